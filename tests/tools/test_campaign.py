"""campaign.py: the order, the edited copies, and every run kept, through a stand-in and the real run.sh."""
import json
import os
import sys
from pathlib import Path

import pytest

import campaign
import check
import compare
import synthetic_logs as logs
from helpers import TRAINER, random_ids, small_config, write_shard
from run_log import RecordError, read_log

# Copies a prepared log, as a run would write it; every second run of a script with FAIL = True dies at step 50.
SCRIPT = """\
import os, pathlib, sys
from collections import namedtuple
from functools import partial
import machine  # as a recipe does, beside run.sh
Made = namedtuple("Made", "SPEED FAIL")
def make(SPEED=1, FAIL=False):  # é: in UTF-8
    return Made(SPEED, FAIL)
PRESETS = {"tiny": make, "fast": partial(make, SPEED=2)}
def start(presets):
    if sys.argv[1] == "--presets":
        return [print(name, "cpu", make(), sep="\\t") for name, make in presets.items()]
    speed, fail = presets[sys.argv[1]]()
    here = pathlib.Path("logs"); here.mkdir(exist_ok=True)
    count = len(list(pathlib.Path("done").iterdir())) if pathlib.Path("done").exists() else 0
    pathlib.Path("done").mkdir(exist_ok=True); (pathlib.Path("done") / str(count)).touch()
    text = pathlib.Path(f"prepared/{speed}/{count}.txt").read_text()
    dies = fail and count > 1
    (here / f"run{count}.txt").write_text(text[:text.index("step:51/")] if dies else text)
    print(f"preset {sys.argv[1]}, log logs/run{count}.txt")
    sys.exit(3 if dies else 0)
if __name__ == "__main__":
    start(PRESETS)
"""


@pytest.fixture
def launcher(tmp_path):
    """A root with a launcher like run.sh, and a log of each speed for each run."""
    for speed, ms in ((1, 220.0), (2, 210.0)):
        for count in range(4):
            logs.write_log(tmp_path / "prepared" / str(speed), logs.Spec(
                seed=count, loss=2.919 + 0.0001 * count, ms_per_step=ms), f"{count}.txt")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "machine.py").touch()
    path = tmp_path / "run.sh"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} "$TRAIN_SCRIPT" "$@"\n')
    path.chmod(0o755)
    return path


def run(launcher: Path, b: str, num_runs: int = 2, as_json: bool = False, a: str = "script.py") -> int:
    root = launcher.parent
    return campaign.campaign(str(root / a) if a.endswith(".py") else a, b, num_runs, "tiny", root / "out", as_json,
                             launcher)


def test_runs_alternate_and_end_in_a_comparison(launcher, capsys):
    assert run(launcher, "SPEED=2", as_json=True) == 0
    r = json.loads(capsys.readouterr().out)
    assert (r["a"]["n"], r["b"]["n"]) == (2, 2)
    assert r["decomposition"]["faster"]["value"] == pytest.approx(-0.010 * 200, abs=0.03)  # jitter: 0.2 sqrt(200) ms
    out = launcher.parent / "out"
    summary = json.loads((out / "campaign.json").read_text())
    assert (summary["order"], campaign.order_of_runs(3)) == ("ABBA", "ABBAAB")
    assert [run["log"] for run in summary["runs"]] == ["A/run0.txt", "B/run1.txt", "B/run2.txt", "A/run3.txt"]
    assert [(out / side / "script.py").read_text() for side in "AB"] == [SCRIPT] * 2
    assert 'PRESETS = {"tiny": partial(PRESETS["tiny"], SPEED=2)}' in (out / "B" / "edited.py").read_text()
    assert not (out / "A" / "edited.py").exists()
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
    broken = SCRIPT.replace("speed, fail = presets", "raise SystemExit(1)\n    speed, fail = presets")
    (launcher.parent / "broken.py").write_text(broken)
    with pytest.raises(RecordError, match="B has no finished run"):
        run(launcher, str(launcher.parent / "broken.py"), 1)
    assert "no log" not in (launcher.parent / "out" / "B" / "failed" / "B1.console").read_text()


@pytest.mark.parametrize("a, b, presets, edits", [
    ("tiny", "fast", ["tiny", "fast"], [None, None]),
    ("fast", "SPEED=1", ["fast", "fast"], [None, "SPEED=1"]),  # edits keep A's preset
    ("SPEED=2", "FAIL=0", ["tiny", "tiny"], ["SPEED=2", "FAIL=0"]),  # but not A's edits
    ("fast", "script.py", ["fast", "tiny"], [None, None])])
def test_sides(launcher, monkeypatch, a, b, presets, edits):
    monkeypatch.setattr(campaign, "TRAINER", launcher.parent / "script.py")
    b = str(launcher.parent / b) if b.endswith(".py") else b
    assert run(launcher, b, 1, a=a) == 0
    out = launcher.parent / "out"
    assert json.loads((out / "campaign.json").read_text())["presets"] == presets
    for side, preset, edit in zip("AB", presets, edits):
        assert f"preset {preset}, log" in (out / side / f"{side}1.console").read_text()
        thin = out / side / "edited.py"
        assert f'partial(PRESETS["{preset}"], {edit})' in thin.read_text() if edit else not thin.exists()


@pytest.mark.parametrize("b, word", [
    ("SPEED=1", "already"), ("SPED=1", "script.py cannot run SPED=1: TypeError: .* 'SPED'"),
    ("SPEED=(", "script.py cannot run SPEED=.: SyntaxError"), ("huge", "huge is no preset of .*: choose one of tiny")])
def test_scripts_that_cannot_be_prepared(launcher, monkeypatch, b, word):
    monkeypatch.setattr(campaign, "TRAINER", launcher.parent / "script.py")
    with pytest.raises(RecordError, match=word):
        run(launcher, b)
    assert not (launcher.parent / "done").exists() and not (launcher.parent / "out").exists()


def test_tiny_through_the_real_run_sh(tmp_path, monkeypatch):
    """The repository's launcher and trainer on this CPU, cut to one step of a smaller model. The shards' folder is
    named from the caller's."""
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DATA_PATH", tmp_path.name)
    write_shard(tmp_path / "text_train_000001.bin", random_ids(2 ** 17 + 4097, small_config()))
    write_shard(tmp_path / "text_val_000000.bin", random_ids(2 ** 14 + 1, small_config()))
    side = campaign.Side(TRAINER, "tiny", "seq_len=128,val_seq_len=512,val_tokens=512,num_iterations=1,"
                                          "kernel_warmup_steps=0")
    outcome = campaign.run_once(side.write(tmp_path / "B"), "B", 1, "tiny", campaign.LAUNCHER)
    assert outcome.fault == "" and outcome.log.parent == tmp_path / "B"
    record = read_log(outcome.log)
    assert record.finished and record.num_iterations == 1 and record.constants["seq_len"] == "128"
    findings = {finding.rule.id: finding.status for finding in check.apply_rules(check.read_folder(tmp_path / "B"))}
    assert findings["source-complete"] == "ok"
