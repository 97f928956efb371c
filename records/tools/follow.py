"""`follow`: a live or finished log against a band of reference runs, from its first validations on."""
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from curves import read_curve
from run_log import NoSteps, RecordError, Run, Validation, read_log
from tables import format_json

PUBLISHED = Path(__file__).resolve().parents[1] / "2025-11-02_SmearMTP"
FALSE_ALARM = 0.01  # chance that a faithful run leaves the band anywhere
LENGTH_TOLERANCE = 0.02  # runs whose lengths differ by less are compared at equal step, the ends with each other
EVERY = 5.0  # seconds between looks at a live log
PATIENCE = 600.0  # seconds without growth after which to stop
PRINTED = 0.00005  # half a unit of a loss with four decimals
HEADER = "  step       loss  reference  difference  sigmas      band   time (s)  reference  left (min)"


class Point(NamedTuple):
    """Reference runs at one step: mean loss, its standard deviation over runs, mean train time."""
    loss: float
    std: float
    train_ms: float


class Band(NamedTuple):
    """`width` standard deviations on either side hold a further run at all steps but for FALSE_ALARM."""
    name: str
    num_iterations: int
    points: dict[int, Point]
    width: float

    def at(self, step: int, num_iterations: int) -> Point | None:
        return self.points.get(self.num_iterations if step == num_iterations else step)


def band_width(num_runs: int, num_points: int) -> float:
    """In sigmas: Student's quantile for one more run, shared out over the points (Bonferroni)."""
    return float(stats.t.isf(FALSE_ALARM / 2 / num_points, num_runs - 1)) * math.sqrt(1 + 1 / num_runs)


def read_band(path: Path) -> Band:
    """From published.json in `path`, or from two or more finished logs. Raises RecordError if there are fewer."""
    curve = read_curve(path)
    if len(curve.side.runs) < 2:
        raise RecordError(f"{path} holds one finished run: a band needs 2 or more of one length.")
    points = {step: Point(*values) for step, *values in zip(
        curve.steps.tolist(), curve.losses.tolist(), curve.stds.tolist(), (1000 * curve.seconds).tolist())}
    return Band(path.name, curve.side.num_iterations, points, band_width(len(curve.side.runs), len(points)))


def judge(run: Run, band: Band) -> list[dict]:
    """One row for each validation that the band knows: difference in sigmas, inside or outside.

    Raises RecordError if the run's schedule is not the reference's.
    """
    if abs(run.num_iterations / band.num_iterations - 1) > LENGTH_TOLERANCE:
        raise RecordError(f"{run.path} runs for {run.num_iterations:,} steps, the reference for "
                          f"{band.num_iterations:,}: give --reference a folder of logs of this length.")
    rows = []
    for v in run.validations:
        point = band.at(v.step, run.num_iterations)
        if point is not None:
            difference = v.loss - point.loss
            inside = abs(difference) <= band.width * point.std + PRINTED
            rows.append({"step": v.step, "loss": v.loss, "reference_loss": point.loss, "difference": difference,
                         "sigmas": difference / point.std if point.std else math.nan,
                         "band": "inside" if inside else "above" if difference > 0 else "below" if difference < 0
                         else "no loss", "seconds": v.train_ms / 1000, "reference_seconds": point.train_ms / 1000,
                         "seconds_left": seconds_left(run, v, band)})
    return rows


def seconds_left(run: Run, v: Validation, band: Band) -> float:
    """Train time to the end: the reference's, in proportion to the time so far; the window's growth is in it."""
    steps = sorted(step for step, point in band.points.items() if math.isfinite(point.train_ms))
    progress = band.num_iterations / run.num_iterations
    spent = np.interp(v.step * progress, steps, [band.points[step].train_ms for step in steps])
    total = band.points[steps[-1]].train_ms
    return (total - spent) / 1000 * (v.train_ms / spent if spent else 1.0)


def minutes(seconds: float) -> str:
    return "{}:{:02d}".format(*divmod(round(seconds), 60))


def format_row(row: dict) -> str:
    sigmas = f"{row['sigmas']:+6.1f}" if math.isfinite(row["sigmas"]) else f"{'':>6}"
    return (f"{row['step']:>6,}  {row['loss']:>9.6f}  {row['reference_loss']:>9.6f}  {row['difference']:>+10.6f}  "
            f"{sigmas}  {row['band']:>8}  {row['seconds']:>9.1f}  {row['reference_seconds']:>9.1f}  "
            f"{minutes(row['seconds_left'])}")


def verdict(run: Run, rows: list[dict], band: Band) -> str:
    """One sentence on what the validations so far say."""
    outside = [row for row in rows if row["band"] != "inside"]
    state = "finished" if run.finished else f"at step {run.last_step:,} of {run.num_iterations:,}"
    width = f"the mean of {band.name} +- {band.width:.1f} sigma"
    if not rows:
        return f"{state}: no validation yet that the reference knows."
    if outside:
        return (f"{state}: not reproducing: the loss is {outside[0]['band']} {width} first at step "
                f"{outside[0]['step']:,}, at {len(outside)} of {len(rows)} validations.")
    return f"{state}: reproducing: all {len(rows)} validations lie within {width}."


def follow(path: Path, reference: Path, once: bool, as_json: bool) -> int:
    """Prints a row for each validation until the run ends or stalls, or at once. 0 if inside."""
    band = read_band(reference)
    shown = 0
    while True:
        run = read_live(path, may_wait=not once)
        rows = judge(run, band) if run else []
        if not as_json:
            for row in rows[shown:]:
                print(*([] if shown else [HEADER]), format_row(row), sep="\n", flush=True)
                shown += 1
        stalled = time.time() - path.stat().st_mtime > PATIENCE
        if once or stalled or run and run.finished:
            break
        time.sleep(EVERY)
    if run is None:
        raise RecordError(f"{path} has no step lines after {PATIENCE:g} s: see the console of the run.")
    sentence = verdict(run, rows, band) + (f" The log has not grown for {PATIENCE:g} s: has the run died?"
                                           if stalled and not run.finished and not once else "")
    print(format_json({"verdict": sentence, "finished": run.finished, "validations": rows}) if as_json else sentence)
    return int(any(row["band"] != "inside" for row in rows))


def read_live(path: Path, may_wait: bool) -> Run | None:
    """The log so far; None while a run that has just begun has written no step yet."""
    if path.is_dir():
        raise RecordError(f"{path} is a folder: name one log.")
    try:
        return read_log(path)
    except NoSteps:
        if may_wait:
            return None
        raise

