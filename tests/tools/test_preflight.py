"""The look at the machine before a run: every subject's verdicts, with stand-ins for GPUs, nvidia-smi and python."""
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import memory
import preflight
import train_gpt_medium as tgm
from helpers import ROOT, environment, small_config, write_text_folder

H100 = preflight.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 80 << 30)


def executable(path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def preset(name: str, **changes) -> tgm.Config:
    return tgm.replace(tgm.PRESETS[name](), **changes)


def test_gpus_that_torch_sees():
    assert preflight.check_gpus([H100] * 9, preset("medium")) == preflight.Line(
        "ok", "GPUs", "9 x NVIDIA H100 80GB HBM3, 8 of them used")
    line = preflight.check_gpus([H100, H100._replace(name="NVIDIA A100", capability=(8, 0))], preset("medium"))
    assert line.status == "warning" and "2 x NVIDIA A100, NVIDIA H100" in line.text and "not all Hopper" in line.text
    assert [preflight.ranks_on([H100] * n) for n in (0, 1, 3, 7, 8)] == [1, 1, 2, 4, 8]


@pytest.mark.parametrize("smi, cuda, words", [
    (None, "13.0", "rent a GPU"), ("echo No devices were found", "13.0", "rent a GPU"),
    ("echo NVIDIA-SMI has failed; exit 9", "13.0", "says 'NVIDIA-SMI has failed': mend the driver"),
    ("exec sleep 600", "13.0", "no answer within 0.1 s"),
    ("echo 535.104.05", None, "is a CPU build: move .venv away"),
    ("echo 535.104.05; echo 535.104.05", "13.0", "update it to 580 or newer, or install"),
    ("echo 535.104.05", "12.6", "sees none but nvidia-smi does: mend driver 535.104.05")])
def test_why_torch_sees_no_gpu(tmp_path, monkeypatch, smi, cuda, words):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(preflight, "SMI_LIMIT_S", 0.1 if "sleep" in str(smi) else 20)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if smi:
        executable(tmp_path / "nvidia-smi", smi)
    line = preflight.check_gpus([], preset("medium"))
    assert line.status == "error" and words in line.text
    assert preflight.check_gpus([], preset("tiny")).status == "ok"
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert preflight.ask_nvidia_smi() == ""


@pytest.mark.parametrize("compilers, header, words", [
    (["gcc"], True, ""), (["clang"], True, ""), ([], True, "a C compiler is missing"),
    (["gcc"], False, "Python.h is missing")])
def test_torch_line_says_what_triton_cannot_do_without(tmp_path, monkeypatch, compilers, header, words):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda *_: str(tmp_path))
    if header:
        (tmp_path / "Python.h").touch()
    line = preflight.check_torch([H100])
    assert line.status == ("error" if words else "ok") and words in line.text


def card(total_gib: int, free_gib: int | None = None) -> preflight.Gpu:
    return H100._replace(total_bytes=total_gib << 30, free_bytes=(total_gib if free_gib is None else free_gib) << 30)


def memory_line(config: tgm.Config, *gpus: preflight.Gpu) -> tuple[str, str]:
    line = preflight.check_memory(list(gpus), config)
    return line.status, line.text


@pytest.mark.parametrize("gpus, status, end", [
    ([card(40)] * 6 + [card(40, 5)], "ok", "40 GiB free at least"),  # only the first four are used
    ([card(40), card(40, 25)], "error", "25 GiB free at least: end the other processes that nvidia-smi lists"),
    ([card(20)] * 8, "error", "20 GiB free at least: set micro_seq_len to 32,768 at the top of train_gpt_medium.py: "
                              "about 18 GiB"),
    ([card(1)], "error", "1 GiB free at least: no micro_seq_len fits, use larger GPUs")])
def test_memory_line(gpus, status, end, monkeypatch):
    """Of a run that needs 2 GiB and half a MiB for each token of a piece."""
    monkeypatch.setattr(memory, "needed", lambda config, ranks: 2**31 + 2**19 * config.piece_len)
    said = memory_line(tgm.Config(), *gpus)
    assert said == (status, f"about 34 GiB a GPU needed (estimated) with micro_seq_len 65,536, {end}")


def test_the_record_fits_where_the_published_one_did():
    """Its logs report 56,810 MiB, of code that keeps more."""
    assert memory_line(tgm.Config(), *[H100._replace(free_bytes=56810 << 20)] * 8)[0] == "ok"


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
    assert memory_line(preset("tiny"))[0] == "ok" and memory_line(tgm.Config())[0] == "warning"


@pytest.mark.parametrize("on_terminal", [False, True])
def test_presets_are_listed_whole_for_programs_alone(on_terminal, monkeypatch, capsys):
    monkeypatch.setattr(preflight.sys.stdout, "isatty", lambda: on_terminal)
    preflight.print_presets()
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == f"medium\tgpu\t{tgm.Config()!r}"
    constants = "preset='baseline', num_iterations=5550, smear_mtp=False"
    assert second == f"baseline\tgpu\t{constants if on_terminal else repr(preset('baseline'))}"


def test_shard_line(tmp_path):
    def line(name: str) -> tuple[str, str]:
        return preflight.check_shards(preset(name, data_dir=str(tmp_path)))[::2]

    assert line("medium")[0] == line("tiny")[0] == "warning" and "./run.sh fetches" in line("medium")[1]
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"torn")
    assert line("medium")[0] == "error" and "fineweb_train_000001.bin" in line("medium")[1]
    (tmp_path / "fineweb_train_000001.bin").unlink()
    assert preflight.check_shards(write_text_folder(tmp_path, small_config())).status == "ok"
    assert line("medium")[0] == "error"  # text for a model of FineWeb


def test_disk_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = preset("medium", data_dir=str(tmp_path / "new" / "folder"), checkpoint_minutes=10.0)
    free = SimpleNamespace(free=10 * 2**30)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: free)
    data, log, checkpoints = preflight.check_disk(config, 30)
    # Three of them: of each parameter, and of its copy and momentum in Snoo, of two states in AdamW or fp32 momentum,
    # smoothed update and mantissa in Muon.
    matrices, head, tables = 16 * 8 * 2**20 + 15 * 4 * 2**20, 50304 * 1024, 7 * 50257 * 1024
    needed = 3 * (matrices * (3 * 2 + 4 + 2 + 2) + head * 5 * 4 + tables * 5 * 2) / 2**30
    assert data.status == log.status == "ok" and "5.8 GiB still needed" in data.text
    assert checkpoints.status == "error" and f"{needed:.1f} GiB still needed" in checkpoints.text
    free.free = 5 * 2**30
    assert [line.status for line in preflight.check_disk(config, 30)] == ["error", "ok", "error"]
    (tmp_path / "new").write_text("a file in the way")
    assert "no folder" in preflight.check_disk(config, 30)[0].text
    monkeypatch.setattr(preflight.os, "access", lambda path, _: path == tmp_path)
    complete = write_text_folder(tmp_path / "read only", small_config())
    assert [preflight.check_disk(complete, number)[0].status for number in (0, 30)] == ["ok", "error"]


@pytest.mark.parametrize("backend, limit, status, words", [
    ("gloo", 600, "ok", "2 ranks over gloo"), ("mpi", 600, "error", "a rank of 2 failed over mpi"),
    ("gloo", 1, "error", "2 ranks over gloo hung for 1 s")])
def test_all_reduce_line_for_real(monkeypatch, backend, limit, status, words):
    monkeypatch.setattr(preflight, "ALL_REDUCE_LIMIT_S", limit)
    line = preflight.check_all_reduce(2, backend)
    assert line.status == status and line.text.startswith(words)


def test_a_wrong_sum_is_found(monkeypatch):
    for name, stand_in in dict(init_process_group=None, get_world_size=2, get_rank=0).items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, stand_in=stand_in, **__: stand_in)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total[1:].fill_(3))
    with pytest.raises(SystemExit, match="the sum of 1 to 2 came as 1 to 3"):
        preflight.all_reduce("gloo")


@pytest.mark.parametrize("gpus, smi, named, plan", [
    (3, "", "", "medium 2 30 train_gpt_medium.py"), (8, "", "tiny", "tiny 0 1 train_gpt_medium.py"),
    (0, "", "", "tiny 0 1 train_gpt_medium.py"),
    (8, "", "1b", "1b 8 101 records/scale_up_1b/train_gpt_1b.py"), (0, "580.95.05", "", None)])
def test_the_plan_is_for_the_gpus_and_never_the_cpu_of_a_node_with_gpus(tmp_path, monkeypatch, capsys, gpus, smi,
                                                                        named, plan):
    """With no preset named, and with one of another recipe's."""
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.delenv("TRAIN_SCRIPT", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(preflight, "list_gpus", lambda: [H100] * gpus)
    monkeypatch.setattr(preflight, "ask_nvidia_smi", lambda: smi)
    for name in ("check_memory", "check_all_reduce", "check_torch"):
        monkeypatch.setattr(preflight, name, lambda *_: preflight.Line("ok", "", ""))
    monkeypatch.setattr(preflight, "check_disk", lambda *_: [])
    if plan is None:
        with pytest.raises(SystemExit, match="not ready"):
            preflight.main("--plan", named)
        assert "comes last\nerror    GPUs" in capsys.readouterr().err
    else:
        preflight.main("--plan", named)
        assert capsys.readouterr().out == f"{plan}\n"


@pytest.mark.parametrize("old, new, out, error", [
    ("checkpoint_every: int = 0", "checkpoint_every: int = 100", "\nok       checkpoints ", "not ready"),
    ("vocab_size: int = 50257", "vocab_size: int = 5", "", "py cannot be used: Config: doc_token"),
    ("(\"qkvo\",)", "()", "\nerror    checkpoints no group has the role qkvo", "not ready")])
def test_an_edited_script_is_looked_at_itself(tmp_path, old, new, out, error):
    """In a process of its own: a second copy of the machine would take its operations away from this one's."""
    source = (ROOT / "train_gpt_medium.py").read_text().replace("checkpoint_minutes: float = 0.0",
                                                                "checkpoint_minutes: float = 1.0")
    assert source.count(old) == 1
    script = tmp_path / f"edited_v1.{len(old)}.py"
    script.write_text(source.replace(old, new))
    done = subprocess.run([sys.executable, preflight.__file__, "medium"], text=True, capture_output=True,
                          env=environment(TRAIN_SCRIPT=str(script), CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 1 and error in done.stderr and out in done.stdout


def run_sh(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", ROOT / "run.sh", *arguments], env=environment(**variables), text=True,
                          capture_output=True)


def test_the_look_at_this_machine_is_one_screen():
    done = run_sh("--check", "mudd_tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines = done.stdout.splitlines()
    assert "preset mudd_tiny;" in first and len(lines) == 8
    assert all(line.split()[0] in ("ok", "warning") for line in lines)


@pytest.mark.parametrize("own_shards", [False, True])
def test_run_sh_looks_fetches_and_launches(tmp_path, own_shards):
    """With an interpreter that satisfies every requirement and only says what it was asked to run."""
    folder = tmp_path / "shards"
    executable(tmp_path / "bin" / "python3", 'case "$*" in -\\ *) exit 0 ;; *--plan*) echo "short 4 2 mine.py" ;; '
                                             'esac\necho "RUN $*" >&2')
    if own_shards:
        write_text_folder(folder, small_config())
    done = run_sh("short", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", DATA_PATH=str(folder))
    assert [line for line in done.stderr.splitlines() if line.startswith("RUN")] == [
        "RUN data/preflight/preflight.py --plan short", *[f"RUN data/shards.py get {folder} --shards 2"][own_shards:],
        "RUN -m torch.distributed.run --standalone --nproc_per_node=4 mine.py short"]
    assert ("FineWeb" in done.stdout) != own_shards
