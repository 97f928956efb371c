"""records/tools/follow.py and power.py: a run against the band of reference runs, live and finished."""
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import follow
import records
import synthetic_logs as logs
from run_log import RecordError, read_log

PUBLISHED = json.loads((follow.PUBLISHED / "published.json").read_text())["record"]


def published_log(path: Path, shift: float = 0.0, last_step: int = 5535, slower: float = 1.0) -> Path:
    """The published log's curve as a log, raised by `shift` after step 0."""
    rows = [row for row in PUBLISHED["one_log_curve"] if row["step"] <= last_step]
    path.write_text("".join(
        f"step:{row['step']}/5535 val_loss:{row['val_loss'] + (shift if row['step'] else 0):.6f} "
        f"train_time:{row['train_time_ms'] * slower:.0f}ms step_avg:1.00ms\n" for row in rows))
    return path


def run(capsys, *arguments) -> tuple[int, str]:
    status = records.main(["follow", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_the_published_log_reproduces_the_published_curve(tmp_path, capsys):
    status, out = run(capsys, published_log(tmp_path / "log.txt"))
    assert status == 0 and out.count("inside") == 46 and "finished: reproducing: all 46" in out
    report = json.loads(run(capsys, tmp_path / "log.txt", "--json")[1], parse_constant=lambda name: pytest.fail(name))
    assert report["finished"] and len(report["validations"]) == 46


@pytest.mark.parametrize("shift, word", [(0.02, "above"), (-0.05, "below")])
def test_a_wrong_run_is_noticed_at_its_first_validations(tmp_path, capsys, shift, word):
    """Two minutes into the run; 0.02 nats are 4 sigma at step 125, 8 at step 500."""
    status, out = run(capsys, "--once", published_log(tmp_path / "log.txt", shift, last_step=500))
    assert status == 1 and f"not reproducing: the loss is {word}" in out and "at step 500 of 5,535" in out


def test_time_left_follows_the_reference_and_the_runs_own_speed(tmp_path):
    band = follow.read_band(follow.PUBLISHED)
    for slower in (1.0, 1.5):
        rows = follow.judge(read_log(published_log(tmp_path / "log.txt", slower=slower)), band)
        total = rows[-1]["seconds"]
        for row in rows[1:]:
            # The published log is 0.13 % faster than the mean, its intervals to 0.3 %.
            assert row["seconds"] + row["seconds_left"] == pytest.approx(total, rel=0.005)


def test_band_holds_faithful_runs():
    """Simulated: runs of the reference's own distribution leave the band in 1 % of the cases or fewer."""
    rng = np.random.default_rng(0)
    trials, num_runs, num_points = 4000, 5, 10
    reference, further = rng.normal(size=(trials, num_runs, num_points)), rng.normal(size=(trials, num_points))
    width = follow.band_width(num_runs, num_points)
    outside = (np.abs(further - reference.mean(1)) > width * reference.std(1, ddof=1)).any(1).mean()
    assert outside <= 0.01 + 5 * (0.01 / trials) ** 0.5
    assert outside >= 0.005 - 5 * (0.005 / trials) ** 0.5  # Bonferroni wastes little with independent points
    assert follow.band_width(10 ** 6, 1) == pytest.approx(stats.norm.isf(0.005), rel=1e-5)


def test_a_band_of_ones_own_logs(tmp_path, capsys):
    logs.write_logs(tmp_path / "runs", logs.record_specs())
    good = logs.write_log(tmp_path, logs.Spec(loss=2.9181, seed=60))
    bad = logs.write_log(tmp_path, logs.Spec(loss=2.9281, seed=61))
    for path, expected in ((good, 0), (bad, 1)):
        assert run(capsys, path, "--reference", tmp_path / "runs")[0] == expected
    with pytest.raises(RecordError, match="needs 2 or more"):
        follow.read_band(good)


def test_a_live_log_is_followed_to_its_end(tmp_path, capsys, monkeypatch):
    """The log grows while it is followed; it begins empty, as a run that still compiles has it."""
    logs.write_logs(tmp_path / "runs", logs.record_specs())
    text = logs.log_text(logs.Spec(loss=2.9184, seed=60))
    path = tmp_path / "live.txt"
    path.touch()
    parts = [text[:text.index("step:0/")], text[:text.index("step:60/") + 9], text]
    writer = threading.Timer(0.2, lambda: [path.write_text(part) for part in parts])
    writer.start()
    monkeypatch.setattr(follow, "EVERY", 0.05)
    status, out = run(capsys, path, "--reference", tmp_path / "runs")
    writer.join()
    assert status == 0 and out.count("inside") == 9 and "finished: reproducing" in out


def test_a_stalled_log_ends_the_wait(tmp_path, capsys):
    path = published_log(tmp_path / "log.txt", last_step=250)
    os.utime(path, (0, 0))
    status, out = run(capsys, path)
    assert status == 0 and "has not grown for 600 s" in out


@pytest.mark.parametrize("content, word", [
    ("", "no step lines"), ("step:0/64 val_loss:5.95 train_time:0ms\n", "--reference"), (None, "No such file")])
def test_what_cannot_be_followed(tmp_path, capsys, content, word):
    path = tmp_path / "log.txt"
    if content is not None:
        path.write_text(content)
    assert records.main(["follow", "--once", str(path)]) == 2
    assert word in capsys.readouterr().err


def test_power_prints_what_the_statistics_give(capsys):
    assert records.main(["power", "--margin", "0.0007", "--runs", "20", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["margins"][0]["runs"] == 20 and report["margins"][0]["power"] >= 0.9
    assert report["runs"][0]["margin"] <= 0.0007
    assert records.main(["power"]) == 0
    assert "runs (t-test)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--margin", "0"], ["--sigma", "-1"], ["-n", "1"], ["--alpha", "1"],
                                       ["--power", "1"]])
def test_power_out_of_range(capsys, arguments):
    assert records.main(["power", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
