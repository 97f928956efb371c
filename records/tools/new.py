"""`new`: a record's folder from finished logs - copies, tables, report, check - so that no number is typed by hand."""
import datetime
import gzip
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import numpy as np

import check
import compare
from inference import plus_minus, std
from report import claims_of_difference, page_of, values_of
from run_log import RecordError, Run, find_logs, read_log, read_text
from tables import format_markdown, write_text

RECORDS = Path(__file__).resolve().parents[1]
LEADERBOARD = ["date", "name", "mean loss +- std (nats/token)", "mean train time (s)", "n (runs)", "hardware", "torch",
               "folder", "status"]


def is_date(text: str) -> bool:
    """Whether it is a day of the calendar, written YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def copy_logs(paths: list[Path], folder: Path, failed: Path) -> list[Run]:
    """Writes every log below `paths` compressed, unfinished ones to `failed`; the finished. The same logs give the same
    bytes. Raises RecordError on damage."""
    finished, texts = [], set()
    for log in (log for path in paths for log in find_logs(path)):
        run, text, content = read_log(log), read_text(log), log.read_bytes()
        is_compressed = log.suffix.lower() == ".gz"
        target = (folder if run.finished else failed) / f"{log.stem if is_compressed else log.name}.gz"
        if text in texts:
            raise RecordError(f"{log} is another log's copy: a run counts once.")
        texts.add(text)
        if target.exists():
            raise RecordError(f"{log} has the name of another log: rename one of them.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(gzip.decompress(content) if is_compressed else content, mtime=0))
        finished += [run] if run.finished else []
    return finished


def one_of(runs: list[Run], attribute: str) -> str:
    return values_of(runs, lambda run: getattr(run.environment, attribute) or "unknown")


def figures_of(runs: list[Run]) -> tuple[str, str]:
    """Mean and deviation of loss and mean time as the tables print them."""
    losses = [run.final_loss for run in runs]
    return plus_minus(np.mean(losses), std(losses), ".6f"), f"{np.mean([run.train_seconds for run in runs]):.3f}"


def runs_table(runs: list[Run]) -> str:
    return format_markdown(["run", "val loss (nats/token)", "train time (s)", "log"],
                           [[str(i), f"{run.final_loss:.6f}", f"{run.train_seconds:.3f}", run.name[:8]]
                            for i, run in enumerate(runs, 1)])


def write_readme(folder: Path, title: str, what: str) -> None:
    """The README of a folder whose logs are in place; every number is computed from the logs."""
    record = check.read_folder(folder)
    runs = record.counted
    parts = [f"# {title}", f"## What changed\n\n{what}", "## Setup\n\n" + format_markdown(["item", "value"], [
        ["hardware", one_of(runs, "hardware")], ["torch", one_of(runs, "torch")], ["CUDA", one_of(runs, "cuda")],
        ["driver", one_of(runs, "driver")], ["steps", values_of(runs, lambda run: f"{run.num_iterations:,}")]])]
    parts += describe_sides(folder, record) if record.has_sides else describe_runs(folder, record)
    if record.failed:
        rows = [[run.name[:8], f"{run.last_step:,} of {run.num_iterations:,}"] for run in record.failed]
        parts.append("## Runs that did not finish\n\n" + format_markdown(["log", "last step"], rows))
    parts.append("Every curve and table: [report.html](report.html), to be opened in a browser.")
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def describe_runs(folder: Path, record: check.Folder) -> list[str]:
    """Results of the runs, and what they are against the baseline's."""
    statistics = check.statistics_rows(record, check.describe_statistics(record))
    parts = ["## Results\n\n" + format_markdown(["statistic", "value"], statistics),
             f"## All {len(record.counted)} runs\n\n{runs_table(record.counted)}"]
    baseline = [run for run in record.baseline if run.finished]
    if baseline:
        r = compare.compare_sides(*map(compare.read_side, (folder / "baseline", folder)))
        (loss, seconds), differences = figures_of(baseline), compare.difference_table(r)
        parts.append(
            f"## Baseline\n\nMean loss {loss} nats/token, mean train time {seconds} s; {baseline[0].num_iterations:,} "
            f"steps, torch {one_of(baseline, 'torch')}, {one_of(baseline, 'hardware')}.\n\n{runs_table(baseline)}\n\n"
            f"Record minus baseline, {compare.basis(r)}:\n\n{format_markdown(differences.header, differences.rows)}")
        if record.experiment:
            claims = "\n".join(f"- {claim}" for claim in claims_of_difference(r))
            parts.insert(0, f"A is the baseline. B are the other runs.\n\n{claims}")
    return parts


def describe_sides(folder: Path, record: check.Folder) -> list[str]:
    """Several sides against the first, and the runs of each."""
    names = sorted({check.role_of(run.path, folder) for run in record.baseline + record.record + record.other})
    sides = [compare.read_side(folder / name) for name in names]
    tables = compare.tables_of_several(compare.compare_several(sides[0], sides[1:]))
    return ["## Results"] + [f"{table.caption}:\n\n{format_markdown(table.header, table.rows)}" for table in tables] + [
        f"## All {len(side.runs)} runs of {side.name}\n\n{runs_table(side.runs)}" for side in sides]


def leaderboard(records: Path) -> str:
    """One row for each record's folder, computed from its logs or its published figures."""
    rows = []
    for path in sorted(path for path in records.iterdir() if re.match(r"\d{4}-\d\d-\d\d_", path.name)):
        folder = check.read_folder(path)
        runs = folder.counted
        if runs:
            title = re.match(r"# (?:[\d-]{10} )?(.+)", folder.readme or f"# {path.name[11:]}")
            status = "published figures, not re-run here" if folder.published else check.verdict_of(
                folder, check.apply_rules(folder))
            rows.append([path.name[:10], title[1] if title else path.name[11:], *figures_of(runs), str(len(runs)),
                         one_of(runs, "hardware"), one_of(runs, "torch"), f"[{path.name}]({path.name}/README.md)",
                         status])
    return format_markdown(LEADERBOARD, rows)


def refresh_leaderboard(records: Path) -> None:
    """Rewrites the table in records/README.md. Raises RecordError if there is none."""
    text = (records / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| date \|.*\n(?:\|.*\n?)*", text, re.M)
    if not table:
        raise RecordError(f"{records / 'README.md'} has no table that begins with | date |: restore it from git.")
    write_text(records / "README.md", text[:table.start()] + leaderboard(records) + "\n" + text[table.end():])


def new(name: str, date: str, logs: list[Path], baseline: list[Path], what: str, as_json: bool,
        records: Path = RECORDS, experiment: bool = False, sides: Sequence[Path] = ()) -> int:
    """Makes records/DATE_NAME, refreshes the leaderboard, and returns what `check` says of the folder.

    experiment: makes records/experiments/DATE_NAME instead, which the leaderboard does not list. sides: in place of
    `logs` and `baseline`, folders of an experiment's logs, which stay apart as A, B, C, ... Raises RecordError, and
    leaves nothing behind, if a log is damaged or no log is finished.
    """
    experiment = experiment or bool(sides)
    if not is_date(date) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise RecordError(f"{date}_{name} is no name of a record: give a date YYYY-MM-DD and letters, digits, - or _.")
    folder = records / (check.EXPERIMENTS if experiment else "") / f"{date}_{name}"
    if folder.exists():
        raise RecordError(f"{folder} exists already: choose another name.")
    folder.mkdir(parents=True)
    try:
        apart = [([side], folder / name) for name, side in zip(ascii_uppercase, sides)]
        for paths, place in apart or [(logs, folder)]:
            if not copy_logs(paths, place, folder / "failed"):
                raise RecordError("none of the logs is finished: a record needs finished runs.")
        copy_logs(baseline, folder / "baseline", folder / "failed")
        write_readme(folder, f"{date} {name}", what)
        write_text(folder / "report.html", page_of(folder))
    except BaseException:
        shutil.rmtree(folder)
        raise
    if not experiment:
        refresh_leaderboard(records)
    return check.check(folder, as_json)
