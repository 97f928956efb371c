"""How much memory a run takes on one GPU, counted on the trainer's own code: an estimate that no GPU has confirmed yet.

A step and a validation pass run on meta tensors, which have a size and no memory, and every tensor counts while it
lives. So another model, rule or table is counted as it is, or the count fails. README.md beside this file says what is
counted and what is assumed.
"""
import importlib.util
import os
import sys
import weakref
from bisect import bisect
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
# Assumptions, none of them measured. Outside torch's allocator: the CUDA context and its modules, 1 GiB; with NCCL's
# channels and buffers, 2. Within it: 5 % for what its blocks round up and for what this count does not see.
CONTEXT_BYTES, CONTEXT_BYTES_WITH_NCCL = 2**30, 2 * 2**30
ALLOCATOR_MARGIN = 1.05
PIECES_RUN = 2  # of a step's at most: a third would find the memory as the second did
META = torch.device("meta")


class Watch(TorchDispatchMode):
    """Bytes of the tensors that live, each storage once: `live` now, `peak` at most."""
    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self, existing: list[Tensor]):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()
        self._add(existing)

    @classmethod
    def ignore_compile_internals(cls) -> bool:  # what compiled code does counts, what compiles it does not
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._add(tree_leaves(result))
        return result

    def _add(self, leaves: list) -> None:
        for storage in (x.untyped_storage() for x in leaves if isinstance(x, Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class Sent:
    """A collective under way, which holds its tensors until it is waited for."""
    def __init__(self, *tensors: Tensor, async_op: bool):
        self.tensors = tensors

    def wait(self) -> None:
        self.tensors = ()


def load_script(path: Path | str | None = None) -> ModuleType:
    """A training script: the one that TRAIN_SCRIPT names, as run.sh runs it, or train_gpt_medium.py, unless named."""
    path = Path(path or os.environ.get("TRAIN_SCRIPT") or ROOT / "train_gpt_medium.py").resolve()
    sys.path[:0] = [str(path.parent), str(ROOT)]
    if path.stem not in sys.modules:  # by its path: its name may hold a point
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def machine_of(config) -> ModuleType:
    """The script that has the machine: the recipe's own, or the one that it imports."""
    return sys.modules[next(base for base in type(config).__mro__ if base.__name__ == "Run").__module__]


def as_on_gpus(machine: ModuleType) -> ExitStack:
    """Meta tensors take a GPU's way: FlexAttention, which knows no such device, and collectives that nobody answers."""
    stack = ExitStack()
    stack.enter_context(patch.object(flex_attention, "_validate_device", lambda *_: None))
    stack.enter_context(patch.object(machine, "dense_mask", lambda mask: mask))
    stack.enter_context(patch.multiple(dist, create=True, all_to_all_single=Sent, all_gather_single=Sent,
                                       all_reduce=lambda _: None))
    return stack


def compiled_model(config) -> nn.Module:
    """On meta tensors. Parts compile alone, partitioned as for Inductor, which would also fuse their operations."""
    torch._dynamo.reset()
    with META:
        model = config.make_model()
    machine_of(config).compile_model(model, whole=False, backend="aot_eager_decomp_partition")
    return model


def pieces(config) -> list[int]:
    """Of a batch, by stage."""
    return [config.pieces(stage)[0] for stage in config.stages]


def count(config, world_size: int) -> int:
    """Bytes that tensors take at most on one of world_size ranks, in a step with Snoo's and in a validation pass."""
    machine, model = machine_of(config), compiled_model(config)
    num_pieces, further = max(pieces(config)) // world_size, machine.inputs_at(0, config, META)

    def tokens(*shape: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=META) for dtype in (torch.int32, torch.int64))

    def validate() -> None:
        with torch.no_grad():
            model(*tokens(config.val_piece_len), **further)

    with as_on_gpus(machine):
        model(*tokens(config.piece_len), **further)  # compiles, which leaves tensors behind
        validate()
        with Watch([*model.parameters(), *model.buffers()]) as watch:
            optimizer = machine.Optimizer(model, config, machine.World(0, world_size, META))
            inputs, targets = (x[:PIECES_RUN] for x in tokens(num_pieces, config.piece_len))
            machine.train_step(model, optimizer, inputs, targets, 0)
            validate()
    return watch.peak


def needed(config, world_size: int) -> int:
    """Free bytes that each of world_size GPUs should have: what is counted and the assumptions above."""
    context = CONTEXT_BYTES_WITH_NCCL if world_size > 1 else CONTEXT_BYTES
    return int(count(config, world_size) * ALLOCATOR_MARGIN) + context


def by_length(config, world_size: int) -> dict:
    """The Config of every micro_seq_len that Config accepts and the ranks can share, the shortest first."""
    machine, configs = machine_of(config), {}
    for divisor in range(config.seq_len // machine.BLOCK_SIZE, 0, -1):
        with suppress(machine.UserError):
            other = replace(config, micro_seq_len=config.seq_len // divisor)
            if not any(number % world_size for number in pieces(other)):
                configs[other.piece_len] = other
    return configs


def largest_micro_seq_len(config, world_size: int, free_bytes: int) -> tuple[int, int] | None:
    """The longest piece with which the run fits, if shorter ones never take more, and what it needs."""
    configs, found = by_length(config, world_size), {}

    def needed_at(length: int) -> int:
        found[length] = needed(configs[length], world_size)
        return found[length]

    bisect([*configs], free_bytes, key=needed_at)
    return max(((length, size) for length, size in found.items() if size <= free_bytes), default=None)


def optimizer_of(config, world_size: int):
    """The Optimizer of rank 0, of meta tensors."""
    machine = machine_of(config)
    with META:
        return machine.Optimizer(config.make_model(), config, machine.World(0, world_size, META))


def checkpoint_bytes(config) -> int:
    """What the ranks write for one checkpoint: parameters, padded as banks are, and their states."""
    optimizer = optimizer_of(config, 1)
    return sum(x.nbytes for x in tree_leaves([optimizer.state_dict(), [b.buffer for b in optimizer.banks.values()]]))
