"""`plot`: the figures of a record, from its logs or from published.json. The only module that loads matplotlib."""
import math
import os
from pathlib import Path

import numpy as np

from curves import Curve, is_published, read_curve
from inference import TARGET, against_target, format_p, mean_interval
from run_log import RecordError, read_published

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for all eyes
TASK_VOCAB = "50257"  # GPT-2's, as our logs state it; other logs are of this task
WIDTH_INCHES, DPI = 8.8, 200  # twice the 880 pixels of a README's column
EARLY = 0.05  # of the run: the fall from 10.8 is left out of loss figures, it would flatten everything else
SETTLED = 0.25  # of the run: differences before it do not set the scale
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titleweight": "bold", "lines.linewidth": 1.5,
         "figure.constrained_layout.use": True, "font.family": "DejaVu Sans"}


def label_of(curve: Curve) -> str:
    n = len(curve.side.runs)
    return f"{curve.side.name}, {n} run{'s' * (n > 1)}"


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


def are_of_task(curves: list[Curve]) -> bool:
    """Whether all losses are of the record's tokens, so that its target says something about them."""
    return all(run.constants.get("vocab_size", TASK_VOCAB) == TASK_VOCAB for curve in curves for run in curve.side.runs)


def name_curves(axes, curves: list[Curve], right: bool = True) -> None:
    """The names in their colours, in an upper corner."""
    for i, (curve, colour) in enumerate(zip(curves, COLOURS)):
        axes.annotate(label_of(curve), (0.98 if right else 0.02, 1), xycoords="axes fraction", xytext=(0, -6 - 12 * i),
                      textcoords="offset points", ha="right" if right else "left", va="top", color=colour)


def count_steps(*all_axes) -> None:
    """Horizontal axes of steps."""
    for axes in all_axes:
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter("{x:,.0f}")


def loss_figure(plt, curves: list[Curve]):
    """Loss against steps and minutes, and below the difference to the first curve with one sigma around it."""
    figure, grid = plt.subplots(2, 2, figsize=(WIDTH_INCHES, 5.6), sharey="row", height_ratios=(1.25, 1))
    reference = curves[0]
    worst = 0.0
    for curve, colour in zip(curves, COLOURS):
        late = curve.steps >= EARLY * curve.side.num_iterations
        for column, x, of_reference in ((0, curve.steps, reference.steps),
                                        (1, curve.seconds / 60, reference.seconds / 60)):
            grid[0, column].plot(x[late], curve.losses[late], color=colour)
            shared = late & (x <= of_reference[-1])
            base = np.interp(x[shared], of_reference, reference.losses)
            difference, sigma = 1000 * (curve.losses[shared] - base), 1000 * curve.stds[shared]
            grid[1, column].plot(x[shared], difference, color=colour)
            grid[1, column].fill_between(x[shared], difference - sigma, difference + sigma, color=colour, alpha=0.25,
                                         linewidth=0)
            settled = curve.steps[shared] >= SETTLED * curve.side.num_iterations
            worst = max(worst, (np.abs(difference) + sigma)[settled].max(initial=0))
    count_steps(*grid[:, 0])
    for axes in grid[:, 1]:
        axes.set_xlabel("training time (min)")
    grid[1, 0].set_ylim(-1.5 * (worst or 1), 1.5 * (worst or 1))
    for axes in grid[0] if are_of_task(curves) else ():
        axes.axhline(TARGET, color="black", linewidth=0.9, linestyle=(0, (5, 3)))
        axes.annotate(f"target {TARGET}", (0.01, TARGET), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", fontsize=8)
    one = len(curves) == 1
    label_ends(grid[0, 1], [(x.losses[-1], f"{x.losses[-1]:.4f}", c) for x, c in zip(curves, COLOURS)])
    if one:
        label_ends(grid[1, 1], [(0, f"± {1000 * reference.stds[-1]:.2f}", COLOURS[0])])
    grid[0, 0].set_title("Validation loss, mean over runs")
    grid[1, 0].set_title("Spread of the runs, one sigma" if one else
                         f"Difference to {reference.side.name}, with one sigma")
    grid[0, 0].set_ylabel("loss (nats/token)")
    grid[1, 0].set_ylabel("difference (0.001 nats/token)")
    name_curves(grid[0, 0], curves)
    return figure


def step_time_figure(plt, curves: list[Curve]):
    """ms per step against the step, above the long window if the logs state it."""
    stated = [(windows, colour) for curve, colour in zip(curves, COLOURS)
              if (windows := curve.side.stated("windows")) is not None]
    figure, grid = plt.subplots(2 if stated else 1, 1, figsize=(WIDTH_INCHES, 4.4 if stated else 3.1), sharex=True,
                                height_ratios=(2, 1) if stated else None, squeeze=False)
    top, bottom = grid[0, 0], grid[-1, 0]
    for curve, colour in zip(curves, COLOURS):
        steps, ms, sigma = curve.step_times
        top.step(steps, ms, color=colour, where="post")
        top.fill_between(steps, ms - sigma, ms + sigma, color=colour, alpha=0.25, linewidth=0, step="post")
    label_ends(top, [(x.step_times[1][-1], f"{x.step_times[1][-1]:.1f} ms", c) for x, c in zip(curves, COLOURS)])
    top.set_title("Training time per step between validations, mean over runs")
    top.set_ylabel("ms/step")
    for windows, colour in stated:
        bottom.step(np.arange(len(windows)), windows, color=colour, where="post")
        bottom.set_title("Long attention window, from the logs")
        bottom.set_ylabel("blocks")
    label_ends(bottom, [(windows[-1], f"{windows[-1]}", colour) for windows, colour in stated])
    count_steps(bottom)
    name_curves(top, curves, right=False)
    return figure


def lambda_figure(plt, curves: list[Curve]):
    """The smear lambda, and the two weights of the backout mix, with one sigma over runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 3.3))
    ends: tuple[list, list] = ([], [])
    for curve, colour in zip(curves, COLOURS):
        for name, (mean, sigma) in ((name, values) for name, values in curve.extras.items() if "lambda" in name):
            side = int(not name.startswith("smear"))
            axes = (left, right)[side]
            axes.plot(curve.steps, mean, color=colour, linestyle="--" if name.endswith("1") else "-")
            axes.fill_between(curve.steps, mean - sigma, mean + sigma, color=colour, alpha=0.25, linewidth=0)
            short = f"{mean[-1]:+.4f}" if not side else f"{name.replace('backout_lambda_', '')}: {mean[-1]:+.3f}"
            ends[side].append((mean[-1], short, colour))
    left.axhline(0, color="black", linewidth=0.7)
    left.margins(y=0.15)  # room for the names
    for axes, labels, title in ((left, ends[0], "smear_lambda"), (right, ends[1], "backout_lambda 0 and 1 (dashed)")):
        label_ends(axes, labels)
        axes.set_title(title + ", mean and one sigma" * (axes is left))
        axes.set_ylabel("weight")
    count_steps(left, right)
    name_curves(left, curves, right=False)
    return figure


def final_figure(plt, curves: list[Curve]):
    """Every run's final loss as a dot, with the mean, its 95 % interval and, where it is theirs, the target."""
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 1.3 + 1.0 * len(curves)))
    for row, (curve, colour) in enumerate(zip(curves, COLOURS)):
        losses = np.array([run.final_loss for run in curve.side.runs])
        # Runs side by side instead of on top of each other, in their own order.
        height = row + 0.12 + 0.3 * (np.arange(len(losses)) % 5) / 5
        axes.plot(losses, height, "o", color=colour, markersize=5, alpha=0.7, markeredgewidth=0)
        test = against_target(losses)
        if len(losses) > 1:
            low, high = mean_interval(losses)
            axes.plot([low, high], [row - 0.12] * 2, color=colour, linewidth=3, solid_capstyle="butt", alpha=0.6)
        axes.plot(test.mean, row - 0.12, "D", color=colour, markersize=6)
        said = ", 95 % interval" + f", p = {format_p(test.t_p)}" * are_of_task(curves) if test.n > 1 else ""
        axes.annotate(f"mean {test.mean:.6f}{said}", (test.mean, row - 0.12), xytext=(0, -13),
                      textcoords="offset points", ha="center", fontsize=8, color=colour)
        axes.text(0.005, row + 0.52, label_of(curve), transform=axes.get_yaxis_transform(), color=colour, va="center")
    axes.set_ylim(-0.6, len(curves) - 0.25)
    axes.set_xlabel("final validation loss (nats/token)")
    if are_of_task(curves):
        axes.axvline(TARGET, color="black", linewidth=0.9, linestyle=(0, (5, 3)))
        axes.annotate(f" target {TARGET}", (TARGET, 1), xycoords=("data", "axes fraction"), fontsize=8, va="top")
        axes.set_xlabel("final validation loss (nats/token); p: one-sided t-test of mean loss <= the target")
    axes.ticklabel_format(useOffset=False)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
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
    curves = [read_curve(path) for path in paths]
    long = [curve for curve in curves if len(curve.steps) > 2]
    timed = [curve for curve in long if np.isfinite(curve.seconds).all()]
    learned = [curve for curve in long if any("lambda" in name for name in curve.extras)]
    published = [read_published(path / "published.json")[1] for path in paths if is_published(path)]
    data = next((data for data in published if "scale_up_1b" in data), {})
    plt = load_pyplot()
    written = []
    with plt.rc_context(STYLE):
        for name, drawing, content in (
                ("loss", loss_figure, timed),
                ("step_time", step_time_figure, [curve for curve in timed if curve.step_times]),
                ("lambdas", lambda_figure, learned), ("final_losses", final_figure, curves),
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
