"""Looks at this machine before a run: one line a subject, each ok, warning or error with the way out.

    python data/preflight/preflight.py [medium|baseline|short|tiny|small]    # ./run.sh --check does the same

Exits with 1 if anything is an error. GPUs and driver are read from nvidia-smi: torch sees none if the driver is old.
The script that TRAIN_SCRIPT names is looked at, as run.sh runs it, or train_gpt_medium.py.
"""
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Oldest Linux driver for each major version of CUDA (NVIDIA's table of minor-version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
ALL_REDUCE_LIMIT_S = 30
START_LIMIT_S = 600  # of Python and torch in all ranks: minutes on a cold network disk
SMI_LIMIT_S = 20
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
    """As nvidia-smi describes it. Memory is None and the capability empty where it does not tell."""
    name: str
    total_mib: int | None
    free_mib: int | None
    driver: str
    capability: str


class NoAnswer(Exception):
    """nvidia-smi is there and does not say whether there are GPUs: a clause that says why."""


def ask_nvidia_smi(fields: str) -> str:
    """Its answer on `fields`, or what it says instead; empty without it. Raises NoAnswer if it hangs."""
    try:
        process = subprocess.Popen(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        return process.communicate(timeout=SMI_LIMIT_S)[0]
    except OSError:
        return ""
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a driver that hangs holds it
        raise NoAnswer(f"nvidia-smi did not answer within {SMI_LIMIT_S} s: restart the node")


def parse_gpu(line: str) -> Gpu | None:
    """A line of nvidia-smi's answer, with or without the capability; None if it is something else."""
    match = re.fullmatch(r"([^,]+), ([^,]+), ([^,]+), (\d+[\d.]*)(?:, ([^,]+))?", line.strip())
    if match is None:
        return None
    total, free = (int(text) if text.isdigit() else None for text in match.group(2, 3))
    return Gpu(match[1], total, free, match[4], match[5] or "")


def load_script():
    """The training script, whose presets for a CPU join CPU_PRESETS."""
    import memory  # with torch, which may not load
    script = memory.load_script()
    CPU_PRESETS.update(name for name, make in script.PRESETS.items() if not make().needs_gpu)
    return script


def list_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi reports and CUDA_VISIBLE_DEVICES shows. Raises NoAnswer if it says something else."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None and not re.match(r"\s*(\d|GPU-|MIG-)", shown):
        return []  # as CUDA reads it: "", -1, NoDevFiles
    fields = "name,memory.total,memory.free,driver_version"
    for asked in (f"{fields},compute_cap", fields):  # old drivers do not know the last
        output = ask_nvidia_smi(asked)
        if gpus := list(filter(None, map(parse_gpu, output.splitlines()))):
            return gpus if shown is None else visible(gpus, shown)
    if output.strip() and "No devices" not in output:
        raise NoAnswer(f"nvidia-smi does not list GPUs but says {output.strip().splitlines()[0]!r}: mend the driver")
    return []


def visible(gpus: list[Gpu], shown: str) -> list[Gpu]:
    """As CUDA reads the setting: up to the first part that names no GPU, and none where one is named twice."""
    names: list[str] = []
    for name in map(str.strip, shown.split(",")):
        if not (name.startswith(("GPU-", "MIG-")) or name.isdigit() and int(name) < len(gpus)):
            break
        names.append(name)
    if len(set(names)) < len(names):
        return []
    # Which of them a UUID means, and what a part of one holds, is not asked.
    return [gpus[int(name)] if name.isdigit() else gpus[0]._replace(total_mib=None, free_mib=None) for name in names]


def ranks_on(gpus: list[Gpu]) -> int:
    """Processes of a run: the largest of 8, 4, 2, 1 that the GPUs allow; one on a CPU."""
    return next(n for n in (8, 4, 2, 1) if n <= max(len(gpus), 1))


def check_gpus(gpus: list[Gpu], preset: str) -> Line:
    if not gpus:
        if preset in CPU_PRESETS:
            return Line("ok", "GPUs", f"none; {preset} runs on the CPU")
        return Line("error", "GPUs", f"nvidia-smi shows none and preset {preset} needs one: rent a GPU, or run tiny")
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    text = f"{len(gpus)} x {names}" + ("" if preset in CPU_PRESETS else f", {ranks_on(gpus)} of them used")
    if any(gpu.free_mib is None for gpu in gpus):
        text += "; nvidia-smi does not tell their memory"
    if any(gpu.capability != "9.0" for gpu in gpus):
        text += "; not all Hopper, for which this is tuned: expect a slower run"
    return Line("warning" if ";" in text else "ok", "GPUs", text)


def check_kernels(gpus: list[Gpu]) -> list[Line]:
    """What docs/running.md says of each kind of card that is here: were its kernels compiled, what has run on it?"""
    guide = ROOT / "docs" / "running.md"
    if not gpus or not guide.is_file():  # a copy of the code alone
        return []
    table = re.findall(r"^\| (card|sm_\d+)[^|]*\|(.+)\|$", guide.read_text(), re.M)
    rows = {card: [cell.strip() for cell in cells.split("|")] for card, cells in table}
    lines = []
    for card in sorted({f"sm_{gpu.capability.replace('.', '')}" for gpu in gpus if gpu.capability}):
        known = "; ".join(f"{name}: {cell}" for name, cell in zip(rows["card"], rows.get(card, ())))
        lines.append(Line("ok" if known else "warning", "kernels",
                          f"{card}: {known or 'never compiled for this card, try preset short first'}"))
    return lines


def check_driver(gpus: list[Gpu], torch_version: str, cuda: str | None) -> Line:
    """The driver's branch against the CUDA that torch was built for."""
    if not gpus:
        return Line("ok", "driver", "no GPU, none needed")
    branch, needed = int(gpus[0].driver.split(".")[0]), OLDEST_DRIVER[int((cuda or "13").split(".")[0])]
    if cuda is None:
        old = f"; driver {gpus[0].driver} is too old for it: update that to {needed}" if branch < needed else ""
        return Line("error", "driver", f"torch {torch_version} is a CPU build: install the pinned one in a new .venv"
                                       + old)
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
        return Line("ok", "memory", "less than 0.8 GiB of main memory (measured at small)")
    if not gpus:
        return Line("warning", "memory", "no GPU whose memory could be compared")
    import memory  # with torch, which may not load
    ranks = ranks_on(gpus)
    unshared = [number for number in memory.pieces(config) if number % ranks]
    if unshared:
        return Line("error", "memory", f"{ranks} GPUs cannot share {unshared[0]} pieces of a batch equally: "
                                       f"make more of them by a smaller micro_seq_len")
    try:
        needed = memory.needed(config, ranks)
        text = f"about {needed / 2**30:.0f} GiB a GPU needed (estimated) with micro_seq_len {config.piece_len:,}"
        used = gpus[:ranks]  # torchrun takes the first ones
        if any(None in (gpu.total_mib, gpu.free_mib) for gpu in used):
            return Line("warning", "memory", f"{text}; what is there is unknown")
        free, total = (min(getattr(gpu, name) for gpu in used) * 2**20 for name in ("free_mib", "total_mib"))
        text += f", {free / 2**30:.0f} GiB free at least"
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


def check_padding(gpus: list[Gpu], config) -> list[Line]:
    """Banks that the ranks cannot share without much padding."""
    import memory  # with torch, which may not load
    with suppress(Exception):  # check_memory says what cannot be counted
        return [Line("warning", "padding", text)
                for text in memory.padded_banks(memory.optimizer_of(config, ranks_on(gpus)))]
    return []


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
    wanted = max(num_shards + 1 - present, 0) * (2**21 if config.preset in CPU_PRESETS else SHARD_BYTES)
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
        if not existing.is_dir() or needed and not os.access(existing, os.W_OK):
            lines.append(Line("error", subject, f"{existing} is no folder that can be written to: choose another one"))
        elif free < needed:
            way_out = "free some, or set DATA_PATH to another disk" if subject == "data disk" else "free some"
            lines.append(Line("error", subject, f"{text}: {way_out}"))
        else:
            lines.append(Line("ok", subject, text))
    return lines


def start_rank(started, trial, *arguments) -> None:
    """What a process of the trial does: says that Python and torch have started, then tries."""
    import torch.distributed  # noqa: F401
    started.release()
    trial(*arguments)


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
    if not (total == size * (size + 1) / 2).all():
        sys.exit(f"rank {rank}: the sum of 1 to {size} came as {total.min():g} to {total.max():g}")
    dist.destroy_process_group()


def check_all_reduce(size: int, on_gpu: bool, limit_s: float = ALL_REDUCE_LIMIT_S, trial=all_reduce_rank) -> Line:
    """An all-reduce over as many processes as the run will have; all are ended limit_s after the last has started."""
    import torch.multiprocessing as mp
    if size == 1:
        return Line("ok", "all-reduce", "one process, none needed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    started = context.Semaphore(0)
    ranks = [context.Process(target=start_rank, args=(started, trial, rank, size, port, on_gpu), daemon=True)
             for rank in range(size)]
    for process in ranks:
        process.start()
    begin, limit, all_started = time.monotonic(), START_LIMIT_S, False
    while any(process.is_alive() for process in ranks) and time.monotonic() - begin < limit:
        if any(process.exitcode for process in ranks):
            break
        if not all_started and started.get_value() == size:
            begin, limit, all_started = time.monotonic(), limit_s, True
        time.sleep(0.05)
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    for process in ranks:
        process.kill()
    backend = "nccl" if on_gpu else "gloo"
    if failed:
        return Line("error", "all-reduce", f"rank {failed[0]} of {size} failed over {backend}: its message is above")
    if hung and not all_started:
        return Line("error", "all-reduce", f"Python and torch took longer than {START_LIMIT_S} s to start in {size} "
                                           f"ranks: try again, or put the environment on a faster disk")
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
    problem = None
    try:
        import torch
    except Exception as error:  # a broken torch raises more than ImportError
        problem = Line("error", "torch", f"does not load ({error}): delete .venv and run ./run.sh")
    try:
        if not problem:
            import memory
            script = load_script()
            machine = memory.machine_of(next(iter(script.PRESETS.values()))())
            config = machine.choose_config(script.PRESETS, [preset])
            num_shards = machine.shards_needed(config, [])
    except Exception as error:  # its constants are made to be edited
        problem = Line("error", "script", f"cannot be used: {error}")
    try:
        gpus = list_gpus()
        gpu_line = check_gpus(gpus, preset)
    except NoAnswer as error:
        gpus, gpu_line = [], Line("warning" if preset in CPU_PRESETS else "error", "GPUs", str(error))
    if problem:
        return [gpu_line, problem]
    if preset in CPU_PRESETS and not torch.cuda.is_available():
        gpus = []  # which it does without
    shards_line = check_shards(config, machine.UserError, machine.find_shards)
    on_gpu = bool(gpus) and torch.cuda.is_available() and preset not in CPU_PRESETS
    return [
        gpu_line,
        *check_kernels(gpus),
        check_driver(gpus, torch.__version__, torch.version.cuda),
        check_torch(gpus, torch),
        check_all_reduce(ranks_on(gpus) if on_gpu else 1, on_gpu),
        check_memory(gpus, config),
        *check_padding(gpus, config),
        shards_line,
        *check_disk(config, 0 if shards_line.status == "ok" else num_shards),
        check_duration(gpus, config),
    ]


def print_presets() -> None:
    """A line each: name, gpu or cpu, constants; on a terminal, only those that differ from the first preset's."""
    try:
        configs = {name: make() for name, make in load_script().PRESETS.items()}
    except Exception as error:  # its constants are made to be edited
        sys.exit(f"preflight: the script's presets cannot be read: {error}")
    first = next(iter(configs.values()))
    for name, config in configs.items():
        constants = repr(config)
        if sys.stdout.isatty() and config is not first:
            constants = ", ".join(f"{key}={value!r}" for key, value in vars(config).items()
                                  if value != vars(first).get(key))
        print(name, "gpu" if config.needs_gpu else "cpu", constants, sep="\t")


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show a letter of a path
    if sys.argv[1:] == ["--presets"]:
        print_presets()
        return
    try:
        preset = sys.argv[1] if len(sys.argv) > 1 else "medium" if list_gpus() else "tiny"
    except NoAnswer:
        preset = "medium"
    print(f"checking this machine for the preset {preset}")
    lines = report(preset)
    for line in lines:
        print(f"{line.status:8} {line.subject:11} {line.text}")
    if any(line.status == "error" for line in lines):
        sys.exit("preflight: not ready, see the errors above")


if __name__ == "__main__":
    main()
