"""The look at the machine before a run: every subject's verdicts, with stand-ins for nvidia-smi and python."""
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace

import pytest
import torch

import fake_gpu
import memory
import preflight
import train_gpt_medium as tgm
from helpers import ROOT, environment, small_config, write_text_folder

LOOK = "RUN data/preflight/preflight.py"
H100 = preflight.Gpu("NVIDIA H100 80GB HBM3", 81559, 81000, "580.95.05", "9.0")


def fake_nvidia_smi(folder, *lines: str) -> None:
    folder.mkdir(exist_ok=True)
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    script.chmod(0o755)


@pytest.mark.parametrize("setting, number", [
    (None, 5), ("0,2", 2), ("", 0), ("-1", 0), ("NoDevFiles", 0), ("none", 0), ("0,-1,1", 1), ("1, 2", 2), ("0,7,1", 1),
    ("0,0", 0), ("GPU-0a1b2c3d", 1), ("GPU-0a,GPU-1b", 2), ("MIG-0a1b", 1)])
def test_gpus_are_those_that_cuda_would_show(tmp_path, monkeypatch, setting, number):
    """Which one a UUID means, and so how much memory it has, is not asked."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    fake_nvidia_smi(tmp_path, *["NVIDIA H100 80GB HBM3, 81559, 81000, 580.95.05, 9.0"] * 5)
    by_uuid = (setting or "").startswith(("GPU-", "MIG-"))
    assert preflight.list_gpus() == [H100._replace(total_mib=None, free_mib=None) if by_uuid else H100] * number


def test_nvidia_smi_that_tells_less(tmp_path, monkeypatch):
    """No memory, as on a GB10; no capability, as with an old driver; no answer. Only a missing one means no GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if shutil.which("nvidia-smi") is None:
        assert preflight.list_gpus() == []
    fake_nvidia_smi(tmp_path, "No devices were found")
    assert preflight.list_gpus() == []
    fake_nvidia_smi(tmp_path, "NVIDIA GB10, [N/A], [N/A], 580.95.05, 12.1", "WARNING: infoROM is corrupted at gpu 0")
    (gpu,) = preflight.list_gpus()
    assert (gpu.total_mib, gpu.free_mib) == (None, None) and memory_line(tgm.Config(), gpu)[0] == "warning"
    assert "does not tell their memory" in preflight.check_gpus([gpu], "tiny").text
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/sh\ncase "$*" in *compute_cap*) echo "Field compute_cap is not a valid field to query."; exit 2;;\n'
        '*) echo "NVIDIA A100, 40536, 40000, 470.82.01";; esac\n')
    assert preflight.list_gpus() == [preflight.Gpu("NVIDIA A100", 40536, 40000, "470.82.01", "")]
    failed = "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."
    fake_nvidia_smi(tmp_path, failed)
    with pytest.raises(preflight.NoAnswer, match="could not communicate"):
        preflight.list_gpus()
    medium, tiny = (preflight.report(preset)[0] for preset in ("medium", "tiny"))
    assert (medium.status, tiny.status) == ("error", "warning") and failed in medium.text
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(preflight, "SMI_LIMIT_S", 0.1)
    with pytest.raises(preflight.NoAnswer, match="did not answer"):
        preflight.list_gpus()


def test_gpu_line():
    assert preflight.check_gpus([H100] * 8, "medium").status == "ok"
    assert preflight.check_gpus([], "tiny").status == "ok"
    assert preflight.check_gpus([], "medium").status == "error"
    line = preflight.check_gpus([H100, H100._replace(name="NVIDIA A100", capability="8.0")], "medium")
    assert line.status == "warning" and "not all Hopper" in line.text


def test_kernels_line_says_the_cards_row():
    """Every card that kernel_specs.py can compile for has one."""
    for arch, gpu in fake_gpu.GPUS.items():
        line, = preflight.check_kernels(2 * [H100._replace(capability=f"{gpu.major}.{gpu.minor}")])
        assert line.status == "ok" and line.text.startswith(f"sm_{arch}: kernels compiled: ")
        row, = re.findall(rf"^\| sm_{arch}, {gpu.name}.*", (ROOT / "docs" / "running.md").read_text(), re.M)
        assert all(cell.strip() in line.text for cell in row.split("|")[2:])
    line, = preflight.check_kernels([H100._replace(capability="7.5")])
    assert line.status == "warning" and "never compiled" in line.text
    assert preflight.check_kernels([]) == preflight.check_kernels([H100._replace(capability="")]) == []


@pytest.mark.parametrize("driver, cuda, status, words", [
    ("580.95.05", "13.0", "ok", "580"), ("535.104.05", "12.6", "ok", "525"),
    ("535.104.05", "13.0", "error", "update it to 580 or newer, or install a build of torch for CUDA 12.x"),
    ("470.82.01", "12.6", "error", "build of torch for CUDA 11.x"), ("440.33.01", "12.6", "error", "no build of torch"),
    ("580.95.05", None, "error", "CPU build"), ("470.82.01", None, "error", "driver 470.82.01 is too old for it")])
def test_driver_line_says_which_build_fits(driver, cuda, status, words):
    line = preflight.check_driver([H100._replace(driver=driver)], "2.13.0", cuda)
    assert line.status == status and words in line.text


@pytest.mark.parametrize("compilers, header, words", [
    (["gcc"], True, "triton "), (["clang"], True, "triton "), ([], True, "a C compiler is missing"),
    (["gcc"], False, "Python.h is missing")])
def test_torch_line_says_what_triton_cannot_do_without(tmp_path, monkeypatch, compilers, header, words):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda *_: str(tmp_path))
    if header:
        (tmp_path / "Python.h").touch()
    torch = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda="13.0"),
                            cuda=SimpleNamespace(is_available=lambda: True))
    line = preflight.check_torch([H100], torch)
    assert line.status == ("ok" if "triton " == words else "error") and words in line.text


def card(total_gib: int, free_gib: int | None = None) -> preflight.Gpu:
    return H100._replace(total_mib=1024 * total_gib, free_mib=1024 * (total_gib if free_gib is None else free_gib))


def memory_line(config: tgm.Config, *gpus: preflight.Gpu) -> tuple[str, str]:
    line = preflight.check_memory(list(gpus), config)
    return line.status, line.text


@pytest.mark.parametrize("gpus, status, end", [
    ([card(40)] * 8, "ok", "40 GiB free at least"),
    ([card(40)] * 6 + [card(40, 5)], "ok", "40 GiB free at least"),  # only the first four are used
    ([card(40), card(40, 25)], "error", "25 GiB free at least: end the other processes that nvidia-smi lists"),
    ([card(20)] * 8, "error", "20 GiB free at least: set micro_seq_len to 32,768 at the top of train_gpt_medium.py: "
                              "about 18 GiB"),
    ([card(18, 17)], "error", "17 GiB free at least: set micro_seq_len to 16,384 at the top of train_gpt_medium.py: "
                              "about 10 GiB"),
    ([card(18, 1)], "error", "1 GiB free at least: end the other processes that nvidia-smi lists and set micro_seq_len "
                             "to 32,768 at the top of train_gpt_medium.py: about 18 GiB"),
    ([card(1)], "error", "1 GiB free at least: no micro_seq_len fits, use larger GPUs")])
def test_memory_line(gpus, status, end, monkeypatch):
    """Of a run that needs 2 GiB and half a MiB for each token of a piece."""
    monkeypatch.setattr(memory, "needed", lambda config, ranks: 2**31 + 2**19 * config.piece_len)
    said = memory_line(tgm.Config(), *gpus)
    assert said == (status, f"about 34 GiB a GPU needed (estimated) with micro_seq_len 65,536, {end}")


def test_the_record_fits_where_the_published_one_did():
    """Its logs report 56,810 MiB, of code that keeps more."""
    assert memory_line(tgm.Config(), *[H100._replace(free_mib=56810)] * 8)[0] == "ok"


def test_memory_line_without_an_estimate():
    class Model(tgm.GPT):
        def latents(self, ids, window_blocks):
            return super().latents(ids, window_blocks) * (1 if ids.sum() else 2)  # that needs a value

    @dataclass(frozen=True, kw_only=True)
    class Recipe(tgm.Config):
        def make_model(self):
            return Model(self)

    status, text = memory_line(Recipe(), H100)
    assert status == "warning" and text.startswith("no estimate covers this script: counting its model failed (")
    status, text = memory_line(tgm.Config(groups=tgm.GROUPS[1:]), H100)
    assert status == "error" and text.startswith("no group has the role mlp_fc")
    status, text = memory_line(tgm.Config(stages=(tgm.Stage(num_slices=4),)), *[H100] * 8)
    assert status == "error" and text.startswith("8 GPUs cannot share 4 pieces of a batch equally")
    assert memory_line(tgm.PRESETS["tiny"]())[0] == "ok" and memory_line(tgm.Config())[0] == "warning"


@pytest.mark.parametrize("on_terminal", [False, True])
def test_presets_are_listed_whole_for_programs_alone(on_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    preflight.print_presets()
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == f"medium\tgpu\t{tgm.Config()!r}"
    constants = "preset='baseline', num_iterations=5550, smear_mtp=False"
    assert second == f"baseline\tgpu\t{constants if on_terminal else repr(tgm.PRESETS['baseline']())}"


def test_banks_that_the_gpus_cannot_share_are_said(monkeypatch):
    """Muon never divides a matrix: with the head as its only one of that shape, 7 of 8 GPUs hold zeros."""
    groups = tuple(group._replace(rule=tgm.Muon(lr=0.03, decay=0.01)) if group.name == "lm_head" else group
                   for group in tgm.GROUPS)
    monkeypatch.setitem(tgm.PRESETS, "medium", lambda: tgm.Config(groups=groups))
    monkeypatch.setattr(preflight, "list_gpus", lambda: [H100] * 8)
    for name in ("check_memory", "check_all_reduce"):
        monkeypatch.setattr(preflight, name, lambda *_: preflight.Line("ok", "", ""))
    line, = (line for line in preflight.report("medium") if line.subject == "padding")
    assert line.status == "warning" and line.text.startswith(
        "lm_head: 88% of what 8 ranks send, hold and update is padding (1,442 MB), since no rank can own a part of "
        "50304 x 1024: ")
    assert preflight.check_padding([H100], tgm.Config(groups=groups)) == []
    assert preflight.check_padding([H100] * 8, tgm.Config()) == []  # a sixteenth of qkvo, and a KB of scalars


def run_sh(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", ROOT / "run.sh", *arguments], env=environment(**variables), text=True,
                          capture_output=True)


@pytest.mark.parametrize("old, new, line", [
    ("checkpoint_every: int = 0", "checkpoint_every: int = 100", "\nok       checkpoints "),
    ("vocab_size: int = 50257", "vocab_size: int = 5", "\nerror    script      cannot be used: Config: doc_token"),
    ("(\"qkvo\",)", "()", "\nerror    checkpoints no group has the role qkvo")])
def test_an_edited_script_is_looked_at_itself(tmp_path, old, new, line):
    source = (ROOT / "train_gpt_medium.py").read_text().replace("checkpoint_minutes: float = 0.0",
                                                                "checkpoint_minutes: float = 1.0")
    assert source.count(old) == 1
    (tmp_path / "edited_v1.2.py").write_text(source.replace(old, new))
    assert line in run_sh("--check", "medium", TRAIN_SCRIPT=str(tmp_path / "edited_v1.2.py")).stdout


def shard_line(folder, preset="medium"):
    config = tgm.replace(tgm.PRESETS[preset](), data_dir=str(folder))
    return preflight.check_shards(config, tgm.UserError, tgm.find_shards)


def test_shard_line(tmp_path):
    assert shard_line(tmp_path).status == "warning" and "./run.sh fetches" in shard_line(tmp_path).text
    assert shard_line(tmp_path, "tiny").status == "warning"
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"torn")
    assert shard_line(tmp_path).status == "error" and "fineweb_train_000001.bin" in shard_line(tmp_path).text
    (tmp_path / "fineweb_train_000001.bin").unlink()
    tiny = write_text_folder(tmp_path, small_config())
    assert preflight.check_shards(tiny, tgm.UserError, tgm.find_shards).status == "ok"
    assert shard_line(tmp_path).status == "error"  # text for a model of FineWeb


def test_disk_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tgm.replace(tgm.PRESETS["medium"](), data_dir=str(tmp_path / "new" / "folder"))
    usage = preflight.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=10 * 2**30))
    assert [line.status for line in preflight.check_disk(config, 30)] == ["ok", "ok"]
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=5 * 2**30))
    data, log = preflight.check_disk(config, 30)
    assert (data.status, log.status) == ("error", "ok") and "5.8 GiB still needed" in data.text
    saving = tgm.replace(config, checkpoint_minutes=10.0)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=20 * 2**30))
    checkpoints = preflight.check_disk(saving, 30)[2]
    # Three of them: of each parameter, and of its copy and momentum in Snoo, of two states in AdamW or fp32 momentum,
    # smoothed update and mantissa in Muon.
    matrices, head, tables = 16 * 8 * 2**20 + 15 * 4 * 2**20, 50304 * 1024, 7 * 50257 * 1024
    needed = 3 * (matrices * (3 * 2 + 4 + 2 + 2) + head * 5 * 4 + tables * 5 * 2) / 2**30
    assert checkpoints.status == "error" and f"{needed:.1f} GiB still needed" in checkpoints.text
    (tmp_path / "new").write_text("a file in the way")
    assert "no folder" in preflight.check_disk(config, 30)[0].text
    monkeypatch.setattr(preflight.os, "access", lambda path, _: path == tmp_path)
    complete = write_text_folder(tmp_path / "read only", small_config())
    assert [preflight.check_disk(complete, number)[0].status for number in (0, 30)] == ["ok", "error"]


def fail_on_rank_one(rank, size, port, on_gpu):
    if rank == 1:
        sys.exit("no peer access")
    time.sleep(60)


def hang(rank, size, port, on_gpu):
    time.sleep(60 if rank == 0 else 0)


@pytest.mark.parametrize("trial, status, text", [
    (preflight.all_reduce_rank, "ok", "2 ranks over gloo"),
    (fail_on_rank_one, "error", "rank 1 of 2 failed over gloo: its message is above")])
def test_all_reduce_line_for_real(trial, status, text):
    assert preflight.check_all_reduce(2, False, 600, trial) == preflight.Line(status, "all-reduce", text)


def test_all_reduce_line_when_a_rank_hangs(monkeypatch):
    """On a clock that goes on once rank 1 is done, so that a busy machine changes nothing."""
    others, clock = set(multiprocessing.active_children()), count(step=8)

    def seconds() -> float:
        return next(clock) if len(set(multiprocessing.active_children()) - others) == 1 else 0.0

    monkeypatch.setattr(preflight, "time", SimpleNamespace(monotonic=seconds, sleep=time.sleep))
    line = preflight.check_all_reduce(2, False, limit_s=8, trial=hang)
    assert line.status == "error" and "ranks [0] of 2 hung" in line.text and "for 8 s" in line.text


def test_all_reduce_line_when_python_starts_slowly(tmp_path, monkeypatch):
    """Its time does not count; where it never starts, the network is not blamed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\nif '--multiprocessing-fork' in sys.orig_argv: time.sleep(5)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert preflight.check_all_reduce(2, False, limit_s=4.9, trial=print).status == "ok"
    monkeypatch.setattr(preflight, "START_LIMIT_S", 1)
    assert "to start in 2 ranks" in preflight.check_all_reduce(2, False, trial=print).text


def test_a_wrong_sum_is_found(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total[1:].fill_(3))
    with pytest.raises(SystemExit, match="the sum of 1 to 2 came as 1 to 3"):
        preflight.all_reduce_rank(0, 2, 0, on_gpu=False)


def test_report_on_this_machine_is_one_screen():
    done = run_sh("--check", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10 and all(line.split()[0] in ("ok", "warning") for line in lines[1:])
    done = run_sh("--check", "medium")
    assert done.returncode == 1 and "\nerror    GPUs" in done.stdout and "not ready" in done.stderr


def run_with_fake_python(tmp_path, gpus: int, *arguments, **variables) -> subprocess.CompletedProcess:
    """run.sh with an interpreter that satisfies every requirement and only says what it was asked to run."""
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f'#!/bin/sh\ncase "$*" in -\\ *) exit 0 ;; -c*) echo {gpus} ;; '
                    '*--presets) printf "short\\tgpu\\n" ;; *) echo "RUN $*" ;; esac\n')
    fake.chmod(0o755)
    return run_sh(*arguments, PATH=f"{fake.parent}:{os.environ['PATH']}", **variables)


def said(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("RUN")]


@pytest.mark.parametrize("gpus, nproc", [(8, 8), (7, 4), (3, 2), (1, 1)])
def test_run_sh_with_gpus_checks_fetches_and_launches(tmp_path, gpus, nproc):
    folder = str(tmp_path / "fineweb")
    done = run_with_fake_python(tmp_path, gpus, DATA_PATH=folder)
    assert said(done) == [
        f"{LOOK} medium", f"RUN data/shards.py get {folder} --preset medium",
        f"RUN -m torch.distributed.run --standalone --nproc_per_node={nproc} train_gpt_medium.py medium"]
    assert done.stdout.startswith(f"{gpus} GPUs: I will check the machine, fetch")


def test_run_sh_never_falls_back_to_the_cpu_on_a_node_with_gpus(tmp_path):
    fake_nvidia_smi(tmp_path / "bin", "GPU 0: NVIDIA H100 80GB HBM3")
    done = run_with_fake_python(tmp_path, 0, CUDA_VISIBLE_DEVICES="0")
    assert said(done) == [f"{LOOK} medium"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a torch that sees no GPU")
@pytest.mark.parametrize("setting, preset", [("0", "medium"), ("-1", "tiny"), ("NoDevFiles", "tiny")])
def test_run_sh_takes_the_cpu_where_gpus_are_hidden(tmp_path, setting, preset):
    """With shards that neither preset can use, so that nothing is trained."""
    fake_nvidia_smi(tmp_path / "bin", "NVIDIA H100 80GB HBM3, 81559, 81000, 580.95.05, 9.0")
    (tmp_path / "mine_train_000001.bin").touch()
    done = run_sh(CUDA_VISIBLE_DEVICES=setting, DATA_PATH=str(tmp_path),
                  PATH=f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    assert done.returncode == 1 and f"checking this machine for the preset {preset}" in done.stdout


def test_run_sh_takes_other_shards_as_they_are(tmp_path):
    (tmp_path / "synthetic_train_000001.bin").touch()
    done = run_with_fake_python(tmp_path, 8, "short", DATA_PATH=str(tmp_path))
    look, train = said(done)
    assert look == f"{LOOK} short" and train.endswith("train_gpt_medium.py short")
