"""`compare`: two sets of runs - loss, time, and where a time gain comes from: fewer steps or faster steps.

Of more sets, the losses of each against the first.
"""
import math
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np

from curves import Curve, Side, mean_curve, read_side
from inference import CONFIDENCE, Interval, format_p, holm, mean_interval, paired, signed, std, welch
from run_log import RecordError, Run
from tables import Table, format_json

SLOPE_STEPS = 0.05  # of the run: the last part of the loss curve, whose slope turns loss into steps
ROWS = 12  # of the tables
PARTS = {"fewer": "fewer steps", "faster": "faster steps, at equal window and batch", "mix": "other windows or batches",
         "rest": "the rest: faster steps, other windows or batches"}


# ----------------------------------------------------------------------------------------------------------------------
# Fewer steps or faster steps

class Steps(NamedTuple):
    """The timed steps of both sides by kind. A kind is a pair: tokens of the batch, and long window in blocks."""
    kinds: np.ndarray  # [K, 2], sorted
    counts: list[np.ndarray]  # of A and of B, [K]
    ms: list[np.ndarray]  # per step, [runs, K]; 0 where a side has no such step


def logged_kinds(side: Side) -> np.ndarray | None:
    """The kind of every step, [steps, 2]; None if the logs do not state it."""
    tokens, windows = side.stated("tokens"), side.stated("windows")
    return None if tokens is None or windows is None else np.stack([np.diff(tokens), windows], axis=1)


def shares_of_run(side: Side, num_shares: int) -> np.ndarray:
    """In place of kinds, where logs do not state them: (0, number of the equal part of the run), [steps, 2]."""
    steps = np.arange(side.num_iterations)
    return np.stack([0 * steps, steps * num_shares // side.num_iterations], axis=1)


def sort_steps(sides: tuple[Side, Side], kinds: list[np.ndarray]) -> Steps:
    """kinds: of every step, for each side. Steps that a log does not time (the first ten in 2024) are left out."""
    durations = [np.stack([run.step_durations() for run in side.runs]) for side in sides]
    timed = [np.isfinite(ms).all(0) for ms in durations]
    found = np.unique(np.concatenate([kind[known] for kind, known in zip(kinds, timed)]), axis=0)
    members = [(kind[:, None] == found).all(2) & known[:, None] for kind, known in zip(kinds, timed)]
    counts = [member.sum(0) for member in members]
    return Steps(found, counts, [np.nan_to_num(ms) @ member / np.maximum(count, 1)
                                 for ms, member, count in zip(durations, members, counts)])


def decompose(steps: Steps) -> dict[str, Interval]:
    """The time difference in seconds as a sum of PARTS, each with an interval over runs.

    N steps, a share p(k) of them of kind k at t(k) each, take N m with m = sum p(k) t(k). So T_b - T_a is exactly
    `fewer`, N_b - N_a times the mean m, plus the mean N times m_b - m_a. The latter is `faster`, the sum of t_b - t_a
    times the mean p over the kinds that both have, plus `mix`: p_b - p_a times the mean t, and kinds that one side
    alone has. A mean over all steps would mix these two, since the window grows during the run.
    """
    (count_a, count_b), (ms_a, ms_b) = steps.counts, steps.ms
    num_a, num_b = count_a.sum(), count_b.sum()
    p_a, p_b = count_a / num_a, count_b / num_b
    half_change, num_steps, shared = (num_b - num_a) / 2000, (num_a + num_b) / 2000, (p_a > 0) & (p_b > 0)
    equal, half_mix = shared * num_steps * (p_a + p_b) / 2, num_steps * (p_b - p_a) / 2
    return {"fewer": welch(-half_change * ms_a @ p_a, half_change * ms_b @ p_b),
            "faster": welch(ms_a @ equal, ms_b @ equal),
            "mix": welch(ms_a @ np.where(shared, -half_mix, num_steps * p_a),
                         ms_b @ np.where(shared, half_mix, num_steps * p_b))}


def step_time_rows(steps: Steps) -> list[tuple[tuple, int, dict]]:
    """ms per step at equal kind, a row for neighbouring windows of one batch: (first kind, last window, numbers).

    Kinds that one side alone has stand in rows of their own.
    """
    kinds, rows = list(map(tuple, steps.kinds.tolist())), []
    size = math.ceil(len(kinds) / ROWS)
    for _, group in groupby(range(len(kinds)), lambda k: (kinds[k][0], *(bool(count[k]) for count in steps.counts))):
        group = list(group)
        for row in (group[start:start + size] for start in range(0, len(group), size)):
            counts, weights = [count[row].sum() for count in steps.counts], sum(steps.counts)[row]
            ms = [float(np.average(ms.mean(0)[row], weights=weights)) if count else math.nan
                  for ms, count in zip(steps.ms, counts)]
            rows.append((kinds[row[0]], kinds[row[-1]][1], {"steps_a": int(counts[0]), "steps_b": int(counts[1]),
                                                            "ms_a": ms[0], "ms_b": ms[1]}))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Loss curves

def loss_rows(a: Curve, b: Curve) -> dict[str, list[dict]]:
    """Loss of both at equal step, at equal train time and, if they are not the same, at equal number of tokens.

    Between validations it is linear.
    """
    steps = np.intersect1d(a.steps, b.steps)
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, ROWS).astype(int))] if len(steps) else steps
    at_step = [{"step": int(step), "loss_a": float(a.losses[a.steps == step][0]),
                "loss_b": float(b.losses[b.steps == step][0])} for step in steps]
    rows = {"step": at_step, "time": [], "tokens": []}
    if np.isfinite([*a.seconds, *b.seconds]).all():
        rows["time"] = rows_at_equal("seconds", a, b)
    if a.tokens is not None and b.tokens is not None and any(
            a.tokens[a.steps == row["step"]] != b.tokens[b.steps == row["step"]] for row in at_step):
        rows["tokens"] = rows_at_equal("tokens", a, b)
    return rows


def rows_at_equal(name: str, a: Curve, b: Curve) -> list[dict]:
    x_a, x_b = getattr(a, name), getattr(b, name)
    end = min(x_a[-1], x_b[-1])
    return [{name: float(x), "loss_a": float(np.interp(x, x_a, a.losses)), "loss_b": float(np.interp(x, x_b, b.losses))}
            for x in np.linspace(end / ROWS, end, ROWS)]


def first_reach(run: Run, loss: float, slope: float) -> tuple[float, bool]:
    """The step at which a run's validation loss, linear between validations, first is at or below `loss`.

    A run that stays above is continued from its last validation at `slope`, in loss per step: (that step, False).
    """
    known = [v for v in run.validations if math.isfinite(v.loss)]
    steps, losses = [v.step for v in known], [v.loss for v in known]
    for i, value in enumerate(losses):
        if value <= loss:
            before = max(i - 1, 0)
            share = (losses[before] - loss) / (losses[before] - value) if losses[before] > value else 0.0
            return steps[before] + share * (steps[i] - steps[before]), True
    return steps[-1] + ((loss - losses[-1]) / slope if slope < 0 else math.nan), False


def slope_beyond(curve: Curve) -> float:
    """Loss per step with which a curve is continued: that of its last 5 % or, if it rises there, of its second half; of
    two validations at least."""
    slopes = []
    for begin in ((1 - SLOPE_STEPS) * curve.steps[-1], curve.steps[-1] / 2):
        first = min(int(np.searchsorted(curve.steps, begin, side="right")) - 1, len(curve.steps) - 2)
        slopes.append(float(np.polyfit(curve.steps[first:], curve.losses[first:], 1)[0]))
    return slopes[0] if slopes[0] < 0 else slopes[1]


def reach_equal_loss(a: Side, b: Side, curves: tuple[Curve, Curve]) -> tuple[float, list[list[tuple[float, bool]]]]:
    """A loss, and what `first_reach` says of it for each run of A and of B. It is the higher of the means at the end.

    Runs of the side with that mean end near it, above or below. So those that stay above are continued by a few steps,
    at the slope of their side's mean curve (`slope_beyond`), rather than left out: that would choose the better.
    """
    loss = max(float(np.mean(side.losses)) for side in (a, b))
    return loss, [[first_reach(run, loss, slope_beyond(curve)) for run in side.runs]
                  for side, curve in zip((a, b), curves)]


def steps_at_equal_loss(a: Side, b: Side, curves: tuple[Curve, Curve]) -> dict:
    """Steps that B's runs take to one loss, minus those of A's."""
    loss, reached = reach_equal_loss(a, b, curves)
    steps = ([step for step, _ in runs] for runs in reached)
    return {"difference": asdict(welch(*steps)), "loss": loss} | {
        f"{what}_{key}": value for key, runs in zip("ab", reached) for what, value in (
            ("steps", float(np.mean([step for step, _ in runs]))), ("above", sum(not below for _, below in runs)))}


def describe_equal_loss(r: dict) -> str:
    """How `compare_sides` counted the steps at equal loss, in words."""
    steps = r["steps_at_equal_loss"]
    above = [f"{steps[f'above_{key}']} of {r[key]['n']} runs of {key.upper()}" for key in "ab" if steps[f"above_{key}"]]
    ending = f"; {' and '.join(above)} stay above it and are continued at their mean curve's slope" if above else ""
    return (f"until the loss, linear between validations, first is {steps['loss']:.6f}, the higher mean at the end"
            + ending)


def basis(r: dict) -> str:
    """What the differences of `compare_sides` rest on, in words."""
    if r["a"]["n"] > 1 and r["b"]["n"] > 1:
        return f"{r['confidence']:.0%} intervals over runs (Welch)"
    return "no interval and no test, since a side has one run"


def order_by_seed(a: Side, b: Side) -> list[list[int]] | None:
    """For A and for B, which run has the first seed, the second, ...; None unless each seed is that of one run of A and
    of one of B, and there are two or more."""
    seeds = [[run.constants.get("drawn seed", "") for run in side.runs] for side in (a, b)]
    ordered = [sorted(of_side) for of_side in seeds]
    alike = ordered[0] == ordered[1] and "" not in ordered[0] and len({*ordered[0]}) == len(ordered[0]) > 1
    return [sorted(range(len(of_side)), key=of_side.__getitem__) for of_side in seeds] if alike else None


def warnings_for(a: Side, b: Side) -> list[str]:
    """What differs between the sides besides the script, or within one."""
    lines = []
    for name in ("hardware", "driver", "torch", "cuda"):
        values = [sorted({getattr(run.environment, name) or "unknown" for run in side.runs}) for side in (a, b)]
        if values[0] != values[1] or len(values[0]) > 1:
            lines.append(f"{name} differs: {' / '.join(values[0])} against {' / '.join(values[1])}; "
                         f"times do not show what the script does")
    for side in (a, b):
        if len({run.source for run in side.runs}) > 1:
            lines.append(f"{side.name} holds runs of different sources")
        if side.skipped:
            lines.append(f"{side.name}: {side.skipped} unfinished runs are left out")
        if side.has_curve and logged_kinds(side) is None:
            lines.append(f"{side.name}: the logs do not state the windows and batches of the steps, or not the same; "
                         f"faster steps cannot be told from other windows or batches")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# The command

def describe_side(side: Side) -> dict:
    low, high = mean_interval(side.losses)
    return {"name": side.name, "n": len(side.runs), "steps": side.num_iterations,
            "loss_mean": float(np.mean(side.losses)), "loss_std": std(side.losses), "loss_low": low, "loss_high": high,
            "seconds_mean": float(np.mean(side.seconds)), "seconds_std": std(side.seconds),
            "ms_per_step": 1000 * float(np.mean(side.seconds)) / max(side.num_iterations, 1)}


def compare_sides(a: Side, b: Side) -> dict:
    """Everything that `compare` prints, as plain values; seconds, nats/token, b minus a."""
    result = {"a": describe_side(a), "b": describe_side(b), "confidence": CONFIDENCE,
              "loss_difference": asdict(welch(a.losses, b.losses)),
              "seconds_difference": asdict(welch(a.seconds, b.seconds)), "warnings": warnings_for(a, b)}
    order = order_by_seed(a, b)
    if order:
        result["loss_difference_paired_by_seed"] = asdict(difference(order, a.losses, b.losses))
    if a.has_curve and b.has_curve:
        curves = mean_curve(a), mean_curve(b)
        result |= {"loss_at_equal": loss_rows(*curves), "steps_at_equal_loss": steps_at_equal_loss(a, b, curves)}
        if math.isfinite(curves[0].seconds[-1] + curves[1].seconds[-1]):
            result |= explain_times(a, b)
    return result


def difference(order: list[list[int]] | None, values_a: list[float], values_b: list[float]) -> Interval:
    """B's values minus A's, one a run: in pairs by the `order` of their seeds or, where that is None, by Welch."""
    return paired(*(np.take(v, i) for v, i in zip((values_a, values_b), order))) if order else welch(values_a, values_b)


def losses_at(side: Side, step: int) -> list[float]:
    return [next(v.loss for v in run.validations if v.step == step) for run in side.runs]


def compare_several(a: Side, others: list[Side]) -> dict:
    """Losses and steps at equal loss of each other side minus A's, as plain values. `p_holm` is corrected for the
    number of the other sides. Raises RecordError on a side without a curve."""
    if flat := [side.name for side in (a, *others) if not side.has_curve]:
        raise RecordError(f"{', '.join(flat)} has no curve of three validations: compare it with one side.")
    curve_a, rows = mean_curve(a), []
    for b in others:
        curve_b, order = mean_curve(b), order_by_seed(a, b)
        _, reached = reach_equal_loss(a, b, (curve_a, curve_b))
        rows.append(describe_side(b) | {
            "paired": order is not None, "loss_difference": asdict(difference(order, a.losses, b.losses)),
            "steps_at_equal_loss": asdict(difference(order, *([step for step, _ in runs] for runs in reached))),
            "loss_at_equal_step": [
                {"step": int(step)} | asdict(difference(order, losses_at(a, step), losses_at(b, step)))
                for step in np.intersect1d(curve_a.steps, curve_b.steps)[1:]]})
    for key in ("loss_difference", "steps_at_equal_loss"):
        for row, p in zip(rows, holm([row[key]["p"] for row in rows])):
            row[key]["p_holm"] = p
    return {"a": describe_side(a), "others": rows, "confidence": CONFIDENCE,
            "warnings": list(dict.fromkeys(line for b in others for line in warnings_for(a, b)))}


def explain_times(a: Side, b: Side) -> dict:
    """The parts of the time difference, and ms per step at equal window and batch. Where a log does not state these:
    no parts but fewer steps and the rest, and ms per step at equal share of the run."""
    kinds = [logged_kinds(side) for side in (a, b)]
    if all(kind is not None for kind in kinds):
        steps = sort_steps((a, b), kinds)
        return {"decomposition": {name: asdict(part) for name, part in decompose(steps).items()},
                "ms_per_step_at_equal_window": [{"tokens": tokens, "windows": [first, last]} | numbers
                                                for (tokens, first), last, numbers in step_time_rows(steps)]}
    num_shares = min(ROWS, a.num_iterations, b.num_iterations)
    all_alike, by_share = (sort_steps((a, b), [shares_of_run(side, num) for side in (a, b)]) for num in (1, num_shares))
    parts = decompose(all_alike)
    return {"decomposition": {"fewer": asdict(parts["fewer"]), "rest": asdict(parts["faster"])},
            "ms_per_step_at_equal_share": [{"share": [first / num_shares, (last + 1) / num_shares]} | numbers
                                           for (_, first), last, numbers in step_time_rows(by_share)]}


# ----------------------------------------------------------------------------------------------------------------------
# Tables, of the command, the report's page and a record's README

def or_blank(value: float, spec: str) -> str:
    return signed(value, spec) if math.isfinite(value) else ""


def between(low: float, high: float, spec: str) -> str:
    return f"{low:{spec}} to {high:{spec}}" if math.isfinite(low) else ""


def interval_cells(i: dict, spec: str) -> list[str]:
    """An Interval's value, bounds, p and, where there is one, corrected p; blank where one run forbids them."""
    return [or_blank(i["value"], spec), between(i["low"], i["high"], spec),
            *(format_p(i[p]) if math.isfinite(i[p]) else "" for p in ("p", "p_holm") if p in i)]


def sides_table(sides: dict[str, dict]) -> Table:
    """sides: of `describe_side`, by label."""
    return Table("Runs that finished", ["", "n", "steps", "mean loss", "std", f"{CONFIDENCE:.0%} interval",
                                        "mean time (s)", "std", "ms/step"], [
        [label, str(s["n"]), f"{s['steps']:,}", f"{s['loss_mean']:.6f}", or_blank(s["loss_std"], ".6f"),
         between(s["loss_low"], s["loss_high"], ".6f"), or_blank(s["seconds_mean"], ".3f"),
         or_blank(s["seconds_std"], ".3f"), or_blank(s["ms_per_step"], ".2f")] for label, s in sides.items()])


def difference_table(r: dict) -> Table:
    found = [("final loss (nats/token)", r["loss_difference"], "+.6f"),
             ("the same, paired by seed (Student)", r.get("loss_difference_paired_by_seed"), "+.6f"),
             ("training time (s)", r["seconds_difference"], "+.3f"),
             *((f"of which {PARTS[name]} (s)", part, "+.3f") for name, part in r.get("decomposition", {}).items()),
             ("steps at equal loss", r.get("steps_at_equal_loss", {}).get("difference"), "+.1f")]
    return Table(f"B - A, {basis(r)}", ["", "difference", f"{CONFIDENCE:.0%} interval", "p"], [
        [name, *interval_cells(i, spec)] for name, i, spec in found if i and math.isfinite(i["value"])])


def step_time_table(r: dict, labels: list[str]) -> Table | None:
    """ms per step by window, or by share of the run where logs do not state it; for one side, its own columns alone."""
    sides, both = "ab"[:len(labels)], len(labels) > 1
    for key, title, names in (("window", "at equal window and batch", ["tokens of a batch", "window (blocks)"]),
                              ("share", "at equal share of the run: the logs do not state windows", ["share"])):
        rows = [[*(["{:.0%} to {:.0%}".format(*row["share"])] if key == "share" else
                   [f"{row['tokens']:,}", "-".join(map(str, sorted(set(row["windows"]))))]),
                 *(f"{row[f'steps_{side}']:,}" for side in sides),
                 *(or_blank(row[f"ms_{side}"], ".2f") for side in sides),
                 *[or_blank(row["ms_b"] - row["ms_a"], "+.2f")] * both]
                for row in r.get(f"ms_per_step_at_equal_{key}", [])]
        if rows:
            columns = [f"{what} {label}".strip() for what in ("steps", "ms/step") for label in labels]
            return Table(f"ms/step {title}", [*names, *columns, *["B - A"] * both], rows)
    return None


def equal_tables(r: dict) -> list[Table]:
    """Loss at equal step, time and tokens."""
    return [Table(f"Loss at equal {key}", [name, "A", "B", "B - A"], [
        [format(row[name], spec), f"{row['loss_a']:.6f}", f"{row['loss_b']:.6f}",
         f"{row['loss_b'] - row['loss_a']:+.6f}"] for row in rows])
        for key, name, spec in (("step", "step", ",d"), ("time", "seconds", ",.1f"), ("tokens", "tokens", ",.0f"))
        if (rows := r.get("loss_at_equal", {}).get(key))]


def report(r: dict) -> str:
    sides, times = {"A": r["a"], "B": r["b"]}, step_time_table(r, ["A", "B"])
    parts = [sides_table(sides).as_text(), difference_table(r).as_text(), *([times.as_text()] if times else []),
             *(table.as_text() for table in equal_tables(r))]
    parts[0] += "".join(f"\n{label}: {side['name']}" for label, side in sides.items())
    if "steps_at_equal_loss" in r:
        parts[1] += f"\nSteps at equal loss: {describe_equal_loss(r)}."
    else:
        parts.append("No curves on one side: fewer and faster steps cannot be told apart.")
    return "\n\n".join(parts + ["\n".join(f"warning: {line}" for line in r["warnings"])]).rstrip()


def tables_of_several(r: dict) -> list[Table]:
    """Of `compare_several`: the sides, B, C, ... against A, and their losses minus A's at equal steps."""
    others = dict(zip(ascii_uppercase[1:], r["others"]))
    interval = f"{r['confidence']:.0%} interval"
    pairing = "in pairs by seed" if all(row["paired"] for row in r["others"]) else "Welch where seeds differ"
    rows = [[f"{label} - A", *interval_cells(row["loss_difference"], "+.6f"),
             *interval_cells(row["steps_at_equal_loss"], "+.1f")] for label, row in others.items()]
    curves = [{point["step"]: point for point in row["loss_at_equal_step"]} for row in r["others"]]
    at_step = [[f"{step:,}", *(f"{p['value']:+.4f} ({between(p['low'], p['high'], '+.4f') or 'one run'})" for p in (
        curve[step] for curve in curves))] for step in sorted(set.intersection(*map(set, curves)))]
    return [sides_table({"A": r["a"]} | others),
            Table(f"Against A, {pairing}; p* by Holm for {len(rows)} comparisons", [
                "", "final loss", interval, "p", "p*", "steps at equal loss", interval, "p", "p*"], rows),
            Table(f"Loss minus A's at equal step, {interval}", ["step", *(row[0] for row in rows)], at_step)]


def report_several(r: dict) -> str:
    names = "\n".join(f"{label}: {side['name']}" for label, side in zip(ascii_uppercase, (r["a"], *r["others"])))
    parts = [names, *(table.as_text() for table in tables_of_several(r))]
    return "\n\n".join(parts + ["\n".join(f"warning: {line}" for line in r["warnings"])]).rstrip()


def compare(path_a: Path, paths_b: list[Path], as_json: bool) -> None:
    a, *others = map(read_side, (path_a, *paths_b))
    result = compare_sides(a, *others) if len(others) == 1 else compare_several(a, others)
    print(format_json(result) if as_json else (report if len(others) == 1 else report_several)(result))
