"""`plot`: the figures of a record, from its logs or from published.json. The only module that loads matplotlib."""
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compare import Side, read_side
from inference import TARGET, against_target, format_p, mean_interval
from run_log import RecordError, Run, find_logs, read_published

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for all eyes
WIDTH_INCHES, DPI = 8.8, 200  # twice the 880 pixels of a README's column
EARLY = 0.05  # of the run: the fall from 10.8 is left out of loss figures, it would flatten everything else
SETTLED = 0.25  # of the run: differences before it do not set the scale
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titleweight": "bold", "lines.linewidth": 1.5,
         "figure.constrained_layout.use": True, "font.family": "DejaVu Sans"}


class Series(NamedTuple):
    """What one set of runs shows. Arrays over the validations that all runs share; `extras` are (mean, std)."""
    name: str
    runs: list[Run]
    num_iterations: int
    steps: np.ndarray
    losses: np.ndarray
    stds: np.ndarray
    minutes: np.ndarray
    extras: dict[str, tuple[np.ndarray, np.ndarray]]
    # Between validations: step at the beginning, ms per step, std over runs; the last value stands twice.
    step_times: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    windows: np.ndarray | None = None  # in blocks, of every step; None if the logs do not state it

    @property
    def late(self) -> np.ndarray:
        """Mask of the validations that loss figures show."""
        return self.steps >= EARLY * self.num_iterations

    @property
    def label(self) -> str:
        n = len(self.runs)
        return f"{self.name}, {n} run{'s' * (n > 1)}"


# ----------------------------------------------------------------------------------------------------------------------
# From logs or published figures to series

def series_of_side(side: Side, name: str) -> Series:
    by_step = [{v.step: v for v in run.validations} for run in side.runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    table = np.array([[(points[s].loss, points[s].train_ms / 60_000) for s in steps] for points in by_step])
    names = set.intersection(*(set(v.extras) for run in side.runs for v in run.validations))
    extras = {}
    for extra in sorted(names):
        values = np.array([[points[s].extras[extra] for s in steps] for points in by_step])
        extras[extra] = values.mean(0), spread(values)
    return Series(name, side.runs, side.num_iterations, np.array(steps), table[:, :, 0].mean(0), spread(table[:, :, 0]),
                  table[:, :, 1].mean(0), extras, step_times_of(side, steps) if side.has_curve else None,
                  side.stated("windows"))


def spread(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over runs, [runs, n] -> [n]; 0 for one run."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def step_times_of(side: Side, steps: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Series.step_times. Validations are exact, single steps jitter; steps before the clock are left out."""
    durations = np.stack([run.step_durations() for run in side.runs])
    edges = np.unique(np.maximum(steps, side.runs[0].clock_start))
    ms = np.stack([durations[:, begin:end].mean(1) for begin, end in zip(edges, edges[1:])], axis=1)
    return edges, *(np.append(values, values[-1]) for values in (ms.mean(0), spread(ms)))


def series_of_figures(path: Path, name: str) -> tuple[Series, dict]:
    """The published mean curve; ms per step from its times, validation to validation."""
    runs, data = read_published(path)
    rows = data["smear_mtp"]["mean_curve_of_26_runs"]
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    extras = {key: (column[key], column.get(f"{key}_std", np.zeros(len(rows))))
              for key in column if "lambda" in key and not key.endswith("_std")}
    steps = column["step"]
    per_step = np.diff(column["train_time_ms"]) / np.diff(steps)
    times = steps, np.append(per_step, per_step[-1]), np.zeros(len(steps))
    return Series(f"{name} (published)", runs, runs[0].num_iterations, steps, column["val_loss"],
                  column["val_loss_std"], column["train_time_ms"] / 60_000, extras, times), data


def read_series(path: Path) -> tuple[Series, dict]:
    """One path's series, and the published data if that is where it comes from. Raises RecordError."""
    if path.is_dir() and (path / "published.json").exists() and not find_logs(path):
        return series_of_figures(path / "published.json", path.name)
    side = read_side(path)
    return series_of_side(side, side.runs[0].name if path.is_file() else path.resolve().name), {}


# ----------------------------------------------------------------------------------------------------------------------
# Drawing

def label_ends(axes, ends: list[tuple[float, str, str]]) -> None:
    """Values at the right edge, pushed apart where they would overlap: (y, text, colour)."""
    low, high = axes.get_ylim()
    height = axes.get_position().height * axes.figure.get_figheight() * 72
    gap, floor = (high - low) * 10 / height, -math.inf
    for y, text, colour in sorted(ends):
        floor = max(y, floor + gap)
        axes.annotate(text, (1, floor), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                      color=colour, va="center", fontsize=8, annotation_clip=False)


def draw_target(axes) -> None:
    axes.axhline(TARGET, color="black", linewidth=0.9, linestyle=(0, (5, 3)))
    axes.annotate(f"target {TARGET}", (0.01, TARGET), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", fontsize=8)


def name_series(axes, all_series: list[Series], right: bool = True) -> None:
    """The names in their colours, in an upper corner."""
    for i, (series, colour) in enumerate(zip(all_series, COLOURS)):
        axes.annotate(series.label, (0.98 if right else 0.02, 1), xycoords="axes fraction", xytext=(0, -6 - 12 * i),
                      textcoords="offset points", ha="right" if right else "left", va="top", color=colour)


def count_steps(*all_axes) -> None:
    """Horizontal axes of steps."""
    for axes in all_axes:
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter("{x:,.0f}")


def loss_figure(plt, all_series: list[Series]):
    """Loss against steps and minutes, and below the difference to the first series' mean with one sigma around it."""
    figure, grid = plt.subplots(2, 2, figsize=(WIDTH_INCHES, 5.6), sharey="row", height_ratios=(1.25, 1))
    reference = all_series[0]
    worst = 0.0
    for series, colour in zip(all_series, COLOURS):
        late = series.late
        for column, x, of_reference in ((0, series.steps, reference.steps), (1, series.minutes, reference.minutes)):
            grid[0, column].plot(x[late], series.losses[late], color=colour)
            shared = late & (x <= of_reference[-1])
            base = np.interp(x[shared], of_reference, reference.losses)
            difference, sigma = 1000 * (series.losses[shared] - base), 1000 * series.stds[shared]
            grid[1, column].plot(x[shared], difference, color=colour)
            grid[1, column].fill_between(x[shared], difference - sigma, difference + sigma, color=colour, alpha=0.25,
                                         linewidth=0)
            settled = series.steps[shared] >= SETTLED * series.num_iterations
            worst = max(worst, (np.abs(difference) + sigma)[settled].max(initial=0))
    count_steps(*grid[:, 0])
    for axes in grid[:, 1]:
        axes.set_xlabel("training time (min)")
    grid[1, 0].set_ylim(-1.5 * (worst or 1), 1.5 * (worst or 1))
    for axes in grid[0]:
        draw_target(axes)
    one = len(all_series) == 1
    label_ends(grid[0, 1], [(s.losses[-1], f"{s.losses[-1]:.4f}", c) for s, c in zip(all_series, COLOURS)])
    if one:
        label_ends(grid[1, 1], [(0, f"± {1000 * reference.stds[-1]:.2f}", COLOURS[0])])
    grid[0, 0].set_title("Validation loss, mean over runs")
    grid[1, 0].set_title("Spread of the runs, one sigma" if one else f"Difference to {reference.name}, with one sigma")
    grid[0, 0].set_ylabel("loss (nats/token)")
    grid[1, 0].set_ylabel("difference (0.001 nats/token)")
    name_series(grid[0, 0], all_series)
    return figure


def step_time_figure(plt, all_series: list[Series]):
    """ms per step against the step, above the long window if the logs state it."""
    stated = [(series, colour) for series, colour in zip(all_series, COLOURS) if series.windows is not None]
    figure, grid = plt.subplots(2 if stated else 1, 1, figsize=(WIDTH_INCHES, 4.4 if stated else 3.1), sharex=True,
                                height_ratios=(2, 1) if stated else None, squeeze=False)
    top, bottom = grid[0, 0], grid[-1, 0]
    for series, colour in zip(all_series, COLOURS):
        steps, ms, sigma = series.step_times
        top.step(steps, ms, color=colour, where="post")
        top.fill_between(steps, ms - sigma, ms + sigma, color=colour, alpha=0.25, linewidth=0, step="post")
    label_ends(top, [(s.step_times[1][-1], f"{s.step_times[1][-1]:.1f} ms", c) for s, c in zip(all_series, COLOURS)])
    top.set_title("Training time per step between validations, mean over runs")
    top.set_ylabel("ms/step")
    for series, colour in stated:
        bottom.step(np.arange(len(series.windows)), series.windows, color=colour, where="post")
        bottom.set_title("Long attention window, from the logs")
        bottom.set_ylabel("blocks")
    label_ends(bottom, [(s.windows[-1], f"{s.windows[-1]}", c) for s, c in stated])
    count_steps(bottom)
    name_series(top, all_series, right=False)
    return figure


def lambda_figure(plt, all_series: list[Series]):
    """The smear lambda, and the two weights of the backout mix, with one sigma over runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 3.3))
    ends: tuple[list, list] = ([], [])
    for series, colour in zip(all_series, COLOURS):
        for name, (mean, sigma) in series.extras.items():
            side = int(not name.startswith("smear"))
            axes = (left, right)[side]
            axes.plot(series.steps, mean, color=colour, linestyle="--" if name.endswith("1") else "-")
            axes.fill_between(series.steps, mean - sigma, mean + sigma, color=colour, alpha=0.25, linewidth=0)
            short = f"{mean[-1]:+.4f}" if not side else f"{name.replace('backout_lambda_', '')}: {mean[-1]:+.3f}"
            ends[side].append((mean[-1], short, colour))
    left.axhline(0, color="black", linewidth=0.7)
    left.margins(y=0.15)  # room for the names
    for axes, labels, title in ((left, ends[0], "smear_lambda"), (right, ends[1], "backout_lambda 0 and 1 (dashed)")):
        label_ends(axes, labels)
        axes.set_title(title + ", mean and one sigma" * (axes is left))
        axes.set_ylabel("weight")
    count_steps(left, right)
    name_series(left, all_series, right=False)
    return figure


def final_figure(plt, all_series: list[Series]):
    """Every run's final loss as a dot, with the mean, its 95 % interval and the target."""
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 1.3 + 1.0 * len(all_series)))
    for row, (series, colour) in enumerate(zip(all_series, COLOURS)):
        losses = np.array([run.final_loss for run in series.runs])
        # Runs side by side instead of on top of each other, in their own order.
        height = row + 0.12 + 0.3 * (np.arange(len(losses)) % 5) / 5
        axes.plot(losses, height, "o", color=colour, markersize=5, alpha=0.7, markeredgewidth=0)
        test = against_target(losses)
        if len(losses) > 1:
            low, high = mean_interval(losses)
            axes.plot([low, high], [row - 0.12] * 2, color=colour, linewidth=3, solid_capstyle="butt", alpha=0.6)
        axes.plot(test.mean, row - 0.12, "D", color=colour, markersize=6)
        axes.annotate(f"mean {test.mean:.6f}" + (f", 95 % interval, p = {format_p(test.t_p)}" if test.n > 1 else ""),
                      (test.mean, row - 0.12), xytext=(0, -13), textcoords="offset points", ha="center", fontsize=8,
                      color=colour)
        axes.text(0.005, row + 0.52, series.label, transform=axes.get_yaxis_transform(), color=colour, va="center")
    axes.axvline(TARGET, color="black", linewidth=0.9, linestyle=(0, (5, 3)))
    axes.set_ylim(-0.6, len(all_series) - 0.25)
    axes.annotate(f" target {TARGET}", (TARGET, 1), xycoords=("data", "axes fraction"), fontsize=8, va="top")
    axes.ticklabel_format(useOffset=False)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("final validation loss (nats/token); p: one-sided t-test of mean loss <= the target")
    axes.set_title("Final losses, every run")
    return figure


def pair_figure(plt, data: dict):
    """The published pair of runs at 1B parameters: loss, and difference. One run each, so no spread."""
    pair = data["scale_up_1b"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 3.3))
    steps, losses = (np.array([[row[key] for row in pair[name]] for name in ("baseline", "smear_mtp")])
                     for key in ("step", "val_loss"))
    late = steps[0] >= EARLY * steps[0, -1]
    for row, (name, style) in enumerate((("baseline", "-"), ("Smear-MTP", "--"))):
        left.plot(steps[row][late], losses[row][late], style, color=COLOURS[1 - row])
        left.text(0.97, 0.9 - 0.1 * row, f"{name}: {losses[row, -1]:.4f}", transform=left.transAxes, ha="right",
                  color=COLOURS[1 - row])
    difference = 1000 * (losses[1] - losses[0])[late]
    right.axhline(0, color="black", linewidth=0.7)
    right.plot(steps[0][late], difference, ".-", color=COLOURS[0])
    label_ends(right, [(difference[-1], f"{difference[-1] / 1000:+.4f}", COLOURS[0])])
    left.set_title("Validation loss at 1B parameters (published)")
    left.set_ylabel("loss (nats/token)")
    right.set_title("Smear-MTP minus baseline, one run each")
    right.set_ylabel("difference (0.001 nats/token)")
    count_steps(left, right)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The command

def load_pyplot():
    """matplotlib without a display. Raises RecordError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise RecordError("matplotlib is not installed: pip install -r records/tools/requirements.txt") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw(paths: list[Path], out: Path) -> list[Path]:
    """Writes every figure for which the data suffice, and returns their paths. Raises RecordError."""
    if len(paths) > len(COLOURS):
        raise RecordError(f"{len(paths)} sets of runs cannot be told apart in one figure: give {len(COLOURS)} at most.")
    read = [read_series(path) for path in paths]
    all_series = [series for series, _ in read]
    curves = [series for series in all_series if len(series.steps) > 2]
    timed = [series for series in curves if np.isfinite(series.minutes).all()]
    learned = [series for series in curves if any("lambda" in name for name in series.extras)]
    data = next((data for _, data in read if "scale_up_1b" in data), {})
    plt = load_pyplot()
    written = []
    with plt.rc_context(STYLE):
        for name, drawing, content in (
                ("loss", loss_figure, timed), ("step_time", step_time_figure, [s for s in timed if s.step_times]),
                ("lambdas", lambda_figure, learned), ("final_losses", final_figure, all_series),
                ("pair_1b", pair_figure, data)):
            if content:
                figure = drawing(plt, content)
                written.append(save(figure, out / f"{name}.png"))
                plt.close(figure)
    return written


def save(figure, path: Path) -> Path:
    """Under a temporary name, then renamed; the same data give the same bytes."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
        os.replace(temporary, path)
    except OSError as error:
        raise RecordError(f"{path} cannot be written ({error.strerror}): name another folder with --out.") from error
    return path
