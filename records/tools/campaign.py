"""`campaign`: two sides in turn on one machine, A B B A ..., through run.sh; every run is kept, then compared.

A side is a preset of the trainer (baseline), a script, or CONSTANT=value[,CONSTANT=value]: edits of the trainer or, for
B, of the script and preset that A names.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import compare
from run_log import RecordError, read_log
from tables import format_json, format_table, write_text

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "run.sh"
TRAINER = ROOT / "train_gpt_medium.py"
EDIT = re.compile(r"[A-Za-z_]\w*=")
LOG_NAME = re.compile(r"logs/[\w.-]+\.(?:txt|log)")


class Outcome(NamedTuple):
    """One run. `fault` is empty if it finished; `log` is None if it wrote none."""
    side: str
    number: int
    log: Path | None
    fault: str
    seconds: float  # of wall clock, set-up and compilation included


# ----------------------------------------------------------------------------------------------------------------------
# Sides: scripts, presets and edits

class Side(NamedTuple):
    """What one side runs: `source`, under the name of `path`, with `preset`."""
    path: Path
    source: str
    preset: str


def read_script(path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
        ast.parse(source)
    except (OSError, SyntaxError, ValueError) as error:
        raise RecordError(f"{path} cannot be read as a script ({error}): name a preset, a script or "
                          f"CONSTANT=value.") from error
    return source


def assigned_in(body: list[ast.stmt], name: str) -> list[ast.expr]:
    """The values that the statements assign to `name`."""
    return [node.value for node in body
            if isinstance(node, ast.AnnAssign) and node.value and getattr(node.target, "id", "") == name
            or isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == [name]]


def presets_of(source: str) -> list[str]:
    """The keys of the script's table PRESETS; none if it has no such table."""
    return [key.value for table in assigned_in(ast.parse(source).body, "PRESETS") if isinstance(table, ast.Dict)
            for key in table.keys if isinstance(key, ast.Constant)]


def find_constant(tree: ast.Module, name: str, preset: str) -> list[ast.expr]:
    """The value nodes that set `name` for `preset`: in the calls that make this preset, otherwise at the top level or
    in a class of constants, which has a field `preset` or derives from one that has; in any class, if none has."""
    calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and any(
        k.arg == "preset" and isinstance(k.value, ast.Constant) and k.value.value == preset for k in call.keywords)]
    while calls:  # partial(X, ...) where X = partial(...): what the former does not set, the latter may
        in_presets = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == name]
        if in_presets:
            return in_presets
        calls = [value for call in calls for base in call.args
                 for value in assigned_in(tree.body, getattr(base, "id", "")) if isinstance(value, ast.Call)]
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    of_constants: list[str] = []
    for node in classes.values():
        if any(isinstance(item, ast.AnnAssign) and getattr(item.target, "id", "") == "preset" for item in node.body) \
                or any(getattr(base, "id", "") in of_constants for base in node.bases):
            of_constants.append(node.name)
    bodies = [tree.body, *(classes[class_name].body for class_name in of_constants or classes)]
    values = [value for body in bodies for value in assigned_in(body, name)]
    # Of field(default_factory=lambda: value), the value: it may use what is defined further down.
    return [next((k.value.body for k in getattr(value, "keywords", []) if k.arg == "default_factory"
                  and isinstance(k.value, ast.Lambda)), value) for value in values]


def parse_edits(spec: str) -> dict[str, str]:
    """`name=value,name=value` by name; values are Python and may hold commas."""
    call = f"edit({spec})"
    try:
        return {k.arg: ast.get_source_segment(call, k.value) for k in ast.parse(call, mode="eval").body.keywords}
    except (SyntaxError, AttributeError) as error:
        raise RecordError(f"{spec} sets no Python values: write CONSTANT=value[,CONSTANT=value], quoted for the "
                          f"shell.") from error


def edit_constant(source: str, name: str, value: str, preset: str) -> str:
    """`source` with another value for one constant. Raises RecordError if there is not exactly one place for it."""
    places = find_constant(ast.parse(source), name, preset)
    if len(places) != 1:
        raise RecordError(f"{name} is set in {len(places)} places of the script: edit a copy and name that.")
    node, lines = places[0], source.encode().splitlines(keepends=True)  # ast counts bytes
    start = sum(map(len, lines[:node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[:node.end_lineno - 1])) + node.end_col_offset
    data = b"".join(lines)
    if data[start:end].decode() == value:
        raise RecordError(f"{name} is {value} already: both sides would be the same.")
    return (data[:start] + value.encode() + data[end:]).decode()


def read_side(spec: str, preset: str, edited: Side | None = None) -> Side:
    """The side that `spec` names. preset: of scripts and of edits. edited: what edits change, if not the trainer."""
    trainer = Side(TRAINER, read_script(TRAINER), preset)
    if spec in presets_of(trainer.source):
        return trainer._replace(preset=spec)
    if EDIT.match(spec):
        side = edited or trainer
        for name, value in parse_edits(spec).items():
            side = side._replace(source=edit_constant(side.source, name, value, side.preset))
    else:
        side = Side(Path(spec), read_script(Path(spec)), preset)
    presets = presets_of(side.source)
    if presets and side.preset not in presets:
        raise RecordError(f"{side.preset} is no preset of {side.path}: choose one of {', '.join(presets)}.")
    return side


# ----------------------------------------------------------------------------------------------------------------------
# Runs

def order_of_runs(num_runs: int) -> str:
    """ABBAABBA...: a machine that warms up or slows down does so for both sides alike."""
    return "".join("AB" if pair % 2 == 0 else "BA" for pair in range(num_runs))


def run_once(script: Path, side: str, number: int, preset: str, launcher: Path) -> Outcome:
    """One run through the launcher. Console and log go to the script's folder, to failed/ below it after a fault."""
    start = time.perf_counter()
    console: list[str] = []
    # A copied recipe may import the trainer, which is not copied with it.
    path = os.pathsep.join([str(launcher.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    data = {"DATA_PATH": os.path.abspath(os.environ["DATA_PATH"])} if os.environ.get("DATA_PATH") else {}
    process = subprocess.Popen([str(launcher), preset], cwd=launcher.parent, text=True,
                               env=os.environ | data | {"TRAIN_SCRIPT": str(script), "PYTHONPATH": path},
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               errors="replace")
    fault = ""
    try:
        for line in process.stdout:
            console.append(line)
            print(f"{side}{number} | {line}", end="", file=sys.stderr, flush=True)
        status = process.wait()
        fault = f"exit status {status}" if status else ""
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        fault = "interrupted"
    written = [path for name in LOG_NAME.findall("".join(console)) if (path := launcher.parent / name).exists()]
    log = written[0] if written else None
    fault = fault or fault_of(log)
    folder = script.parent / "failed" if fault else script.parent
    folder.mkdir(exist_ok=True)
    write_text(folder / f"{side}{number}.console", "".join(console))
    if log:
        log = Path(shutil.move(log, folder / log.name))
    return Outcome(side, number, log, fault, time.perf_counter() - start)


def fault_of(log: Path | None) -> str:
    """Why a log of a run that ended well does not count; empty if it does."""
    if log is None:
        return "no log was written"
    try:
        run = read_log(log)
    except RecordError as error:
        return str(error)
    return "" if run.finished else run.ending


def campaign(a: str, b: str, num_runs: int, preset: str, out: Path, as_json: bool, launcher: Path = LAUNCHER) -> int:
    """Runs both sides `num_runs` times each into `out`/A and /B and prints their comparison; 1 if any run failed.

    preset: of a side that is a script or edits of the trainer. Raises RecordError if a side cannot be prepared or has
    no finished run.
    """
    if num_runs < 1:
        raise RecordError(f"-n {num_runs} leaves nothing to run: give 1 or more.")
    if out.exists():
        raise RecordError(f"{out} exists already: name a new folder with --out.")
    out = out.resolve()
    side_a = read_side(a, preset)
    sides = {"A": side_a, "B": read_side(b, preset, edited=None if EDIT.match(a) else side_a)}
    scripts = {name: out / name / side.path.name for name, side in sides.items()}
    for name, script in scripts.items():
        script.parent.mkdir(parents=True)
        write_text(script, sides[name].source)
    outcomes: list[Outcome] = []
    order = order_of_runs(num_runs)
    for side in order:
        print(f"campaign: run {len(outcomes) + 1} of {len(order)}, {side}: {a if side == 'A' else b}", file=sys.stderr)
        number = order[:len(outcomes)].count(side) + 1
        outcomes.append(run_once(scripts[side], side, number, sides[side].preset, launcher))
        write_summary(out, a, b, [side.preset for side in sides.values()], order, outcomes)
        if outcomes[-1].fault == "interrupted":
            break
    return conclude(out, outcomes, as_json)


def write_summary(out: Path, a: str, b: str, presets: list[str], order: str, outcomes: list[Outcome]) -> None:
    """campaign.json: what was planned and what became of it, after every run."""
    runs = [outcome._asdict() | {"log": outcome.log and str(outcome.log.relative_to(out))} for outcome in outcomes]
    write_text(out / "campaign.json", format_json({"A": a, "B": b, "presets": presets, "order": order, "runs": runs}))


def conclude(out: Path, outcomes: list[Outcome], as_json: bool) -> int:
    """The runs one by one, then what `compare` says of the finished ones."""
    failed = [outcome for outcome in outcomes if outcome.fault]
    rows = [[f"{o.side}{o.number}", o.fault or "finished", f"{o.seconds:.0f} s", o.log.name if o.log else "no log"]
            for o in outcomes]
    print(format_table(rows), f"in {out}", sep="\n", end="\n\n", file=sys.stderr if as_json else sys.stdout)
    for side in "AB":
        if not any(outcome.side == side and not outcome.fault for outcome in outcomes):
            raise RecordError(f"{side} has no finished run: see the consoles in {out / side / 'failed'}.")
    compare.compare(out / "A", out / "B", as_json)
    return int(bool(failed))
