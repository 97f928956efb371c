"""A second recipe, which is this file: it imports the machine, copies nothing, and runs on ranks and nodes.

Two layers of its own, a rule of its own with a state that updates half of the parameters at every second step alone,
two stages with batches, lengths of pieces and windows (to the token) of their own, batches that it puts together, and
other inputs of the model than the trainer's.
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fault_driver import run_python
from helpers import CPU, SERVER, TRAINER, environment, free_port, random_ids, write_shard
from train_gpt_medium import Group, Run, Shard, Stage, attend, attention_masks, fused_head_loss, inputs_at, start

WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Recipe(Run):
    temperature: float = 1.0  # at first

    def make_model(self) -> "Model":
        return Model(self)

    def model_inputs(self, step: int) -> dict[str, int | float]:
        return {"reach": self.stage(step).window + 5, "temperature": self.temperature + step / 4}

    def next_batch(self, shard: Shard, position: int, step: int) -> tuple[list[list[range]], int] | None:
        """Every piece is its second half, then its first."""
        batch = super().next_batch(shard, position, step)
        if batch is None:
            return None
        pieces, position = batch
        middles = [(ids.start + ids.stop) // 2 for ids, in pieces]
        return [[range(m, ids.stop - 1), range(ids.start, m + 1)] for m, (ids,) in zip(middles, pieces)], position


class Model(nn.Module):
    compiled_alone = ("layers",)

    def __init__(self, config: Recipe):
        super().__init__()
        self.config = config
        self.letters = nn.Parameter(0.1 * torch.randn(config.vocab_size, WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, ids: Tensor, targets: Tensor, reach: Tensor, temperature: Tensor) -> Tensor:
        mask, = attention_masks(ids, (reach,), self.config.doc_token, exact=True)
        x = F.embedding(ids, self.letters)
        for layer in self.layers:
            heads = x.view(1, len(ids), 2, -1)
            x = x + layer(attend(heads, heads, heads, mask, 0.1, {}).view_as(x)).relu()
        return fused_head_loss(x / temperature, self.letters, targets, softcap=30.0, chunks=1)

    def report(self) -> dict[str, float]:
        return {"size": self.letters.square().mean().item()}


@dataclass(frozen=True)
class SignDescent:
    """Of an average of gradients."""
    rate: float
    unit_dims = 1  # a row stays whole
    compiles = True

    def hyperparameters(self, step: int, config: Recipe) -> dict[str, float]:
        return {"rate": self.rate * (1 - step / config.num_iterations)}

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"average": torch.zeros_like(p)}

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], rate: Tensor) -> None:
        for p, grad, state in zip(params, grads, states):
            state["average"].lerp_(grad, 0.5)
            p.sub_(rate * state["average"].sign())


def seam() -> Recipe:
    return Recipe(
        preset="seam", num_iterations=4, stages=(Stage(0.5, num_slices=4, window=64, seq_len=128),
                                                 Stage(num_slices=4, window=128)),
        groups=(Group("layers", ("weight",), SignDescent(0.01)), Group("letters", ("letters",), SignDescent(0.02), 2)),
        snoo=None, data_dir="shards", vocab_size=257, doc_token=256, seq_len=512, micro_seq_len=256, val_seq_len=512,
        val_tokens=1024, val_every=2, needs_gpu=False, kernel_warmup_steps=1, seed=1, checkpoint_every=2)


def start_script(folder: Path, name: str, *launcher: str, **variables: str) -> SERVER.Process:
    """This file, alone or under torchrun; it prints into the file `name`."""
    torchrun = ("-m", "torch.distributed.run", *launcher) if launcher else ()
    process = SERVER.Process(name=str(folder / name), target=run_python, args=(
        str(folder), [*torchrun, __file__], environment(OMP_NUM_THREADS="1", PYTHONPATH=":".join(sys.path),
                                                        **variables), str(folder / name)))
    process.start()
    return process


def finish(*processes: SERVER.Process) -> None:
    for process in processes:
        process.join(300)
        assert process.exitcode == 0, Path(process.name).read_text()


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> dict[str, str]:
    """Of one rank, two launchers of a rank each on the loopback, and one launcher of two that resume these."""
    one, nodes = folders = [tmp_path_factory.mktemp(name) for name in ("one", "nodes")]
    period, config = random_ids(128, seam()), seam()
    for folder in folders:  # all pieces are equal, so that losses are, to the last digit
        write_shard(folder / "shards" / "text_train_000001.bin", [*period.repeat(40), period[0]])
        write_shard(folder / "shards" / "text_val_000000.bin", random_ids(1025, config))
    node = ("--nproc_per_node=1", "--nnodes=2", "--rdzv_id=seam", "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1")
    finish(start_script(one, "alone"), start_script(nodes, "first", *node), start_script(nodes, "second", *node))
    (run,) = (nodes / "checkpoints").iterdir()
    finish(start_script(nodes, "resumed", "--standalone", "--nproc_per_node=2", RESUME_FROM=str(run / "step_000002")))
    paths = dict(zip(("one", "nodes", "resumed"), (*one.glob("logs/*"), *sorted(
        nodes.glob("logs/*"), key=lambda path: path.stat().st_mtime)), strict=True))  # rank 0 writes
    return {name: path.read_text() for name, path in paths.items()}


def fields(log: str) -> list[tuple[str, ...]]:
    """Of every line of a step: which, the validation's loss, and what follows the times."""
    return re.findall(r"^step:(\d)/4 (?:val_loss:(\S+) )?train_time:\d+ms step_avg:\S+ (.*)$", log, re.M)


def test_ranks_and_nodes_train_as_one(logs):
    one = fields(logs["one"])
    assert fields(logs["nodes"]) == one
    assert fields(logs["resumed"]) == one[3:]  # from the validation after step 2 on
    assert [(step, further) for step, loss, further in one if not loss] == [
        ("1", "tokens:512 reach:69 temperature:1"), ("2", "tokens:1024 reach:69 temperature:1.25"),
        ("3", "tokens:3072 reach:133 temperature:1.5"), ("4", "tokens:5120 reach:133 temperature:1.75")]
    losses = [float(loss) for _, loss, _ in one if loss]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_numbers_reach_the_model_as_they_are():
    inputs = inputs_at(1, seam(), CPU)
    assert {name: (x.item(), x.dtype) for name, x in inputs.items()} == {
        "reach": (69, torch.int32), "temperature": (1.25, torch.float32)}


def test_the_log_holds_both_sources(logs):
    for log in logs.values():
        assert log.startswith(Path(__file__).read_text())
        assert TRAINER.read_text() in log
        assert "\ntemperature = 1.0\n" in log and "\nsnoo = None\n" in log


if __name__ == "__main__":
    start({"seam": seam})
