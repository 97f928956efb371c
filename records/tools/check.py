"""`check`: the rules of a record, each with its reason and its origin, applied to a folder of logs and a README."""
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

import readme_figures as figures
from inference import ALPHA, POOLED_SIGMA, POWER, TARGET, TargetTest, against_target, format_p, plus_minus
from run_log import RUN_ID, RecordError, Run, Validation, find_logs, read_log, read_published
from tables import format_json, format_table

NUM_GPUS = 8
VAL_TOKENS = 10_485_760
ALLOWED_COMPILE_FLAGS = {"coordinate_descent_tuning"}  # allowed on the medium track, banned on the short one
FORBIDDEN_COMPILE_ARGUMENTS = ("mode", "options", "backend")
# Packages that a log need not contain: a requirements file can name them.
PACKAGES = {"torch", "torchvision", "numpy", "triton", "tqdm", "huggingface_hub", "kernels", "flash_attn",
            "flash_attn_interface", "flash_attn_3", "einops", "wandb", "tiktoken", "scipy", "pandas", "matplotlib",
            "datasets", "transformers", "cuda", "cutlass", "quack", "liger_kernel", "transformer_engine", "apex",
            "xformers", "requests", "yaml", "psutil", "pynvml", "cupy", "numba", "lovely_tensors", "rich", "dotenv",
            "bitsandbytes", "torchao", "schedulefree", "heavyball", "dion", "opt_einsum", "safetensors", "distutils"}
SHOWN = 4  # examples a message names
EXPERIMENTS = "experiments"  # folder of comparisons that are no records


@dataclass
class Folder:
    """A record's folder: its runs by role, its README, and what could not be read."""
    path: Path
    readme: str  # empty if there is none
    record: list[Run] = field(default_factory=list)
    baseline: list[Run] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)  # in folders named so
    other: list[Run] = field(default_factory=list)  # further folders beside the record's logs: ablations
    unreadable: list[str] = field(default_factory=list)
    published: dict | None = None  # figures in place of logs
    has_sides: bool = False  # A/ and B/, as `campaign` leaves them: A is the baseline

    @property
    def filed(self) -> bool:
        """Whether it lies in experiments/."""
        return self.path.resolve().parent.name == EXPERIMENTS

    @property
    def experiment(self) -> bool:
        """Whether it is a comparison, which need not be of the record's task."""
        return self.filed or self.has_sides

    @property
    def logs(self) -> list[Run]:
        return [] if self.published else [*self.record, *self.baseline, *self.failed, *self.other]

    @property
    def counted(self) -> list[Run]:
        """The record's runs that have a final loss."""
        return [run for run in self.record if run.finished and math.isfinite(run.final_loss)]


class Rule(NamedTuple):
    """`test` returns what is wrong, one sentence each; None if the folder has nothing to apply it to.

    needs: names of what a Folder must have, so that there is something to apply it to.
    """
    id: str
    severity: str  # error or warning
    why: str
    origin: str
    needs: tuple[str, ...]
    of_task: bool  # demanded by the record's task, and not of an experiment
    test: Callable[[Folder], list[str] | None]


class Finding(NamedTuple):
    """A rule's outcome: `status` is ok, not applicable or broken."""
    rule: Rule
    status: str
    messages: list[str]


RULES: list[Rule] = []


def rule(id: str, severity: str, why: str, origin: str, needs: tuple[str, ...] = ("logs",), of_task: bool = False):
    """Adds the decorated test to RULES."""
    def register(test):
        RULES.append(Rule(id, severity, why, origin, needs, of_task, test))
        return test
    return register


# ----------------------------------------------------------------------------------------------------------------------
# Reading a folder

def role_of(log: Path, folder: Path) -> str:
    """`record`, `baseline`, `failed`, or the name of another folder that the log lies in."""
    folders = log.relative_to(folder).parts[:-1]
    for role in ("failed", "baseline"):
        if any(name.lower().startswith(role) for name in folders):
            return role
    return folders[0] if folders and folders[0].lower() not in ("log", "logs", "run", "runs") else "record"


def read_folder(path: Path) -> Folder:
    """Everything `check` looks at; damaged logs become sentences. Raises RecordError if there is no such folder."""
    if not path.is_dir():
        raise RecordError(f"{path} is not a folder: name a record's folder.")
    readme = path / "README.md"
    folder = Folder(path, readme.read_text(encoding="utf-8", errors="replace").strip() if readme.exists() else "")
    roles: dict[str, list[Run]] = {}
    for log in find_logs(path):
        try:
            roles.setdefault(role_of(log, path), []).append(read_log(log))
        except RecordError as error:
            folder.unreadable.append(str(error))
    folder.baseline, folder.failed = roles.pop("baseline", []), roles.pop("failed", [])
    folder.has_sides = {"A", "B"} <= roles.keys() and "record" not in roles and not folder.baseline
    if folder.has_sides:
        folder.baseline, folder.record = roles.pop("A"), roles.pop("B")
    else:
        folder.record = roles.pop("record", None) or list(chain(*roles.values()))
    folder.other = [run for run in chain(*roles.values()) if run not in folder.record]
    if not folder.logs and not folder.unreadable and (path / "published.json").exists():
        folder.record, folder.published = read_published(path / "published.json")
    return folder


def final_losses(runs: list[Run]) -> list[float]:
    """Of the runs that have one."""
    return [run.final_loss for run in runs if run.finished and math.isfinite(run.final_loss)]


def shown(items: Iterable) -> str:
    """The first few of many."""
    items = [str(item) for item in items]
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def name_of(run: Run) -> str:
    return run.path.name


# ----------------------------------------------------------------------------------------------------------------------
# What is there

@rule("readme", "error", "A claim needs its words: what changed, against which baseline.",
      "records/README.md, how to submit", needs=())
def has_readme(folder):
    if folder.has_sides and not folder.filed:
        return None
    return [] if folder.readme else ["there is no README.md, or it is empty"]


@rule("readable", "error", "A log that cannot be read proves nothing.", "records/README.md, rule 6", needs=())
def all_readable(folder):
    return folder.unreadable if folder.unreadable or folder.logs else None


@rule("finished", "error", "A run without a final loss cannot count, and leaving it out would choose among runs; "
      "keep crashed ones in failed/.", "records/README.md, rule 7")
def all_finished(folder):
    problems = [f"{name_of(run)} {run.ending}" for run in folder.record + folder.baseline if not run.finished]
    return problems + [f"{name_of(run)} ends with loss {run.final_loss}" for run in folder.record + folder.baseline
                       if run.finished and not math.isfinite(run.final_loss)]


@rule("all-counted", "error", "A finished run of the record's script outside the record's runs was left out.",
      "records/README.md, rule 7; logs that were not among the listed runs")
def none_left_out(folder):
    sources = {run.source for run in folder.record if run.source}
    others = folder.failed + folder.other + ([] if folder.has_sides else folder.baseline)  # a campaign may try A twice
    return [f"{run.path.relative_to(folder.path)} is a finished run of the record's script"
            for run in others if run.finished and not run.resumed_from
            and run.source in sources and same_constants(run, folder.record[0])]


@rule("unique", "error", "A run counted twice feigns evidence.", "the field: runs counted twice", needs=())
def no_run_twice(folder):
    runs = [run for run in folder.record + folder.baseline + folder.other if run.finished]
    finals = Counter((f"{run.final_loss:.6f}", f"{run.train_seconds:.3f}") for run in runs
                     if math.isfinite(run.train_seconds))
    problems = [f"loss {loss} after {seconds} s occurs {count} times" for (loss, seconds), count in finals.items()
                if count > 1]
    ids = Counter(run.name for run in runs if RUN_ID.fullmatch(run.name))  # other names may be those of several runs
    return problems + [f"run id {id} occurs {count} times" for id, count in ids.items() if count > 1]


@rule("seeds", "error", "Runs of one seed are not independent samples.", "the t-test's assumption")
def seeds_differ(folder):
    seeds = Counter(run.constants["drawn seed"] for run in folder.record if "drawn seed" in run.constants)
    return [f"seed {seed} was used {count} times" for seed, count in seeds.items() if count > 1] if seeds else None


# ----------------------------------------------------------------------------------------------------------------------
# Statistics

@rule("target-t", "error", f"The mean of all runs must be below the target with p < {ALPHA} (one-sided t-test).",
      "records/README.md, rule 1", needs=("counted",), of_task=True)
def t_test_passes(folder):
    test = test_of(folder)
    if test.mean > TARGET:
        return [f"mean loss {test.mean:.6f} is above {TARGET}"]
    if test.n < 2:
        return [f"one run ({test.mean:.6f}) is no test: {test.runs_needed or 'more'} are needed"]
    if math.isnan(test.t):
        return [f"all {test.n} losses are equal ({test.mean:.6f}): independent runs differ"]
    return [] if test.t_p < ALPHA else [f"mean {test.mean:.6f}, n = {test.n}: p = {format_p(test.t_p)} is not below "
                                        f"{ALPHA}"]


@rule("target-z", "warning", "Few runs that happen to agree pass a t-test at any margin; the field's pooled sigma does "
      "not.", "the field: records of n = 2", needs=("counted",), of_task=True)
def z_test_passes(folder):
    test = test_of(folder)
    return [] if test.z_p < ALPHA else [f"with sigma {POOLED_SIGMA:g}: z = {test.z:.2f}, p = {format_p(test.z_p)} is "
                                        f"not below {ALPHA}"]


def test_of(folder: Folder) -> TargetTest:
    return against_target([run.final_loss for run in folder.counted])


# ----------------------------------------------------------------------------------------------------------------------
# The README against the logs

def known_losses(folder: Folder) -> list[float]:
    """Losses that the folder's own data give: along every curve, of all runs and their means, and with the spread of
    the final ones."""
    losses = [float(text) for text in re.findall(r"\d+\.\d+", json.dumps(folder.published or {}))]
    others = [[*runs] for _, runs in groupby(folder.other, lambda run: role_of(run.path, folder.path))]
    for group in (folder.record, folder.baseline, folder.record + folder.baseline, *others, folder.failed):
        by_step: dict[int, list[float]] = {}
        for validation in chain(*(run.validations for run in group)):
            by_step.setdefault(validation.step, []).append(validation.loss)
        losses += chain(*([*values, float(np.mean(values))] for values in by_step.values()))
        finals = final_losses(group)
        if len(finals) > 1:
            test = against_target(finals)
            losses += [test.low, test.high, test.mean - test.std, test.mean + test.std]
    return losses


@rule("readme-has-runs", "error", "Every run's loss, and its time or the mean time, stands in the README: all runs "
      "count.", "records/README.md, rule 7; the field: logs not among the listed runs", needs=("readme", "counted"))
def readme_lists_every_run(folder):
    stated = figures.read_figures(folder.readme)
    missing = [f"{run.final_loss:.6f}" for run in folder.counted
               if not any(f.decimals >= figures.LOSS_DECIMALS and f.rounds(run.final_loss) for f in stated)]
    problems = [f"loss {shown(missing)} of {len(missing)} runs is not in the README"] if missing else []
    seconds = [run.train_seconds for run in folder.counted if math.isfinite(run.train_seconds)]
    if seconds:
        absent = [s for s in seconds if not any(f.states_time(s) for f in stated)]
        if absent and not any(f.states_time(np.mean(seconds)) for f in stated):
            problems.append(f"neither the mean train time {np.mean(seconds):.3f} s nor every run's is in the README")
    return problems


@rule("readme-from-logs", "error", "A loss that the README lists or a number of runs that it speaks of, but the logs "
      "do not give, cannot be verified.", "the field: one log under a list of thirty runs", needs=("readme", "counted"))
def readme_lists_nothing_else(folder):
    losses, finals = known_losses(folder), final_losses(folder.record + folder.baseline)
    unknown = [f.text for f in figures.read_figures(folder.readme) if f.listed and f.is_loss(finals)
               and not any(f.rounds(loss) for loss in losses)]
    problems = [f"loss {shown(unknown)}: no {'published.json' if folder.published else 'log here'} gives "
                f"{'it' if len(unknown) == 1 else 'them'}"] if unknown else []
    counts = {int(number) for number in figures.RUN_COUNT.findall(folder.readme)}
    if counts and len(folder.counted) not in counts:
        problems.append(f"the README speaks of {shown(sorted(counts))} runs, there are {len(folder.counted)}")
    return problems


# ----------------------------------------------------------------------------------------------------------------------
# What ran

SEEDS = {"drawn seed", "seed"}  # drawn by the run, or given


def same_constants(a: Run, b: Run) -> bool:
    """Whether the constants that our logs print agree, but for the seed and where data and checkpoint lie."""
    differing = {name for name, _ in a.constants.items() ^ b.constants.items()}
    return differing <= {*SEEDS, "data_dir", "shards", "resumed from"}


@rule("one-source", "error", "Runs of different scripts are no sample of one.", "records/README.md, rule 6")
def all_of_one_source(folder):
    problems = []
    for role, runs in (("record", folder.record), ("baseline", folder.baseline)):
        sources = Counter("\n".join(line.rstrip() for line in run.source.splitlines()) for run in runs)
        if len(sources) > 1:
            problems.append(f"the {role}'s {len(runs)} runs have {len(sources)} different sources")
        elif any(not same_constants(run, runs[0]) for run in runs):
            names = {name for run in runs for name, _ in run.constants.items() ^ runs[0].constants.items()}
            problems.append(f"the {role}'s runs differ in the constants {shown(sorted(names - SEEDS))}")
    return problems


@rule("one-step-count", "error", "Runs of different lengths are no sample of one.", "records/README.md, rule 1")
def all_of_one_length(folder):
    return [f"the {role}'s runs have {shown(sorted(counts))} steps" for role, runs in
            (("record", folder.record), ("baseline", folder.baseline))
            if len(counts := {run.num_iterations for run in runs}) > 1]


def local_modules(source: str) -> dict[str, list[str]]:
    """Modules that a source imports, neither Python's nor known packages, with the names taken from them."""
    modules: dict[str, list[str]] = {}
    for match in re.finditer(r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#;]+)|"
                             r"import[ \t]+([\w., \t]+?))[ \t]*(?:[#;].*)?$", source, re.M):
        if match[3]:
            for part in match[3].split(","):
                modules.setdefault(part.split(" as ")[0].strip().split(".")[0], [])
        else:
            names = re.sub(r"#[^\n]*", "", match[2]).strip("() \t\n").split(",")
            modules.setdefault(match[1].split(".")[0] or match[1], []).extend(
                name.split(" as ")[0].strip() for name in names if name.strip())
    return {name: names for name, names in modules.items()
            if name and name not in PACKAGES and name not in sys.stdlib_module_names}


@rule("source-complete", "error", "A log must hold every line that ran: the script and each local module that it "
      "imports.", "records/README.md, rule 6; the field: kernels missing from the log")
def source_is_complete(folder):
    problems = []
    for source, runs in group_by(folder.record + folder.baseline, lambda run: run.source):
        if not re.search(r"^\s*(import|from) ", source, re.M):
            problems.append(f"{shown(map(name_of, runs))}: the log holds no source")
        for module, names in local_modules(source).items():
            header = re.search(rf"^\W*(?:[\w./]*/)?{re.escape(module)}\.py\b", source, re.M)
            defined = names and all(re.search(rf"^\s*(?:(?:async )?def|class) {re.escape(name)}\b|"
                                              rf"^{re.escape(name)}\s*(?::.*)?=", source, re.M) for name in names)
            if not header and not defined:
                problems.append(f"{shown(map(name_of, runs))}: imports {module}, whose source is not in the log")
    return problems


def group_by(runs: list[Run], key: Callable) -> list[tuple]:
    """(key, runs) pairs in the order of their first run."""
    groups: dict = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.items())


@rule("compile-flags", "error", "Inductor flags and torch.compile modes buy time that is not the idea's.",
      "modded-nanogpt's rules: no extra torch._inductor.config or torch.compile flags")
def no_extra_compile_flags(folder):
    problems = []
    for source, runs in group_by(folder.record, lambda run: run.source):
        code = re.sub(r"#[^\n]*", "", source)
        aliases = re.findall(r"torch\._inductor(?:\.| import )config as (\w+)", code) + (
            ["config"] if re.search(r"from torch\._inductor import config\b(?! as)", code) else [])
        prefix = "|".join([r"torch\._inductor\.config", r"inductor_config", *aliases])
        flags = set(re.findall(rf"\b(?:{prefix})\.([\w.]+)\s*=(?!=)", code)) - ALLOWED_COMPILE_FLAGS
        flags |= {f"{name}=" for call in re.findall(r"\bcompile\(((?:[^()]|\([^()]*\))*)\)", code)
                  for name in FORBIDDEN_COMPILE_ARGUMENTS if re.search(rf"\b{name}\s*=(?!=)", call)}
        flags |= set(re.findall(r"TORCHINDUCTOR_\w+", code))
        if flags:
            problems.append(f"{shown(map(name_of, runs))}: {shown(sorted(flags))}")
    return problems


def val_tokens(run: Run) -> int | None:
    """Validation tokens by our log's constant, or by the assignment in the source; None if neither shows."""
    text = run.constants.get("val_tokens")
    if text is None:
        match = re.search(r"^\s*(?:\w+\.)?val_tokens\s*(?::\s*\w+\s*)?=\s*([\d_* ()]+?)\s*(?:#.*)?$", run.source, re.M)
        text = match[1] if match else ""
    factors = [part.strip(" ()") for part in text.split("*")]
    return math.prod(map(int, factors)) if all(factor.replace("_", "").isdigit() for factor in factors) else None


@rule("val-tokens", "error", f"The loss is defined on {VAL_TOKENS:,} validation tokens.", "records/README.md, rule 1",
      of_task=True)
def whole_validation_set(folder):
    return [f"{shown(map(name_of, runs))}: " + (f"{tokens:,} tokens" if tokens else "the log does not show how many")
            for tokens, runs in group_by(folder.record + folder.baseline, val_tokens) if tokens != VAL_TOKENS]


@rule("data", "error", "Losses on synthetic tokens mean nothing.", "records/README.md, rule 4", of_task=True)
def real_data(folder):
    return [f"{name_of(run)} trained on synthetic shards" for run in folder.record
            if "SYNTHETIC" in run.constants.get("shards", "")]


# ----------------------------------------------------------------------------------------------------------------------
# Where it ran, and the clock

@rule("gpus", "error", "The task is the time on 8 GPUs of one kind.", "records/README.md, the target", of_task=True)
def eight_gpus(folder):
    unknown = "the log names no GPUs in a form that is known (nvidia-smi's table, or: on 8 x NAME)"
    return [f"{shown(map(name_of, runs))}: " + (unknown if hardware == "unknown" else hardware)
            for hardware, runs in group_by(folder.record, lambda run: run.environment.hardware)
            if len(set(runs[0].environment.gpus)) != 1 or len(runs[0].environment.gpus) != NUM_GPUS]


@rule("one-environment", "error", "Another driver, torch, CUDA or GPU changes the speed: all runs share one.",
      "records/README.md, rule 5; the field: a torch upgrade mistaken for an idea")
def one_environment(folder):
    values = {name: Counter(getattr(run.environment, name) or "none shown" for run in folder.record)
              for name in ("hardware", "driver", "torch", "cuda")}
    return [f"{name}: {shown(f'{value} ({count} runs)' for value, count in counts.items())}"
            for name, counts in values.items()
            if len(counts) > 1 or "none shown" in counts and not folder.experiment]  # which may run on a CPU


@rule("times", "error", "A clock that runs backwards, skips steps or contradicts its own average was edited or reset.",
      "records/README.md, rule 2")
def clock_is_consistent(folder):
    return [f"{name_of(run)}: {problem}" for run in folder.record + folder.baseline for problem in clock_problems(run)]


def clock_problems(run: Run) -> list[str]:
    """What contradicts itself among a log's times."""
    points = sorted([*((s, ms) for s, ms in run.step_ms if math.isfinite(ms)),
                     *((v.step, v.train_ms) for v in run.validations if math.isfinite(v.train_ms))])
    if not points:
        return ["the log has no train times"]
    problems = [f"time decreases after step {step}" for (step, ms), (_, later) in zip(points, points[1:])
                if later < ms and step > run.clock_start][:1]
    steps = [step for step, _ in run.step_ms]
    strides = np.diff([0, *steps, *([run.num_iterations + 1] if run.finished else [])])
    if len(steps) > 1 and strides.max() > np.median(strides):  # some scripts log every tenth step only
        gap = int(strides.argmax())
        problems.append(f"step lines are missing after step {([0] + steps)[gap]}")
    if run.step_ms and run.finished and len(steps) > 1:
        total, last = run.validations[-1].train_ms, run.step_ms[-1][1]
        # Step lines do not wait for the GPU, which may be a few steps behind.
        if abs(total - last) > max(5 * total / run.num_iterations, 2):
            problems.append(f"the steps sum to {last:.0f} ms, the total is {total:.0f} ms")
    start = Validation(run.clock_start, 0.0, 0.0)
    timed = [start, *(v for v in run.validations if v.step > run.clock_start)]
    # Averages are of all steps so far or, in some scripts, of those since the last validation.
    if all(map(average_holds, timed[:-1], timed[1:])):
        return problems
    return problems + [f"at step {v.step} {v.step_avg_ms} ms a step is not {v.train_ms:.0f} ms in all"
                       for v in timed[1:] if not average_holds(start, v)][:1]


def average_holds(begin: Validation, v: Validation) -> bool:
    """Whether the average printed at v, if there is one, is that of the steps since `begin`."""
    steps, ms = v.step - begin.step, v.train_ms - begin.train_ms
    average = ms / steps if v.step_avg_ms is None else v.step_avg_ms
    # Half a unit of each printed total, and of the printed average times the steps.
    return not abs(average * steps - ms) > 0.51 + 0.51 * (begin.train_ms > 0) + 0.0051 * steps


@rule("resumed", "error", "The clock stands while checkpoints are written, and a resumed run's time is put together "
      "from two starts: only runs without either are timed; keep others in failed/.", "records/README.md, rule 2")
def none_resumed(folder):
    runs = folder.record + folder.baseline
    return [f"{name_of(run)} was resumed from {run.resumed_from}" for run in runs if run.resumed_from] + [
        f"{name_of(run)} wrote checkpoints ({name} = {run.constants[name]})" for run in runs
        for name in ("checkpoint_every", "checkpoint_minutes") if run.constants.get(name, "0") not in ("0", "0.0")]


@rule("baseline", "warning", "Without a baseline on the same hardware and torch the speed claim is uncontrolled.",
      "records/README.md, rule 5")
def baseline_is_comparable(folder):
    runs = [run for run in folder.baseline if run.finished]
    if not runs:
        return ["there are no finished runs of a baseline (a folder baseline/): the speed claim is uncontrolled"]
    pairs = {name: ({getattr(run.environment, name) for run in folder.record},
                    {getattr(run.environment, name) for run in runs}) for name in ("hardware", "torch", "driver")}
    return [f"{name} differs: {shown(sorted(ours))} against the baseline's {shown(sorted(theirs))}"
            for name, (ours, theirs) in pairs.items() if not theirs <= ours]


# ----------------------------------------------------------------------------------------------------------------------
# The verdict

def apply_rules(folder: Folder) -> list[Finding]:
    findings = []
    for rule in RULES:
        applies = all(getattr(folder, name) for name in rule.needs) and not (rule.of_task and folder.experiment)
        messages = rule.test(folder) if applies else None
        status = "not applicable" if messages is None else "broken" if messages else "ok"
        findings.append(Finding(rule, status, messages or []))
    return findings


def verdict_of(folder: Folder, findings: list[Finding]) -> str:
    """One line. Errors come first; published figures are never better than unverified."""
    broken = Counter(finding.rule.severity for finding in findings if finding.status == "broken")
    errors, warnings = (f"{broken[kind]} {kind}{'s' * (broken[kind] != 1)}" for kind in ("error", "warning"))
    if folder.published:
        return "figures only, cannot be verified" + (f"; {errors} in the figures" if broken["error"] else "")
    if not folder.logs and not folder.unreadable:
        return "nothing to judge: no logs, no figures"
    if not folder.counted:
        return "unfinished: no run of the record has a final loss"
    if broken["error"]:
        return f"does not hold: {errors}"
    if folder.experiment:
        if 1 in (len(folder.counted), len(final_losses(folder.baseline))):
            return f"a comparison that shows nothing yet: a side has one run, so no interval and no test; {warnings}"
        kind = "an experiment" if folder.filed else "a comparison of B with A"
        return f"{kind}: keeps every rule but those of the record's task, with {warnings}"
    return f"holds, with {warnings}" if broken["warning"] else "holds: every rule is kept"


def describe_statistics(folder: Folder) -> dict:
    """The record's figures by its runs, as plain values; empty without a finished run."""
    if not folder.counted:
        return {}
    test = test_of(folder)
    seconds = [run.train_seconds for run in folder.counted]
    environments = sorted({run.environment.hardware for run in folder.counted})
    loss = {name: getattr(test, name) for name in ("n", "mean", "std", "low", "high")} if folder.experiment else asdict(
        test) | {"margin": TARGET - test.mean, "target": TARGET, "sigma": POOLED_SIGMA}
    return loss | {
        "train_seconds_mean": float(np.mean(seconds)),
        "train_seconds_std": float(np.std(seconds, ddof=1)) if len(seconds) > 1 else math.nan,
        "hardware": environments, "torch": sorted({run.environment.torch for run in folder.counted}),
        "num_iterations": sorted({run.num_iterations for run in folder.counted}), "baseline_runs": len(folder.baseline),
        "failed_runs": len(folder.failed), "other_runs": len(folder.other)}


def check(path: Path, as_json: bool) -> int:
    """Prints the report; 1 if a rule of severity error is broken, or there is nothing to judge, otherwise 0."""
    folder = read_folder(path)
    findings = apply_rules(folder)
    statistics, verdict = describe_statistics(folder), verdict_of(folder, findings)
    if as_json:
        rules = [{"id": f.rule.id, "severity": f.rule.severity, "status": f.status, "messages": f.messages,
                  "why": f.rule.why, "origin": f.rule.origin} for f in findings]
        print(format_json({"folder": str(path), "verdict": verdict, "statistics": statistics, "rules": rules}))
    else:
        print(report(folder, findings, statistics, verdict))
    errors = any(f.status == "broken" and f.rule.severity == "error" for f in findings)
    return int(errors or not (folder.counted or folder.published))


def report(folder: Folder, findings: list[Finding], statistics: dict, verdict: str) -> str:
    lines = [f"{folder.path}: {verdict}", ""]
    if statistics:
        lines += [format_table(statistics_rows(folder, statistics)), ""]
    broken = [finding for finding in findings if finding.status == "broken"]
    if broken:
        lines += [format_table([[f.rule.severity, f.rule.id, message] for f in broken for message in f.messages]), "",
                  *(f"  {f.rule.id}: {f.rule.why} [{f.rule.origin}]" for f in broken), ""]
    for status in ("ok", "not applicable"):
        ids = [finding.rule.id for finding in findings if finding.status == status]
        if ids:
            lines.append(f"{status}: {', '.join(ids)}")
    return "\n".join(lines)


def statistics_rows(folder: Folder, s: dict) -> list[list[str]]:
    """s: of `describe_statistics`. Runs, loss and time; of a record also both tests, and the runs that they need."""
    rows = [["runs", f"{s['n']} (baseline {s['baseline_runs']}, failed {s['failed_runs']}, other {s['other_runs']})"],
            ["loss", plus_minus(s["mean"], s["std"], ".6f") + " nats/token" + (
                f", 95 % interval {s['low']:.6f} to {s['high']:.6f}" if s["n"] > 1 else "")],
            ["train time", plus_minus(s["train_seconds_mean"], s["train_seconds_std"], ".3f") + " s"]]
    if folder.experiment:
        return rows
    return [*rows,
            [f"t-test, mean <= {s['target']}", f"t = {s['t']:.2f}, p = {format_p(s['t_p'])}"
             if math.isfinite(s["t"]) else "none: it needs runs that differ"],
            [f"z-test, sigma {s['sigma']:g}", f"z = {s['z']:.2f}, p = {format_p(s['z_p'])}"],
            [f"runs needed for p < {ALPHA}",
             f"{s['runs_needed'] or 'no number'} at this margin ({s['margin']:.6f}), {POWER:.0%} power"]]
