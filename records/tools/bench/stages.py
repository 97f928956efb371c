"""What only a GPU can show, in stages, the most valuable first: docs/first_gpu.md says what each answers.

    tests/gpu.sh                 # every stage that has no result yet for this GPU, torch and source, in order
    tests/gpu.sh c e             # these stages, again if need be
    tests/gpu.sh --minutes 9     # begin none that could not get far, stop the last one in time
    tests/gpu.sh --list          # what has run where, and what is owed: README's table

A stage is a process of its own with a time limit. All runs on a GPU and torch lie in one file of this folder, complete
at any moment: a stage writes what it has found as it finds it, and one that fails leaves its last lines there.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[3]
FOLDERS = ("", "data/preflight", "records/scale_up_1b")  # of what the stages import
WRITE_SECONDS = 5
SAMPLED = "clocks.sm,clocks.mem,power.draw,memory.used,temperature.gpu,utilization.gpu,clocks_event_reasons.active"
KEPT_LINES = 60  # of a stage's output
BEYOND = "NCCL on several GPUs; a whole `short` and `medium`; MUDD; fetching from the real hub"  # what no stage shows
FACTS = """
import json, torch, triton
print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}))
"""
TRAIN = """
import json, sys
from dataclasses import replace
from importlib import import_module
script, preset, constants, *resume_from = sys.argv[1:]
script = import_module(script)
script.main(replace(script.PRESETS[preset](), **json.loads(constants)), *resume_from)
"""


class StageError(Exception):
    """What a stage could not do, or found wrong."""


def write_json(path: Path | str, content: dict) -> None:
    """Complete or not at all."""
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1, default=str))
    os.replace(unfinished, path)


# ----------------------------------------------------------------------------------------------------------------------
# The stages, each in a process of its own

class Job:
    """A stage at work: its folder, in which every *.json counts as found, and the size of its runs."""
    preset, seq_len, val_tokens = "short", 2**16, 2**17

    def __init__(self, folder: Path):
        self.folder, self.found = folder, {"says": {}}

    def keep(self, name: str, found, says: str) -> None:
        """Write it down at once. says: in words, for the README's table."""
        self.found[name], self.found["says"][name] = found, says
        write_json(self.folder / "found.json", self.found)

    def make_shards(self, steps: int) -> None:
        call(ROOT / "data" / "shards.py", "synthetic", self.folder / "shards", "--shards", 1,
             "--tokens", steps * 8 * self.seq_len + 1, "--val-tokens", self.val_tokens + 1)

    def train(self, name: str, *resume_from: Path, script: str = "train_gpt_medium", preset: str = "",
              environment: dict[str, str] = {}, **constants) -> dict:
        """A run of the script in the folder `name`, with some of its constants changed: what its console tells."""
        folder, constants = self.folder / name, dict(val_tokens=self.val_tokens) | constants
        folder.mkdir()
        constants["data_dir"] = str(self.folder / "shards")
        lines = call("-c", TRAIN, script, preset or self.preset, json.dumps(constants), *resume_from, cwd=folder,
                     **environment)
        found = [(seconds, *re.findall(r"val_loss:(\S+) .*step_avg:(\S+)ms", line)[0])
                 for seconds, line in lines if line.startswith("step:")]
        peak = [int(mib) for _, line in lines if line.startswith("peak") for mib in re.findall(r"(\d+) MiB", line)]
        return {"losses": [float(loss) for _, loss, _ in found], "step_ms": float(found[-1][2]),
                "seconds_to_first_validation": round(found[0][0], 1), "allocated_and_reserved_mib": peak}


def call(*command, cwd: Path = ROOT, **environment: str) -> list[tuple[float, str]]:
    """Python with these arguments: its lines, which are shown, and the seconds after which each came."""
    began, lines = time.perf_counter(), []
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", cwd=cwd, env=os.environ | environment)
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append((time.perf_counter() - began, line.strip()))
    if process.wait():
        said = last_words([line for _, line in lines])
        raise StageError(f"{' '.join(map(str, command))[:120]}: status {process.returncode}: {said}")
    return lines


def last_words(lines: list[str]) -> str:
    """The error that a process ended with, or its last line."""
    said = [words for line in lines if (words := line.strip(" ="))] or ["it printed nothing"]
    error = re.compile(r"(\[rank\d+\]:\s*)?[\w.]+(Error|Exception): ")
    return next((line for line in reversed(said) if error.match(line)), said[-1])


def bench(*options: str, job: Job) -> None:
    """bench.py with these options, whose results lie in a file as they come."""
    call(SCRIPT.with_name("bench.py"), *options, "--json", job.folder / "bench.json")


def run_steps(steps: int, job: Job, **how) -> None:
    """So many steps, and a validation before and after them."""
    job.make_shards(steps)
    run = job.train("run", num_iterations=steps, **how)
    job.keep("run", run, f"loss {run['losses'][0]:.2f} to {run['losses'][-1]:.2f}, {run['step_ms']:.0f} ms a step, "
             f"{run['allocated_and_reserved_mib'][0]:,} MiB")


def run_tests(name: str, *options: str, job: Job) -> None:
    if find_spec("pytest") is None:
        raise StageError("pytest is not installed, and this stage is tests: pip install -r tests/requirements.txt")
    (*_, (_, last)) = call("-m", "pytest", f"tests/properties/{name}.py", "-v", "--tb=short", "-p", "no:cacheprovider",
                           *options, TRITON_INTERPRET="0")
    job.keep(name, last, last.strip("= "))


def starts(job: Job) -> None:
    job.make_shards(1)
    caches = {f"{name}_CACHE_DIR": str(job.folder / name) for name in ("TORCHINDUCTOR", "TRITON")}
    for name in ("cold", "warm"):
        run = job.train(name, environment=caches, num_iterations=1)
        job.keep(name, run, f"{name} {run['seconds_to_first_validation']:.0f} s to the first validation")


def resumes(job: Job) -> None:
    import torch
    job.make_shards(4)
    parts = []
    for name in ("straight", "resumed"):  # of which the first finds no checkpoint, the second one
        found = job.folder.glob("straight/checkpoints/*/step_000002")
        run = job.train(name, *found, num_iterations=4, checkpoint_every=2, seed=1)
        job.keep(name, run, f"{name}: loss {run['losses'][-1]}")
        end, = job.folder.glob(f"{name}/checkpoints/*/step_000004")
        part = torch.load(end / "rank_0.pt", map_location="cpu", mmap=True, weights_only=True)
        parts.append({"parameters": part["shards"]} | part["optimizer"])
    straight, resumed = parts
    different = [f"{bank} {name}" for bank, state in straight.items() for name, x in state.items()
                 if not torch.equal(resumed[bank][name], x)]
    job.keep("different", different, f"{len(different)} tensors differ")
    tool, weights = ROOT / "records" / "tools" / "weights" / "weights.py", end
    if find_spec("safetensors"):  # otherwise the checkpoint itself serves
        weights = job.folder / "weights.safetensors"
        call(tool, "export", end, weights)
    for command in ("evaluate", "audit"):
        lines = [line for _, line in call(tool, command, weights, "--data", job.folder / "shards")]
        job.keep(command, lines, f"{command} of {weights.name} ends with {lines[-1]}")


def memory_peaks(job: Job) -> None:
    import memory
    import train_gpt_medium as tgm
    job.make_shards(1)
    for length in (job.seq_len // divisor for divisor in (1, 4, 16)):
        constants = dict(num_iterations=1, kernel_warmup_steps=1, micro_seq_len=length, val_tokens=job.val_tokens)
        estimated = memory.count(replace(tgm.PRESETS[job.preset](), **constants), 1) >> 20
        run = job.train(f"pieces_{length}", **constants)
        job.keep(f"pieces of {length:,}", {"estimated_mib": estimated} | run, f"pieces of {length:,}: "
                 f"{run['allocated_and_reserved_mib'][0]:,} MiB, estimated {estimated:,}")


class Stage(NamedTuple):
    key: str
    what: str
    minutes: float  # its limit
    run: Callable[[Job], None]
    files: tuple[str, ...] = ()  # that decide its result, besides the trainer


BENCH = "records/tools/bench/bench.py", "tests/plain_twin.py", "data/generate.py"
STAGES = (
    Stage("a", "three steps of `short`", 5, partial(run_steps, 3)),
    Stage("b", "the kernels' tests", 7, partial(run_tests, "test_kernels", "-k", "not compile"),  # which needs no GPU
          ("tests/properties/test_kernels.py",)),
    Stage("c", "the tests that need a GPU", 7, partial(run_tests, "test_gpu"), ("tests/properties/test_gpu.py",)),
    Stage("d", "step time and peak memory against the plain twin", 8,
          partial(bench, "--windows", "14", "3", "27", "--profile"), BENCH),
    Stage("e", "each hand-written kernel: error and time", 5, partial(bench, "--kernels"), BENCH),
    Stage("f", "attention sweep", 8.5, partial(bench, "--sweep-attention"), BENCH),
    Stage("g", "cold and warm start", 7, starts),
    Stage("h", "checkpoint, resume, weights, audit", 8, resumes,
          ("records/tools/weights/weights.py", "records/tools/weights/audit.py")),
    Stage("i", "memory model against peaks", 8, memory_peaks, ("data/preflight/memory.py",)),
    Stage("j", "20 steps of the 1.5B run", 8.5,
          partial(run_steps, 20, script="train_gpt_1b", preset="1b", val_every=20, val_tokens=10 * 12 * 1024,
                  cooldown_steps=1), ("records/scale_up_1b/train_gpt_1b.py",)),
)


# ----------------------------------------------------------------------------------------------------------------------
# Running them

def source_of(stage: Stage) -> str:
    """A hash of the files that decide the stage's result."""
    digest = hashlib.sha256()
    for file in ("train_gpt_medium.py", *stage.files):
        digest.update((ROOT / file).read_bytes())
    return digest.hexdigest()[:12]


def last_run(book: dict, stage: Stage) -> dict | None:
    """Its last run, or the last that ended well on the same sources. None if it never ran."""
    runs = [run for run in book["runs"] if run["stage"] == stage.key]
    return max((run for run in reversed(runs) if run["source"] == runs[-1]["source"]),
               key=lambda run: run["status"] == "ok", default=None)


def is_done(book: dict, stage: Stage) -> bool:
    run = last_run(book, stage)
    return run is not None and (run["status"], run["source"]) == ("ok", source_of(stage))


def run_stage(stage: Stage, book: dict, paths: list[Path], facts: dict, limit_s: float) -> dict:
    """Its run in the book, which is written to all paths as the stage goes: where this is killed, it says running."""
    folder, began = paths[0].parent / "stage.tmp", time.monotonic()  # ignored by git
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run = {"stage": stage.key, "status": "running", "date": datetime.now().isoformat(timespec="seconds"),
           "source": source_of(stage), **facts, "result": {}}
    book["runs"].append(run)

    def write() -> None:
        for path in sorted(folder.glob("*.json")):
            run["result"] |= json.loads(path.read_text())
        for name in ("output", "nvidia-smi"):
            if (folder / name).exists():
                run[name] = (folder / name).read_text(errors="replace").splitlines()[-KEPT_LINES:]
        run["seconds"] = round(time.monotonic() - began, 1)
        for path in paths:
            write_json(path, book)

    search = os.pathsep.join([*(str(ROOT / name) for name in FOLDERS), os.environ.get("PYTHONPATH", "")])
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--stage", stage.key, "--results", str(folder)], stdout=output,
            stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1"},
            start_new_session=True)  # a group, to be killed with all that it started
    try:
        while process.poll() is None and time.monotonic() - began < limit_s:
            write()
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(WRITE_SECONDS, began + limit_s - time.monotonic()))
        run["status"] = "too long" if process.poll() is None else "failed" if process.returncode else "ok"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        write()
    shutil.rmtree(folder, ignore_errors=True)
    return run


def describe(run: dict) -> str:
    """A run in a line: its result, or what it ended with."""
    status = "killed" if run["status"] == "running" else run["status"]
    return "; ".join(run["result"]["says"].values()) if status == "ok" else f"{status}: {last_words(run['output'])}"


def as_table(books: list[dict]) -> str:
    """What GPUs have shown and what is owed, as README has it."""
    found = [(stage, book, run) for stage in STAGES for book in books if (run := last_run(book, stage))]
    rows = [f"| {stage.what} | {book['gpu']}, torch {book['torch']}, {run['date'][:10]} | "
            f"{describe(run).replace('|', '/')} |" for stage, book, run in found]
    shown = {stage for stage, _, run in found if run["status"] == "ok"}
    missing = [f"({stage.key}) {stage.what}" for stage in STAGES if stage not in shown]
    return "\n".join([*(["| what | where | result |", "|---|---|---|", *rows, ""] if rows else []),
                      f"Still owed to a GPU: {'; '.join([*missing, BEYOND])}."])


def run_stages(args: argparse.Namespace) -> int:
    """The stages asked for, or those without a result. The exit status: 1 if one failed."""
    deadline, failed = time.monotonic() + 60 * args.minutes, False
    asked = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"error: {sys.executable} sees no CUDA GPU, run this on a GPU machine: "
                 f"{last_words(asked.stderr.splitlines())}")
    facts = json.loads(asked.stdout)
    name = re.sub(r"[^a-z0-9.]+", "_", f"gpu {facts['gpu']} torch {facts['torch'].split('+')[0]}".lower())
    paths = [path / f"{name}.json" for path in (args.results, args.copy) if path]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    book = {"gpu": facts["gpu"], "torch": facts["torch"], "runs": []}
    if paths[0].exists():
        book = json.loads(paths[0].read_text())
    print(f"{facts['gpu']}, torch {facts['torch']}: results in {paths[0]}", flush=True)
    # Those that these sources have not tried come first: one that takes too long would hold them up in every call.
    tried = {(run["stage"], run["source"]) for run in book["runs"]}
    due = [stage for stage in STAGES if (stage.key in args.stages if args.stages else not is_done(book, stage))]
    for stage in sorted(due, key=lambda stage: (stage.key, source_of(stage)) in tried):
        left = deadline - time.monotonic()
        if left < 30 * stage.minutes:
            print(f"({stage.key}) and what follows wait for the next call: {left:.0f} s are left", flush=True)
            break
        print(f"({stage.key}) {stage.what} ...", flush=True)
        run = run_stage(stage, book, paths, facts, min(60 * stage.minutes, left))
        print(f"({stage.key}) after {run['seconds']:.0f} s: {describe(run)}", flush=True)
        failed |= run["status"] != "ok"
    return int(failed)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(f"{s.key}: {s.what}" for s in STAGES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for all stages together")
    parser.add_argument("--list", action="store_true", help="what has run where")
    parser.add_argument("--results", type=Path, default=SCRIPT.parent, help="folder of the results")
    parser.add_argument("--copy", type=Path, help="a folder that gets the results' file too, after every change")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # the process of one stage
    args = parser.parse_args(arguments)
    if unknown := set(args.stages) - {stage.key for stage in STAGES}:
        parser.error(f"no stage is called {min(unknown)}: --help lists them.")
    if args.stage:
        with (args.results / "nvidia-smi").open("w") as samples, suppress(OSError):  # where it is missing
            subprocess.Popen(["nvidia-smi", f"--query-gpu={SAMPLED}", "--format=csv", "-l", "5"], stdout=samples)
        next(stage for stage in STAGES if stage.key == args.stage).run(job=Job(args.results))
        return 0
    if args.list:
        books = [json.loads(path.read_text()) for path in sorted(args.results.glob("gpu_*.json"))]
        print(as_table(books))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the stage in progress ends too
    return run_stages(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
