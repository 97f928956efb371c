"""`campaign`: two scripts in turn on one machine, A B B A ..., through run.sh; every run is kept, then compared."""
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

ROOT = Path(__file__).resolve().parent.parent
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
# Scripts and their edited copies

def find_constant(tree: ast.Module, name: str, preset: str) -> list[ast.expr]:
    """The value nodes that set `name` for `preset`: in the call that makes this preset, otherwise where it is defined,
    at the top level or as a field of a class there."""
    in_presets = [keyword.value for call in ast.walk(tree) if isinstance(call, ast.Call)
                  and any(k.arg == "preset" and isinstance(k.value, ast.Constant) and k.value.value == preset
                          for k in call.keywords) for keyword in call.keywords if keyword.arg == name]
    if in_presets:
        return in_presets
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    return [node.value for body in bodies for node in body
            if isinstance(node, ast.AnnAssign) and node.value and getattr(node.target, "id", "") == name
            or isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == [name]]


def edit_constant(source: str, name: str, value: str, preset: str) -> str:
    """`source` with another value for one constant. Raises RecordError if there is not exactly one place for it."""
    try:
        ast.parse(value, mode="eval")
    except SyntaxError as error:
        raise RecordError(f"{name}={value} is no Python value: quote it for the shell if need be.") from error
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


def prepare_script(spec: str, base: Path, folder: Path, preset: str) -> Path:
    """A copy in `folder` of the script that `spec` names, or of `base` with the edits that it lists."""
    path = base if EDIT.match(spec) else Path(spec)
    try:
        source = path.read_text(encoding="utf-8")
        ast.parse(source)
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}): name a script or CONSTANT=value.") from error
    except (SyntaxError, ValueError) as error:
        raise RecordError(f"{path} is no Python script ({error}): name a script or CONSTANT=value.") from error
    if path is base and EDIT.match(spec):
        for edit in re.split(r"[,\s]+(?=[A-Za-z_]\w*=)", spec):
            source = edit_constant(source, *edit.split("=", 1), preset)
    folder.mkdir(parents=True)
    write_text(folder / path.name, source)
    return folder / path.name


# ----------------------------------------------------------------------------------------------------------------------
# Runs

def order_of_runs(num_runs: int) -> str:
    """ABBAABBA...: a machine that warms up or slows down does so for both sides alike."""
    return "".join("AB" if pair % 2 == 0 else "BA" for pair in range(num_runs))


def run_once(script: Path, side: str, number: int, preset: str, launcher: Path) -> Outcome:
    """One run through the launcher. Console and log go to the script's folder, to failed/ below it after a fault."""
    start = time.perf_counter()
    console: list[str] = []
    process = subprocess.Popen([str(launcher), preset], cwd=launcher.parent, text=True,
                               env=os.environ | {"TRAIN_SCRIPT": str(script)}, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
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
    return "" if run.finished else f"ends at step {run.last_step} of {run.num_iterations}"


def campaign(a: str, b: str, num_runs: int, preset: str, out: Path, as_json: bool, launcher: Path = LAUNCHER) -> int:
    """Runs both sides `num_runs` times each into `out`/A and /B and prints their comparison; 1 if any run failed.

    Raises RecordError if a script cannot be prepared or a side has no finished run.
    """
    if num_runs < 1:
        raise RecordError(f"-n {num_runs} leaves nothing to run: give 1 or more.")
    if out.exists():
        raise RecordError(f"{out} exists already: name a new folder with --out.")
    base = TRAINER if EDIT.match(a) else Path(a)
    out = out.resolve()
    scripts = {side: prepare_script(spec, base, out / side, preset) for side, spec in (("A", a), ("B", b))}
    outcomes: list[Outcome] = []
    order = order_of_runs(num_runs)
    for side in order:
        print(f"campaign: run {len(outcomes) + 1} of {len(order)}, {side}: {a if side == 'A' else b}", file=sys.stderr)
        number = order[:len(outcomes)].count(side) + 1
        outcomes.append(run_once(scripts[side], side, number, preset, launcher))
        write_summary(out, a, b, preset, order, outcomes)
        if outcomes[-1].fault == "interrupted":
            break
    return conclude(out, outcomes, as_json)


def write_summary(out: Path, a: str, b: str, preset: str, order: str, outcomes: list[Outcome]) -> None:
    """campaign.json: what was planned and what became of it, after every run."""
    runs = [outcome._asdict() | {"log": outcome.log and str(outcome.log.relative_to(out))} for outcome in outcomes]
    write_text(out / "campaign.json", format_json({"A": a, "B": b, "preset": preset, "order": order, "runs": runs}))


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
