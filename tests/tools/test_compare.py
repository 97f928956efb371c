"""records/compare.py: differences, and fewer against faster steps, on runs whose parts are known."""
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import compare
import records
import synthetic_logs as logs
from helpers import RECORDS
from run_log import RecordError

A = [logs.Spec(loss=2.9192 + 0.0001 * i, seed=100 + i, num_iterations=210, ms_per_step=222.0) for i in range(4)]
B = [logs.Spec(loss=2.9185 + 0.0001 * i, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for name, specs in (("a", A), ("b", B)):
        for spec in specs:
            logs.write_log(folder / name, spec)
    return folder / "a", folder / "b"


def step_seconds(spec: logs.Spec) -> float:
    """Of a whole run, without jitter."""
    return (spec.ms_per_step + spec.ms_per_block * logs.window_blocks(spec)).sum() / 1000


def test_a_time_gain_is_fewer_steps_plus_faster_steps(sides):
    r = compare.compare_sides(*map(compare.read_side, sides))
    fewer, faster = r["decomposition"]["fewer"]["value"], r["decomposition"]["faster"]["value"]
    assert fewer + faster == pytest.approx(r["seconds_difference"]["value"], abs=1e-9)
    # Every step is 2 ms faster; the mean number of steps is 205. A run's jitter sums to 0.2 ms sqrt(210) = 3 ms,
    # half of that in the mean of 4 runs; 5 deviations of a difference.
    assert faster == pytest.approx(-0.002 * 205, abs=5 * 0.0029 / 2 * 2 ** 0.5)
    assert fewer == pytest.approx(step_seconds(B[0]) - step_seconds(A[0]) + 0.002 * 205, abs=5 * 0.0029 / 2 * 2 ** 0.5)
    for row in r["ms_per_step_at_equal_window"]:
        # Step lines are whole milliseconds: the ends of a row of k steps are off by 1 ms in all.
        steps = min(row["steps_a"], row["steps_b"])
        assert row["ms_b"] - row["ms_a"] == pytest.approx(-2, abs=2 * (1 + 5 * 0.1) / steps)


def test_averages_mislead_where_windows_differ(tmp_path):
    """The same steps, in half as many: no step is faster although shorter runs see each window less."""
    for name, steps in (("a", 400), ("b", 200)):
        for seed in range(2):
            logs.write_log(tmp_path / name, logs.Spec(num_iterations=steps, seed=seed, loss=2.919 + 0.001 * seed))
    r = compare.compare_sides(*(compare.read_side(tmp_path / name) for name in "ab"))
    assert r["decomposition"]["faster"]["value"] == pytest.approx(0, abs=5 * 0.004)  # jitter: 0.2 sqrt(400) ms
    assert r["decomposition"]["fewer"]["value"] == pytest.approx(r["seconds_difference"]["value"], abs=5 * 0.004)


def test_the_windows_of_our_own_logs_are_those_of_their_constants(tmp_path):
    """A window that only one side has is interpolated, so that the parts still sum to the difference."""
    for name, window in (("a", 3456), ("b", 1024)):
        for seed in range(2):
            logs.write_log(tmp_path / name, logs.Spec(seed=seed, constants=f"max_window = {window}"))
    r = compare.compare_sides(*(compare.read_side(tmp_path / name) for name in "ab"))
    fewer, faster = (r["decomposition"][name]["value"] for name in ("fewer", "faster"))
    assert fewer + faster == pytest.approx(r["seconds_difference"]["value"], abs=1e-9)
    assert any("windows grow" in line for line in r["warnings"])


def test_loss_difference_and_its_worth_in_steps(sides):
    r = compare.compare_sides(*map(compare.read_side, sides))
    assert r["loss_difference"]["value"] == pytest.approx(-0.0007, abs=1e-9)
    # The curve of A between steps 175 and 210, where the last 5 % of the run begin before 199.5.
    slope = np.polyfit([175, 200, 210], [np.mean([logs.curve(s, spec) for spec in A]) for s in (175, 200, 210)], 1)[0]
    assert r["slope_from_step"] == 175
    assert r["loss_difference_in_steps"] == pytest.approx(-0.0007 / slope, rel=0.01)
    last = r["loss_at_equal"]["step"][-1]
    assert last["step"] == 200 and last["loss_b"] - last["loss_a"] == pytest.approx(
        np.mean([logs.curve(200, s) for s in B]) - np.mean([logs.curve(200, s) for s in A]), abs=2e-6)


@pytest.mark.parametrize("name, value", [("torch", "2.9.0+cu126"), ("driver", "570.1"), ("gpus", ("NVIDIA H200",) * 8)])
def test_other_machines_are_warned_of(sides, tmp_path, name, value):
    for spec in B:
        logs.write_log(tmp_path, replace(spec, **{name: value}))
    lines = compare.compare_sides(compare.read_side(sides[0]), compare.read_side(tmp_path))["warnings"]
    assert len(lines) == 1 and lines[0].startswith("hardware" if name == "gpus" else name)


def test_one_run_against_one_run(sides, capsys):
    paths = [str(next(side.iterdir())) for side in sides]
    assert records.main(["compare", *paths]) == 0
    out = capsys.readouterr().out
    assert out.count("no interval") >= 4 and out.count("is one run: no interval, no test") == 2


def test_a_records_folder_is_compared_without_its_baseline(tmp_path):
    record = logs.write_record(tmp_path / "record")
    assert len(compare.read_side(record).runs) == 8 and len(compare.read_side(record / "baseline").runs) == 4


def test_unfinished_runs_are_left_out_and_named(sides, tmp_path):
    side = Path(shutil.copytree(sides[1], tmp_path / "b"))
    logs.write_log(side, logs.Spec(seed=9, last_step=80))
    r = compare.compare_sides(compare.read_side(sides[0]), compare.read_side(side))
    assert r["b"]["n"] == 4 and any("1 unfinished" in line for line in r["warnings"])


@pytest.mark.parametrize("specs, word", [([], "holds no logs"), ([logs.Spec(last_step=60)], "no finished run"),
                                         ([B[0], A[0]], "200, 210 steps")])
def test_sides_that_cannot_be_compared(tmp_path, specs, word):
    for spec in specs:
        logs.write_log(tmp_path, spec)
    with pytest.raises(RecordError, match=word):
        compare.read_side(tmp_path)


def test_published_figures_are_a_side_without_curves(sides, capsys):
    assert records.main(["compare", str(sides[0]), str(RECORDS / "2025-11-02_SmearMTP")]) == 0
    out = capsys.readouterr().out
    assert "2.919309 +- 0.000678" in out and "cannot be told apart" in out


def test_json(sides, capsys):
    assert records.main(["compare", *map(str, sides), "--json"]) == 0
    r = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert r["a"]["n"] == 4 and r["seconds_difference"]["low"] < r["seconds_difference"]["value"] < 0


def test_windows_of_untimed_steps_alone_do_not_count(tmp_path):
    """A clock that starts after step 10, as the scaled-up run's: the first windows have no time on either side."""
    for side, ms in (("a", 100), ("b", 90)):
        log = logs.write_log(tmp_path / side, logs.Spec(num_iterations=40, val_every=20, seed=ms))
        text = re.sub(r"step:(\d+)/40 (val_loss:\S+ )?train_time:\S+ step_avg:\S+", lambda line: (
            f"step:{line[1]}/40 {line[2] or ''}train_time:{ms * max(0, int(line[1]) - 10)}ms "
            f"step_avg:{ms if int(line[1]) > 10 else math.nan:.2f}ms"), log.read_text())
        log.write_text(text)
    sides = [compare.read_side(tmp_path / side) for side in "ab"]
    rows = compare.step_time_rows(*sides)
    assert len(rows) > 1
    for row in rows:
        assert (row["ms_a"], row["ms_b"]) == (pytest.approx(100), pytest.approx(90))
