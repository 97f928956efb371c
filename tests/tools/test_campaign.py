"""records/campaign.py: the order, the edited copies, and every run kept, through a stand-in and the real run.sh."""
import json
import os
import re
import sys
from pathlib import Path

import pytest

import campaign
import compare
import synthetic_logs as logs
from helpers import TRAINER, random_ids, small_config, write_shard
from run_log import RecordError, read_log

# Copies a prepared log, as a run would write it; every second run of a script with FAIL = True dies at step 50.
SCRIPT = """\
import os, pathlib, sys
FAIL = False
SPEED = 1  # é: bytes are not characters
here = pathlib.Path("logs"); here.mkdir(exist_ok=True)
count = len(list(pathlib.Path("done").iterdir())) if pathlib.Path("done").exists() else 0
pathlib.Path("done").mkdir(exist_ok=True); (pathlib.Path("done") / str(count)).touch()
text = pathlib.Path(f"prepared/{SPEED}/{count}.txt").read_text()
dies = FAIL and count > 1
(here / f"run{count}.txt").write_text(text[:text.index("step:51/")] if dies else text)
print(f"preset {sys.argv[1]}, log logs/run{count}.txt")
sys.exit(3 if dies else 0)
"""


@pytest.fixture
def launcher(tmp_path):
    """A root with a launcher like run.sh, and a log of each speed for each run."""
    for speed, ms in ((1, 220.0), (2, 210.0)):
        for count in range(4):
            logs.write_log(tmp_path / "prepared" / str(speed), logs.Spec(
                seed=count, loss=2.919 + 0.0001 * count, ms_per_step=ms), f"{count}.txt")
    (tmp_path / "script.py").write_text(SCRIPT)
    path = tmp_path / "run.sh"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} "$TRAIN_SCRIPT" "$@"\n')
    path.chmod(0o755)
    return path


def run(launcher: Path, b: str, num_runs: int = 2, as_json: bool = False) -> int:
    root = launcher.parent
    return campaign.campaign(str(root / "script.py"), b, num_runs, "tiny", root / "out", as_json, launcher)


def test_runs_alternate_and_end_in_a_comparison(launcher, capsys):
    assert run(launcher, "SPEED=2", as_json=True) == 0
    r = json.loads(capsys.readouterr().out)
    assert (r["a"]["n"], r["b"]["n"]) == (2, 2)
    assert r["decomposition"]["faster"]["value"] == pytest.approx(-0.010 * 200, abs=0.03)  # jitter: 0.2 sqrt(200) ms
    out = launcher.parent / "out"
    summary = json.loads((out / "campaign.json").read_text())
    assert summary["order"] == "ABBA" and [run["log"] for run in summary["runs"]] == [
        "A/run0.txt", "B/run1.txt", "B/run2.txt", "A/run3.txt"]
    assert (out / "B" / "script.py").read_text() == SCRIPT.replace("SPEED = 1", "SPEED = 2")
    assert (out / "A" / "script.py").read_text() == SCRIPT
    assert sorted(path.name for path in out.glob("*/*.console")) == ["A1.console", "A2.console", "B1.console",
                                                                    "B2.console"]
    assert not any((launcher.parent / "logs").iterdir())


def test_failed_runs_are_kept_and_counted(launcher, capsys):
    assert run(launcher, "FAIL=True") == 1
    out = launcher.parent / "out"
    assert (out / "B" / "failed" / "run2.txt").exists() and (out / "B" / "failed" / "B2.console").exists()
    assert "exit status 3" in capsys.readouterr().out
    assert len(compare.read_side(out / "B").runs) == 1


def test_a_side_without_a_finished_run(launcher):
    (launcher.parent / "broken.py").write_text("raise SystemExit(1)\n")
    with pytest.raises(RecordError, match="B has no finished run"):
        run(launcher, str(launcher.parent / "broken.py"), 1)
    assert "no log" not in (launcher.parent / "out" / "B" / "failed" / "B1.console").read_text()


@pytest.mark.parametrize("b, word", [
    ("SPEED=1", "already"), ("NONE=1", "0 places"), ("SPEED=(", "no Python value"), ("none.py", "cannot be read"),
    ("SPEED=2,NONE=1", "0 places")])
def test_scripts_that_cannot_be_prepared(launcher, b, word):
    with pytest.raises(RecordError, match=word):
        run(launcher, b)
    assert not (launcher.parent / "done").exists()


def test_order():
    assert [campaign.order_of_runs(n) for n in (1, 2, 3, 4)] == ["AB", "ABBA", "ABBAAB", "ABBAABBA"]


@pytest.mark.parametrize("preset, name, old, new", [
    ("medium", "num_iterations", "num_iterations: int = 5535", "num_iterations: int = 5550"),
    ("tiny", "num_iterations", "num_iterations=64", "num_iterations=5550"),
    ("tiny", "muon_lr", "muon_lr: float = 0.03", "muon_lr: float = 5550"),
    ("medium", "SMEAR_MTP", "SMEAR_MTP = True", "SMEAR_MTP = 5550")])
def test_constants_of_the_trainer_are_found(preset, name, old, new):
    source = TRAINER.read_text()
    edited = campaign.edit_constant(source, name, "5550", preset)
    changed = [(a, b) for a, b in zip(source.splitlines(), edited.splitlines()) if a != b]
    assert len(changed) == 1 and changed[0][1] == changed[0][0].replace(old, new) != changed[0][0]


def test_tiny_through_the_real_run_sh(tmp_path, monkeypatch):
    """The repository's launcher and trainer on this CPU, both sides cut to one step of a smaller model."""
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    write_shard(tmp_path / "text_train_000001.bin", random_ids(2 ** 18 + 4097, small_config()))
    write_shard(tmp_path / "text_val_000000.bin", random_ids(2 ** 14 + 1, small_config()))
    cut = "seq_len=128,val_seq_len=512,val_tokens=512,num_iterations=1,warmup_steps=0"
    status = campaign.campaign(cut, cut.replace("num_iterations=1", "num_iterations=2"), 1, "tiny", tmp_path / "out",
                               False)
    assert status == 0
    for side, steps in (("A", 1), ("B", 2)):
        (log,) = (tmp_path / "out" / side).glob("*.txt")
        record = read_log(log)
        assert record.finished and record.num_iterations == steps and record.constants["seq_len"] == "128"
        script = (tmp_path / "out" / side / "train_gpt_medium.py").read_text()
        assert record.source == script.strip("\n") and re.search(rf"num_iterations={steps}\b", script)
