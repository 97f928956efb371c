"""records/tools/compare.py: differences, and fewer against faster steps, on runs whose parts are known."""
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import compare
import curves
import records
import synthetic_logs as logs
from helpers import RECORDS
from run_log import RecordError, Run, Validation

A = [logs.Spec(loss=2.9192 + 0.0001 * i, seed=100 + i, num_iterations=210, ms_per_step=222.0) for i in range(4)]
B = [logs.Spec(loss=2.9185 + 0.0001 * i, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return logs.write_logs(folder / "a", A), logs.write_logs(folder / "b", B)


LAST, OLD = logs.Spec(num_iterations=210), logs.Spec(num_iterations=210, is_old=True)
FASTER = replace(LAST, num_iterations=200, ms_per_step=218.0)
RAMP = replace(LAST, num_iterations=200, small_batches=60)
# A run's jitter sums to 0.2 ms sqrt(210) = 2.9 ms; 5 deviations of a difference of means of 2 runs.
JITTER_S = 5 * 0.0029


def compare_specs(folder: Path, a: logs.Spec, b: logs.Spec) -> dict:
    """Of two runs each."""
    return compare.compare_sides(*(compare.read_side(logs.write_logs(folder / name, [
        replace(spec, seed=seed, loss=spec.loss + 0.001 * seed) for seed in range(2)]))
        for name, spec in (("a", a), ("b", b))))


def kinds_of(spec: logs.Spec) -> list[tuple]:
    return list(zip(logs.batch_tokens(spec), logs.window_blocks(spec)))


@pytest.mark.parametrize("a, b, faster_ms", [
    (LAST, FASTER, -2),
    (LAST, replace(LAST, num_iterations=105), 0),  # every window in half as many steps: no step is faster
    (LAST, replace(LAST, last_window=8), 0), (LAST, RAMP, 0)])
def test_a_time_gain_is_the_sum_of_its_parts(tmp_path, a, b, faster_ms):
    r = compare_specs(tmp_path, a, b)
    fewer, faster, mix = (r["decomposition"][name]["value"] for name in ("fewer", "faster", "mix"))
    mean_ms = (logs.step_ms(a).mean() + logs.step_ms(b).mean()) / 2
    assert fewer == pytest.approx((b.num_iterations - a.num_iterations) * mean_ms / 1000, abs=JITTER_S)
    assert faster == pytest.approx(faster_ms * (a.num_iterations + b.num_iterations) / 2000, abs=JITTER_S)
    assert fewer + faster + mix == pytest.approx(r["seconds_difference"]["value"], abs=1e-9)
    if set(kinds_of(a)) == set(kinds_of(b)):
        # A window's steps are a whole number: half a step more or less at each, 20 ms longer or shorter than the mean.
        assert mix == pytest.approx(0, abs=JITTER_S + 27 * 0.5 * 0.02)
    assert not r["warnings"]


@pytest.mark.parametrize("a", [LAST, RAMP])
def test_rows_of_equal_window_never_mix_batches(tmp_path, a):
    rows = compare_specs(tmp_path, a, RAMP)["ms_per_step_at_equal_window"]
    for side, spec in (("a", a), ("b", RAMP)):
        tokens, windows, ms = logs.batch_tokens(spec), logs.window_blocks(spec), logs.step_ms(spec)
        assert sum(row[f"steps_{side}"] for row in rows) == spec.num_iterations
        for row in rows:
            inside = ms[(tokens == row["tokens"]) & (row["windows"][0] <= windows) & (windows <= row["windows"][1])]
            assert row[f"steps_{side}"] == len(inside)
            # Step lines are whole milliseconds.
            assert (inside.min() - 1 < row[f"ms_{side}"] < inside.max() + 1) if len(inside) else math.isnan(
                row[f"ms_{side}"])


@pytest.mark.parametrize("a, b, silent", [(OLD, FASTER, 1), (LAST, replace(FASTER, is_old=True), 1),
                                          (OLD, replace(FASTER, is_old=True), 2)])
def test_logs_that_do_not_state_their_windows_are_not_split_by_them(tmp_path, capsys, a, b, silent):
    r = compare_specs(tmp_path, a, b)
    parts = {name: part["value"] for name, part in r["decomposition"].items()}
    assert parts.keys() == {"fewer", "rest"}
    assert sum(parts.values()) == pytest.approx(r["seconds_difference"]["value"], abs=1e-9)
    assert parts["rest"] == pytest.approx(-0.002 * 205, abs=JITTER_S)  # at equal shares of the run, windows are equal
    assert "ms_per_step_at_equal_window" not in r and len(r["ms_per_step_at_equal_share"]) == compare.ROWS
    assert sum("the logs do not state the windows" in line for line in r["warnings"]) == silent
    assert "at equal share of the run" in compare.report(r) and r["loss_at_equal"]["tokens"] == []


def test_losses_at_equal_tokens(tmp_path):
    """The run of fewer tokens ends the table; where batches are equal, equal steps are equal tokens."""
    full = replace(LAST, num_iterations=200)
    last = compare_specs(tmp_path / "ramp", full, RAMP)["loss_at_equal"]["tokens"][-1]
    assert last["tokens"] == logs.batch_tokens(RAMP).sum() == 155 * logs.BATCH
    before, after = (np.mean([logs.curve(step, replace(full, loss=2.919 + shift)) for shift in (0, 0.001)])
                     for step in (150, 175))
    assert (last["loss_a"], last["loss_b"]) == pytest.approx((0.8 * before + 0.2 * after, 2.9195), abs=2e-6)
    assert compare_specs(tmp_path / "same", full, LAST)["loss_at_equal"]["tokens"] == []


def test_loss_difference(sides):
    r = compare.compare_sides(*map(compare.read_side, sides))
    assert r["loss_difference"]["value"] == pytest.approx(-0.0007, abs=1e-9)
    last = r["loss_at_equal"]["step"][-1]
    assert last["step"] == 200 and last["loss_b"] - last["loss_a"] == pytest.approx(
        np.mean([logs.curve(200, s) for s in B]) - np.mean([logs.curve(200, s) for s in A]), abs=2e-6)


def hand_made(name: str, *last_losses: tuple[float, float]) -> curves.Side:
    """Runs of 100 steps, validated at 0, 50 and 100; the losses at the latter two."""
    runs = [Run(Path(name), 100, [Validation(step, loss, step) for step, loss in ((0, 5.0), (50, middle), (100, end))])
            for middle, end in last_losses]
    return curves.side_of(runs, name, Path(name))


def test_steps_at_equal_loss():
    """A's mean at the end is 3.0, and its mean curve falls by 0.02 a step: a run 0.1 above that takes 5 steps more."""
    a, b = hand_made("a", (4.0, 3.1), (4.0, 2.9)), hand_made("b", (3.2, 2.8), (3.0, 2.7))
    steps_a, steps_b = [105, 50 + 50 / 1.1], [75, 50]
    for sides, steps, above in (((a, b), (steps_a, steps_b), (1, 0)), ((b, a), (steps_b, steps_a), (0, 1))):
        r = compare.compare_sides(*sides)
        found, expected = r["steps_at_equal_loss"], stats.ttest_ind(*reversed(steps), equal_var=False)
        difference, interval = found["difference"], expected.confidence_interval(0.95)
        assert found["loss"] == pytest.approx(3.0) and (found["above_a"], found["above_b"]) == above
        assert [found["steps_a"], found["steps_b"]] == pytest.approx([np.mean(s) for s in steps])
        assert difference == pytest.approx({"value": np.mean(steps[1]) - np.mean(steps[0]), "low": interval.low,
                                                     "high": interval.high, "p": expected.pvalue})
        assert f"1 of 2 runs of {'AB'[above[1]]} stay above it" in compare.report(r)
    flat = compare.compare_sides(hand_made("a", (3.2, 3.3), (2.9, 2.9)), b)["steps_at_equal_loss"]
    assert math.isnan(flat["difference"]["value"])  # a curve that does not fall cannot be continued


def test_a_curve_that_rises_at_its_end_is_continued_as_its_second_half_falls():
    """Mean 4, 2.925, 3 from step 50 on: a fall of 0.02 a step. A loss that is not a number is passed over."""
    runs = [Run(Path("x"), 100, [Validation(step, loss, step) for step, loss in zip((0, 50, 75, 100), losses)])
            for losses in ((5.0, 4.0, 3.05, 3.1), (5.0, 4.0, 2.8, 2.9))]
    side = curves.side_of(runs, "x", Path("x"))
    found = compare.compare_sides(side, side)["steps_at_equal_loss"]
    assert found["steps_a"] == pytest.approx(np.mean([105, 50 + 25 / 1.2])) and found["above_a"] == 1
    gap = Run(Path("x"), 100, [Validation(step, loss, step) for step, loss in ((0, 4.0), (50, math.nan), (100, 3.0))])
    assert compare.first_reach(gap, 3.1, -0.02) == (pytest.approx(90), True)


@pytest.mark.parametrize("name, value", [("torch", "2.9.0+cu126"), ("driver", "570.1"), ("gpus", ("NVIDIA H200",) * 8)])
def test_other_machines_are_warned_of(sides, tmp_path, name, value):
    logs.write_logs(tmp_path, [replace(spec, **{name: value}) for spec in B])
    lines = compare.compare_sides(compare.read_side(sides[0]), compare.read_side(tmp_path))["warnings"]
    assert len(lines) == 1 and lines[0].startswith("hardware" if name == "gpus" else name)


def test_one_run_against_one_run(sides, capsys):
    paths = [str(next(side.iterdir())) for side in sides]
    assert records.main(["compare", *paths]) == 0
    out = capsys.readouterr().out
    assert out.count("no interval and no test, since a side has one run") == out.count("no interval") == 1
    assert "nan" not in out and "-0.0 " not in out and "e-06" not in out
    assert records.main(["compare", *paths, "--json"]) == 0
    r = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert r["seconds_difference"]["value"] < 0 and r["seconds_difference"]["low"] is None


def test_equal_seeds_are_compared_in_pairs(tmp_path, capsys):
    """Two seeds whose runs differ by far more than the sides do; another seed on one side, and there are no pairs."""
    losses = {"a": [2.91, 2.93], "b": [2.9101, 2.9303]}
    sides = [logs.write_logs(tmp_path / side, logs.record_specs(of_seeds)) for side, of_seeds in losses.items()]
    found, expected = compare.compare_sides(*map(compare.read_side, sides)), stats.ttest_rel(losses["b"], losses["a"])
    interval = expected.confidence_interval(0.95)
    assert found["loss_difference_paired_by_seed"] == pytest.approx(
        {"value": 0.0002, "low": interval.low, "high": interval.high, "p": expected.pvalue})
    assert "paired by seed (Student)" in compare.report(found)
    logs.write_log(sides[1], logs.Spec(seed=9))
    assert "loss_difference_paired_by_seed" not in compare.compare_sides(*map(compare.read_side, sides))


def test_several_sides_are_held_against_the_first(tmp_path, capsys):
    """Seeds shared with A: pairs. p corrected for two comparisons: the smaller times 2, the larger as it is."""
    losses = {"a": [2.91, 2.93, 2.92], "b": [2.9101, 2.9303, 2.9202], "c": [2.911, 2.928, 2.922]}
    paths = [logs.write_logs(tmp_path / side, logs.record_specs(of_seeds)) for side, of_seeds in losses.items()]
    a, *others = map(compare.read_side, paths)
    r = compare.compare_several(a, others)
    expected = [stats.ttest_rel(losses[side], losses["a"]) for side in "bc"]
    for row, test in zip(r["others"], expected, strict=True):
        assert row["paired"] and row["loss_difference"]["p"] == pytest.approx(test.pvalue)
        last = row["loss_at_equal_step"][-1]
        assert last["step"] == a.num_iterations and last["value"] == row["loss_difference"]["value"]
        assert row["steps_at_equal_loss"]["low"] < row["steps_at_equal_loss"]["value"]
    assert [row["loss_difference"]["p_holm"] for row in r["others"]] == pytest.approx(
        [2 * expected[0].pvalue, max(2 * expected[0].pvalue, expected[1].pvalue)])
    assert records.main(["compare", *map(str, paths)]) == 0
    assert "C - A" in capsys.readouterr().out
    assert records.main(["compare", *map(str, paths), str(RECORDS / "2025-11-02_SmearMTP")]) == 2
    assert "has no curve" in capsys.readouterr().err


def test_unfinished_runs_are_left_out_and_named(sides, tmp_path):
    side = Path(shutil.copytree(sides[1], tmp_path / "b"))
    logs.write_log(side, logs.Spec(seed=9, last_step=80))
    r = compare.compare_sides(compare.read_side(sides[0]), compare.read_side(side))
    assert r["b"]["n"] == 4 and any("1 unfinished" in line for line in r["warnings"])


@pytest.mark.parametrize("specs, word", [([], "holds no logs"), ([logs.Spec(last_step=60)], "no finished run"),
                                         ([B[0], A[0]], "200, 210 steps")])
def test_sides_that_cannot_be_compared(tmp_path, specs, word):
    with pytest.raises(RecordError, match=word):
        compare.read_side(logs.write_logs(tmp_path, specs))


def test_published_figures_are_a_side_without_curves(sides, capsys):
    assert records.main(["compare", str(sides[0]), str(RECORDS / "2025-11-02_SmearMTP")]) == 0
    out = capsys.readouterr().out
    assert "2.919309   0.000678" in out and "cannot be told apart" in out


def test_windows_of_untimed_steps_alone_do_not_count(tmp_path):
    """A clock that starts after step 10, as the scaled-up run's: the first windows have no time on either side."""
    for side, ms in (("a", 100), ("b", 90)):
        log = logs.write_log(tmp_path / side, logs.Spec(num_iterations=40, val_every=20, seed=ms))
        text = re.sub(r"step:(\d+)/40 (val_loss:\S+ )?train_time:\S+ step_avg:\S+", lambda line: (
            f"step:{line[1]}/40 {line[2] or ''}train_time:{ms * max(0, int(line[1]) - 10)}ms "
            f"step_avg:{ms if int(line[1]) > 10 else math.nan:.2f}ms"), log.read_text())
        log.write_text(text)
    sides = [compare.read_side(tmp_path / side) for side in "ab"]
    rows = compare.compare_sides(*sides)["ms_per_step_at_equal_window"]
    assert len(rows) > 1 and sum(row["steps_a"] for row in rows) == 30
    edges, ms = curves.step_times_of(sides[0], [0, 20, 40])
    assert edges.tolist() == [10, 20, 40] and ms == pytest.approx(100)
    for row in rows:
        assert (row["ms_a"], row["ms_b"]) == (pytest.approx(100), pytest.approx(90))
