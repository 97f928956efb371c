"""Looks at this machine before a run: one line a subject, each ok, warning or error with the way out.

    python data/preflight/preflight.py [medium|baseline|short|tiny|small]    # ./run.sh --check does the same

Exits with 1 if anything is an error. GPUs and driver are read from nvidia-smi: torch sees none if the driver is old.
The script that TRAIN_SCRIPT names is looked at, as run.sh runs it, or train_gpt_medium.py.
"""
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

# Oldest Linux driver for each major version of CUDA (NVIDIA's table of minor-version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
ALL_REDUCE_LIMIT_S = 30
RECORD_SECONDS, RECORD_TOKENS = 1374.7, 5535 * 524288  # 8xH100, records/2025-11-02_SmearMTP
CPU_PRESETS = {"tiny", "small"}  # and those of the script that say so
CPU_SECONDS_PER_TOKEN = 150 / (64 * 4096)  # tiny on 2 CPU cores, from shards to summary
SHARD_BYTES = 1024 + 2 * 100_000_000
LOG_BYTES = 2 * 2**20


class Line(NamedTuple):
    """One subject of the report."""
    status: str  # ok, warning or error
    subject: str
    text: str


class Gpu(NamedTuple):
    name: str
    total_mib: int
    free_mib: int
    driver: str
    capability: str


def load_script():
    """The training script, as a module."""
    path = ROOT / (os.environ.get("TRAIN_SCRIPT") or "train_gpt_medium.py")
    sys.path.insert(0, str(path.parent))
    script = importlib.import_module(path.stem)
    CPU_PRESETS.update(name for name, make in script.PRESETS.items() if not make().needs_gpu)
    return script


def list_gpus() -> list[Gpu]:
    """What nvidia-smi reports, limited to CUDA_VISIBLE_DEVICES if that is a list of numbers; empty without it."""
    try:
        output = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap",
             "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    fields = [[field.strip() for field in line.split(",")] for line in output.splitlines()]
    gpus = [Gpu(name, int(total), int(free), driver, capability) for name, total, free, driver, capability in fields]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and all(part.strip().isdigit() for part in visible.split(",") if part):
        gpus = [gpus[int(part)] for part in visible.split(",") if part and int(part) < len(gpus)]
    return gpus


def ranks_on(gpus: list[Gpu]) -> int:
    """Processes of a run: the largest of 8, 4, 2, 1 that the GPUs allow; one on a CPU."""
    return next(n for n in (8, 4, 2, 1) if n <= max(len(gpus), 1))


def check_gpus(gpus: list[Gpu], preset: str) -> Line:
    if not gpus:
        if preset in CPU_PRESETS:
            return Line("ok", "GPUs", f"none; {preset} runs on the CPU")
        return Line("error", "GPUs", f"nvidia-smi shows none and preset {preset} needs one: rent a GPU, or run tiny")
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    text = f"{len(gpus)} x {names}, {ranks_on(gpus)} of them used"
    if any(gpu.capability != "9.0" for gpu in gpus):
        return Line("warning", "GPUs", f"{text}; not all Hopper, for which this is tuned: expect a slower run")
    return Line("ok", "GPUs", text)


def check_driver(gpus: list[Gpu], torch_version: str, cuda: str | None) -> Line:
    """The driver's branch against the CUDA that torch was built for."""
    if not gpus:
        return Line("ok", "driver", "no GPU, none needed")
    if cuda is None:
        return Line("error", "driver", f"torch {torch_version} is a CPU build: install the pinned one in a new .venv")
    branch, needed = int(gpus[0].driver.split(".")[0]), OLDEST_DRIVER[int(cuda.split(".")[0])]
    if branch >= needed:
        return Line("ok", "driver", f"{gpus[0].driver}, torch needs {needed} or newer for CUDA {cuda}")
    fitting = [major for major, oldest in OLDEST_DRIVER.items() if oldest <= branch]
    way_out = f"or install a build of torch for CUDA {max(fitting)}.x" if fitting else "no build of torch fits it"
    return Line("error", "driver", f"{gpus[0].driver} is too old for torch {torch_version}, built for CUDA {cuda}: "
                                   f"update it to {needed} or newer, {way_out}")


def check_torch(gpus: list[Gpu], torch) -> Line:
    text = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if not gpus:
        return Line("ok", "torch", text)
    if not torch.cuda.is_available():
        return Line("error", "torch", f"{text} sees no GPU but nvidia-smi does: mend the driver, or restart the node")
    if importlib.util.find_spec("triton") is None:
        return Line("error", "torch", f"{text}, but triton is missing, which torch.compile needs: reinstall torch")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    if compiler is None or not header.exists():
        missing = header if compiler else "a C compiler"
        return Line("error", "torch", f"{text}, but {missing} is missing, which triton needs to launch a kernel: "
                                      "install gcc and Python's headers (Debian, Ubuntu: apt install gcc python3-dev)")
    import triton
    return Line("ok", "torch", f"{text}, triton {triton.__version__}")


def not_counted(subject: str, config, error: Exception) -> Line:
    """What the trainer would refuse, or a model that memory.py cannot run: it may run on a GPU all the same."""
    import memory
    if isinstance(error, memory.machine_of(config).UserError):
        return Line("error", subject, str(error))
    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return Line("warning", subject, f"no estimate covers this script: counting its model failed ({reason:.150})")


def check_memory(gpus: list[Gpu], config) -> Line:
    """What the run should need (memory.py) against what is free; where it is too much, the length that fits."""
    if config.preset in CPU_PRESETS:
        return Line("ok", "memory", f"{config.preset}, as published, takes less than 0.8 GiB of main memory (measured)")
    if not gpus:
        return Line("warning", "memory", "no GPU whose memory could be compared")
    import memory  # with torch, which may not load
    ranks = ranks_on(gpus)
    fullest = min(gpus[:ranks], key=lambda gpu: gpu.free_mib)  # torchrun takes the first ones
    free, total = fullest.free_mib * 2**20, min(gpu.total_mib for gpu in gpus[:ranks]) * 2**20
    unshared = [number for number in memory.pieces(config) if number % ranks]
    if unshared:
        return Line("error", "memory", f"{ranks} GPUs cannot share {unshared[0]} pieces of a batch equally: "
                                       f"make more of them by a smaller micro_seq_len")
    try:
        needed = memory.needed(config, ranks)
        text = (f"about {needed / 2**30:.0f} GiB a GPU needed (estimated) with micro_seq_len {config.piece_len:,}, "
                f"{free / 2**30:.0f} GiB free at least")
        if needed <= free:
            return Line("ok", "memory", text)
        if needed <= total:
            return Line("error", "memory", f"{text}: end the other processes that nvidia-smi lists")
        for limit, way_out in ((free, "set"), (total, "end the other processes that nvidia-smi lists and set")):
            if fitting := memory.largest_micro_seq_len(config, ranks, limit):
                script = Path(sys.modules[type(config).__module__].__file__).name
                return Line("error", "memory", f"{text}: {way_out} micro_seq_len to {fitting[0]:,} at the top of "
                                               f"{script}: about {fitting[1] / 2**30:.0f} GiB")
        return Line("error", "memory", f"{text}: no micro_seq_len fits, use larger GPUs")
    except Exception as error:
        return not_counted("memory", config, error)


def check_shards(config, errors: type[Exception], find_shards) -> Line:
    """Whether the trainer's own check is content; missing FineWeb shards are run.sh's to fetch."""
    try:
        shards, _ = find_shards(config)
    except errors as error:
        present = {path.name.split("_")[0] for path in Path(config.data_dir).glob("*.bin")}
        if config.preset in CPU_PRESETS and not present:
            return Line("warning", "shards", f"none in {config.data_dir} yet: ./run.sh makes them in seconds")
        if config.preset not in CPU_PRESETS and present <= {"fineweb"} and "missing" in str(error):
            return Line("warning", "shards", f"not all in {config.data_dir} yet: ./run.sh fetches what is missing")
        return Line("error", "shards", str(error))
    return Line("ok", "shards", f"{len(shards)} for training and one for validation in {config.data_dir}")


def check_disk(config, num_shards: int) -> list[Line]:
    """Room for the shards that are still to come, for the log, and for checkpoints if they are on."""
    lines: list[Line] = []
    present = len(list(Path(config.data_dir).glob("*.bin")))
    wanted = 4 * 2**20 if config.preset in CPU_PRESETS else max(num_shards + 1 - present, 0) * SHARD_BYTES
    subjects = [("data disk", config.data_dir, wanted), ("log disk", "logs", LOG_BYTES)]
    if config.checkpoint_every or config.checkpoint_minutes:
        import memory  # with torch, which may not load
        try:
            subjects.append(("checkpoints", "checkpoints", 3 * memory.checkpoint_bytes(config)))  # two and a new one
        except Exception as error:
            lines.append(not_counted("checkpoints", config, error))
    for subject, folder, needed in subjects:
        folder = Path(folder).absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        text = f"{free / 2**30:.1f} GiB free at {existing}, {needed / 2**30:.1f} GiB still needed"
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            lines.append(Line("error", subject, f"{existing} is no folder that can be written to: choose another one"))
        elif free < needed:
            way_out = "free some, or set DATA_PATH to another disk" if subject == "data disk" else "free some"
            lines.append(Line("error", subject, f"{text}: {way_out}"))
        else:
            lines.append(Line("ok", subject, text))
    return lines


def all_reduce_rank(rank: int, size: int, port: int, on_gpu: bool) -> None:
    """One process of the collective's trial; exits with an error if the sum is wrong."""
    import torch
    import torch.distributed as dist
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    total = torch.full((2**20,), float(rank + 1), device=device)
    dist.all_reduce(total)
    assert total.min() == total.max() == size * (size + 1) / 2
    dist.destroy_process_group()


def check_all_reduce(size: int, on_gpu: bool, limit_s: float = ALL_REDUCE_LIMIT_S, trial=all_reduce_rank) -> Line:
    """An all-reduce over as many processes as the run will have; all are ended at the limit."""
    import torch.multiprocessing as mp
    if size == 1:
        return Line("ok", "all-reduce", "one process, none needed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    ranks = [context.Process(target=trial, args=(rank, size, port, on_gpu), daemon=True) for rank in range(size)]
    start = time.monotonic()
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks) and time.monotonic() - start < limit_s:
        if any(process.exitcode for process in ranks):
            break
        time.sleep(0.05)
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    for process in ranks:
        process.kill()
    backend = "nccl" if on_gpu else "gloo"
    if failed:
        return Line("error", "all-reduce", f"rank {failed[0]} of {size} failed over {backend}: its message is above")
    if hung:
        return Line("error", "all-reduce", f"ranks {hung} of {size} hung over {backend} for {limit_s:.0f} s: look with "
                                           f"NCCL_DEBUG=INFO; if GPUs cannot reach each other, take another node")
    return Line("ok", "all-reduce", f"{size} ranks over {backend}")


def check_duration(gpus: list[Gpu], config) -> Line:
    ranks, num_tokens = ranks_on(gpus), sum(map(config.batch_tokens, range(config.num_iterations)))
    if config.preset in CPU_PRESETS:
        minutes = CPU_SECONDS_PER_TOKEN * num_tokens / 60
        return Line("ok", "duration", f"about {minutes:.1f} minutes on 2 CPU cores (measured at tiny)")
    minutes = RECORD_SECONDS / RECORD_TOKENS * num_tokens * 8 / ranks / 60
    return Line("ok", "duration", f"about {minutes:.0f} minutes of training on {ranks} x H100 (estimated from the "
                                  f"published run's time for a token), after minutes of compilation")


def report(preset: str) -> list[Line]:
    """All lines for a preset; a torch or a script that does not load ends the report with its own line."""
    gpus = list_gpus()
    try:
        import torch
    except Exception as error:  # a broken torch raises more than ImportError
        broken = Line("error", "torch", f"does not load ({error}): delete .venv and run ./run.sh")
        return [check_gpus(gpus, preset), broken]
    try:
        import memory
        script = load_script()
        machine = memory.machine_of(next(iter(script.PRESETS.values()))())
        config = machine.choose_config(script.PRESETS, [preset])
        num_shards = machine.shards_needed(config, [])
    except Exception as error:  # its constants are made to be edited
        return [check_gpus(gpus, preset), Line("error", "script", f"cannot be used: {error}")]
    on_gpu = bool(gpus) and torch.cuda.is_available() and preset not in CPU_PRESETS
    return [
        check_gpus(gpus, preset),
        check_driver(gpus, torch.__version__, torch.version.cuda),
        check_torch(gpus, torch),
        check_all_reduce(ranks_on(gpus) if on_gpu else 1, on_gpu),
        check_memory(gpus, config),
        check_shards(config, machine.UserError, machine.find_shards),
        *check_disk(config, num_shards),
        check_duration(gpus, config),
    ]


def print_presets() -> None:
    """Those of the script, a line each: name, gpu or cpu, constants."""
    try:
        configs = {name: make() for name, make in load_script().PRESETS.items()}
    except Exception as error:  # its constants are made to be edited
        sys.exit(f"preflight: the script's presets cannot be read: {error}")
    for name, config in configs.items():
        print(name, "gpu" if config.needs_gpu else "cpu", repr(config), sep="\t")


def main() -> None:
    if sys.argv[1:] == ["--presets"]:
        print_presets()
        return
    preset = sys.argv[1] if len(sys.argv) > 1 else "medium" if list_gpus() else "tiny"
    print(f"checking this machine for the preset {preset}")
    lines = report(preset)
    for line in lines:
        print(f"{line.status:8} {line.subject:11} {line.text}")
    if any(line.status == "error" for line in lines):
        sys.exit("preflight: not ready, see the errors above")


if __name__ == "__main__":
    main()
