"""records/tools/new.py: a folder made of logs keeps every rule, and the leaderboard is the tool's own."""
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import check
import new
import synthetic_logs as logs
from helpers import RECORDS
from run_log import RecordError


@pytest.fixture
def records_folder(tmp_path):
    folder = tmp_path / "records"
    for path in RECORDS.glob("2*_*"):
        shutil.copytree(path, folder / path.name)
    shutil.copy(RECORDS / "README.md", folder)
    return folder


def make(records_folder: Path, name: str = "Made-up", specs=None) -> int:
    runs = records_folder.parent / "runs"
    logs.write_logs(runs / "new", specs or logs.record_specs())
    logs.write_logs(runs / "old", logs.baseline_specs())
    return new.new(name, "2026-01-02", [runs / "new"], [runs / "old"], "A constant.", False, records_folder)


def test_a_new_folder_keeps_every_rule(records_folder, capsys):
    crashed = replace(logs.Spec(), seed=70, last_step=60)
    assert make(records_folder, specs=[*logs.record_specs(), crashed]) == 0
    folder = records_folder / "2026-01-02_Made-up"
    findings = check.apply_rules(check.read_folder(folder))
    assert {f.rule.id: f.status for f in findings} == {rule.id: "ok" for rule in check.RULES}
    assert [len(list(folder.glob(pattern))) for pattern in ("*.txt.gz", "baseline/*.txt.gz", "failed/*.txt.gz")] == [
        8, 4, 1]
    text = (folder / "README.md").read_text()
    assert "## What changed\n\nA constant.\n" in text and "of which faster steps, at equal window and batch (s)" in text
    assert "(report.html)" in text and "8 runs end at" in (folder / "report.html").read_text()
    assert "holds: every rule is kept" in capsys.readouterr().out


def test_an_experiment_stays_apart_and_is_not_held_to_the_records_task(records_folder, tmp_path, capsys):
    """Runs of another task: a loss above the target, on a CPU. Its other rules still count."""
    before = (records_folder / "README.md").read_text()
    runs, baseline = ([replace(spec, gpus=(), loss=spec.loss + 2) for spec in specs]
                      for specs in (logs.record_specs(), logs.baseline_specs()))
    sides = [logs.write_logs(tmp_path / "B", runs)], [logs.write_logs(tmp_path / "A", baseline)]
    arguments = ("X", "2026-01-02", *sides, "A question.", True)
    assert new.new(*arguments, records_folder, experiment=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"].startswith("an experiment: ") and "target" not in report["statistics"]
    folder = records_folder / "experiments" / "2026-01-02_X"
    readme, page = ((folder / name).read_text() for name in ("README.md", "report.html"))
    assert "| loss | 4.918519 +- " in readme and "t-test" not in readme
    assert "A is the baseline. B are the other runs.\n\n- " in readme
    assert all(" nats/token below A: mean 4.918519 of 8 runs" in text for text in (readme, page))
    assert (records_folder / "README.md").read_text() == before
    assert new.new(*arguments, records_folder) == 1  # as a record it would not hold
    (folder / "again.txt").write_text(logs.log_text(replace(runs[0], loss=5.0)))  # a run of the same seed
    assert check.check(folder, True) == 1


def test_an_experiment_of_several_sides(records_folder, tmp_path):
    """Each side stays apart."""
    sides = [logs.write_logs(tmp_path / name, [
        replace(spec, gpus=(), loss=spec.loss + 0.01 * i, seed=spec.seed + 50 * i, source=f"{spec.source}# {name}")
        for spec in logs.record_specs()]) for i, name in enumerate("ABC")]
    assert new.new("X", "2026-01-02", [], [], "A question.", False, records_folder, experiment=True, sides=sides) == 0
    folder = records_folder / "experiments" / "2026-01-02_X"
    readme = (folder / "README.md").read_text()
    assert "| C - A | +0.020000 |" in readme and "## All 8 runs of C" in readme
    assert [len(list((folder / name).glob("*.gz"))) for name in "ABC"] == [8, 8, 8]


def test_the_leaderboard_gets_a_row_and_keeps_the_others(records_folder):
    before = (records_folder / "README.md").read_text()
    make(records_folder)
    after = (records_folder / "README.md").read_text()
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(added) == 1 and added[0].startswith("| 2026-01-02 | Made-up | 2.918519 +- 0.000551 | 48.1")
    assert after.replace(added[0] + "\n", "") == before


def test_the_leaderboard_of_this_repository_is_the_tools():
    assert new.leaderboard(RECORDS) in (RECORDS / "README.md").read_text()


GOOD = logs.log_text(logs.Spec())


@pytest.mark.parametrize("content, name, date, times_given, word", [
    ("", "X", "2026-01-02", 1, "no step lines"),
    (logs.log_text(logs.Spec(last_step=60)), "X", "2026-01-02", 1, "none of the logs is finished"),
    (GOOD, "X", "2026-01-02", 2, "counts once"), (GOOD, "a/b", "2026-01-02", 1, "is no name"),
    (GOOD, "X", "today", 1, "is no name"), (GOOD, "SmearMTP", "2025-11-02", 1, "exists already"),
    (GOOD, "X", "2026-02-30", 1, "is no name")])
def test_what_will_not_do_leaves_nothing_behind(records_folder, content, name, date, times_given, word):
    before, log = sorted(records_folder.rglob("*")), records_folder.parent / "one.log"
    log.write_text(content)
    with pytest.raises(RecordError, match=word):
        new.new(name, date, [log] * times_given, [], "-", False, records_folder)
    assert sorted(records_folder.rglob("*")) == before


def test_logs_are_compressed_and_the_same_logs_give_the_same_bytes(records_folder):
    """Also those that came compressed."""
    make(records_folder)
    runs = records_folder.parent / "runs"
    for log in runs.rglob("*.txt"):
        (log.parent / f"{log.name}.gz").write_bytes(gzip.compress(log.read_bytes(), 1))
        log.unlink()
    new.new("Again", "2026-01-02", [runs / "new"], [runs / "old"], "A constant.", False, records_folder)
    first, again = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.txt.gz")} for folder in (
        records_folder / f"2026-01-02_{name}" for name in ("Made-up", "Again")))
    assert first == again and len(first) == 12
