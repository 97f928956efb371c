"""Markers by folder and by what was asked for; the slowest files first."""
import os
import subprocess

import pytest

pytest.register_assert_rewrite("helpers")  # so that its failures show both values too

# Before torch is imported: threads that spin while they wait make a busy 2-core machine ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before triton is imported: without a GPU, its interpreter runs the kernels. gpu.sh sets 0: it has seen one.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# So that no worker is left alone with one of them at the end.
SLOW_FILES = ("test_edits.py", "test_kernels.py", "test_compiled.py", "test_cli.py", "test_faults.py",
              "test_trajectory.py", "test_memory.py", "test_mudd.py", "test_second_recipe.py")


@pytest.fixture
def kernels(monkeypatch):
    """Everything that has a kernel runs it, with NaN in every output before; two programs share the work."""
    pytest.importorskip("triton", reason="triton is not installed: its interpreter runs the kernels")
    import torch
    import train_gpt_medium as tgm
    from helpers import DEVICE
    monkeypatch.setattr(tgm, "runs_kernels", lambda *_: True)
    monkeypatch.setattr(tgm, "num_multiprocessors", lambda device: 2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def mount():
    """A function that mounts a memory disk, with mount's options, in a folder that it makes; or changes the options."""
    mounted = []

    def mount(folder, options: str):
        again = folder in mounted
        folder.mkdir(exist_ok=True)
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"{'remount,' * again}{options}", "tmpfs", folder],
                           check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to mount")
        if not again:
            mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.parent.name == "record":
            item.add_marker("record")
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: ask for it with -m slow"))
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)
