"""What a copy of the trainer does to itself on request, for test_faults.py. Imports nothing of the repository.

FAULT=`die 1 5` names a function below, the rank that it strikes (* for all), and where.
"""
import contextlib
import io
import math
import os
import signal
import time
from pathlib import Path


def install(script: dict) -> None:
    """`script`: the copy's globals. Leaves the process's id in the file rank_0.pid."""
    rank = os.environ.get("RANK", "0")
    Path(f"rank_{rank}.pid").write_text(str(os.getpid()))
    name, struck, where = os.environ.get("FAULT", "none 0 0").split()
    if name != "none" and struck in (rank, "*"):
        globals()[name](script, where)


def in_step(act):
    """A fault: `act(script, optimizer)` before the updates of the step that makes `where` complete."""
    def fault(script: dict, where: str) -> None:
        update = script["Optimizer"].step

        def step(optimizer, number):
            if number + 1 == int(where):
                act(script, optimizer)
            update(optimizer, number)

        script["Optimizer"].step = step
    return fault


@in_step
def die(script, optimizer):
    os.kill(os.getpid(), signal.SIGKILL)


@in_step
def fail(script, optimizer):
    raise RuntimeError("this rank has a fault of its own")


@in_step
def spoil(script, optimizer):
    """One number of one gradient is nan."""
    optimizer.params[-1].grad.view(-1)[:1].fill_(math.nan)


@in_step
def wait(script, optimizer):
    """Until a signal was noted; for ever, where nobody notes them. The file waiting_0 says that it has begun."""
    signals = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    Path(f"waiting_{os.environ.get('RANK', '0')}").write_text("yes")
    while signals is None or not signals.received:
        time.sleep(0.01)


@in_step
def fill(script, optimizer):
    """The disk of the log; its lines are as long as the last page that it holds already."""
    log = script["Log"].__call__
    with open("logs/filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    script["Log"].__call__ = lambda self, text, console=False: log(self, text.ljust(8192), console)


def die_writing(script: dict, where: str) -> None:
    """Killed while the second checkpoint is written: after none or half of its bytes, or around the renaming."""
    save, replace = script["torch"].save, os.replace

    def save_some(content, path):
        buffer = io.BytesIO()
        save(content, buffer)
        data = buffer.getvalue()
        if "step_000004" in str(path) and where not in ("written", "renamed"):
            Path(path).write_bytes(data[:len(data) // 2 if where == "half" else 0])
            os.kill(os.getpid(), signal.SIGKILL)
        Path(path).write_bytes(data)

    def replace_or_die(source, target):
        fatal = "step_000004" in str(target)
        if not (fatal and where == "written"):
            replace(source, target)
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    script["torch"].save, os.replace = save_some, replace_or_die
