"""What only a GPU can show, in stages, the most valuable first: docs/first_gpu.md says what each answers.

    tests/gpu.sh                 # every stage that has no result yet for this GPU, torch and source, in order
    tests/gpu.sh c e             # these stages, again if need be
    tests/gpu.sh --minutes 9     # begin none that could not get far, stop the last one in time
    tests/gpu.sh --list          # what has run where, and what is owed: README's table
    tests/gpu.sh --rehearse      # every stage on a CPU, tiny, with stand-ins, in a temporary folder

A stage is a process of its own with a time limit. All results of a GPU and torch lie in one file of this folder,
complete at any moment: a stage writes what it has found as it finds it, and one that fails leaves its last lines there.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[3]
FOLDERS = ("", "tests", "records/tools/bench", "data/preflight", "records/scale_up_1b")  # of what the stages import
SAMPLE_SECONDS = 5
KEPT_LINES = 60  # of a stage's output
SAMPLED = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "used_mib": "memory.used",
           "celsius": "temperature.gpu", "busy": "utilization.gpu", "throttle": "clocks_event_reasons.active"}
THROTTLE_BITS = {4: "power cap", 8: "hardware slowdown", 32: "heat", 64: "heat (hardware)", 128: "power brake"}
MARGIN = 0.02  # of an operation in bf16 against fp32: its roundings are some 2^-9
BEYOND = "NCCL on several GPUs; a whole `short` and `medium`; fetching from the real hub"  # what no stage shows
FACTS = """
import json, torch
gpu = torch.cuda.is_available() and torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": gpu and gpu.name, "uuid": gpu and f"GPU-{gpu.uuid}", "torch": torch.__version__}))
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
    """A stage at work: its folder, in which every *.json counts as found, and its size (tiny: a rehearsal's)."""
    def __init__(self, folder: Path, tiny: bool):
        self.folder, self.tiny, self.found = folder, tiny, {}
        self.preset, self.seq_len, self.val_tokens = ("tiny", 512, 2**11) if tiny else ("short", 2**16, 2**17)

    def keep(self, **found) -> None:
        """Write it down at once. `says` is the stage's result in a line."""
        self.found |= found
        write_json(self.folder / "found.json", self.found)

    def bench(self, name: str, *options: str) -> dict:
        """bench.py's results, which lie in a file as they come."""
        path = self.folder / f"{name}.json"
        script = "tests/pretended_gpu.py" if self.tiny else "records/tools/bench/bench.py"
        call(ROOT / script, *options, "--json", path)
        return json.loads(path.read_text())

    def make_shards(self, steps: int) -> None:
        size = "--shards", 1, "--tokens", steps * 8 * self.seq_len + 1, "--val-tokens", self.val_tokens + 1
        kind, size = ("text", ()) if self.tiny else ("synthetic", size)
        call(ROOT / "data" / "shards.py", kind, self.folder / "shards", *size)

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


def attempt(*parts: Callable[[], object]) -> list:
    """The results of all, whatever becomes of one. Raises what went wrong at the end."""
    results, errors = [], []
    for part in parts:
        try:
            results.append(part())
        except StageError as error:
            errors.append(str(error))
    if errors:
        raise StageError("; ".join(errors))
    return results


def relative(ours, exact) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def kernel_errors(config, T: int, device) -> Iterator[tuple[str, float]]:
    """Yields the relative error of every hand-written operation in bf16, on a GPU its kernel's, against its plain
    version in fp32."""
    import torch
    import train_gpt_medium as tgm
    C, hidden, V = config.model_dim, config.mlp_factor * config.model_dim, config.vocab_size
    ids = torch.randint(V, (T,), device=device, dtype=torch.int32)

    def randn(*shape: int):
        return torch.randn(shape, device=device).bfloat16()

    def loss_and_gradient(logits):
        logits = logits.clone()
        return tgm.cross_entropy(logits, ids.long(), config.logit_softcap, True), logits

    x, fc, logits, wide = randn(T, C), randn(hidden, C), randn(T, -(-V // 128) * 128), randn(4, C, hidden)
    operations = {
        "mlp_up": (tgm.mlp_up, x, fc),
        "mlp_down_grad": (tgm.mlp_down_grad, x, randn(C, hidden), tgm.mlp_up(x, fc)),
        "cross_entropy": (lambda z: loss_and_gradient(z)[0], logits),
        "cross_entropy's gradient": (lambda z: loss_and_gradient(z)[1], logits),
        "embedding_grad": (lambda grads: tgm.embedding_grad(grads, ids, V), randn(7, T, C)),
        "symmetric_product": (lambda X: tgm.symmetric_product(X, 1.0, 0.0), wide),
        "symmetric_product plus x": (lambda A: tgm.symmetric_product(A, 1.2, -3.1), wide @ wide.mT / hidden)}
    for name, (function, *inputs) in operations.items():
        yield name, relative(function(*inputs), function(*(x.float() for x in inputs)))


def attention_errors(config, T: int, device) -> Iterator[tuple[str, float]]:
    """Yields those of FlexAttention and its gradients in bf16, with the script's options, against dense attention in
    fp32."""
    import bench
    import torch
    import train_gpt_medium as tgm
    ids, on_gpu = bench.real_looking_ids(T, config, seed=0).to(device), device.type == "cuda"
    compiled = torch.compile(tgm.attend, dynamic=False, fullgraph=True) if on_gpu else tgm.attend
    for window, options in ((14, tgm.LONG_WINDOW_KERNEL), (7, tgm.SHORT_WINDOW_KERNEL)):
        block_mask, = tgm.block_masks(ids, (bench.as_window(window, device),), config.doc_token)
        dense, results = tgm.dense_mask(block_mask), []
        *qkv, dy = torch.randn(4, 1, T, config.num_heads, config.head_dim, device=device).bfloat16()
        for dtype, attend, mask in ((torch.bfloat16, compiled, block_mask if on_gpu else dense),
                                    (torch.float32, tgm.attend, dense)):
            inputs = [x.detach().to(dtype).requires_grad_() for x in qkv]
            y = attend(*inputs, mask, config.attention_scale, options)
            results.append((y, *torch.autograd.grad(y, inputs, dy.to(dtype))))
        for name, *pair in zip(("y", "dq", "dk", "dv"), *results):
            yield f"{name}, window {window}", relative(*pair)


def first_look(job: Job) -> None:
    import torch
    import train_gpt_medium as tgm
    config, device = tgm.PRESETS[job.preset](), torch.device("cpu" if job.tiny else "cuda")
    size, errors = (config, min(config.seq_len, 4096), device), {}
    for name, error in chain(kernel_errors(*size), attention_errors(*size)):
        errors[name] = error
        job.keep(errors=errors)  # one that raises hides none before it
    torch.cuda.empty_cache()  # the next process needs it
    job.make_shards(3)
    run = job.train("short", num_iterations=3)
    job.keep(run=run, says=f"kernels, attention and its gradients within {max(errors.values()):.2%} of fp32; loss "
             f"{run['losses'][0]:.2f} to {run['losses'][-1]:.2f}, {run['step_ms']:.0f} ms a step")
    if wrong := {name: error for name, error in errors.items() if not error < MARGIN}:
        raise StageError(f"not within {MARGIN:.0%} of fp32: {wrong}")


def gpu_tests(job: Job) -> None:
    if find_spec("pytest") is None:
        raise StageError("pytest is not installed, and this stage is tests: pip install -r tests/requirements.txt")

    def run(name: str, *options: str) -> None:
        file = f"tests/properties/{name}.py"
        *_, (_, last) = call("-m", "pytest", file, "-v", "--tb=short", "-p", "no:cacheprovider", *options,
                             **{} if job.tiny else {"TRITON_INTERPRET": "0"})
        job.keep(**{name: last_words([last])})

    # The quick ones first; a process for each, since one wrong access to memory ends a GPU's process.
    # Tests that only compile need no GPU.
    attempt(partial(run, "test_kernels", "-k", "embedding" if job.tiny else "not compile"), partial(run, "test_gpu"))
    job.keep(says="; ".join(f"{name}: {result}" for name, result in job.found.items()))


def step_time(job: Job) -> None:
    says = []
    for window, row in job.bench("step", "--windows", "14,3,27")["windows"].items():
        ours, twin = ((side["sum_ms"]["median"], side["peak_gb"]) for side in row["sides"].values())
        says.append(f"window {window}: {ours[0]:.1f} of the twin's {twin[0]:.1f} ms ({row['ratio']:.3f}), peak "
                    f"{ours[1]:.1f} of {twin[1]:.1f} GB")
    job.keep(says="; ".join(says))


def parts_alone(job: Job) -> None:
    kernels, optimizer = attempt(*(partial(job.bench, name, f"--{name}") for name in ("kernels", "optimizer")))
    says = []
    for name, case in kernels["kernels"].items():
        ours, other, *_ = (row["median"] for row in case["versions"].values())
        says.append(f"{name} {ours:.3f} of the library's {other:.3f} ms")
    for size, case in optimizer["ranks"].items():
        ours, frozen = (row["median"] for row in case["optimizers"].values())
        says.append(f"optimizer on one of {size} ranks {ours:.1f} of the frozen one's {frozen:.1f} ms")
    job.keep(says="; ".join(says))


def attention_sweep(job: Job) -> None:
    import bench
    says = []
    for window, swept in job.bench("sweep", "--sweep-attention")["attention"].items():
        rows = swept["candidates"]
        best, untuned = map(bench.ms_of, (swept["best"], rows[0]))
        says.append(f"window {window}: {best:.3f} ms, untuned {untuned:.3f}, {sum('failed' in row for row in rows)} of "
                    f"{len(rows)} configurations fail")
    job.keep(says="; ".join(says))


def starts(job: Job) -> None:
    job.make_shards(1)
    caches = {f"{name}_CACHE_DIR": str(job.folder / name) for name in ("TORCHINDUCTOR", "TRITON")}
    for name in ("cold", "warm"):
        job.keep(**{name: job.train(name, environment=caches, num_iterations=1)})
    cold, warm = (job.found[name]["seconds_to_first_validation"] for name in ("cold", "warm"))
    job.keep(says=f"{cold:.0f} s to the first validation cold, {warm:.0f} s warm")


def resumes(job: Job) -> None:
    import torch
    job.make_shards(4)
    constants, parts = dict(num_iterations=4, checkpoint_every=2, seed=1), []
    for name in ("straight", "resumed"):  # of which the first finds no checkpoint, the second one
        job.keep(**{name: job.train(name, *job.folder.glob("straight/checkpoints/*/step_000002"), **constants)})
        end, = job.folder.glob(f"{name}/checkpoints/*/step_000004")
        part = torch.load(end / "rank_0.pt", map_location="cpu", mmap=True, weights_only=True)
        parts.append({"parameters": part["shards"]} | part["optimizer"])
    straight, resumed = parts
    apart = {f"{bank} {name}": relative(resumed[bank][name], x) for bank, state in straight.items()
             for name, x in state.items() if not torch.equal(resumed[bank][name], x)}
    job.keep(different=apart)
    tool, weights = ROOT / "records" / "tools" / "weights" / "weights.py", end
    if find_spec("safetensors"):  # otherwise the checkpoint itself serves
        weights = job.folder / "weights.safetensors"
        call(tool, "export", end, weights)
    for command in ("evaluate", "audit"):
        lines = call(tool, command, weights, "--data", job.folder / "shards")
        job.keep(**{command: [line for _, line in lines]})
    job.keep(says=f"{len(apart)} tensors of the resumed run differ from the straight one's, by up to "
             f"{max(apart.values(), default=0):.1e}; loss {job.found['resumed']['losses'][-1]}, of the "
             f"{'exported weights' if weights != end else 'checkpoint'} {job.found['evaluate'][-1].split(':')[-1]}; "
             f"the audit passes")


def memory_peaks(job: Job) -> None:
    import memory
    import train_gpt_medium as tgm
    job.make_shards(1)
    pieces, says = {}, []
    for length in (job.seq_len // divisor for divisor in ((1, 4) if job.tiny else (1, 4, 16))):
        constants = dict(num_iterations=1, kernel_warmup_steps=1, micro_seq_len=length, val_tokens=job.val_tokens)
        estimated = memory.count(replace(tgm.PRESETS[job.preset](), **constants), 1) >> 20
        pieces[length] = {"estimated_mib": estimated} | job.train(f"pieces_{length}", **constants)
        peak = pieces[length]["allocated_and_reserved_mib"][0]
        says.append(f"pieces of {length:,}: {peak:,} MiB, estimated {estimated:,}")
        job.keep(pieces=pieces, says="; ".join(says))


def second_experiment(job: Job) -> None:
    job.make_shards(20)
    preset, length = ("tiny", 256) if job.tiny else ("1b", 12 * 1024)
    run = job.train("1b", script="train_gpt_1b", preset=preset, num_iterations=20, val_every=20, val_tokens=10 * length,
                    cooldown_steps=1)
    job.keep(run=run, says=f"loss {run['losses'][0]:.2f} to {run['losses'][-1]:.2f}, {run['step_ms']:.0f} ms a step, "
             f"{run['allocated_and_reserved_mib'][0]:,} MiB")


class Stage(NamedTuple):
    key: str
    what: str
    minutes: float  # its limit
    run: Callable[[Job], None]
    files: tuple[str, ...] = ()  # that decide its result, besides the trainer


BENCH = "records/tools/bench/bench.py", "tests/plain_twin.py", "tests/plain_optimizer.py"
STAGES = (
    Stage("a", "every kernel once, FlexAttention's gradients, three steps of `short`", 7, first_look),
    Stage("b", "the tests that need a GPU, and the kernels'", 8.5, gpu_tests,
          ("tests/properties/test_gpu.py", "tests/properties/test_kernels.py")),
    Stage("c", "step time and peak memory against the plain twin", 8, step_time, BENCH),
    Stage("d", "kernels and optimizer by themselves", 7, parts_alone, BENCH),
    Stage("e", "attention sweep", 8.5, attention_sweep, BENCH),
    Stage("f", "cold and warm start", 7, starts),
    Stage("g", "checkpoint, resume, weights, audit", 8, resumes,
          ("records/tools/weights/weights.py", "records/tools/weights/audit.py")),
    Stage("h", "memory model against peaks", 8, memory_peaks, ("data/preflight/memory.py",)),
    Stage("i", "20 steps of the 1.5B run", 8.5, second_experiment, ("records/scale_up_1b/train_gpt_1b.py",)),
)


def source_of(stage: Stage) -> str:
    """A hash of the files that decide the stage's result."""
    digest = hashlib.sha256()
    for file in ("train_gpt_medium.py", *stage.files):
        digest.update((ROOT / file).read_bytes())
    return digest.hexdigest()[:12]


# ----------------------------------------------------------------------------------------------------------------------
# Running them

def ask_gpu(uuid: str | None, fields: list[str]) -> list[str]:
    """nvidia-smi's answers; none where it is missing or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip().split(", ")
    return []


def summarise(samples: list[dict[str, str]]) -> dict:
    """Least, median and largest of what was sampled while the GPU was busy, and what throttled it."""
    samples = [row for row in samples if len(row) == len(SAMPLED)]
    rows = [row for row in samples if row["busy"].isdigit() and int(row["busy"]) >= 50] or samples
    load = {"samples": len(rows)}
    for name in SAMPLED.keys() - {"throttle"}:
        if numbers := [float(row[name]) for row in rows if re.fullmatch(r"[\d.]+", row[name])]:
            load[name] = [min(numbers), statistics.median(numbers), max(numbers)]
    reasons = [int(row["throttle"], 16) for row in rows if row["throttle"].startswith("0x")]
    return load | {"throttle": [name for bit, name in THROTTLE_BITS.items() if any(bit & reason for reason in reasons)]}


def read_book(path: Path) -> dict:
    """The results of one GPU and torch. A stage whose run was killed counts as killed, unless it had a result."""
    book = json.loads(path.read_text())
    if "running" in book:
        file_entry(book, "killed")
    return book


def file_entry(book: dict, status: str) -> None:
    """The entry of the stage that ran becomes the stage's, but for one that did not end well where an earlier did."""
    entry = book.pop("running")
    entry["status"] = status
    before = book["stages"].get(entry["stage"], {})
    if status == "ok" or (before.get("status"), before.get("source")) != ("ok", entry["source"]):
        book["stages"][entry["stage"]] = entry


def run_stage(stage: Stage, book: dict, paths: list[Path], uuid: str | None, entry: dict, limit_s: float,
              tiny: bool) -> dict:
    """Its entry in the book, which is written to all paths as the stage goes."""
    folder = paths[0].parent / "stage.tmp"  # ignored by git
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    book["running"], samples, began = entry, [], time.monotonic()
    entry |= {"stage": stage.key, "status": "running", "date": datetime.now().isoformat(timespec="seconds"),
              "source": source_of(stage), "result": {}}

    def write() -> None:
        for path in sorted(folder.glob("*.json")):
            entry["result"] |= json.loads(path.read_text())
        entry["output"] = (folder / "output").read_text(errors="replace").splitlines()[-KEPT_LINES:]
        entry["load"] = summarise(samples)
        entry["seconds"] = round(time.monotonic() - began, 1)
        for path in paths:
            write_json(path, book)

    search = os.pathsep.join([*(str(ROOT / name) for name in FOLDERS), os.environ.get("PYTHONPATH", "")])
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--stage", stage.key, "--results", str(folder), *["--rehearse"] * tiny],
            env=os.environ | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1"}, stdout=output, stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp)  # a group, to be killed with all that it started
    try:
        while process.poll() is None and time.monotonic() - began < limit_s:
            if time.monotonic() - began >= SAMPLE_SECONDS * len(samples):
                samples.append(dict(zip(SAMPLED, ask_gpu(uuid, [*SAMPLED.values()]))))
                write()
            time.sleep(0.1)
        status = "too long" if process.poll() is None else "failed" if process.returncode else "ok"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    file_entry(book, status)
    write()
    shutil.rmtree(folder, ignore_errors=True)
    return entry


def describe(entry: dict) -> str:
    """An entry in a line: its result, or what it ended with."""
    return entry["result"]["says"] if entry["status"] == "ok" else f"{entry['status']}: {last_words(entry['output'])}"


def as_table(books: list[dict]) -> str:
    """What GPUs have shown and what is owed, as README has it."""
    rows = [f"| {stage.what} | {book['gpu']}, torch {book['torch']}, {entry['date'][:10]} | "
            f"{describe(entry).replace('|', '/')} |"
            for stage in STAGES for book in books if (entry := book["stages"].get(stage.key))]
    shown = {key for book in books for key, entry in book["stages"].items() if entry["status"] == "ok"}
    missing = [f"({stage.key}) {stage.what}" for stage in STAGES if stage.key not in shown]
    return "\n".join([*(["| what | where | result |", "|---|---|---|", *rows, ""] if rows else []),
                      f"Still owed to a GPU: {'; '.join([*missing, BEYOND])}."])


def is_done(stage: Stage, book: dict) -> bool:
    entry = book["stages"].get(stage.key, {})
    return (entry.get("status"), entry.get("source")) == ("ok", source_of(stage))


def run_stages(args: argparse.Namespace, folder: Path) -> int:
    """The stages asked for, or those without a result. The exit status: 1 if one failed."""
    deadline, failed = time.monotonic() + 60 * args.minutes, False
    asked = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"error: {sys.executable} cannot use torch: {last_words(asked.stderr.splitlines())}")
    facts = json.loads(asked.stdout)
    if args.rehearse:
        facts["gpu"] = "no GPU, a rehearsal"
    elif not facts["gpu"]:
        sys.exit(f"error: {sys.executable} sees no CUDA GPU: run this on a GPU machine, or --rehearse.")
    uuid = facts.pop("uuid")
    facts |= {"driver": "".join(ask_gpu(uuid, ["driver_version"])),
              "triton": metadata.version("triton") if find_spec("triton") else None}
    name = re.sub(r"[^a-z0-9.]+", "_", f"gpu {facts['gpu']} torch {facts['torch'].split('+')[0]}".lower())
    paths = [path / f"{name}.json" for path in (folder, args.copy) if path]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    book = read_book(paths[0]) if paths[0].exists() else {"gpu": facts["gpu"], "torch": facts["torch"], "stages": {}}
    print(f"{facts['gpu']}, torch {facts['torch']}: results in {paths[0]}", flush=True)
    # Those that these sources have not tried come first: one that takes too long would hold them up in every call.
    tried = {stage: book["stages"].get(stage.key, {}).get("source") == source_of(stage) for stage in STAGES}
    for stage in sorted(STAGES, key=tried.get):
        if stage.key not in args.stages if args.stages else is_done(stage, book):
            continue
        left = deadline - time.monotonic()
        if left < 30 * stage.minutes:
            print(f"({stage.key}) and what follows wait for the next call: {left:.0f} s are left", flush=True)
            break
        print(f"({stage.key}) {stage.what} ...", flush=True)
        entry = run_stage(stage, book, paths, uuid, {**facts}, min(60 * stage.minutes, left), args.rehearse)
        print(f"({stage.key}) after {entry['seconds']:.0f} s: {describe(entry)}", flush=True)
        failed |= entry["status"] != "ok"
    return int(failed)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(f"{s.key}: {s.what}" for s in STAGES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for all stages together")
    parser.add_argument("--list", action="store_true", help="what has run where")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny, with stand-ins")
    parser.add_argument("--results", type=Path, help="folder of the results (default: records/tools/bench)")
    parser.add_argument("--copy", type=Path, help="a folder that gets the results' file too, after every change")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # the process of one stage
    args = parser.parse_args(arguments)
    unknown = set(args.stages) - {stage.key for stage in STAGES}
    if unknown:
        parser.error(f"no stage is called {min(unknown)}: --help lists them.")
    if args.stage:
        next(stage for stage in STAGES if stage.key == args.stage).run(Job(args.results, args.rehearse))
        return 0
    folder = args.results or (Path(tempfile.mkdtemp()) if args.rehearse else SCRIPT.parent)
    if args.list:
        books = [*map(read_book, sorted(folder.glob("gpu_*.json")))]
        print(as_table(books))
        for book in books:
            print(f"{book['gpu']}, torch {book['torch']}: a call here would run "
                  f"{' '.join(stage.key for stage in STAGES if not is_done(stage, book)) or 'nothing'}")
        return 0
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the stage in progress ends too
    return run_stages(args, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
