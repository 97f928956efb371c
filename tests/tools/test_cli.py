"""What a user types: run.sh, the trainer and torchrun, as subprocesses."""
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import venv

import numpy as np
import pytest
import torch

from helpers import ROOT, TRAINER, environment, random_ids, small_config, write_shard

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def run(*command, cwd=ROOT, timeout=600, **changes) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment(**changes), text=True,
                          capture_output=True, timeout=timeout)


def unigram_entropy(path) -> float:
    """Nats per token of the 4,096 ids that are validated on, from their own frequencies."""
    counts = np.bincount(np.fromfile(path, dtype="<u2", offset=1024)[:2**12 + 1])
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def test_run_sh_trains_tiny_on_real_text(tmp_path):
    """As a new user would: the shards are made, the model learns, the summary says what happened.

    24 steps of a quarter of a batch and of three layers, edited where users edit constants, go well below what the
    ids' frequencies alone allow.
    """
    copy = tmp_path / "clone"
    copy.mkdir()
    for name in ("run.sh", "requirements.txt"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    source = TRAINER.read_text().replace("num_iterations=64,", "num_iterations=24, stages=(Stage(num_slices=2),), "
                                         "layers=LAYERS[:3], backout_from=1, val_tokens=2**12,")
    (copy / TRAINER.name).write_text(source)
    (copy / "data" / "preflight").mkdir(parents=True)
    for path in (ROOT / "data").rglob("*.py"):
        (copy / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    done = run("bash", "run.sh", cwd=copy, timeout=1800)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step:\d+/24 val_loss:(\S+)", done.stdout, re.M)]
    assert losses[0] == pytest.approx(math.log(384), abs=1e-4)
    assert losses[-1] < unigram_entropy(copy / "data" / "text" / "text_val_000000.bin") - 0.15
    assert f"validation loss {losses[0]:.6f} before, {losses[-1]:.6f} after" in done.stdout
    log = copy / re.search(r"^Log, .*: (logs/\S+)$", done.stdout, re.M)[1]
    assert log.read_text().startswith(source)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_big_presets_are_refused_on_a_cpu():
    done = run(sys.executable, TRAINER, "short")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "preset short needs a CUDA GPU" in done.stderr and "tiny" in done.stderr
    done = run("bash", "run.sh", "medium")
    assert done.returncode == 1 and not done.stdout and done.stderr.endswith("not ready, see the errors above\n")
    assert "error    GPUs        none, and preset medium needs one: rent a GPU, or run tiny\n" in done.stderr


@pytest.mark.parametrize("ranks, sentence", [(2, "text_train_000001.bin is missing"), (3, "3 processes cannot share")])
def test_what_all_ranks_of_torchrun_refuse_is_said_once(tmp_path, ranks, sentence):
    done = run(*TORCHRUN, f"--nproc_per_node={ranks}", TRAINER, "tiny", cwd=tmp_path)
    (error,) = re.findall("^error: .+", done.stderr, re.M)
    assert done.returncode != 0 and sentence in error and not (tmp_path / "logs").exists()


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        write_shard(tmp_path / "text_train_000001.bin", random_ids(64 * 4096 + 1, small_config()))
        write_shard(tmp_path / "text_val_000000.bin", random_ids(2 ** 14 + 1, small_config()))
        done = run(sys.executable, TRAINER, "tiny", cwd=tmp_path, DATA_PATH=str(tmp_path), WORLD_SIZE="2", RANK="0",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 1 and port in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("start with torchrun, or mend MASTER_ADDR or MASTER_PORT.")


def test_help_and_unknown_presets():
    done = run("bash", "run.sh", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ./run.sh [PRESET]")
    done = run("bash", "run.sh", "huge")
    own, others = "medium baseline short tiny small", "mudd mudd_smear mudd_short mudd_tiny 1b baseline tiny"
    assert done.returncode == 1 and done.stderr == (
        f"preflight: 'huge' is not a preset of {TRAINER.name}: choose one of {own} {others}.\n")
    done = run("bash", "run.sh", "--huge")
    assert done.returncode == 1 and "'--huge' is not an option" in done.stderr
    done = run(sys.executable, TRAINER, "huge")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "choose one of medium, baseline, short, tiny, small" in done.stderr


def test_an_active_environment_that_satisfies_the_requirements_is_used():
    done = run("bash", "run.sh", "--python")
    assert done.returncode == 0, done.stderr
    assert os.path.realpath(done.stdout.strip()) == os.path.realpath(sys.executable)


def test_a_preset_of_ones_own_in_a_thin_script(tmp_path):
    """Listed and trained on the CPU; its log holds the script, and the machine under its name."""
    write_shard(tmp_path / "text_train_000001.bin", random_ids(2 * 1024 + 1, small_config()))
    write_shard(tmp_path / "text_val_000000.bin", random_ids(1025, small_config()))
    script = tmp_path / "mine.py"
    script.write_text("from train_gpt_medium import *\n\nPRESETS = {'mine': partial(PRESETS['tiny'], preset='mine', "
                      "num_iterations=1, seq_len=128, val_seq_len=512, val_tokens=512)}\n\n"
                      "if __name__ == '__main__':\n    start(PRESETS)\n")
    variables = dict(TRAIN_SCRIPT=str(script), PYTHONPATH=str(ROOT), DATA_PATH=str(tmp_path))
    listed = run("bash", "run.sh", "--presets", **variables)
    assert listed.returncode == 0 and listed.stdout.startswith("mine\tcpu\tConfig(preset='mine', num_iterations=1, ")
    done = run("bash", "run.sh", "mine", **variables)
    assert done.returncode == 0, done.stderr
    log = ROOT / re.search(r"log (logs/\S+)", done.stdout)[1]
    text = log.read_text()
    log.unlink()
    assert text.startswith(f"{script.read_text()}\n{'=' * 100}\n# {TRAINER.name}\n{TRAINER.read_text()}")


def test_a_script_that_is_not_there_is_refused_at_once():
    done = run("bash", "run.sh", "tiny", TRAIN_SCRIPT="nowhere.py")
    assert done.returncode != 0 and not done.stdout
    assert done.stderr == f"run.sh: TRAIN_SCRIPT names {ROOT}/nowhere.py, which does not exist: " \
                          "name a training script.\n"


def test_paths_are_the_callers(tmp_path):
    """From another folder: its shards are looked at, and its requirements file is installed from."""
    write_shard(tmp_path / "mine" / "mine_train_000001.bin", [1], vocab_size=9, doc_token=8)
    (tmp_path / "nothing.txt").touch()
    done = run("bash", ROOT / "run.sh", "tiny", cwd=tmp_path, DATA_PATH="mine")
    assert f"error    shards      {tmp_path}/mine/mine_train_000001.bin holds ids of a vocabulary of 9" in done.stderr
    assert run("bash", ROOT / "run.sh", "--python", "nothing.txt", cwd=tmp_path).returncode == 0
    assert not (ROOT / "mine").exists()


def test_another_shell_is_sent_to_bash():
    for script in ("run.sh", "tests/run.sh", "tests/gpu.sh"):
        done = run("dash", script) if shutil.which("dash") else pytest.skip("dash is not installed")
        assert done.returncode == 1 and done.stderr.startswith(f"{script}: this shell is not bash"), done.stderr


def test_an_environment_without_pip_keeps_what_is_in_it(tmp_path):
    """As `uv venv` makes it. pip is added; what it cannot install here is said."""
    for name in ("run.sh", TRAINER.name):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "one.txt").write_text("no-such-package==1")
    venv.create(tmp_path / ".venv")
    kept = tmp_path / ".venv" / "mine.py"
    kept.write_text("mine")
    done = run("./run.sh", "--python", "one.txt", cwd=tmp_path, PIP_NO_INDEX="1")
    assert kept.exists() and f"run.sh: installing {tmp_path}/one.txt failed" in done.stderr
    assert run(tmp_path / ".venv" / "bin" / "python", "-m", "pip", "--version").returncode == 0
