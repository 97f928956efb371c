"""How much memory a run takes on one GPU, computed from its Config: a model that no GPU has confirmed yet.

    python data/preflight/memory.py       # a table of the record by micro_seq_len, for 1 and 8 GPUs

States are counted on the trainer's own objects, made of fake tensors. What the forward pass keeps follows from the
tensors that torch.compile's partitioner keeps (tests/tools/test_memory.py measures them). README.md beside this file
has the derivation. A row is a tensor [T, C] in the model's dtype, the unit in which a block's tensors are counted.
"""
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_gpt_medium import BLOCK_SIZE, GPT, PRESETS, Config, Optimizer, UserError, World  # noqa: E402

# Assumptions, none of them measured. Outside torch's allocator: the CUDA context and its modules, 1 GiB; with NCCL's
# channels and buffers, 2. Within it: 5 % for what its blocks round up and for what this model does not see.
CONTEXT_BYTES, CONTEXT_BYTES_WITH_NCCL = 2**30, 2 * 2**30
ALLOCATOR_MARGIN = 1.05


class Memory(NamedTuple):
    """Bytes of one GPU by part."""
    parameters: int  # padded, as banks are
    rotary: int
    states: int  # of this rank's shards
    copies: int  # of parameters and states, which warm_up holds until it is done
    gradients: int
    means: int  # fp32 gradients, where a rank has more than one piece
    saved: int  # from the forward for the backward pass
    head: int  # beyond that: logits, latents and the head in the model's dtype
    backward: int  # beyond that: gradients of the last block, the MLP's hidden layer included, and of the head
    tables: int  # at the end of the backward pass beyond gradients: those of embeddings, before and after stacking
    averaging: int  # one gradient in fp32 on its way into the means
    update: int  # gradients as packed and received, and Newton-Schulz
    validation: int

    @property
    def phases(self) -> dict[str, int]:
        """What each phase of warm_up adds to what all of them hold. They follow each other."""
        return {"forward": self.means + self.saved + self.head,
                "backward": self.means + max(self.saved + self.backward, self.gradients + self.tables),
                "means": self.means + self.gradients + self.averaging,
                "optimizer": self.update, "validation": self.validation}

    @property
    def peak(self) -> int:
        """What torch's allocator hands out at most: the maximum over phases."""
        return self.parameters + self.rotary + self.states + self.copies + max(self.phases.values())

    def needed(self, world_size: int) -> int:
        """Free bytes that a GPU should have: the peak and the assumptions above."""
        return int(self.peak * ALLOCATOR_MARGIN) + (CONTEXT_BYTES_WITH_NCCL if world_size > 1 else CONTEXT_BYTES)


def num_bytes(tree) -> int:
    return sum(x.nbytes for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


@cache
def count_held(config: Config, world_size: int) -> dict[str, int]:
    """The parts that no length changes, from a model and an Optimizer of fake tensors, which take no memory."""
    with FakeTensorMode():
        model = GPT(config)
        optimizer = Optimizer(model, config, World(0, world_size, torch.device("cpu")))
    banks, sizes = optimizer.banks, [p.numel() for p in model.parameters()]
    packed = sum(bank.buffer.nbytes for bank in banks.values())
    shards = num_bytes([bank.shard for bank in banks.values()])
    at_first = num_bytes(optimizer.state_dict())  # Muon's states and Snoo's outer weights: the others come in a step
    adam = 2 * num_bytes([bank.shard for bank in optimizer.adam_banks])
    # Of an update of MLP matrices, a number takes 16.5 bytes in bf16 (tests/properties/test_distributed.py). That is
    # eager code; compiled code takes less, and averages parts without the 6 bytes a number that eager code needs.
    itemsize, mlp = config.dtype.itemsize, banks["mlp_fc"].shard.numel() + banks["mlp_proj"].shard.numel()
    largest = max(bank.buffer.nbytes for bank in banks.values())  # both as gradients and packed for a moment
    return dict(parameters=packed, states=at_first + adam + shards, copies=packed + at_first,
                gradients=num_bytes(list(model.parameters())),
                means=4 * sum(sizes), averaging=4 * max(sizes),
                update=packed + (packed if world_size > 1 else 0) + max(largest, int((7.25 * itemsize + 2) * mlp)))


def saved_bytes_per_token(config: Config) -> int:
    """What the compiled forward pass keeps for the backward pass, without the gradients that HeadLoss keeps.

    In rows, every layer: the mixed input, the MLP's input before and after norm (without attention before it, the
    first two are one), post of 4, and the output, to which a skip may already be added; with attention, the projected
    q, k and v, the same normed, rotated and mixed, and attention's output. A skip's source is kept for itself where its
    own sum with a skip took its place. Embeddings are kept, x00 and x01 computed anew. In fp32: the factors of all
    norms, log-sum-exp of attention, and a copy of the backout layer's output. Exact in bf16; a model in fp32, which is
    for known answers, keeps a row more, and a skip from the layer just before or from backout's may keep one less.
    """
    layers, attention_layers = config.layers, sum(layer.attention for layer in config.layers)
    sources = {layer.skip_from for layer in layers} - {None}
    rows = 7 * len(layers) + 8 * attention_layers + num_tables(config)
    rows += sum(layers[source + 1].skip_from is not None for source in sources)
    fp32 = config.model_dim + 4 * config.num_heads * attention_layers + len(layers) + 4
    return rows * config.model_dim * config.dtype.itemsize + 4 * fp32


def num_tables(config: Config) -> int:
    return 2 + len({layer.value_embed for layer in config.layers} - {None})


def mask_bytes(num_tokens: int) -> int:
    """Block masks, int32: lists [B, B] of partial and full blocks, of keys and queries; their lengths [B] for two
    windows; each token's document."""
    num_blocks = num_tokens // BLOCK_SIZE
    return 4 * (4 * num_blocks ** 2 + 2 * 4 * num_blocks + num_tokens)


def estimate(config: Config, world_size: int) -> Memory:
    """Bytes on each of world_size GPUs, which divides config.num_pieces."""
    T, val_T, itemsize, tables = config.piece_len, config.val_piece_len, config.dtype.itemsize, num_tables(config)
    row, val_row = (length * config.model_dim * itemsize for length in (T, val_T))
    head_rows = -(-config.vocab_size // 128) * 128
    logits, val_logits = (length * head_rows * itemsize for length in (T, val_T // config.val_loss_chunks))
    head = head_rows * config.model_dim
    held = count_held(replace(config, micro_seq_len=config.seq_len), world_size)
    if config.num_pieces == world_size:
        held = held | dict(means=0, averaging=0)
    return Memory(
        **held, rotary=4 * config.head_dim * max(T, val_T),
        saved=T * saved_bytes_per_token(config) + mask_bytes(T) + row + head * itemsize,
        head=logits + row + head * itemsize, backward=6 * row + 4 * head, tables=2 * tables * row,
        # Blocks that compile by themselves leave all outputs alive. A block's own rows: x and, at most, q, k, v twice,
        # or x, its norm, post and the output.
        validation=mask_bytes(val_T) + max((tables + len(config.layers) + 7) * val_row,
                                           val_logits + val_row + head * itemsize))


def largest_micro_seq_len(config: Config, world_size: int, free_bytes: int) -> int | None:
    """The longest piece with which the run fits, among those that Config accepts and the ranks can share."""
    for num_pieces in range(1, config.seq_len // BLOCK_SIZE + 1):
        try:
            shorter = replace(config, micro_seq_len=config.seq_len // num_pieces)
        except UserError:
            continue
        if shorter.num_pieces % world_size == 0 and estimate(shorter, world_size).needed(world_size) <= free_bytes:
            return shorter.micro_seq_len
    return None


def main() -> None:
    print(f"micro_seq_len {'1 GPU':>7} {'8 GPUs':>7}   GiB a GPU of the record (estimated)")
    for config in (replace(PRESETS["medium"], micro_seq_len=length) for length in (65536, 32768, 16384, 8192, 4096)):
        print(f"{config.micro_seq_len:13,}", *(f"{estimate(config, n).needed(n) / 2**30:7.1f}" for n in (1, 8)))


if __name__ == "__main__":
    main()
