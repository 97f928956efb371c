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

pytest.importorskip("matplotlib")


@pytest.fixture
def records_folder(tmp_path):
    folder = tmp_path / "records"
    shutil.copytree(RECORDS / "2025-11-02_SmearMTP", folder / "2025-11-02_SmearMTP")
    shutil.copy(RECORDS / "README.md", folder)
    return folder


def make(records_folder: Path, name: str = "Made-up", specs=None) -> int:
    runs = records_folder.parent / "runs"
    for spec in specs or logs.record_specs():
        logs.write_log(runs / "new", spec)
    for spec in logs.baseline_specs():
        logs.write_log(runs / "old", spec)
    return new.new(name, "2026-01-02", [runs / "new"], [runs / "old"], "A constant.", False, records_folder)


def test_a_new_folder_keeps_every_rule(records_folder, capsys):
    crashed = replace(logs.Spec(), seed=70, last_step=60)
    assert make(records_folder, specs=[*logs.record_specs(), crashed]) == 0
    folder = records_folder / "2026-01-02_Made-up"
    findings = check.apply_rules(check.read_folder(folder), check.Limits())
    assert {f.rule.id: f.status for f in findings} == {
        rule.id: "not applicable" if rule.id == "scripts" else "ok" for rule in check.RULES}
    assert len(list(folder.glob("*.txt"))) == 8 and len(list(folder.glob("baseline/*.txt"))) == 4
    assert [path.stem for path in folder.glob("failed/*.txt")] == [crashed.run_id]
    text = (folder / "README.md").read_text()
    assert "## What changed\n\nA constant.\n" in text and "of which faster steps, at equal window and batch (s)" in text
    for path in folder.glob("figures/*.png"):
        assert f"(figures/{path.name})" in text
    assert "holds: every rule is kept" in capsys.readouterr().out


def test_an_experiment_stays_apart_and_is_not_held_to_the_records_task(records_folder, tmp_path, capsys):
    """Runs of another task: a loss above the target, on a CPU. Its other rules still count."""
    before = (records_folder / "README.md").read_text()
    runs, baseline = ([replace(spec, gpus=(), loss=spec.loss + 2) for spec in specs]
                      for specs in (logs.record_specs(), logs.baseline_specs()))
    for side, specs in (("B", runs), ("A", baseline)):
        for spec in specs:
            logs.write_log(tmp_path / side, spec)
    arguments = ("X", "2026-01-02", [tmp_path / "B"], [tmp_path / "A"], "A question.", True)
    assert new.new(*arguments, records_folder, experiment=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"].startswith("an experiment: ") and "target" not in report["statistics"]
    folder = records_folder / "experiments" / "2026-01-02_X"
    readme, page = ((folder / name).read_text() for name in ("README.md", "report.html"))
    assert "| mean loss +- std (nats/token) | 4.918519" in readme and "one-sided p" not in readme
    assert "A is the baseline. B are the other runs.\n\n- " in readme
    assert all(" nats/token below A: mean 4.918519 of 8 runs" in text for text in (readme, page))
    assert (records_folder / "README.md").read_text() == before
    assert new.new(*arguments, records_folder) == 1  # as a record it would not hold
    (folder / "again.txt").write_text(logs.log_text(replace(runs[0], loss=5.0)))  # a run of the same seed
    assert check.check(folder, check.Limits(), True) == 1


def test_the_leaderboard_gets_a_row_and_keeps_the_others(records_folder):
    before = (records_folder / "README.md").read_text()
    make(records_folder)
    after = (records_folder / "README.md").read_text()
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(added) == 1 and added[0].startswith("| 2026-01-02 | Made-up | 2.918519 +- 0.000551 | 48.1")
    assert after.replace(added[0] + "\n", "") == before


def test_the_leaderboard_of_this_repository_is_the_tools():
    assert new.leaderboard(RECORDS) in (RECORDS / "README.md").read_text()


@pytest.mark.parametrize("content, word", [
    ("", "is empty"), (logs.log_text(replace(logs.Spec(), last_step=60)), "finished")])
def test_nothing_is_left_behind_by_logs_that_will_not_do(records_folder, content, word):
    before = sorted(records_folder.rglob("*"))
    (records_folder.parent / "one.log").write_text(content)
    with pytest.raises(RecordError, match=word):
        new.new("X", "2026-01-02", [records_folder.parent / "one.log"], [], "-", False, records_folder)
    assert sorted(records_folder.rglob("*")) == before


@pytest.mark.parametrize("name, date", [("a/b", "2026-01-02"), ("X", "today"), ("SmearMTP", "2025-11-02"),
                                        ("X", "2026-02-30")])
def test_names_that_will_not_do(records_folder, name, date):
    with pytest.raises(RecordError, match="is no name|exists already"):
        new.new(name, date, [], [], "-", False, records_folder)


def test_a_log_given_twice_is_refused(records_folder):
    log = logs.write_log(records_folder.parent, logs.Spec())
    with pytest.raises(RecordError, match="counts once"):
        new.new("X", "2026-01-02", [log, log], [], "-", False, records_folder)


def test_logs_of_one_name_in_several_folders_are_several_runs(tmp_path):
    specs = logs.record_specs()[:3]
    for spec in specs:
        logs.write_log(tmp_path / f"seed{spec.seed}", spec, "train.log")
    folder = tmp_path / "record"
    runs = new.copy_logs([tmp_path / f"seed{spec.seed}" for spec in specs], folder, folder / "failed")
    assert sorted(path.name for path in folder.iterdir()) == ["train-seed1.log", "train-seed2.log", "train.log"]
    assert {run.final_loss for run in check.read_folder(folder).record} == {run.final_loss for run in runs}
    with pytest.raises(RecordError, match="counts once"):
        new.copy_logs([tmp_path / "seed1", tmp_path / "seed1"], tmp_path / "again", folder / "failed")


def test_a_large_folder_is_compressed_and_read_all_the_same(records_folder, monkeypatch):
    make(records_folder)
    monkeypatch.setattr(new, "MAX_BYTES", 300_000)
    make(records_folder, "Compressed")
    plain, compressed = (records_folder / f"2026-01-02_{name}" for name in ("Made-up", "Compressed"))
    names = sorted(path.relative_to(plain) for path in plain.rglob("*.txt"))
    assert sorted(path.relative_to(compressed) for path in compressed.rglob("*.txt*")) == [
        Path(f"{name}.gz") for name in names] and len(names) == 12
    assert [gzip.decompress((compressed / f"{name}.gz").read_bytes()) for name in names] == [
        (plain / name).read_bytes() for name in names]
    verdicts = [[(f.rule.id, f.status) for f in check.apply_rules(check.read_folder(folder), check.Limits())]
                for folder in (plain, compressed)]
    assert verdicts[0] == verdicts[1]
