"""Copies of the trainer that can harm themselves, and the processes that run them, for test_faults.py.

A copy is the script with two lines more before its guard: one sets the constants, one installs a fault of faults.py.
Processes are forked from a server that has imported torch; all else, the script's guard and torchrun included, runs
in them.
"""
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from helpers import SERVER, TRAINER, environment

LIMIT_S = 120  # for a whole run, on a machine that others use too


def write_copy(path: Path, config) -> None:
    """The trainer, whose preset tiny is `config`."""
    before, guard, after = TRAINER.read_text().partition('\n\nif __name__ == "__main__":')
    assert guard
    path.write_text(f'{before}\n\nPRESETS["tiny"] = lambda: {config!r}\n__import__("faults").install(globals())\n'
                    f'{guard}{after}')


def run_python(folder: str, arguments: list[str], variables: dict[str, str], console: str) -> None:
    """What the interpreter does with these arguments, in a process that it is given."""
    # A shell in the background, or nohup, has these ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


class Started:
    """`python train.py tiny` in `folder`, or torchrun of it; what it prints goes to one file, in order."""
    def __init__(self, folder: Path, fault: str = "none 0 0", ranks: int = 0, **variables):
        """ranks: 0 without torchrun."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        variables = environment(FAULT=fault, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent), **variables)
        self.folder, self.ranks = folder, range(ranks)
        self.console = folder / f"console_{len(list(folder.glob('console_*')))}.txt"
        self.console.touch()
        for path in (*folder.glob("rank_*.pid"), *folder.glob("waiting_*")):
            path.unlink()  # of the run before
        self.process = SERVER.Process(target=run_python, args=(
            str(folder), [*torchrun, "train.py", "tiny"], variables, str(self.console)))
        self.process.start()

    def reach(self, name: str) -> Path:
        """Waits until the file is there with what it says; fails at once where nobody is left to write it."""
        path = self.folder / name
        wait_for(lambda: path.exists() and path.read_text() or not self.process.is_alive())
        assert path.exists(), self.console.read_text()
        return path

    def pid(self, rank: int) -> int:
        """Of a rank, once it has begun."""
        return int(self.reach(f"rank_{rank}.pid").read_text())

    def send(self, number: int) -> None:
        """The signal, to the process that was started."""
        os.kill(self.process.pid, number)

    def finish(self, limit_s: float = LIMIT_S) -> tuple[int, str]:
        """Exit status (negative: a signal) and what was printed."""
        self.process.join(limit_s)
        assert self.process.exitcode is not None, f"runs after {limit_s} s: {self.console.read_text()}"
        return self.process.exitcode, self.console.read_text()

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_) -> None:
        """Nothing is left of it."""
        self.process.kill()
        self.process.join()
        for path in self.folder.glob("rank_*.pid"):
            if is_alive(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether there is such a process that is not dead and waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited for {limit_s} s"
        time.sleep(0.02)
