"""Runs of one script as a side, and what they show on average: the curves that the tools share."""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from run_log import RecordError, Run, find_logs, read_log, read_published, read_runs


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

    def stated(self, name: str) -> np.ndarray | None:
        """`windows` or `tokens` of the runs, step by step; None if a log does not state them, or not the same."""
        values = [getattr(run, name) for run in self.runs]
        return values[0] if all(v is not None and np.array_equal(v, values[0]) for v in values) else None


class Curve(NamedTuple):
    """Means over a side's runs at the steps that all of them validated at, and sample deviations over the runs."""
    side: Side
    steps: np.ndarray
    losses: np.ndarray
    stds: np.ndarray  # of the losses
    seconds: np.ndarray
    tokens: np.ndarray | None  # None: the logs do not state them
    extras: dict[str, np.ndarray]  # further fields of the validations
    # Between validations: step at the beginning, ms per step; the last value stands twice.
    step_times: tuple[np.ndarray, np.ndarray] | None


def read_side(path: Path) -> Side:
    """Finished runs of a log, of a folder, or of published figures; a record's folder gives its own runs, without its
    baseline's. Raises RecordError if there are none, or of several lengths."""
    direct = [log for log in find_logs(path) if log.parent == path] if path.is_dir() else []
    return side_of([read_log(log) for log in direct] or read_runs(path), path.name, path)


def side_of(runs: list[Run], name: str, path: Path) -> Side:
    """The finished ones of `runs`, which come from `path`. Raises RecordError as `read_side` does."""
    finished = [run for run in runs if run.finished and math.isfinite(run.final_loss)]
    if not finished:
        raise RecordError(f"{path} holds no finished run: wait for its last step or name other logs.")
    lengths = sorted({run.num_iterations for run in finished})
    if len(lengths) > 1:
        raise RecordError(f"{path} holds runs of {', '.join(map(str, lengths))} steps: compare one kind at a time.")
    return Side(name, finished, len(runs) - len(finished))


def mean_curve(side: Side) -> Curve:
    by_step = [{v.step: v for v in run.validations} for run in side.runs]
    steps = sorted(set.intersection(*map(set, by_step)))

    def over_runs(value) -> np.ndarray:
        return np.array([[value(points[step]) for step in steps] for points in by_step])

    losses = over_runs(lambda v: v.loss)
    names = set.intersection(*(set(v.extras) for run in side.runs for v in run.validations))
    tokens = side.stated("tokens")
    return Curve(side, np.array(steps), losses.mean(0), losses.std(0, ddof=min(1, len(losses) - 1)),
                 over_runs(lambda v: v.train_ms).mean(0) / 1000, None if tokens is None else tokens[steps],
                 {name: over_runs(lambda v: v.extras[name]).mean(0) for name in sorted(names)},
                 step_times_of(side, steps) if side.has_curve else None)


def step_times_of(side: Side, steps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Curve.step_times. Validations are exact, single steps jitter; steps before the clock are left out."""
    durations = np.stack([run.step_durations() for run in side.runs])
    edges = np.unique(np.maximum(steps, side.runs[0].clock_start))
    ms = [durations[:, begin:end].mean(1).mean() for begin, end in zip(edges, edges[1:])]
    return edges, np.array([*ms, ms[-1]])


def published_curve(path: Path) -> Curve:
    """The mean curve of a published.json; ms per step from its times, validation to validation."""
    runs, data = read_published(path)
    rows = data["record"]["mean_curve"]
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    extras = {key: values for key, values in column.items() if "lambda" in key and not key.endswith("_std")}
    steps = column["step"]
    per_step = np.diff(column["train_time_ms"]) / np.diff(steps)
    times = steps, np.append(per_step, per_step[-1])
    side = Side(f"{path.resolve().parent.name} (published)", runs, 0)
    return Curve(side, steps, column["val_loss"], column["val_loss_std"], column["train_time_ms"] / 1000, None, extras,
                 times)


def read_curve(path: Path) -> Curve:
    """Of a log, a folder of logs or a folder of published figures. Raises RecordError."""
    if (path / "published.json").exists() and not find_logs(path):
        return published_curve(path / "published.json")
    side = read_side(path)
    return mean_curve(side._replace(name=side.runs[0].name if path.is_file() else path.resolve().name))
