"""`campaign`: two sides in turn on one machine, A B B A ..., through run.sh; every run is kept, then compared.

A side is a preset of the trainer (baseline), a script (*.py), or CONSTANT=value[,CONSTANT=value]: edits of the trainer
or, for B, of the script and preset that A names. Edits become a script of a few lines, beside a copy of what they edit.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
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
    """What one side runs: `script`, or constants of it that are others in a thin script beside its copy."""
    script: Path
    preset: str
    edits: str = ""  # as arguments of a call

    def write(self, folder: Path) -> Path:
        """The scripts, into a new folder; returns the one to start."""
        folder.mkdir(parents=True)
        write_text(folder / self.script.name, self.script.read_text(encoding="utf-8"))
        if not self.edits:
            return folder / self.script.name
        write_text(folder / "edited.py", THIN_SCRIPT.format(
            name=self.script.name, module=self.script.stem, preset=self.preset, edits=self.edits))
        return folder / "edited.py"


THIN_SCRIPT = '''"""{name} with other constants."""
from functools import partial

from {module} import *

PRESETS = {{"{preset}": partial(PRESETS["{preset}"], {edits})}}

if __name__ == "__main__":
    start(PRESETS)
'''


def read_side(spec: str, preset: str, edited: Side) -> Side:
    """The side that `spec` names. preset: of scripts. edited: what edits are of."""
    if EDIT.match(spec):
        return edited._replace(edits=spec)
    return Side(Path(spec), preset) if spec.endswith(".py") else Side(TRAINER, spec)


def start_launcher(launcher: Path, script: Path, *arguments: str) -> subprocess.Popen:
    # A copied recipe may import the trainer, which is not copied with it.
    path = os.pathsep.join([str(launcher.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    data = {"DATA_PATH": os.path.abspath(os.environ["DATA_PATH"])} if os.environ.get("DATA_PATH") else {}
    return subprocess.Popen([str(launcher), *arguments], cwd=launcher.parent, text=True, errors="replace",
                            env=os.environ | data | {"TRAIN_SCRIPT": str(script), "PYTHONPATH": path},
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ask_constants(side: Side, launcher: Path) -> str:
    """The constants with which the script itself would run the side's preset. Raises RecordError if it would not."""
    with tempfile.TemporaryDirectory() as folder:
        process = start_launcher(launcher, side.write(Path(folder) / "side"), "--presets")
        lines = process.communicate()[0].splitlines() or [""]
    if process.returncode:
        raise RecordError(f"{side.script.name} cannot run {side.edits or side.preset}: {lines[-1]}")
    presets = {name: constants for name, *_, constants in (line.split("\t") for line in lines if "\t" in line)}
    if side.preset not in presets:
        raise RecordError(f"{side.preset} is no preset of {side.script}: choose one of {', '.join(presets)}.")
    return presets[side.preset]


# ----------------------------------------------------------------------------------------------------------------------
# Runs

def order_of_runs(num_runs: int) -> str:
    """ABBAABBA...: a machine that warms up or slows down does so for both sides alike."""
    return "".join("AB" if pair % 2 == 0 else "BA" for pair in range(num_runs))


def run_once(script: Path, side: str, number: int, preset: str, launcher: Path) -> Outcome:
    """One run through the launcher. Console and log go to the script's folder, to failed/ below it after a fault."""
    start = time.perf_counter()
    console: list[str] = []
    process = start_launcher(launcher, script, preset)
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
    trainer = Side(TRAINER, preset)
    side_a = read_side(a, preset, edited=trainer)
    sides = {"A": side_a, "B": read_side(b, preset, edited=trainer if side_a.edits else side_a)}
    constants = [ask_constants(side, launcher) for side in sides.values()]
    if constants[0] == constants[1] and any(side.edits for side in sides.values()):
        raise RecordError(f"{b} is so in A already: both sides would be the same.")
    scripts = {name: side.write(out / name) for name, side in sides.items()}
    outcomes: list[Outcome] = []
    order = order_of_runs(num_runs)
    for side in order:
        print(f"campaign: run {len(outcomes) + 1} of {len(order)}, {side}: {a if side == 'A' else b}", file=sys.stderr)
        number = order[:len(outcomes)].count(side) + 1
        outcomes.append(run_once(scripts[side], side, number, sides[side].preset, launcher))
        runs = [outcome._asdict() | {"log": outcome.log and str(outcome.log.relative_to(out))} for outcome in outcomes]
        write_text(out / "campaign.json", format_json({  # what was planned and what became of it, after every run
            "A": a, "B": b, "presets": [side.preset for side in sides.values()], "order": order, "runs": runs}))
        if outcomes[-1].fault == "interrupted":
            break
    return conclude(out, outcomes, as_json)


def conclude(out: Path, outcomes: list[Outcome], as_json: bool) -> int:
    """The runs one by one, then what `compare` says of the finished ones."""
    failed = [outcome for outcome in outcomes if outcome.fault]
    rows = [[f"{o.side}{o.number}", o.fault or "finished", f"{o.seconds:.0f} s", o.log.name if o.log else "no log"]
            for o in outcomes]
    print(format_table(rows), f"in {out}", sep="\n", end="\n\n", file=sys.stderr if as_json else sys.stdout)
    for side in "AB":
        if not any(outcome.side == side and not outcome.fault for outcome in outcomes):
            raise RecordError(f"{side} has no finished run: see the consoles in {out / side / 'failed'}.")
    compare.compare(out / "A", [out / "B"], as_json)
    return int(bool(failed))
