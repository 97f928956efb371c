"""Reads the log of one training run: ours, and those of the modded-nanogpt project since late 2024.

A log is the script's source, a line of =, versions and nvidia-smi, a line of =, then `step:125/5535 val_loss:4.263118
train_time:28554ms step_avg:228.43ms` lines, with or without further fields, and the peak memory. Our step lines state
the tokens trained on so far and the long window of the step; other logs do not, and nothing here computes them.
Reading is liberal: 4 or 6 decimals, train losses, steps without a clock. A last line without its end is left out, since
it may be cut within a number. Judging is left to the rules of `check`. A log may be compressed: `.txt.gz`, `.log.gz`.
"""
import gzip
import json
import math
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

RULE_LINE = re.compile(r"^={60,}\s*$", re.M)
STEP_LINE = re.compile(r"^\s*step:\s*(\d+)/(\d+)\s+(\S.*)$")
FIELD = re.compile(r"([A-Za-z_]\w*):\s*(\S+)")
LOG_SUFFIX = re.compile(r"\.(txt|log)(\.gz)?$", re.I)
RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class RecordError(Exception):
    """Something the user can put right: shown as one sentence, without a traceback."""


class NoSteps(RecordError):
    """A log without a step: of a run that has just begun, or that died before its first."""


@dataclass(frozen=True)
class Validation:
    """One validation line. `train_ms` is nan in logs without a clock, `step_avg_ms` None if it is not printed."""
    step: int
    loss: float
    train_ms: float
    step_avg_ms: float | None = None
    extras: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Environment:
    """What the log says about the machine; empty where it is silent."""
    python: str = ""
    torch: str = ""
    cuda: str = ""
    driver: str = ""
    gpus: tuple[str, ...] = ()

    @property
    def hardware(self) -> str:
        """For example `8x H100 80GB HBM3`."""
        if not self.gpus:
            return "unknown"
        return " + ".join(f"{self.gpus.count(kind)}x {kind.removeprefix('NVIDIA ')}" for kind in sorted(set(self.gpus)))


@dataclass(frozen=True)
class Run:
    """One log. `step_ms` are (step, cumulative train ms) of the step lines, in the order of the file; `step_fields` are
    the further numbers of these lines, by step and name. Loss and gradient norms of a step have a later line."""
    path: Path
    num_iterations: int
    validations: list[Validation]
    step_ms: list[tuple[int, float]] = field(default_factory=list)
    source: str = ""
    environment: Environment = Environment()
    constants: dict[str, str] = field(default_factory=dict)  # our logs print every constant and the seed
    peak_memory_mib: int | None = None
    step_fields: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The log's file name without `.txt`, `.log` and `.gz`: of our logs the run id."""
        return LOG_SUFFIX.sub("", self.path.name)

    @property
    def finished(self) -> bool:
        return bool(self.validations) and self.validations[-1].step == self.num_iterations

    @property
    def ending(self) -> str:
        """Where an unfinished run ends, in words."""
        missing = " without its last validation" if self.last_step == self.num_iterations else ""
        return f"ends at step {self.last_step} of {self.num_iterations}{missing}"

    @property
    def resumed_from(self) -> str:
        """The checkpoint that the run was resumed from; empty if it began at the beginning."""
        return self.constants.get("resumed from", "")

    @property
    def last_step(self) -> int:
        return max([step for step, _ in self.step_ms[-1:]] + [v.step for v in self.validations[-1:]], default=0)

    @property
    def final_loss(self) -> float:
        return self.validations[-1].loss

    @property
    def train_seconds(self) -> float:
        return self.validations[-1].train_ms / 1000

    @property
    def clock_start(self) -> int:
        """Steps before the clock: the scripts of 2024 set it to 0 after ten warm-up steps, with averages of nan.

        An average of nan at step 0 may be 0 / 0 alone, so the next one decides: it is of all steps, or of all but ten.
        """
        known = [v for v in self.validations if v.step_avg_ms is not None]
        later = [v for v in known if v.step > 10 and math.isfinite(v.step_avg_ms)]
        if not later or not math.isnan(known[0].step_avg_ms):
            return 0
        of_all, of_all_but_ten = (abs(later[0].step_avg_ms * (later[0].step - n) - later[0].train_ms) for n in (0, 10))
        return 10 if of_all_but_ten < of_all else 0

    def _of_steps(self, name: str) -> list[int]:
        """A field of every step line; empty if one of the lines lacks it."""
        values = [self.step_fields.get(step, {}).get(name, math.nan) for step in range(1, self.num_iterations + 1)]
        return [int(value) for value in values] if all(map(math.isfinite, values)) else []

    @property
    def windows(self) -> np.ndarray | None:
        """Long window of every step in blocks, [num_iterations]; None if the log does not state it."""
        windows = self._of_steps("window_blocks")
        return np.array(windows) if windows else None

    @property
    def tokens(self) -> np.ndarray | None:
        """Tokens trained on after 0, 1, ... steps, [num_iterations + 1]; None if the log does not state them."""
        tokens = self._of_steps("tokens")
        return np.array([0, *tokens]) if tokens else None

    def step_durations(self) -> np.ndarray:
        """Milliseconds of every step, [num_iterations], nan where the log does not tell.

        Step lines are written without waiting for the GPU, so single steps jitter while sums hold; validations are
        exact and overrule them. Between points further apart than one step the time is spread evenly.
        """
        points = dict(self.step_ms) | {v.step: v.train_ms for v in self.validations}
        start = self.clock_start
        points = {start: 0.0} | {step: ms for step, ms in points.items() if step > start and math.isfinite(ms)}
        durations = np.full(self.num_iterations, math.nan)
        steps = sorted(points)
        for begin, end in zip(steps, steps[1:]):
            durations[begin:end] = (points[end] - points[begin]) / (end - begin)
        return durations


def parse_number(text: str) -> float | None:
    """`228.43ms` or a bare number; None if it is something else."""
    try:
        return float(text.removesuffix("ms"))
    except ValueError:
        return None


def read_text(path: Path) -> str:
    """The text of a file, which may be compressed. Raises RecordError if it cannot be read."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix.lower() == ".gz" and data else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f"{path} is damaged ({error}): copy the log again.") from error
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}): name a log.") from error
    return data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")


def split_sections(text: str) -> tuple[str, str, str]:
    """Source, environment and the rest: the parts between lines of =; the environment is the first that states a
    version or a driver. Logs of 2024 begin with such a line, newer ones may hold several sources."""
    parts = RULE_LINE.split(text)
    is_environment = [bool(re.search(r"^Running py|^\| NVIDIA-SMI", part, re.M | re.I)) for part in parts]
    if len(parts) == 1 or not any(is_environment[1:]):
        first = re.search(r"^\s*step:\s*\d+/\d+\s", text, re.M)
        source = "".join(parts[:-1]) if len(parts) > 1 else text[:first.start() if first else len(text)]
        return source.strip("\n"), "", parts[-1]
    index = is_environment.index(True, 1)
    return "".join(parts[:index]).strip("\n"), parts[index], "".join(parts[index + 1:] or parts[index:])


def parse_environment(text: str) -> Environment:
    """Versions, and the GPUs that the run used or, where the log does not say, those of nvidia-smi's table."""
    def find(pattern: str) -> str:
        match = re.search(pattern, text, re.M | re.I)
        return match[1] if match else ""

    gpus = re.findall(r"^\|\s+\d+\s+(?!N/A)(\S.*?)\s+(?:On|Off|N/A)\s*\|", text, re.M)
    ranks = re.search(r"^on (\d+) x ([^(\n]+)", text, re.M)
    if ranks and (int(ranks[1]) != len(gpus) or ranks[2].strip() not in gpus):  # what is there may not be what ran
        gpus = [ranks[2].strip()] * int(ranks[1])
    return Environment(python=find(r"^Running Python ([\d.]+)"), torch=find(r"^Running PyTorch (\S+)"),
                       cuda=find(r"compiled for CUDA (\S+)"), driver=find(r"Driver Version:\s*([\d.]+)"),
                       gpus=tuple(gpus))


def parse_constants(text: str) -> dict[str, str]:
    """`name = value` lines of our logs, the seed that was drawn, where the shards and a resumed run came from."""
    constants = dict(re.findall(r"^(\w+) = (.+)$", text, re.M))
    for name, pattern in (("drawn seed", r"^seed drawn or given: (\d+)"), ("shards", r"^training shards: (.+)$"),
                          ("resumed from", r"^resumed from (.+): not eligible")):
        match = re.search(pattern, text, re.M)
        if match:
            constants[name] = match[1]
    return constants


def parse_lines(text: str, path: Path):
    """(num_iterations, validations, step_ms, step_fields). Raises RecordError where the lines contradict each other."""
    totals: set[int] = set()
    validations: list[Validation] = []
    step_ms: list[tuple[int, float]] = []
    step_fields: dict[int, dict[str, float]] = {}
    for line in text[:text.rfind("\n") + 1].splitlines():
        if not line.lstrip().startswith("step:"):
            continue
        match = STEP_LINE.match(line)
        fields = dict(FIELD.findall(match[3])) if match else {}
        values = {name: parse_number(value) for name, value in fields.items()}
        known = [values.get(name) for name in ("val_loss", "train_time", "train_loss") if name in values]
        if not known or None in known:
            raise RecordError(f"{path} is damaged at {line[:60]!r}: copy the log again.")
        step, total = int(match[1]), int(match[2])
        totals.add(total)
        if step in step_fields and not {"train_time", "val_loss"} & values.keys():
            step_fields[step] |= values  # figures that the device gave after the step's own line
            continue
        train_ms = values.pop("train_time", math.nan)
        previous = [v.step for v in validations[-1:]] if "val_loss" in values else [s for s, _ in step_ms[-1:]]
        if previous and step <= previous[0]:
            raise RecordError(f"{path} holds more than one run (step {step} follows step {previous[0]}): "
                              f"keep one log a run.")
        loss, average = values.pop("val_loss", None), values.pop("step_avg", None)
        extras = {name: value for name, value in values.items() if value is not None}
        if loss is None:
            step_ms.append((step, train_ms))
            step_fields[step] = extras
        else:
            validations.append(Validation(step, loss, train_ms, average, extras))
    if not totals:
        raise NoSteps(f"{path} has no step lines: it is no log of a run, or the run died before its first step.")
    if len(totals) > 1 or max([s for s, _ in step_ms] + [v.step for v in validations]) > max(totals):
        raise RecordError(f"{path} counts its steps to {', '.join(map(str, sorted(totals)))} and beyond: "
                          f"keep one log a run.")
    return totals.pop(), validations, step_ms, step_fields


def read_log(path: Path) -> Run:
    """One log as a Run. Raises RecordError with one sentence if it is none."""
    text = read_text(path)
    source, environment, rest = split_sections(text)
    num_iterations, validations, step_ms, step_fields = parse_lines(rest, path)
    peak = re.search(r"^peak memory\D*(\d+) MiB", rest, re.M)
    return Run(path, num_iterations, validations, step_ms, source, parse_environment(environment),
               parse_constants(environment), int(peak[1]) if peak else None, step_fields)


def looks_like_log(path: Path) -> bool:
    """Whether a file claims to be a log: by its name (a run id), or by what it holds. Damaged ones do too."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".log") or RUN_ID.fullmatch(name.removesuffix(".txt")):
        return True
    try:
        return bool(re.search(r"^\s*step:\s*\d|^Running py", read_text(path), re.M | re.I))
    except RecordError:
        return True


def find_logs(path: Path) -> list[Path]:
    """The logs of a folder and of those below it, or the log itself. Raises RecordError if there is no such path.

    Names that begin with a dot are left out; links that lead nowhere are logs that cannot be read.
    """
    if path.is_dir():
        named = (file for file in path.rglob("*") if LOG_SUFFIX.search(file.name) and not file.is_dir()
                 and not any(part.startswith(".") for part in file.relative_to(path).parts))
        return sorted(filter(looks_like_log, named))
    if not path.exists():
        raise RecordError(f"{path} does not exist: name a log or a folder of logs.")
    return [path]


def read_published(path: Path) -> tuple[list[Run], dict]:
    """The runs of a published.json (final loss and time alone), and its content. Raises RecordError if damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        record = data["record"]
        count, _, kind = record["hardware"].partition("x ")
        environment = Environment(torch=record["torch"], gpus=(kind,) * int(count))
        steps = record["num_iterations"]
        runs = [Run(path, steps, [Validation(steps, loss, 1000 * seconds)], environment=environment)
                for loss, seconds in zip(record["val_loss"], record["train_time_s"], strict=True)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is damaged ({error!r}): restore it from git.") from error
    return runs, data


def read_runs(path: Path) -> list[Run]:
    """All runs of a log, a folder of logs or a folder of published figures. Raises RecordError if there is none."""
    logs = find_logs(path)
    if logs:
        return [read_log(log) for log in logs]
    if (path / "published.json").exists():
        return read_published(path / "published.json")[0]
    raise RecordError(f"{path} holds no logs (*.txt, *.log, either with .gz): name a log or a folder of logs.")
