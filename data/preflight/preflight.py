"""Looks at this machine before a run: one line a subject, each ok, warning or error with the way out.

    python data/preflight/preflight.py [PRESET]           # ./run.sh --check does the same
    python data/preflight/preflight.py --presets          # those of the script, a line each
    python data/preflight/preflight.py --plan [PRESET]    # looks, and prints what run.sh then starts

Exits with 1 if anything is an error. The script is the one that TRAIN_SCRIPT names, or the first that has the preset:
train_gpt_medium.py, then those in records/.
"""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TextIO

import torch
import torch.distributed as dist

import memory

ROOT = Path(__file__).resolve().parents[2]
# Oldest Linux driver for each major version of CUDA (NVIDIA's table of minor-version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
ALL_REDUCE_LIMIT_S, COLLECTIVE_LIMIT_S = 300, 60  # with the start of all ranks, which a cold disk slows; without
SMI_LIMIT_S = 20
# Published, on 8xH100: of any script, and of one that has its own; records/*/published.json.
RECORD_SECONDS_PER_TOKEN = {"": 1374.7 / (5535 * 524288), "train_gpt_mudd": 860.5 / 1_905_262_592}
CPU_SECONDS_PER_TOKEN = 150 / (64 * 4096)  # tiny on 2 CPU cores, from shards to summary
SHARD_BYTES = 1024 + 2 * 100_000_000
LOG_BYTES = 2 * 2**20


class Line(NamedTuple):
    """One subject of the report."""
    status: str  # ok, warning or error
    subject: str
    text: str


class Gpu(NamedTuple):
    """As torch describes it."""
    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int


def list_gpus() -> list[Gpu]:
    """Those that torch sees, as CUDA_VISIBLE_DEVICES has it."""
    return [Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i), *torch.cuda.mem_get_info(i))
            for i in range(torch.cuda.device_count())]


def ask_nvidia_smi() -> str:
    """The driver's version, or what nvidia-smi says instead; empty without it, and where all GPUs are hidden."""
    if not re.match(r"\s*(\d|GPU-|MIG-)", os.environ.get("CUDA_VISIBLE_DEVICES", "0")):
        return ""  # as CUDA reads "", -1, NoDevFiles
    try:
        process = subprocess.Popen(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        said = process.communicate(timeout=SMI_LIMIT_S)[0].strip()
    except OSError:
        return ""
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a driver that hangs holds it
        return f"no answer within {SMI_LIMIT_S} s"
    return "" if "No devices" in said else said.partition("\n")[0]


def ranks_on(gpus: list[Gpu]) -> int:
    """Processes of a run: the largest of 8, 4, 2, 1 that the GPUs allow; one on a CPU."""
    return next(n for n in (8, 4, 2, 1) if n <= max(len(gpus), 1))


def check_gpus(gpus: list[Gpu], config) -> Line:
    """What torch sees; where a run needs a GPU and torch sees none, why."""
    if gpus:
        text = f"{len(gpus)} x {', '.join(sorted({gpu.name for gpu in gpus}))}, {ranks_on(gpus)} of them used"
        if any(gpu.capability != (9, 0) for gpu in gpus):
            return Line("warning", "GPUs", f"{text}; not all Hopper, for which this is tuned: expect a slower run")
        return Line("ok", "GPUs", text)
    if not config.needs_gpu:
        return Line("ok", "GPUs", f"none needed, {config.preset} runs on the CPU")
    said, cuda = ask_nvidia_smi(), torch.version.cuda
    if not said:
        way_out = f"none, and preset {config.preset} needs one: rent a GPU, or run tiny"
    elif not re.fullmatch(r"\d+(\.\d+)+", said):
        way_out = f"nvidia-smi says {said!r}: mend the driver, or restart the node"
    elif cuda is None:
        way_out = f"torch {torch.__version__} is a CPU build: move .venv away (or leave the environment), run ./run.sh"
    elif int(said.partition(".")[0]) < (needed := OLDEST_DRIVER[int(cuda.partition(".")[0])]):
        way_out = (f"driver {said} is too old for torch {torch.__version__}, built for CUDA {cuda}: update it to "
                   f"{needed} or newer, or install a build of torch for an older CUDA")
    else:
        way_out = f"torch {torch.__version__} sees none but nvidia-smi does: mend driver {said}, or restart the node"
    return Line("error", "GPUs", way_out)


def check_torch(gpus: list[Gpu]) -> Line:
    """What torch.compile needs to make and launch kernels on a GPU."""
    text = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if not gpus:
        return Line("ok", "torch", text)
    if importlib.util.find_spec("triton") is None:
        return Line("error", "torch", f"{text}, but triton is missing, which torch.compile needs: reinstall torch")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    if compiler is None or not header.exists():
        missing = header if compiler else "a C compiler"
        return Line("error", "torch", f"{text}, but {missing} is missing, which triton needs to launch a kernel: "
                                      "install gcc and Python's headers (Debian, Ubuntu: apt install gcc python3-dev)")
    return Line("ok", "torch", text)


def all_reduce(backend: str) -> None:
    """One rank of the collective's trial, started by torchrun; exits with an error if the sum is wrong."""
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_LIMIT_S))
    size = dist.get_world_size()
    total = torch.full((2**20,), dist.get_rank() + 1.0, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(total)
    if not (total == size * (size + 1) / 2).all():
        sys.exit(f"the sum of 1 to {size} came as {total.min():g} to {total.max():g}")
    dist.destroy_process_group()


def check_all_reduce(size: int, backend: str) -> Line:
    """An all-reduce over as many processes as the run will have."""
    if size == 1:
        return Line("ok", "all-reduce", "one process, none needed")
    done = subprocess.run(
        ["timeout", str(ALL_REDUCE_LIMIT_S), sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={size}", __file__, "--all-reduce", backend], stdout=sys.stderr.fileno())
    if done.returncode == 124:
        return Line("error", "all-reduce", f"{size} ranks over {backend} hung for {ALL_REDUCE_LIMIT_S} s: look with "
                                           f"NCCL_DEBUG=INFO; if GPUs cannot reach each other, take another node")
    if done.returncode:
        return Line("error", "all-reduce", f"a rank of {size} failed over {backend}: its message is above; look with "
                                           f"NCCL_DEBUG=INFO")
    return Line("ok", "all-reduce", f"{size} ranks over {backend}")


def not_counted(subject: str, config, error: Exception) -> Line:
    """What the trainer would refuse, or a model that memory.py cannot run: it may run on a GPU all the same."""
    if isinstance(error, memory.machine_of(config).UserError):
        return Line("error", subject, str(error))
    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return Line("warning", subject, f"no estimate covers this script: counting its model failed ({reason:.150})")


def check_memory(gpus: list[Gpu], config) -> Line:
    """What the run should need (memory.py) against what is free; where it is too much, the length that fits."""
    if not config.needs_gpu:
        return Line("ok", "memory", "less than 0.8 GiB of main memory (measured at tiny)")
    if not gpus:
        return Line("warning", "memory", "no GPU whose memory could be compared")
    ranks = ranks_on(gpus)
    if unshared := [number for number in memory.pieces(config) if number % ranks]:
        return Line("error", "memory", f"{ranks} GPUs cannot share {unshared[0]} pieces of a batch equally: "
                                       f"make more of them by a smaller micro_seq_len")
    used = gpus[:ranks]  # torchrun takes the first ones
    free, total = min(gpu.free_bytes for gpu in used), min(gpu.total_bytes for gpu in used)
    try:
        needed = memory.needed(config, ranks)
        text = (f"about {needed / 2**30:.0f} GiB a GPU needed (estimated) with micro_seq_len {config.piece_len:,}, "
                f"{free / 2**30:.0f} GiB free at least")
        if needed <= free:
            return Line("ok", "memory", text)
        if needed <= total:
            return Line("error", "memory", f"{text}: end the other processes that nvidia-smi lists")
        if fitting := memory.largest_micro_seq_len(config, ranks, total):
            script = Path(sys.modules[type(config).__module__].__file__).name
            return Line("error", "memory", f"{text}: set micro_seq_len to {fitting[0]:,} at the top of {script}: about "
                                           f"{fitting[1] / 2**30:.0f} GiB")
        return Line("error", "memory", f"{text}: no micro_seq_len fits, use larger GPUs")
    except Exception as error:
        return not_counted("memory", config, error)


def check_shards(config) -> Line:
    """Whether the trainer's own check is content; missing FineWeb shards are run.sh's to fetch."""
    machine = memory.machine_of(config)
    try:
        shards, _ = machine.find_shards(config)
    except machine.UserError as error:
        present = {path.name.split("_")[0] for path in Path(config.data_dir).glob("*.bin")}
        if not config.needs_gpu and not present:
            return Line("warning", "shards", f"none in {config.data_dir} yet: ./run.sh makes them in seconds")
        if config.needs_gpu and present <= {"fineweb"} and "missing" in str(error):
            return Line("warning", "shards", f"not all in {config.data_dir} yet: ./run.sh fetches what is missing")
        return Line("error", "shards", str(error))
    return Line("ok", "shards", f"{len(shards)} for training and one for validation in {config.data_dir}")


def check_disk(config, num_shards: int) -> list[Line]:
    """Room for the shards that are still to come, for the log, and for checkpoints if they are on."""
    lines: list[Line] = []
    present = len(list(Path(config.data_dir).glob("*.bin")))
    wanted = max(num_shards + 1 - present, 0) * (SHARD_BYTES if config.needs_gpu else 2**21)
    subjects = [("data disk", config.data_dir, wanted), ("log disk", "logs", LOG_BYTES)]
    if config.checkpoint_every or config.checkpoint_minutes:
        try:
            subjects.append(("checkpoints", "checkpoints", 3 * memory.checkpoint_bytes(config)))  # two and a new one
        except Exception as error:
            lines.append(not_counted("checkpoints", config, error))
    for subject, folder, needed in subjects:
        folder = Path(folder).absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        text = f"{free / 2**30:.1f} GiB free at {existing}, {needed / 2**30:.1f} GiB still needed"
        if not existing.is_dir() or needed and not os.access(existing, os.W_OK):
            lines.append(Line("error", subject, f"{existing} is no folder that can be written to: choose another one"))
        elif free < needed:
            lines.append(Line("error", subject, f"{text}: free some, or name another disk (shards: DATA_PATH)"))
        else:
            lines.append(Line("ok", subject, text))
    return lines


def check_duration(gpus: list[Gpu], config) -> Line:
    """By the time for a token that was measured or published."""
    num_tokens = sum(map(config.batch_tokens, range(config.num_iterations)))
    if not config.needs_gpu:
        minutes = CPU_SECONDS_PER_TOKEN * num_tokens / 60
        return Line("ok", "duration", f"about {minutes:.1f} minutes on 2 CPU cores (measured at tiny)")
    ranks = ranks_on(gpus)
    seconds_per_token = RECORD_SECONDS_PER_TOKEN.get(type(config).__module__, RECORD_SECONDS_PER_TOKEN[""])
    minutes = seconds_per_token * num_tokens * 8 / ranks / 60
    return Line("ok", "duration", f"about {minutes:.0f} minutes of training on {ranks} x H100 (estimated from the "
                                  f"published run's time for a token), after minutes of compilation")


def find_script(preset: str) -> ModuleType:
    """The script that TRAIN_SCRIPT names, or of all recipes' the first that has the preset. Exits where none has."""
    named, known = os.environ.get("TRAIN_SCRIPT"), []
    paths = [named] if named else [ROOT / "train_gpt_medium.py", *sorted(ROOT.glob("records/*/train_gpt_*.py"))]
    for path in paths:
        try:
            script = memory.load_script(path)
        except Exception as error:  # its constants are made to be edited
            sys.exit(f"preflight: {path} cannot be used: {error}")
        if preset in script.PRESETS:
            return script
        known += script.PRESETS
    sys.exit(f"preflight: {preset!r} is not a preset of {Path(paths[0]).name}: choose one of {' '.join(known)}.")


def report(gpus: list[Gpu], config, num_shards: int) -> Iterator[Line]:
    """All lines for a run that consumes so many training shards; last, what takes seconds or, for MUDD, minutes."""
    shards_line = check_shards(config)
    yield check_gpus(gpus, config)
    yield check_torch(gpus)
    yield check_all_reduce(ranks_on(gpus), "nccl")
    yield shards_line
    yield from check_disk(config, 0 if shards_line.status == "ok" else num_shards)
    yield check_duration(gpus, config)
    yield check_memory(gpus, config)


def print_presets() -> None:
    """A line each: name, gpu or cpu, constants; on a terminal, only those that differ from the first preset's."""
    try:
        configs = {name: make() for name, make in memory.load_script().PRESETS.items()}
    except Exception as error:  # its constants are made to be edited
        sys.exit(f"preflight: the script's presets cannot be read: {error}")
    first = next(iter(configs.values()))
    for name, config in configs.items():
        constants = repr(config)
        if sys.stdout.isatty() and config is not first:
            constants = ", ".join(f"{key}={value!r}" for key, value in vars(config).items()
                                  if value != vars(first).get(key))
        print(name, "gpu" if config.needs_gpu else "cpu", constants, sep="\t")


def look(preset: str, to: TextIO) -> str:
    """Write the report to a stream. Exits if it has an error. Returns what run.sh starts: the preset, processes (0: on
    the CPU), training shards that it consumes, and the script.
    """
    preset = preset or ("medium" if torch.cuda.device_count() or ask_nvidia_smi() else "tiny")
    script = find_script(preset)
    print(f"checking this machine for the preset {preset}; memory, counted on the model itself, comes last", file=to,
          flush=True)
    try:
        machine = memory.machine_of(script.PRESETS[preset]())
        config = machine.choose_config(script.PRESETS, [preset])
        num_shards = machine.shards_needed(config, [])
    except Exception as error:  # its constants are made to be edited
        sys.exit(f"preflight: {script.__file__} cannot be used: {error}")
    try:
        gpus = list_gpus() if config.needs_gpu else []
    except RuntimeError as error:  # a GPU that does not work
        sys.exit(f"preflight: torch cannot use the GPUs ({str(error).splitlines()[0]}): take another node")
    ready = True
    for line in report(gpus, config, num_shards):
        print(f"{line.status:8} {line.subject:11} {line.text}", file=to, flush=True)
        ready = ready and line.status != "error"
    if not ready:
        sys.exit("preflight: not ready, see the errors above")
    return f"{preset} {ranks_on(gpus) if config.needs_gpu else 0} {num_shards} {os.path.relpath(script.__file__, ROOT)}"


def main(mode: str = "", *preset: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for a terminal that cannot show a letter of a path
    if mode == "--presets":
        print_presets()
    elif mode == "--all-reduce":
        all_reduce(*preset)
    elif mode == "--plan":
        print(look("".join(preset), to=sys.stderr))
    else:
        look(mode, to=sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
