"""campaign.py: the order, the edited copies, and every run kept, through a stand-in and the real run.sh."""
import ast
import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import campaign
import compare
import synthetic_logs as logs
import train_gpt_medium as tgm
from helpers import TRAINER, random_ids, small_config, write_shard
from run_log import RecordError, read_log

# Copies a prepared log, as a run would write it; every second run of a script with FAIL = True dies at step 50.
SCRIPT = """\
import os, pathlib, sys
import machine  # as a recipe does, beside run.sh
PRESETS = {"tiny": 0, "fast": 1}
FAIL = False
SPEED = 1  # é: bytes are not characters
here = pathlib.Path("logs"); here.mkdir(exist_ok=True)
count = len(list(pathlib.Path("done").iterdir())) if pathlib.Path("done").exists() else 0
pathlib.Path("done").mkdir(exist_ok=True); (pathlib.Path("done") / str(count)).touch()
text = pathlib.Path(f"prepared/{SPEED + PRESETS[sys.argv[1]]}/{count}.txt").read_text()
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


@pytest.mark.parametrize("a, b, presets, scripts", [
    ("tiny", "fast", ["tiny", "fast"], ["SPEED = 1", "SPEED = 1"]),
    ("fast", "SPEED=0", ["fast", "fast"], ["SPEED = 1", "SPEED = 0"]),  # edits keep A's preset
    ("SPEED=2", "FAIL=0", ["tiny", "tiny"], ["SPEED = 2", "SPEED = 1"]),  # but not A's edits
    ("fast", "script.py", ["fast", "tiny"], ["SPEED = 1", "SPEED = 1"])])
def test_sides(launcher, monkeypatch, a, b, presets, scripts):
    monkeypatch.setattr(campaign, "TRAINER", launcher.parent / "script.py")
    b = str(launcher.parent / b) if b.endswith(".py") else b
    assert run(launcher, b, 1, a=a) == 0
    out = launcher.parent / "out"
    assert json.loads((out / "campaign.json").read_text())["presets"] == presets
    for side, preset, line in zip("AB", presets, scripts):
        assert f"preset {preset}, log" in (out / side / f"{side}1.console").read_text()
        assert f"\n{line}  #" in (out / side / "script.py").read_text()


@pytest.mark.parametrize("b, word", [
    ("SPEED=1", "already"), ("NONE=1", "0 places"), ("SPEED=(", "no Python value"), ("none.py", "cannot be read"),
    ("SPEED=2,NONE=1", "0 places"), ("PRESETS={'fast': 1}", "tiny is no preset of .*: choose one of fast")])
def test_scripts_that_cannot_be_prepared(launcher, b, word):
    with pytest.raises(RecordError, match=word):
        run(launcher, b)
    assert not (launcher.parent / "done").exists() and not (launcher.parent / "out").exists()


@pytest.mark.parametrize("preset", tgm.PRESETS)
def test_every_constant_of_a_preset_is_set_in_one_place(preset):
    tree, config = ast.parse(TRAINER.read_text()), tgm.PRESETS[preset]()
    for item in fields(config):
        (place,) = campaign.find_constant(tree, item.name, preset)
        assert eval(ast.unparse(place), vars(tgm)) == getattr(config, item.name), item.name
    assert campaign.find_constant(tree, "lr", preset) == []  # of a rule, of which there are several


@pytest.mark.parametrize("preset, spec, old, new", [
    ("medium", "smear_mtp=False", "smear_mtp: bool = True", "smear_mtp: bool = False"),
    ("baseline", "smear_mtp=True", "smear_mtp=False", "smear_mtp=True"),
    ("medium", "snoo=Snoo(every=14, lr=0.5)", "lambda: Snoo()", "lambda: Snoo(every=14, lr=0.5)"),
    ("tiny", "stages=(Stage(num_slices=4),)", "lambda: STAGES", "lambda: (Stage(num_slices=4),)"),
    ("short", "BLOCK_SIZE=64", "BLOCK_SIZE = 128", "BLOCK_SIZE = 64")])
def test_constants_of_the_trainer_are_edited(preset, spec, old, new):
    source, edited = TRAINER.read_text(), campaign.read_side(spec, preset).source
    changed = [(a, b) for a, b in zip(source.splitlines(), edited.splitlines()) if a != b]
    assert len(changed) == 1 and changed[0][1] == changed[0][0].replace(old, new)


def test_tiny_through_the_real_run_sh(tmp_path, monkeypatch):
    """The repository's launcher and trainer on this CPU, both sides cut to one step of a smaller model."""
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    write_shard(tmp_path / "text_train_000001.bin", random_ids(2 ** 18 + 4097, small_config()))
    write_shard(tmp_path / "text_val_000000.bin", random_ids(2 ** 14 + 1, small_config()))
    cut = "seq_len=128,val_seq_len=512,val_tokens=512,num_iterations=1,kernel_warmup_steps=0"
    status = campaign.campaign(cut, cut.replace("num_iterations=1", "num_iterations=2"), 1, "tiny", tmp_path / "out",
                               False)
    assert status == 0
    for side, steps in (("A", 1), ("B", 2)):
        (log,) = (tmp_path / "out" / side).glob("*.txt")
        record = read_log(log)
        assert record.finished and record.num_iterations == steps and record.constants["seq_len"] == "128"
        script = (tmp_path / "out" / side / "train_gpt_medium.py").read_text()
        assert record.source == script.strip("\n") and re.search(rf"num_iterations={steps}\b", script)
