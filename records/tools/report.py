"""`report`: one HTML file of a folder or a log, which opens offline: claim, charts, tables, and findings of `check`.

This module gathers what the logs say, report/report.js draws it. Numbers become text here, as other tools print them.
"""
import ast
import base64
import difflib
import hashlib
import html
import math
import re
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

import check
import compare
from curves import Curve, Side, mean_curve, read_curve, side_of
from inference import ALPHA, CONFIDENCE, TARGET, Interval, against_target, format_p, mean_interval
from run_log import LOG_SUFFIX, RecordError, Run, read_log
from tables import Table, format_json, write_text

PARTS = Path(__file__).resolve().parent / "report"
POINTS_OF_ALL = 24_000  # of one series by step, over all runs: so many that 52 runs stay well below 1 MB
MIN_POINTS, MAX_POINTS = 100, 2_000  # of one run
MAX_DIFF_LINES = 3_000
MACHINE = {"hardware": "hardware", "torch": "torch", "CUDA": "cuda", "driver": "driver", "Python": "python"}


class Group(NamedTuple):
    """Runs of one role. `side` are those that statistics count, None if there are none; `curve` are their means."""
    label: str
    runs: list[Run]
    side: Side | None = None
    curve: Curve | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Runs by role

def group_of(label: str, runs: list[Run], path: Path) -> Group:
    try:
        side = side_of(runs, label, path)
    except RecordError:  # none finished, or of several lengths: curves, and no statistics
        return Group(label, runs)
    return Group(label, runs, side, mean_curve(side))


def groups_of(folder: check.Folder) -> list[Group]:
    """Of a record's folder or a campaign's: A (a baseline), B, then others, failed ones last."""
    if folder.published:
        return [group_of("all", folder.record, folder.path)._replace(curve=read_curve(folder.path))]
    own = {check.role_of(run.path, folder.path) for run in folder.record}  # one, or of several folders of equal rank
    label = "B" if folder.baseline else "record" if folder.other else "all"
    roles = {"A": folder.baseline}
    for run in folder.record + folder.other:
        role = check.role_of(run.path, folder.path)
        roles.setdefault(label if {role} == own else role, []).append(run)
    groups = [group_of(label, runs, folder.path) for label, runs in roles.items() if runs]
    return groups + ([Group("failed", folder.failed)] if folder.failed else [])


def judged_of(groups: list[Group], folder: check.Folder | None) -> Group | None:
    """The runs that the target is for, if their loss is the record's: on its validation tokens and real data by
    `check`, or published."""
    tests = check.whole_validation_set, check.real_data
    if folder is None or folder.filed or folder.logs and any(test(folder) for test in tests):
        return None
    return next((group for group in groups if group.side and group.label in ("B", "record", "all")), None)


# ----------------------------------------------------------------------------------------------------------------------
# The claim

def plural(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def in_words(interval: Interval, spec: str) -> str:
    """In parentheses; empty where a side has one run."""
    return "" if math.isnan(interval.low) else (
        f" ({CONFIDENCE:.0%} interval of B - A: {interval.low:{spec}} to {interval.high:{spec}}, "
        f"p = {format_p(interval.p)})")


def claim_of_losses(losses: list[float]) -> str:
    low, high = mean_interval(losses)
    interval = f" ({CONFIDENCE:.0%} interval {low:.6f} to {high:.6f})" if math.isfinite(low) else ""
    ends = "ends at a loss of" if len(losses) == 1 else "end at a mean loss of"
    return f"{plural(len(losses))} {ends} {np.mean(losses):.6f} nats/token{interval}"


def claim_of_target(group: Group) -> str:
    test, claim = against_target(group.side.losses), claim_of_losses(group.side.losses)
    if math.isnan(test.t_p):
        return f"{claim}: no test against the target of {TARGET} without two runs that differ."
    shown = f"below the target of {TARGET}" if test.t_p < ALPHA else f"not shown to be below {TARGET}"
    return f"{claim}, {shown}: p = {format_p(test.t_p)}."


def claims_of_difference(r: dict) -> list[str]:
    """Loss, steps at equal loss, and time of B against A by `compare`, whatever their signs."""
    loss, seconds = Interval(**r["loss_difference"]), Interval(**r["seconds_difference"])
    claims = ["No difference in loss is shown: " * (loss.p >= 1 - CONFIDENCE)
              + f"B ends {abs(loss.value):.6f} nats/token {'below' if loss.value < 0 else 'above'} A: mean "
              f"{r['b']['loss_mean']:.6f} of {plural(r['b']['n'])} against {r['a']['loss_mean']:.6f} of {r['a']['n']}"
              f"{in_words(loss, '+.6f') or ': ' + compare.basis(r)}."]
    if "steps_at_equal_loss" in r:
        steps = Interval(**r["steps_at_equal_loss"]["difference"])
        if math.isfinite(steps.value):
            more = "fewer" if steps.value < 0 else "more"
            claims.append(f"At equal loss B takes {abs(steps.value):.1f} steps {more}{in_words(steps, '+.1f')}: "
                          f"steps {compare.describe_equal_loss(r)}.")
    if math.isfinite(seconds.value):
        claims.append(f"B's training takes {abs(seconds.value):.3f} s {'less' if seconds.value < 0 else 'more'}"
                      f"{in_words(seconds, '+.3f')}.")
    return claims


def claims_of(groups: list[Group], judged: Group | None, r: dict | None, has_sides: bool) -> list[str]:
    """Sentences; the first is the headline: of a campaign, which `has_sides`, the difference."""
    claims = [claim_of_target(judged)] if judged else []
    if r:
        claims = claims_of_difference(r) + claims if has_sides else claims + claims_of_difference(r)
    elif not claims:
        claims = [f"{group.label}: " * (len(groups) > 1) + claim_of_losses(group.side.losses) + "."
                  for group in groups if group.side]
    lengths = {run.num_iterations for group in groups for run in group.runs if run.finished}
    if not claims and lengths:
        claims = [f"The runs are of {', '.join(map(str, sorted(lengths)))} steps: there is no mean over them."]
    running = [run for group in groups for run in group.runs if not run.finished and group.label != "failed"]
    for run in running if len(running) < 4 else []:
        last = f", validation loss {run.final_loss:.6f} at step {run.validations[-1].step:,}" if run.validations else ""
        claims.append(f"{run.name} is at step {run.last_step:,} of {run.num_iterations:,}{last}.")
    return claims + ([f"{len(running)} runs have not finished."] if len(running) > 3 else [])


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def values_of(runs: list[Run], value) -> str:
    """What all runs share, or all that there is."""
    found = sorted({str(value(run)) for run in runs})
    return "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def machine_table(groups: list[Group]) -> Table:
    rows = [[name, *(values_of(group.runs, lambda run: getattr(run.environment, attribute) or "not stated")
                     for group in groups)] for name, attribute in MACHINE.items()]
    rows.append(["peak memory (MiB)", *(values_of(group.runs, lambda run: run.peak_memory_mib or "not stated")
                                        for group in groups)])
    return Table("Hardware and versions", ["", *(group.label for group in groups)], rows)


def rows_of(name: str, value: str) -> dict[str, str]:
    """A constant under its name; of a table, which is a tuple of calls such as `(Stage(...), ...)`, every row under its
    own: `groups[mlp]` where rows have a name, otherwise `layers[3]`."""
    try:
        tree = ast.parse(value, mode="eval").body
    except SyntaxError:
        return {name: value}
    if not (isinstance(tree, ast.Tuple) and tree.elts and all(isinstance(row, ast.Call) for row in tree.elts)):
        return {name: value}
    keys = [next((ast.unparse(field.value).strip("'") for field in row.keywords if field.arg == "name"), number)
            for number, row in enumerate(tree.elts)]
    keys = keys if len({*keys}) == len(keys) else range(len(keys))
    return {f"{name}[{key}]": ast.get_source_segment(value, row) for key, row in zip(keys, tree.elts)}


def constants_tables(groups: list[Group]) -> list[Table]:
    """Constants that differ between or within groups, then those that all runs share; the seed is each run's own."""
    constants = [[dict(chain(*(rows_of(*item).items() for item in run.constants.items()))) for run in group.runs]
                 for group in groups]
    names = dict.fromkeys(chain(*chain(*constants)))
    names.pop("drawn seed", None)
    rows = [[name, *(values_of(runs, lambda run: run.get(name, "not stated")) for runs in constants)] for name in names]
    shared = [row for row in rows if len({run.get(row[0]) for run in chain(*constants)}) == 1]
    return [Table("Constants that differ", ["constant", *(group.label for group in groups)],
                  [row for row in rows if row not in shared]),
            Table("Constants that all runs share", ["constant", "value"], [row[:2] for row in shared])]


def source_difference(a: Group, b: Group) -> dict:
    """A unified diff from A's source to B's, line by line, and a sentence on it."""
    sources = [list(dict.fromkeys(run.source for run in group.runs)) for group in (a, b)]
    several = [f"{group.label}'s runs have {len(found)} different sources, the first is shown"
               for group, found in zip((a, b), sources) if len(found) > 1]
    lines = list(difflib.unified_diff(*(found[0].splitlines() for found in sources), "A", "B", lineterm=""))
    changed = [sum(line.startswith(sign) for line in lines[2:]) for sign in "-+"]
    note = f"From A to B: {changed[0]} lines removed, {changed[1]} added" if lines else "A and B have the same source"
    cut = [f"{len(lines) - MAX_DIFF_LINES} further lines are left out"] if len(lines) > MAX_DIFF_LINES else []
    return {"note": "; ".join([note, *several, *cut]) + ".", "lines": lines[:MAX_DIFF_LINES]}


def check_section(folder: check.Folder, findings: list[check.Finding]) -> dict:
    rows = [[f.rule.severity, f.rule.id, message, f.rule.why] for f in findings if f.status == "broken"
            for message in f.messages]
    table = Table("Rules that are broken", ["severity", "rule", "found", "why"], rows)
    kept = {words: [f.rule.id for f in findings if f.status == status]
            for status, words in (("ok", "Kept"), ("not applicable", "Not applicable"))}
    return {"verdict": check.verdict_of(folder, findings),
            "kept": " ".join(f"{words}: {', '.join(ids)}." for words, ids in kept.items() if ids),
            "table": table}


# ----------------------------------------------------------------------------------------------------------------------
# Curves

def plain(values) -> list:
    """Numbers as short as the log prints them: nan becomes null, 248.0 becomes 248."""
    return [None if not math.isfinite(v) else int(v) if v == int(v) else float(f"{v:.9g}") for v in map(float, values)]


def thin(x: np.ndarray, y: np.ndarray, points: int) -> dict:
    """At most `points` of a curve, and two more: first, last, and the lowest and highest of each equal stretch.

    So no peak is lost, and what is kept is exact.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) > points:
        edges = np.linspace(0, len(x), points // 2 + 1).astype(int)
        kept = {0, len(x) - 1}
        for begin, end in zip(edges, edges[1:]):
            kept |= {begin + int(y[begin:end].argmin()), begin + int(y[begin:end].argmax())}
        x, y = x[sorted(kept)], y[sorted(kept)]
    return {"x": plain(x), "y": plain(y)}


def field_of(run: Run, name: str, points: int) -> dict:
    """A further number of the step lines; runs of equal neighbours lose their middle, which a line shows as well."""
    steps = np.array([step for step in run.step_fields if name in run.step_fields[step]])
    values = np.array([run.step_fields[step][name] for step in steps])
    inner = (values[1:-1] == values[:-2]) & (values[1:-1] == values[2:])
    kept = np.concatenate([[True], ~inner, [True]]) if len(steps) > 2 else np.ones(len(steps), bool)
    return thin(steps[kept], values[kept], points)


def curves_of(run: Run, points: int) -> dict:
    """What the charts draw of one run: every validation, thinned series by step, and what the legend says."""
    durations = run.step_durations()[:run.last_step]
    names = dict.fromkeys(name for v in run.validations for name in v.extras)
    fields = dict.fromkeys(name for fields in run.step_fields.values() for name in fields if name != "tokens")
    timed = run.step_ms or len(run.validations) > 2
    return {"name": run.name, "step": [v.step for v in run.validations], "loss": plain(v.loss for v in run.validations),
            "ms": plain(v.train_ms for v in run.validations),
            "scalars": {name: plain(v.extras.get(name, math.nan) for v in run.validations) for name in names},
            "fields": {name: field_of(run, name, points) for name in fields},
            "step_ms": thin(np.arange(1, len(durations) + 1), durations, points) if timed else None}


def mean_of(group: Group) -> dict | None:
    curve = group.curve
    if curve is None or len(curve.steps) < 2 or len(curve.side.runs) < 2:
        return None
    edges, ms = curve.step_times or ([], [])
    return {"label": f"{group.label}, ".removeprefix("all, ") + f"mean of {len(curve.side.runs)} runs",
            "step": plain(curve.steps), "loss": plain(np.round(curve.losses, 7)),
            "ms": plain(np.round(1000 * curve.seconds, 1)),
            "scalars": {name: plain(np.round(mean, 7)) for name, mean in curve.extras.items()},
            "step_ms": {"x": plain(edges), "y": plain(np.round(ms, 3))} if len(edges) else None}


def describe_group(group: Group, points: int) -> dict:
    """A group as the page holds it."""
    runs = [curves_of(run, points) for run in group.runs]
    for number, (run, log) in enumerate(zip(runs, group.runs), 1):
        if not LOG_SUFFIX.search(log.path.name):  # published figures
            run["name"] = f"run {number}"
        run["counts"] = bool(group.side) and any(log is counted for counted in group.side.runs)
    losses = group.side.losses if group.side else []
    low, high = mean_interval(losses) if len(losses) > 1 else (math.nan, math.nan)
    return {"label": group.label, "runs": runs, "mean": mean_of(group),
            "final": {"mean": float(np.mean(losses)), "low": low, "high": high} if losses else None}


def runs_table(groups: list[Group], described: list[dict]) -> Table:
    rows = [[group.label, run["name"], log.constants.get("drawn seed", ""),
             "finished" if log.finished else f"step {log.last_step:,} of {log.num_iterations:,}",
             *([f"{log.final_loss:.6f}", compare.or_blank(log.train_seconds, ".3f")] if log.validations else ["", ""])]
            for group, of_group in zip(groups, described) for log, run in zip(group.runs, of_group["runs"])]
    return Table("Every run", ["", "run", "seed", "end", "last loss", "train time (s)"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# The page

def gather(path: Path) -> dict:
    """Everything that the page shows of a folder or a log. Raises RecordError if there is nothing to show."""
    if not path.is_dir():
        run = read_log(path)
        return assemble(run.name, [group_of("log", [run], path)], None, [])
    folder = check.read_folder(path)
    groups = groups_of(folder)
    if not groups:
        raise RecordError(f"{path} holds no log that can be read and no published figures: name a record's folder.")
    return assemble(path.resolve().name, groups, folder, check.apply_rules(folder))


def assemble(title: str, groups: list[Group], folder: check.Folder | None, findings: list[check.Finding]) -> dict:
    sides = [group for group in groups if group.side and group.label in ("A", "B")]
    sides = sides if len(sides) == 2 else []
    r = compare.compare_sides(*(group.side for group in sides)) if sides else None
    judged = judged_of(groups, folder)
    has_sides = folder is not None and folder.has_sides
    claims = claims_of(groups, judged, r, has_sides) or ["No run has finished."]
    checked = check_section(folder, findings) if folder else None
    logged = [group for group in groups if any(run.source or run.constants for run in group.runs)]
    shown = sides or [group for group in groups if group.side and group.side.has_curve][:1]
    times = r if sides else compare.explain_times(shown[0].side, shown[0].side) if shown and np.isfinite(
        shown[0].curve.seconds).all() else {}
    table = compare.step_time_table(times, ["A", "B"] if sides else [""])
    runs = [run for group in groups for run in group.runs]
    points = min(max(POINTS_OF_ALL // max(len(runs), 1), MIN_POINTS), MAX_POINTS)
    described = [describe_group(group, points) for group in groups]
    return {
        "title": title, "headline": claims[0],
        "sentences": claims[1:] + ([f"By the rules of check: {checked['verdict']}."] if checked else []),
        "groups": described, "target": TARGET if judged else None,
        "thinning": f"Every validation is here. Series by step keep the lowest and the highest point of every stretch, "
                    f"{points:,} points a run at most: no peak is lost." if any(run.step_ms for run in runs) else "",
        "sides": compare.sides_table({g.label: compare.describe_side(g.side) for g in groups if g.side}),
        "difference": compare.difference_table(r) if r else None,
        "equal": compare.equal_tables(r or {}),
        "warnings": r["warnings"] if r else [],
        "step_times": table,
        "constants": constants_tables(logged) if logged else [],
        "source": source_difference(*sides) if sides and all(run.source for g in sides for run in g.runs[:1]) else None,
        "machine": machine_table(groups), "runs": runs_table(groups, described),
        "check": checked}


def read_parts() -> dict[str, str]:
    """The page's parts: ours, and the library of the charts."""
    names = {"style": ("uPlot.min.css", "report.css"), "script": ("uPlot.iife.min.js", "report.js"),
             "licence": ("uPlot.LICENSE",), "page": ("report.html",)}
    return {part: "".join((PARTS / name).read_text(encoding="utf-8") for name in files)
            for part, files in names.items()}


def policy(parts: dict[str, str]) -> str:
    """A content security policy: this style and this script alone, and no request."""
    digests = (base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode() for name in ("style", "script"))
    return ("default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; base-uri 'none'; "
            "form-action 'none'").format(*digests)


def render(data: dict, parts: dict[str, str]) -> str:
    json = format_json(data, indent=None).replace("<", "\\u003c")  # which no parser of HTML ends early
    values = parts | {"title": html.escape(data["title"]), "headline": html.escape(data["headline"]), "data": json,
                      "policy": html.escape(policy(parts))}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], parts["page"])


def page_of(path: Path) -> str:
    """The report of a folder or a log. Raises RecordError if there is nothing to show."""
    return render(gather(path), read_parts())


def report(path: Path, out: Path | None, as_json: bool) -> None:
    """Writes the report of a folder to logs/, of a log beside it, or to `out`. Raises RecordError."""
    text = page_of(path)
    logs = Path("logs")  # which git ignores: a record's folder stays as it is
    out = out or (logs / f"{path.resolve().name}.html" if path.is_dir() else
                  path.with_name(LOG_SUFFIX.sub("", path.name) + ".html"))
    if out.parent == logs:
        logs.mkdir(exist_ok=True)
    write_text(out, text)
    print(format_json({"report": str(out), "bytes": len(text.encode())}) if as_json else out)
