"""`compare`: two sets of runs - loss, time, and where a time gain comes from: fewer steps or faster steps."""
import math
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from inference import CONFIDENCE, Interval, std, welch
from run_log import RecordError, Run, find_logs, read_log, read_runs
from tables import format_json, format_table

SLOPE_STEPS = 0.05  # of the run: the last part of the loss curve, whose slope turns loss into steps
ROWS = 12  # of the tables of curves


class Side(NamedTuple):
    """Runs of one script: all finished, all of one length."""
    name: str
    runs: list[Run]
    skipped: int  # unfinished ones

    @property
    def losses(self) -> list[float]:
        return [run.final_loss for run in self.runs]

    @property
    def seconds(self) -> list[float]:
        return [run.train_seconds for run in self.runs]

    @property
    def num_iterations(self) -> int:
        return self.runs[0].num_iterations

    @property
    def has_curve(self) -> bool:
        return all(len(run.validations) > 2 for run in self.runs)


class Curve(NamedTuple):
    """Means over runs at the steps that all runs validated at."""
    steps: np.ndarray
    losses: np.ndarray
    seconds: np.ndarray


def read_side(path: Path) -> Side:
    """Finished runs of a log, of a folder, or of published figures; a record's folder gives its own runs, without its
    baseline's. Raises RecordError if there are none, or of several lengths."""
    direct = [log for log in find_logs(path) if log.parent == path] if path.is_dir() else []
    runs = [read_log(log) for log in direct] or read_runs(path)
    finished = [run for run in runs if run.finished and math.isfinite(run.final_loss)]
    if not finished:
        raise RecordError(f"{path} holds no finished run: wait for its last step or name other logs.")
    lengths = sorted({run.num_iterations for run in finished})
    if len(lengths) > 1:
        raise RecordError(f"{path} holds runs of {', '.join(map(str, lengths))} steps: compare one kind at a time.")
    return Side(path.name, finished, len(runs) - len(finished))


def mean_curve(side: Side) -> Curve:
    by_step = [{v.step: v for v in run.validations} for run in side.runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    loss = np.array([[points[step].loss for step in steps] for points in by_step]).mean(0)
    seconds = np.array([[points[step].train_ms for step in steps] for points in by_step]).mean(0) / 1000
    return Curve(np.array(steps), loss, seconds)


# ----------------------------------------------------------------------------------------------------------------------
# Fewer steps or faster steps

def window_times(side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Mean ms per step by long window in blocks, [runs, W + 1], nan for a window without steps; its steps, [W + 1].

    Steps that the log does not time (the first ten of 2024's scripts) are left out of both.
    """
    windows = side.runs[0].window_blocks()
    durations = np.stack([run.step_durations() for run in side.runs])
    timed = np.isfinite(durations).all(0)
    counts = np.bincount(windows[timed])
    sums = np.stack([np.bincount(windows[timed], weights=row[timed]) for row in durations])
    return sums / np.where(counts, counts, math.nan), counts


def same_windows(a: Side, b: Side) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """window_times of both over the windows that either has; a window that one side skips is interpolated."""
    times, counts = zip(window_times(a), window_times(b))
    size = max(map(len, counts))
    counts = [np.pad(count, (0, size - len(count))) for count in counts]
    used = np.flatnonzero(counts[0] + counts[1])
    filled = []
    for time in times:
        known = np.flatnonzero(np.isfinite(time[0]))
        filled.append(np.stack([np.interp(used, known, row[known]) for row in time]))
    return filled, [count[used] for count in counts], used


def decompose(a: Side, b: Side) -> dict[str, Interval]:
    """The time difference in seconds as `fewer` + `faster`, each with an interval over runs.

    With N(w) steps at window w, each of t(w): T = sum N t, so T_b - T_a = sum (N_b - N_a) (t_a + t_b) / 2
    + sum (t_b - t_a) (N_a + N_b) / 2, exactly. The sums run over windows because the window grows during the run:
    an average over all steps would mix the two.
    """
    (time_a, time_b), (count_a, count_b), _ = same_windows(a, b)
    half_change, mean_count = (count_b - count_a) / 2000, (count_a + count_b) / 2000
    return {"fewer": welch(-(time_a @ half_change), time_b @ half_change),
            "faster": welch(time_a @ mean_count, time_b @ mean_count)}


def step_time_rows(a: Side, b: Side) -> list[dict]:
    """ms per step at equal window: groups of neighbouring windows, so that each row holds many steps."""
    (time_a, time_b), (count_a, count_b), windows = same_windows(a, b)
    both = [time.mean(0) for time in (time_a, time_b)]
    rows = []
    for group in np.array_split(np.arange(len(windows)), min(ROWS, len(windows))):
        weights = (count_a + count_b)[group]
        ms_a, ms_b = (float(np.average(time[group], weights=weights)) for time in both)
        rows.append({"window_blocks": [int(windows[group[0]]), int(windows[group[-1]])],
                     "steps_a": int(count_a[group].sum()), "steps_b": int(count_b[group].sum()),
                     "ms_a": ms_a, "ms_b": ms_b})
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Loss curves

def loss_rows(a: Curve, b: Curve) -> dict[str, list[dict]]:
    """Loss of both at equal step, and at equal train time (linear between validations)."""
    steps = np.intersect1d(a.steps, b.steps)
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, ROWS).astype(int))] if len(steps) else steps
    at_step = [{"step": int(step), "loss_a": float(a.losses[a.steps == step][0]),
                "loss_b": float(b.losses[b.steps == step][0])} for step in steps]
    end = min(a.seconds[-1], b.seconds[-1])
    at_time = [{"seconds": float(s), "loss_a": float(np.interp(s, a.seconds, a.losses)),
                "loss_b": float(np.interp(s, b.seconds, b.losses))} for s in np.linspace(end / ROWS, end, ROWS)] \
        if np.isfinite([*a.seconds, *b.seconds]).all() else []
    return {"step": at_step, "time": at_time}


def final_slope(curve: Curve) -> tuple[float, int]:
    """Loss per step over the last 5 % of the run (two validations at least), and the step at which this part begins."""
    start = min(int(np.searchsorted(curve.steps, curve.steps[-1] * (1 - SLOPE_STEPS), side="right")) - 1,
                len(curve.steps) - 2)
    slope = np.polyfit(curve.steps[start:], curve.losses[start:], 1)[0]
    return float(slope), int(curve.steps[start])


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
        if len(side.runs) < 2:
            lines.append(f"{side.name} is one run: no interval, no test")
        if side.skipped:
            lines.append(f"{side.name}: {side.skipped} unfinished runs are left out")
    if a.runs[0].max_window != b.runs[0].max_window:
        lines.append(f"the windows grow to {a.runs[0].max_window} and {b.runs[0].max_window} tokens")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# The command

def compare_sides(a: Side, b: Side) -> dict:
    """Everything that `compare` prints, as plain values; seconds, nats/token, b minus a."""
    result = {name: {"name": side.name, "n": len(side.runs), "steps": side.num_iterations,
                     "loss_mean": float(np.mean(side.losses)), "loss_std": std(side.losses),
                     "seconds_mean": float(np.mean(side.seconds)), "seconds_std": std(side.seconds),
                     "ms_per_step": 1000 * float(np.mean(side.seconds)) / max(side.num_iterations, 1)}
              for name, side in (("a", a), ("b", b))}
    result |= {"confidence": CONFIDENCE, "loss_difference": asdict(welch(a.losses, b.losses)),
               "seconds_difference": asdict(welch(a.seconds, b.seconds)), "warnings": warnings_for(a, b)}
    if a.has_curve and b.has_curve:
        curves = mean_curve(a), mean_curve(b)
        slope, start = final_slope(curves[0])
        result |= {"loss_at_equal": loss_rows(*curves), "loss_per_step_at_the_end": slope, "slope_from_step": start,
                   "loss_difference_in_steps": result["loss_difference"]["value"] / slope if slope else math.nan}
        if math.isfinite(curves[0].seconds[-1] + curves[1].seconds[-1]):
            result |= {"decomposition": {name: asdict(part) for name, part in decompose(a, b).items()},
                       "ms_per_step_at_equal_window": step_time_rows(a, b)}
    return result


def report(r: dict) -> str:
    a, b = r["a"], r["b"]
    lines = [format_table([[key, str(s["n"]), f"{s['steps']:,}", f"{s['loss_mean']:.6f} +- {s['loss_std']:.6f}",
                            f"{s['seconds_mean']:.3f} +- {s['seconds_std']:.3f}", f"{s['ms_per_step']:.2f}", s["name"]]
                           for key, s in (("A", a), ("B", b))],
                          ["", "runs", "steps", "loss (nats/token)", "train time (s)", "ms/step", "name"]), "",
             f"B - A, {r['confidence']:.0%} intervals over runs (Welch):"]
    rows = [["loss", Interval(**r["loss_difference"]).format("+.6f", " nats/token")],
            ["time", Interval(**r["seconds_difference"]).format("+.3f", " s")]]
    if "decomposition" in r:
        rows += [["  fewer steps", Interval(**r["decomposition"]["fewer"]).format("+.3f", " s")],
                 ["  faster steps", Interval(**r["decomposition"]["faster"]).format("+.3f", " s")
                  + ", at equal window"]]
    if "loss_per_step_at_the_end" in r:
        steps = r["loss_difference_in_steps"]
        rows.append(["loss in steps", f"{abs(steps):.1f} steps {'gained' if steps > 0 else 'lost'}: A's curve falls by "
                     f"{-1e6 * r['loss_per_step_at_the_end']:.2f}e-6 a step from step {r['slope_from_step']:,} on"])
    lines.append(format_table(rows))
    if "ms_per_step_at_equal_window" in r:
        lines += ["", "ms/step at equal window (blocks of 128 tokens):", format_table(
            [["-".join(map(str, sorted(set(row["window_blocks"])))), f"{row['steps_a']:,}", f"{row['steps_b']:,}",
              f"{row['ms_a']:.2f}", f"{row['ms_b']:.2f}", f"{row['ms_b'] - row['ms_a']:+.2f}"]
             for row in r["ms_per_step_at_equal_window"]], ["window", "steps A", "steps B", "A", "B", "B - A"])]
    elif "loss_at_equal" not in r:
        lines += ["", "No curves on one side: fewer and faster steps cannot be told apart."]
    for key, title, unit in (("step", "step", ",d"), ("time", "seconds", ",.1f")):
        curve_rows = r.get("loss_at_equal", {}).get(key)
        if curve_rows:
            lines += ["", f"Loss at equal {key}:", format_table(
                [[format(row[title], unit), f"{row['loss_a']:.6f}", f"{row['loss_b']:.6f}",
                  f"{row['loss_b'] - row['loss_a']:+.6f}"] for row in curve_rows], [title, "A", "B", "B - A"])]
    return "\n".join([*lines, *([""] if r["warnings"] else []), *(f"warning: {line}" for line in r["warnings"])])


def compare(path_a: Path, path_b: Path, as_json: bool) -> None:
    result = compare_sides(read_side(path_a), read_side(path_b))
    print(format_json(result) if as_json else report(result))
