"""GPT-2-Medium speedrun: train a 16-layer, 1024-wide GPT on FineWeb to a validation loss of 2.92 on 8xH100.

The idea that gives the run its name is Smear-MTP: just before the language head, the output latent of the previous
token, times one learned scalar, is added to the current one. This file reproduces the record of 2025-11-02
(26 runs: mean loss 2.9193, mean time 1374.7 s; records/2025-11-02_SmearMTP/).

    torchrun --standalone --nproc_per_node=8 train_gpt_medium.py           # the record; 1, 2 or 4 GPUs also work
    torchrun --standalone --nproc_per_node=8 train_gpt_medium.py baseline  # the same without Smear-MTP, 5,550 steps
    torchrun --standalone --nproc_per_node=1 train_gpt_medium.py short     # a 300-step schedule, for trying ideas
    python train_gpt_medium.py tiny                                        # a small model on a CPU; `small`: longer

Part 1 is the recipe: all that an experiment edits. Part 2 is the machine; another recipe imports it from this file.
Shards are read from the preset's `data_dir`, or from the folder named by the environment variable DATA_PATH.
RESUME_FROM=checkpoints/<run id> resumes that run, of this very script, from its last checkpoint.
Shapes: T tokens of a piece, C channels, H heads, D channels of a head, V rows of the head, B = T / 128 blocks.
"""
import contextlib
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import chain, count, cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd
from tqdm import tqdm

try:  # comes with torch for GPUs; where it is missing, the plain versions of the kernels run
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=int)

# ======================================================================================================================
# Part 1: the recipe
# ======================================================================================================================
# Constants

@dataclass(frozen=True, kw_only=True)
class Run:
    """The constants that the machine reads, of any recipe; the defaults are the record's. Lengths are in tokens."""
    preset: str = "medium"
    num_iterations: int = 5535
    stages: "tuple[Stage, ...]" = field(default_factory=lambda: STAGES)
    groups: "tuple[Group, ...]" = field(default_factory=lambda: GROUPS)
    snoo: "Snoo | None" = field(default_factory=lambda: Snoo())  # the outer optimizer
    clip_norm: float | None = None  # of all averaged gradients together; with it, every update waits for all of them
    # data
    data_dir: str = "data/fineweb10B"
    shard_prefix: str = "fineweb"  # of the files' names, where data_dir is still empty
    repeat_shards: bool = False  # where they are too few for the schedule, begin again with the first; else refuse
    vocab_size: int = 50257
    doc_token: int = 50256  # begins every document
    seq_len: int = 64 * 1024  # one slice, the longest if stages have their own; a stage says how many make a batch
    # A slice is processed in pieces of at most this length, which the ranks share: shorter pieces fit smaller GPUs and
    # more ranks. Attention, positions and Smear-MTP never cross a piece's border. Validation's pieces shrink alike.
    micro_seq_len: int = 64 * 1024
    # validation
    val_tokens: int = 10_485_760  # the task's definition
    val_seq_len: int = 4 * 64 * 1024
    val_every: int = 125
    # run
    seed: int | None = None  # None: drawn at random and logged, so that runs are independent samples
    needs_gpu: bool = True
    kernel_warmup_steps: int = 4  # untimed, on random tokens; parameters and states are restored after them
    coordinate_descent_tuning: bool = True  # one graph, tuned kernels: faster steps for minutes of compilation
    watch_every: int = 16  # steps between looks at losses and gradient norms: for the log, and for NaN and inf
    # Checkpoints every so many steps, or minutes; 0: never. With either, or in a resumed run, the last step and a
    # signal to stop save one too.
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0

    # Every other number must be positive.
    may_be_zero = ("doc_token", "seed", "kernel_warmup_steps", "checkpoint_every", "checkpoint_minutes")

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if type(value) in (int, float) and (value < 0 or value == 0 and item.name not in self.may_be_zero):
                raise UserError(f"Config: {item.name} {value} is not positive.")
        for ok, sentence in self.checks():
            if not ok:
                raise UserError(f"Config: {sentence}.")

    def checks(self) -> list[tuple[bool, str]]:
        """Conditions on the constants, each with the sentence that says what is wrong; a recipe adds its own."""
        ends = [0.0, *(stage.until for stage in self.stages)]
        roles = [role for group in self.groups for role in group.roles]
        return [
            (self.seq_len % BLOCK_SIZE == 0, f"seq_len {self.seq_len} is not a multiple of {BLOCK_SIZE}"),
            (self.seq_len % self.piece_len == 0 and self.piece_len % BLOCK_SIZE == 0,
             f"micro_seq_len {self.micro_seq_len} must divide seq_len and be a multiple of {BLOCK_SIZE}"),
            (self.val_seq_len * self.piece_len % (self.seq_len * BLOCK_SIZE) == 0,
             f"val_seq_len {self.val_seq_len} * micro_seq_len / seq_len is not a multiple of {BLOCK_SIZE}"),
            (self.val_tokens % self.val_seq_len == 0, f"val_tokens {self.val_tokens} is not a multiple of val_seq_len"),
            (self.doc_token < self.vocab_size, f"doc_token {self.doc_token} is not below vocab_size {self.vocab_size}"),
            (ends == sorted(set(ends)) and ends[-1] == 1, f"the stages' ends {ends[1:]} do not rise to 1.0"),
            (all(stage.num_slices > 0 for stage in self.stages), "a stage's num_slices is not positive"),
            (all(0 < length <= self.seq_len and length % min(self.piece_len, length) == 0 == length % BLOCK_SIZE
                 for length in (stage.seq_len or self.seq_len for stage in self.stages)),
             f"a stage's seq_len is not a multiple of {BLOCK_SIZE} and of micro_seq_len, at most seq_len"),
            (len(set(roles)) == len(roles), f"{max(roles, key=roles.count, default='')} is a role in two groups"),
            (len({group.name for group in self.groups}) == len(self.groups), "two groups have the same name"),
            (all(group.name.isidentifier() for group in self.groups), "a group's name, a field of the log, is no word"),
            (not self.snoo or self.snoo.every > 0, "Snoo's `every` is not positive"),
            (all(group.every > 0 for group in self.groups), "a group's `every` is not positive"),
            (not self.snoo or self.update_every == 1, "Snoo needs groups that update at every step"),
            (self.checkpoint_every % max(1, self.update_every) == 0,
             f"checkpoint_every {self.checkpoint_every} is not a multiple of {self.update_every}: before all groups "
             f"have updated, a checkpoint would lack gradients"),
        ]

    @property
    def piece_len(self) -> int:
        """Tokens of the longest forward and backward pass."""
        return min(self.micro_seq_len, self.seq_len)

    @property
    def val_piece_len(self) -> int:
        """Tokens of a forward pass of validation."""
        return self.val_seq_len * self.piece_len // self.seq_len

    def stage(self, step: int) -> "Stage":
        """The stage of step `step`, counted from 0; after the last step, the last stage."""
        return next((row for row in self.stages if step < row.until * self.num_iterations), self.stages[-1])

    def pieces(self, stage: "Stage") -> tuple[int, int]:
        """Number and length of the pieces that a batch of this stage is processed in."""
        slice_len = stage.seq_len or self.seq_len
        length = min(self.piece_len, slice_len)
        return stage.num_slices * slice_len // length, length

    def batch_tokens(self, step: int) -> int:
        return math.prod(self.pieces(self.stage(step)))

    @property
    def update_every(self) -> int:
        """Steps after which all groups have updated."""
        return math.lcm(*(group.every for group in self.groups))

    def next_batch(self, shard: "Shard", position: int, step: int) -> "tuple[list[list[range]], int] | None":
        """The pieces of the batch of `step` from `position` of a shard on; a recipe may choose tokens as it likes."""
        return consecutive_pieces(shard, position, *self.pieces(self.stage(step)))

    def step_fields(self, step: int) -> dict[str, float]:
        """What the log's line of a step shows of it, besides times and tokens; a recipe's class may add to it."""
        return self.model_inputs(step)


@dataclass(frozen=True, kw_only=True)
class Config(Run):
    """Adds the constants of this recipe's model and schedules."""
    layers: "tuple[Layer, ...]" = field(default_factory=lambda: LAYERS)
    num_heads: int = 8
    head_dim: int = 128
    mlp_factor: int = 4  # hidden width of the MLP, in model_dim
    smear_mtp: bool = True
    backout_from: int = 11  # row of LAYERS, not the last, whose output is mixed into the last latent
    attention_scale: float = 0.12  # in place of 1/sqrt(D), since q and k are normed
    rotary_base: float = 1024.0
    rotary_share: float = 0.5  # of a head's channels; the others never rotate
    logit_softcap: float = 15.0
    fused_head: bool = True  # GPT.loss by the machine's kernel, in less memory; False: as GPT.loss is written
    init_scale: float = 0.5  # of 1/sqrt(C), as a standard deviation
    dtype: torch.dtype = torch.bfloat16  # of weights, activations and Newton-Schulz; float32 in exact tests
    val_loss_chunks: int = 4  # the logits of a whole piece of validation do not fit
    # schedules
    flat_share: float = 0.3  # of the run at the full learning rate
    final_lr_factor: float = 0.01
    max_window: int = 27 * 128  # of the long window, at the end of the run; ON_CPU has its own
    short_window_divisor: int = 2  # of the long window, in blocks
    momentum_start: float = 0.85
    momentum_end: float = 0.95
    momentum_warmup_steps: int = 300

    may_be_zero = (*Run.may_be_zero, "backout_from", "rotary_share", "flat_share", "final_lr_factor", "momentum_start")

    def checks(self) -> list[tuple[bool, str]]:
        tables = sorted({layer.value_embed for layer in self.layers} - {None})
        return super().checks() + [
            (self.rotary_share <= 1 and self.head_dim % 2 == 0 and self.rotary_share * self.head_dim % 2 == 0,
             f"rotary_share {self.rotary_share} of head_dim {self.head_dim} is not an even number of channels"),
            (self.val_piece_len % self.val_loss_chunks == 0, "val_loss_chunks does not divide val_seq_len's pieces"),
            (all(layer.skip_from is None or 0 <= layer.skip_from < i for i, layer in enumerate(self.layers)),
             "a layer skips from itself or a later one"),
            (tables == list(range(len(tables))), f"the layers' value_embeds {tables} are not 0, 1, 2, ..."),
            (all(layer.attention or layer.value_embed is None for layer in self.layers),
             "a layer without attention has a value_embed"),
            (self.backout_from < len(self.layers), f"backout_from {self.backout_from} is not a layer"),
            (all(len(row) == 3 for row in NEWTON_SCHULZ), "a row of NEWTON_SCHULZ does not hold three numbers"),
        ]

    @property
    def model_dim(self) -> int:
        return self.num_heads * self.head_dim

    def model_inputs(self, step: int) -> dict[str, int]:
        return {"window_blocks": num_window_blocks(step, self)}

    def make_model(self) -> "GPT":
        return GPT(self)


# FlexAttention's options for long and short windows. Both are untuned: tiles, warps and stages are torch's own. After a
# sweep on a GPU, `bench.py --choose` prints these two lines as it found them fastest. While they are equal, blocks of
# long and short windows share compiled code. ROWS_GUARANTEED_SAFE only with fwd_BLOCK_N = 128: a query needs a key in
# the first tile that it meets, or its row is NaN, and a document may begin after the first half of its own block.
LONG_WINDOW_KERNEL: dict[str, Any] = {}
SHORT_WINDOW_KERNEL: dict[str, Any] = {}


# ----------------------------------------------------------------------------------------------------------------------
# Layer plan

class Layer(NamedTuple):
    """A row of the layer plan."""
    attention: bool = True
    long_window: bool = False
    value_embed: int | None = None  # table mixed into the values
    skip_from: int | None = None  # earlier layer whose output is added first, times skip_weights[skip_from]


# Long windows and value embeddings at both ends, U-net skips in the middle [@KoszarskyB, modded-nanogpt];
# no attention in layer 7 [@YouJiacheng, modded-nanogpt].
LAYERS = (
    Layer(value_embed=0, long_window=True),  # 0
    Layer(value_embed=1),  # 1
    Layer(value_embed=2),  # 2
    Layer(value_embed=3),  # 3
    Layer(value_embed=4, long_window=True),  # 4
    Layer(),  # 5
    Layer(),  # 6
    Layer(attention=False),  # 7
    Layer(),  # 8
    Layer(skip_from=6),  # 9
    Layer(skip_from=4),  # 10
    Layer(skip_from=2, value_embed=0, long_window=True),  # 11
    Layer(value_embed=1),  # 12
    Layer(value_embed=2),  # 13
    Layer(value_embed=3),  # 14
    Layer(value_embed=4, long_window=True),  # 15
)


# ----------------------------------------------------------------------------------------------------------------------
# Stages and schedules: functions of the step in progress, counted from 0

class Stage(NamedTuple):
    """A row of the stage table: what holds until a share of the run's steps is done."""
    until: float = 1.0
    num_slices: int = 8  # of a step's batch
    window: int | None = None  # in tokens; None: the smooth window of the whole run
    lr_factor: float = 1.0  # on top of the schedule's
    seq_len: int | None = None  # of a slice; None: Run's


STAGES = (Stage(until=1.0, num_slices=8),)


def lr_factor(step: int, config: Config) -> float:
    """Flat, then linear down to final_lr_factor at the end of the run; times the stage's factor."""
    progress = step / config.num_iterations
    stage_factor = config.stage(step).lr_factor
    if progress < config.flat_share:
        return stage_factor
    remaining = (1 - progress) / (1 - config.flat_share)
    return (remaining + (1 - remaining) * config.final_lr_factor) * stage_factor


def muon_momentum(step: int, config: Config) -> float:
    warmed = min(step / config.momentum_warmup_steps, 1)
    return (1 - warmed) * config.momentum_start + warmed * config.momentum_end


def num_window_blocks(step: int, config: Config) -> int:
    """Long window in blocks: grows fast, rests in the middle of the run, grows again [@Gusarich, modded-nanogpt]."""
    p, window = step / config.num_iterations, config.stage(step).window
    if window is None:
        window = config.max_window * (4 * p ** 3 - 6 * p ** 2 + 3 * p)
    return max(1, math.ceil(window / BLOCK_SIZE))


# ----------------------------------------------------------------------------------------------------------------------
# Model. A parameter is declared once, with its initial value; its role in GROUPS is the last part of its name.

def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),))


def smear(x: Tensor, smear_lambda: Tensor) -> Tensor:
    """Smear-MTP: y[t] = x[t] + lambda x[t - 1], [T, C] -> [T, C]; y[0] = x[0]. Looks across document borders."""
    return torch.cat((x[:1], x[1:] + smear_lambda * x[:-1]))


class Rotary(nn.Module):
    """Rotary positions on a share of a head's channels: truncated base frequencies [@YouJiacheng, modded-nanogpt]."""
    def __init__(self, config: Config):
        super().__init__()
        num_pairs, max_len = config.head_dim // 2, max(config.piece_len, config.val_piece_len)
        share = torch.linspace(0, 1, int(config.rotary_share * num_pairs), dtype=torch.float32)
        frequencies = F.pad((1 / config.rotary_base) ** share, (0, num_pairs - len(share)))
        theta = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)
        self.register_buffer("cos", theta.cos()[:, None], persistent=False)  # [max_len, 1, D / 2]
        self.register_buffer("sin", theta.sin()[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, H, D], rotated in fp32 by its positions 0 ... T - 1."""
        cos, sin = self.cos[:x.size(1)], self.sin[:x.size(1)]
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).type_as(x)


class Block(nn.Module):
    """One layer: attention without a norm in front (q, k and v are normed instead), then an MLP with relu squared."""
    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        C, hidden = config.model_dim, config.mlp_factor * config.model_dim
        self.num_heads, self.attention_scale = config.num_heads, config.attention_scale
        self.has_attention = layer.attention
        self.kernel_options = LONG_WINDOW_KERNEL if layer.long_window else SHORT_WINDOW_KERNEL
        bound = 3 ** 0.5 * config.init_scale * C ** -0.5  # uniform in +-bound
        if layer.attention:
            qkvo = torch.empty(4, C, C).uniform_(-bound, bound)
            qkvo[3] = 0
            self.qkvo = nn.Parameter(qkvo.to(config.dtype))
        self.mlp_fc = nn.Parameter(torch.empty(hidden, C).uniform_(-bound, bound).to(config.dtype))
        self.mlp_proj = nn.Parameter(torch.zeros(C, hidden, dtype=config.dtype))

    def forward(self, x: Tensor, x00: Tensor, x01: Tensor, value_embed: Tensor | None, block_lambdas: Tensor,
                attn_lambdas: Tensor, rotary: Rotary, mask: BlockMask | Tensor) -> Tensor:
        """x00, x01: the input's embeddings; block_lambdas: [3], the shares of x, x00 and x01. All others: [T, C]."""
        x = block_lambdas[0] * x + block_lambdas[1] * x00 + block_lambdas[2] * x01
        if self.has_attention:
            x = x + self.attention(x, value_embed, attn_lambdas, rotary, mask)
        return x + ReluSquaredMLP.apply(norm(x), self.mlp_fc, self.mlp_proj)

    def attention(self, x: Tensor, value_embed: Tensor | None, lambdas: Tensor, rotary: Rotary,
                  mask: BlockMask | Tensor) -> Tensor:
        """x, value_embed: [T, C]; lambdas: [2], the shares of value and value embedding."""
        qkv = F.linear(x, self.qkvo[:3].flatten(0, 1)).view(1, x.size(0), 3, self.num_heads, -1)
        q, k, v = qkv.unbind(2)  # before norm, which torch.compile then fuses with rotary
        v = lambdas[0] * norm(v)
        if value_embed is not None:
            v = v + lambdas[1] * value_embed.view_as(v)
        y = attend(rotary(norm(q)), rotary(norm(k)), v, mask, self.attention_scale, self.kernel_options)
        return F.linear(y.reshape(x.shape), self.qkvo[3])


class GPT(nn.Module):
    """The record's model: layers by the plan, value embeddings, skips, backout, Smear-MTP."""
    compiled_alone = ("embed", "blocks", "finish", "loss")  # unless the model compiles as one graph

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        num_layers, C = len(config.layers), config.model_dim
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.rotary = Rotary(config)
        # Rows are padded to a multiple of 128 [@Grad62304977, modded-nanogpt]; all of them count in the loss.
        self.lm_head = nn.Parameter(torch.zeros(-(-config.vocab_size // 128) * 128, C, dtype=torch.float32))
        if any(layer.skip_from is not None for layer in config.layers):
            self.skip_weights = nn.Parameter(torch.ones(num_layers))  # one per layer, used or not, as published
        self.block_lambdas = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]).repeat(num_layers, 1))
        self.attn_lambdas = nn.Parameter(torch.full((num_layers, 2), 0.5))
        if config.smear_mtp:
            self.smear_lambda = nn.Parameter(torch.tensor(0.0))  # zero-dim: a [1] tensor would promote bf16 to fp32
        self.backout_lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))
        num_value_embeds = len({layer.value_embed for layer in config.layers} - {None})
        # Two tables for the input, the others for values.
        self.embeds = nn.Parameter(torch.randn(2 + num_value_embeds, config.vocab_size, C).to(config.dtype))

    def embed(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids [T] integer -> x00, x01 and the value embeddings, each [T, C]."""
        embed1, embed2, *value_embeds = look_up(ids, self.embeds)
        return norm(embed1), norm(embed2), *value_embeds

    def finish(self, x: Tensor, middle: Tensor, ids: Tensor) -> Tensor:
        """Outputs of the last and of the backout layer, each [T, C] -> the head's input [T, C]. ids: [T], unused."""
        x = self.backout_lambdas[0] * norm(x) + self.backout_lambdas[1] * norm(middle)
        return smear(x, self.smear_lambda) if self.config.smear_mtp else x

    def loss(self, latents: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, fp32, over all rows of the head. latents [T, C], targets [T].

        An edit of it needs fused_head = False, or it changes nothing. It is validation's loss, too: what training alone
        minimises, such as a z-loss or label smoothing, goes under `if torch.is_grad_enabled()`.
        """
        softcap = self.config.logit_softcap
        z = (latents @ self.lm_head.to(latents.dtype).mT).float()
        return F.cross_entropy(softcap * z * torch.rsqrt(z.square() + softcap ** 2), targets)

    def latents(self, ids: Tensor, window_blocks: Tensor) -> Tensor:
        """ids [T] integer, window_blocks zero-dim integer -> the head's input [T, C], smeared."""
        windows = window_blocks, window_blocks // self.config.short_window_divisor
        long_mask, short_mask = attention_masks(ids, windows, self.config.doc_token)
        x00, x01, *value_embeds = self.embed(ids)
        x = x00.view_as(x00)  # a new object: a block that gets one tensor twice would compile to a graph of its own
        outputs: list[Tensor] = []
        for i, (layer, block) in enumerate(zip(self.config.layers, self.blocks)):
            if layer.skip_from is not None:
                x = x + self.skip_weights[layer.skip_from] * outputs[layer.skip_from]
            value_embed = None if layer.value_embed is None else value_embeds[layer.value_embed]
            x = block(x, x00, x01, value_embed, self.block_lambdas[i], self.attn_lambdas[i], self.rotary,
                      long_mask if layer.long_window else short_mask)
            outputs.append(x)
        return self.finish(x, outputs[self.config.backout_from], ids)

    def forward(self, ids: Tensor, targets: Tensor, window_blocks: Tensor) -> Tensor:
        """Mean cross-entropy in nats (fp32). ids: [T] integer, targets: [T] int64, window_blocks: zero-dim integer."""
        chunks = 1 if torch.is_grad_enabled() else self.config.val_loss_chunks
        latents = self.latents(ids, window_blocks)
        if self.config.fused_head:
            head = self.lm_head.to(self.config.dtype)
            return fused_head_loss(latents, head, targets, self.config.logit_softcap, chunks)
        return torch.stack([self.loss(y, t) for y, t in zip(latents.chunk(chunks), targets.chunk(chunks))]).mean()

    def report(self) -> dict[str, float]:
        """The learned scalars that a validation line of the log shows."""
        smear_lambda = {"smear_lambda": self.smear_lambda.item()} if self.config.smear_mtp else {}
        return smear_lambda | {f"backout_lambda_{i}": x for i, x in enumerate(self.backout_lambdas.tolist())}


# ----------------------------------------------------------------------------------------------------------------------
# Update rules and parameter groups

# One row per Newton-Schulz step: a, b, c of X <- aX + (bA + cA^2)X with A = XX^T [@YouJiacheng, modded-nanogpt].
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum [@kellerjordan, 2024], its average over steps and mantissas [@snimu, modded-nanogpt]."""
    lr: float  # before schedules
    decay: float
    smoothing: float = 0.2
    newton_schulz: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ
    unit_dims = 2  # a matrix is never split across ranks
    compiles = True

    def hyperparameters(self, step: int, config: Config) -> dict[str, float]:
        return {"lr": self.lr * lr_factor(step, config), "momentum": muon_momentum(step, config)}

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return dict(momentum_buffer=torch.zeros_like(p, dtype=torch.float32), smooth=torch.zeros_like(p),
                    mantissa=torch.zeros_like(p, dtype=torch.int16))

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: Tensor,
               momentum: Tensor) -> None:
        """In place, on batches of matrices [n, rows, cols] that are of one shape but for transposition.

        One batch for Newton-Schulz: a 1024 x 4096 matrix alone has 36 symmetric tiles for 132 multiprocessors.
        """
        directions = []
        for p, grad, state in zip(params, grads, states):
            scaled_grad = (1 - momentum) * grad.float()
            state["momentum_buffer"].copy_(momentum * state["momentum_buffer"] + scaled_grad)
            u = (momentum * state["momentum_buffer"] + scaled_grad).to(p.dtype)
            directions.append(u.mT if p.size(-2) > p.size(-1) else u)
        assert len({u.shape[1:] for u in directions}) == 1, "a row of GROUPS holds Muon's matrices of several shapes"
        orthogonal = newton_schulz(torch.cat(directions), self.newton_schulz).split([len(p) for p in params])
        for p, u, state in zip(params, orthogonal, states):
            (rows, cols), smooth = p.shape[-2:], state["smooth"]
            c = torch.tensor(self.smoothing, dtype=smooth.dtype)  # rounded to the state's dtype, as published
            smooth.copy_(c * smooth + (1 - c) * (u.mT if rows > cols else u))
            w = read_weights(p, state["mantissa"])
            w = w * (1 - lr * self.decay) - lr * max(1, rows / cols) ** 0.5 * smooth.float()
            write_weights(p, state["mantissa"], w)


@dataclass(frozen=True)
class AdamW:
    """torch's fused AdamW: states in the parameter's dtype, arithmetic in fp32, rounded to nearest."""
    lr: float  # before schedules
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10
    decay: float = 0.0
    unit_dims = 0  # elementwise
    compiles = False

    def hyperparameters(self, step: int, config: Config) -> dict[str, float]:
        return {"lr": self.lr * lr_factor(step, config)}

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p),
                    step=torch.zeros((), dtype=torch.float32, device=p.device))

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: Tensor) -> None:
        averages, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        adamw(params, grads, averages, squares, [], steps, fused=True, amsgrad=False, maximize=False, lr=lr.item(),
              beta1=self.betas[0], beta2=self.betas[1], weight_decay=self.decay, eps=self.eps)


@dataclass(frozen=True)
class Snoo:
    """The outer optimizer: Nesterov SGD on the weights of the last outer step [@dominikkallusky, arXiv 2510.15830].

    The gradient is the outer weights minus the current ones. Outer weights and momentum have the parameters' dtypes;
    mantissas stay as they are, as published.
    """
    every: int = 28  # inner steps
    lr: float = 0.68
    momentum: float = 0.37

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return dict(outer=p.clone(), outer_momentum=torch.zeros_like(p))

    def update(self, params: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        outer, momenta = ([state[name] for state in states] for name in ("outer", "outer_momentum"))
        grads = [old - new for old, new in zip(outer, params)]
        # Fused rounds least; on a CPU torch 2.13's fused SGD leaves bf16 parameters where they were.
        sgd(outer, grads, momenta, fused=params[0].is_cuda, weight_decay=0.0, momentum=self.momentum, lr=self.lr,
            dampening=0.0, nesterov=True, maximize=False)
        for p, old in zip(params, outer):
            p.copy_(old)


class Group(NamedTuple):
    """A row of GROUPS: parameters that one rule updates."""
    name: str
    roles: tuple[str, ...]  # a role without a parameter is ignored
    rule: Any  # Muon, AdamW, or one of your own: what it needs stands at the head of Part 2
    every: int = 1  # steps, whose gradients are summed for one update; nothing is sent before it


# In the order of sending: the longest update first, the longest message last.
GROUPS = (
    Group("mlp", ("mlp_fc", "mlp_proj"), Muon(lr=0.03, decay=0.02)),
    Group("qkvo", ("qkvo",), Muon(lr=0.03, decay=0.01)),
    Group("lm_head", ("lm_head",), AdamW(lr=1 / 320)),
    Group("scalars", ("skip_weights", "block_lambdas", "attn_lambdas", "smear_lambda", "backout_lambdas"),
          AdamW(lr=0.015)),
    Group("embeds", ("embeds",), AdamW(lr=0.3)),
)

# ----------------------------------------------------------------------------------------------------------------------
# Presets

# For a CPU, on bytes. fp32: a CPU without AVX-512 multiplies bf16 matrices ten times slower.
ON_CPU = partial(Config, data_dir="data/text", shard_prefix="text", vocab_size=257, doc_token=256, seq_len=512,
                 num_heads=4, head_dim=32, dtype=torch.float32, max_window=4 * 128, snoo=Snoo(every=14),
                 val_tokens=2**14, val_seq_len=2**11, needs_gpu=False, kernel_warmup_steps=1,
                 coordinate_descent_tuning=False)

PRESETS = {  # made and checked when they are chosen
    "medium": Config,
    "baseline": partial(Config, preset="baseline", smear_mtp=False, num_iterations=5550),  # the previous record
    "short": partial(Config, preset="short", num_iterations=300, val_tokens=2**20, val_seq_len=2**17, val_every=50,
                     coordinate_descent_tuning=False),
    "tiny": partial(ON_CPU, preset="tiny", num_iterations=64, momentum_warmup_steps=16, val_every=16),
    # One window change, in the middle. That the rates suit this width was tried: records/experiments.
    "small": partial(ON_CPU, preset="small", layers=LAYERS[:4] + LAYERS[-4:], backout_from=5, num_heads=2,
                     stages=(Stage(until=0.5, num_slices=2, window=256), Stage(num_slices=2, window=512)),
                     num_iterations=240, momentum_warmup_steps=60, val_tokens=2**13, val_every=24),
}


# ======================================================================================================================
# Part 2: the machine
# ======================================================================================================================
# All that it takes from a recipe, this file's or one that imports this file:
#   Run    the constants. A recipe derives its own class, which adds constants of its own, and overrides make_model()
#          and model_inputs(step): numbers by name, passed to the model as zero-dim tensors, and written to the log;
#          step_fields(step) writes further ones there, next_batch says which tokens a batch is made of.
#   Stage  a row of Run.stages: `until`, `num_slices` and `seq_len`; further columns are the recipe's.
#   Group  a row of Run.groups: a name, roles, `every`, and a rule that updates the parameters of these roles:
#            unit_dims: how many trailing dimensions ranks never divide; compiles: is update compiled on a GPU?
#            hyperparameters(step, config): numbers by name, passed to update as zero-dim fp64 tensors on the CPU
#            new_state(p): the states of this rank's shard p [n, *unit], tensors by name
#            update(params, grads, states, **hyperparameters): in place, on the shards of the group's banks
#   Snoo   Run.snoo: every, new_state(p), update(params, states); None for a recipe without an outer optimizer.
#   Model  what make_model() returns: model(ids, targets, **model_inputs) gives the mean loss and, under no_grad,
#          validation's; config, its Run; compiled_alone, names of methods and module lists; report(), see GPT.

class World(NamedTuple):
    """This process among the ranks of the run."""
    rank: int
    size: int
    device: torch.device


class UserError(Exception):
    """Something the user can put right: shown as one sentence, without a traceback."""


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: what torch.compile cannot fuse by itself. Each is a custom operation: a Triton kernel on a GPU, plain torch
# elsewhere. The autograd Function around it says what is kept for the backward pass.

HOPPER_SHARED_BYTES = 227 * 1024  # of a multiprocessor for one program; an A100 has 163 KiB, graphics cards 99
kernel = triton.jit if triton else lambda function: function


def runs_kernels(x: Tensor, shared_bytes: int = 0) -> bool:
    """Whether kernels whose tiles take so much shared memory run on x. Not on fp32: Triton would multiply in tf32."""
    if triton is None or not x.is_cuda or x.dtype == torch.float32:
        return False
    return shared_bytes <= torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin


def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@kernel
def cross_entropy_kernel(logits, targets, losses, num_rows, num_columns, softcap, grad_scale,
                         WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        z_row = logits + tl.cast(row, tl.int64) * num_columns
        target = tl.load(targets + row)
        z_target = tl.load(z_row + target).to(tl.float32)  # first: later, another warp may have overwritten it
        exp_sum = tl.full([BLOCK], 0.0, tl.float32)
        for start in tl.range(0, num_columns, BLOCK, num_stages=4):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(z_row + column, mask=column < num_columns, other=0.0).to(tl.float32)
            capped = z * softcap * tl.rsqrt(z * z + softcap * softcap)
            # No logit exceeds softcap, so the exponentials need no maximum to be subtracted.
            exp_sum += tl.where(column < num_columns, tl.exp(capped - softcap), 0.0)
        log_sum = tl.log(tl.sum(exp_sum, 0)) + softcap
        tl.store(losses + row, log_sum - z_target * softcap * tl.rsqrt(z_target * z_target + softcap * softcap))
        if WITH_GRAD:
            for start in tl.range(0, num_columns, BLOCK, num_stages=4):
                column = start + tl.arange(0, BLOCK)
                zs = tl.load(z_row + column, mask=column < num_columns, other=0.0).to(tl.float32)
                slope = softcap * tl.rsqrt(zs * zs + softcap * softcap)  # cube root of d(capped) / dz
                excess = tl.exp(zs * slope - log_sum) - tl.where(column == target, 1.0, 0.0)
                grad = excess * slope * slope * slope * grad_scale
                tl.store(z_row + column, grad.to(logits.dtype.element_ty), mask=column < num_columns)


@torch.library.custom_op("smear_mtp::cross_entropy", mutates_args=("logits",))
def cross_entropy(logits: Tensor, targets: Tensor, softcap: float, with_grad: bool) -> Tensor:
    """Softcapped cross-entropy of logits [T, V], not yet capped, and targets [T]: losses [T] in nats, fp32.

    with_grad: the logits are overwritten by the gradient of the mean loss. They are read from memory once: so few
    programs run, each on one row (100 KB), that these are still in the L2 cache for the second loop.
    """
    assert logits.is_contiguous()
    if runs_kernels(logits):
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        num_programs = min(len(logits), 2 * num_multiprocessors(logits.device))
        cross_entropy_kernel[(num_programs,)](logits, targets, losses, *logits.shape, softcap, 1 / len(logits),
                                              WITH_GRAD=with_grad, BLOCK=4096, num_warps=16, maxnreg=64)
        return losses
    z = logits.float()
    slope = softcap * torch.rsqrt(z.square() + softcap ** 2)
    log_p = (z * slope).log_softmax(-1)
    if with_grad:
        excess = log_p.exp() - F.one_hot(targets, logits.size(1))
        logits.copy_(excess * slope ** 3 / len(logits))
    return -log_p.gather(1, targets[:, None])[:, 0]


cross_entropy.register_fake(lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32))


class HeadLoss(torch.autograd.Function):
    """fused_head_loss in training: forward computes both gradients, and frees the logits, the largest tensor of all."""
    @staticmethod
    def forward(ctx, latents: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        logits = latents @ head.mT
        losses = cross_entropy(logits, targets, softcap, True)
        ctx.save_for_backward(logits @ head, logits.mT @ latents)
        return losses.mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        latents_grad, head_grad = ctx.saved_tensors
        return latents_grad * grad, head_grad * grad, None, None


def fused_head_loss(latents: Tensor, head: Tensor, targets: Tensor, softcap: float, chunks: int) -> Tensor:
    """Mean softcapped cross-entropy of latents [T, C] under the head [V, C]; without gradients, in chunks of the T."""
    if torch.is_grad_enabled():
        return HeadLoss.apply(latents, head, targets, softcap)
    return torch.cat([cross_entropy(y @ head.mT, t, softcap, False)
                      for y, t in zip(latents.chunk(chunks), targets.chunk(chunks))]).mean()


@kernel
def mlp_gemm_kernel(a_desc, b_desc, post_desc, out_desc, M, N, K, BACKWARD: tl.constexpr, B_BY_COLUMNS: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        # GROUP_M tiles below each other run at once, so that their columns of b are read from the L2 cache.
        group = tile // (GROUP_M * num_n)
        group_m = min(num_m - group * GROUP_M, GROUP_M)
        m = (group * GROUP_M + tile % (GROUP_M * num_n) % group_m) * BLOCK_M
        n = (tile % (GROUP_M * num_n) // group_m) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            b = b_desc.load([n, k]).T if B_BY_COLUMNS else b_desc.load([k, n])
            acc = tl.dot(a_desc.load([m, k]), b, acc)
        # Stored in halves: a whole tile of output would take the pipeline's shared memory.
        halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            x, column = halves[half], n + half * (BLOCK_N // 2)
            if BACKWARD:
                x *= 2 * tl.sqrt(post_desc.load([m, column]).to(tl.float32))
            else:
                x = tl.maximum(x, 0.0)
                x *= x
            out_desc.store([m, column], x.to(out_desc.dtype))


def launch_mlp_gemm(a: Tensor, b: Tensor, post: Tensor | None) -> Tensor:
    """relu(a b)^2 without post, 2 sqrt(post) (a b) with it: [M, K] and [K, N], stored either way -> [M, N]."""
    by_columns = not b.is_contiguous()
    assert a.is_contiguous() and (b.mT if by_columns else b).is_contiguous()
    (M, K), N = a.shape, b.size(1)
    out = torch.empty(M, N, dtype=a.dtype, device=a.device)
    BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
    in_blocks = TensorDescriptor.from_tensor
    out_desc = in_blocks(out, [BLOCK_M, BLOCK_N // 2])
    mlp_gemm_kernel[(min(num_multiprocessors(a.device), triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)),)](
        in_blocks(a, [BLOCK_M, BLOCK_K]),
        in_blocks(b.mT, [BLOCK_N, BLOCK_K]) if by_columns else in_blocks(b, [BLOCK_K, BLOCK_N]),
        out_desc if post is None else in_blocks(post, [BLOCK_M, BLOCK_N // 2]), out_desc, M, N, K,
        BACKWARD=post is not None, B_BY_COLUMNS=by_columns, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        GROUP_M=8, num_warps=8, num_stages=4 if post is None else 3)
    return out


@torch.library.custom_op("smear_mtp::mlp_up", mutates_args=())
def mlp_up(x: Tensor, fc: Tensor) -> Tensor:
    """relu(x fcT)^2: x [T, C], fc [hidden, C] -> [T, hidden], in one kernel [@andrewbriand, modded-nanogpt]."""
    if runs_kernels(x, HOPPER_SHARED_BYTES):
        return launch_mlp_gemm(x, fc.mT, None)
    return F.relu(F.linear(x, fc)).square()


mlp_up.register_fake(lambda x, fc: x.new_empty(len(x), len(fc)))


@torch.library.custom_op("smear_mtp::mlp_down_grad", mutates_args=())
def mlp_down_grad(dy: Tensor, proj: Tensor, post: Tensor) -> Tensor:
    """Gradient before relu^2: 2 sqrt(post) (dy proj). dy [T, C], proj [C, hidden], post [T, hidden] -> [T, hidden]."""
    # The square's derivative is 2 relu(h), and relu(h) = sqrt(post) has half of post's rounding error.
    if runs_kernels(dy, HOPPER_SHARED_BYTES):
        return launch_mlp_gemm(dy, proj, post)
    return ((dy @ proj).float() * 2 * post.float().sqrt()).to(dy.dtype)


mlp_down_grad.register_fake(lambda dy, proj, post: torch.empty_like(post))


class ReluSquaredMLP(torch.autograd.Function):
    """proj(relu(fc(x))^2). Of the hidden layer, only post = relu()^2 is kept for the backward pass.

    x [T, C], fc [hidden, C], proj [C, hidden], which may be the transpose of what is stored.
    """
    @staticmethod
    def forward(ctx, x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
        post = mlp_up(x, fc)
        ctx.save_for_backward(x, fc, proj, post)
        return F.linear(post, proj)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, fc, proj, post = ctx.saved_tensors
        dh = mlp_down_grad(dy, proj, post)
        # Laid out as the parameter is.
        return dh @ fc, dh.mT @ x, dy.mT @ post if proj.is_contiguous() else (post.mT @ dy).mT


@kernel
def embedding_grad_kernel(grads, order, starts, out, num_tokens, vocab_size, num_channels,
                          ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row, table = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.full([CHANNELS], 0.0, tl.float32)
    for start in range(first, last, ROWS):
        position = start + tl.arange(0, ROWS)
        token = tl.load(order + position, mask=position < last, other=0) + table.to(tl.int64) * num_tokens
        inside = (position < last)[:, None] & (channel < num_channels)[None, :]
        grad = tl.load(grads + token[:, None] * num_channels + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(grad.to(tl.float32), 0)
    out_row = out + (table.to(tl.int64) * vocab_size + row) * num_channels
    tl.store(out_row + channel, total.to(out.dtype.element_ty), mask=channel < num_channels)


@torch.library.custom_op("smear_mtp::embedding_grad", mutates_args=())
def embedding_grad(grads: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """Gradient of n tables looked up at the same ids: [n, T, C], [T] -> [n, V, C], summed in fp32, rounded once.

    The tokens are sorted once; a program sums the rows of one id in one table. torch would fill a fp32 table with
    zeros, add to it atomically and cast it: four times the traffic, and not deterministic.
    """
    num_tables, T, C = grads.shape
    if not runs_kernels(grads):
        out = torch.zeros(num_tables, vocab_size, C, dtype=torch.float32, device=grads.device)
        return out.index_add_(1, ids, grads.float()).to(grads.dtype)
    ids, order = ids.sort()
    starts = torch.searchsorted(ids, torch.arange(vocab_size + 1, dtype=ids.dtype, device=ids.device))
    out = torch.empty(num_tables, vocab_size, C, dtype=grads.dtype, device=grads.device)
    embedding_grad_kernel[(vocab_size, num_tables)](grads, order, starts, out, T, vocab_size, C, ROWS=16,
                                                    CHANNELS=triton.next_power_of_2(C), num_warps=8)
    return out


embedding_grad.register_fake(lambda grads, ids, vocab_size: grads.new_empty(len(grads), vocab_size, grads.size(2)))


@kernel
def symmetric_product_kernel(x_desc, x_tiles, out_tiles, num_rows, K, scale, x_scale, ADD_X: tl.constexpr,
                             BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, matrix = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK, tl.program_id(2) * num_rows
    if n <= m:
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x_desc.load([matrix + m, k]), x_desc.load([matrix + n, k]).T, acc)
        acc *= scale
        if ADD_X:
            acc += x_scale * x_tiles.load([matrix + m, n]).to(tl.float32)
        tile = acc.to(out_tiles.dtype)
        out_tiles.store([matrix + m, n], tile)
        if n < m:
            out_tiles.store([matrix + n, m], tile.T)


@torch.library.custom_op("smear_mtp::symmetric_product", mutates_args=())
def symmetric_product(x: Tensor, scale: float, x_scale: float) -> Tensor:
    """[n, rows, K] -> [n, rows, rows]: scale x xT; with x_scale, for a symmetric x, scale x x + x_scale x.

    Tiles on and below the diagonal, 36 of 64 for 1024 rows, are computed and mirrored [@byronxu99, modded-nanogpt].
    """
    n, num_rows, K = x.shape
    BLOCK, BLOCK_K = 128, 64
    if not runs_kernels(x, HOPPER_SHARED_BYTES) or num_rows % BLOCK or K % BLOCK_K:
        return (scale * x) @ x + x_scale * x if x_scale else (scale * x) @ x.mT
    assert x.is_contiguous()
    in_blocks = TensorDescriptor.from_tensor
    out = x.new_empty(n, num_rows, num_rows)
    x_flat, out_flat = x.view(-1, K), out.view(-1, num_rows)
    symmetric_product_kernel[(num_rows // BLOCK, num_rows // BLOCK, n)](
        in_blocks(x_flat, [BLOCK, BLOCK_K]), in_blocks(x_flat, [BLOCK, BLOCK]), in_blocks(out_flat, [BLOCK, BLOCK]),
        num_rows, K, scale, x_scale, ADD_X=x_scale != 0, BLOCK=BLOCK, BLOCK_K=BLOCK_K, num_warps=8, num_stages=4)
    return out


symmetric_product.register_fake(lambda x, *_: x.new_empty(x.size(0), x.size(1), x.size(1)))


class Embed(torch.autograd.Function):
    """Rows of tables at ids [T]: of tensors [n, V, C] of such tables, n tensors [T, C] each."""
    @staticmethod
    def forward(ctx, ids: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(ids)
        ctx.vocab_size, ctx.num_tables = tables[0].size(1), [len(n_tables) for n_tables in tables]
        return tuple(F.embedding(ids, table) for n_tables in tables for table in n_tables)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, = ctx.saved_tensors
        # One call sorts the ids once.
        return None, *embedding_grad(torch.stack(grads), ids, ctx.vocab_size).split(ctx.num_tables)


def look_up(ids: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """Embed, and without gradients as plain torch: torch.compile loses ctx of a Function of any number of tensors."""
    if torch.is_grad_enabled():
        return Embed.apply(ids, *tables)
    return tuple(F.embedding(ids, table) for n_tables in tables for table in n_tables)


# ----------------------------------------------------------------------------------------------------------------------
# Attention: documents and sliding windows in blocks

BLOCK_SIZE = 128  # tokens; FlexAttention's own block


def block_lists(num_visible_B: Tensor, num_full_B: Tensor, direction: int, w: Tensor) -> tuple[Tensor, ...]:
    """BlockMask's num_blocks [B], indices [B, B], full_num_blocks and full_indices for a window w.

    The blocks that a block sees lie side by side: itself, partial; then the full ones; then the other partial ones.
    direction: -1 for the keys of a query block, 1 for the queries of a key block. Indices past num_blocks are not read.
    """
    block = torch.arange(len(num_visible_B), device=w.device, dtype=torch.int32)
    num_partial_B = torch.minimum(num_visible_B - num_full_B, (w - num_full_B).clamp_min(1))
    # At distance 0, and then, beyond the full ones, from num_full + 1 on.
    partial_BB = block[:, None] + direction * (block + torch.where(block > 0, num_full_B[:, None], 0))
    full_BB = block[:, None] + direction * (block + 1)
    return (num_partial_B, partial_BB.clamp(0, len(block) - 1),
            torch.minimum(num_full_B, (w - 1).clamp_min(0)), full_BB.clamp(0, len(block) - 1))


def block_masks(ids_T: Tensor, windows: tuple[Tensor, ...], doc_token: int, exact: bool = False
                ) -> tuple[BlockMask, ...]:
    """Causal attention within documents, cut to the nearest blocks or tokens: a mask for each window w.

    ids_T: integer ids, T a multiple of 128. windows: in blocks, zero-dim int32 tensors, so that a growing window does
    not recompile. A query block keeps its nearest w - 1 full and max(w - full, 1) partial blocks. Full: both blocks lie
    in one document, every pair attends. Partial: q >= k and the same document are tested token by token.
    exact: windows are in tokens, and a token sees itself and w before it; in partial blocks that is tested, too.
    The scheme of windows in blocks is from [@KoszarskyB and @YouJiacheng, modded-nanogpt].
    """
    T = len(ids_T)
    token = torch.arange(T, device=ids_T.device, dtype=torch.int32)
    block, after = token[:T // BLOCK_SIZE], token[::BLOCK_SIZE] + BLOCK_SIZE  # first token after a block
    doc_start_T = torch.where(ids_T == doc_token, token, 0).cummax(0).values
    start_B = doc_start_T[::BLOCK_SIZE]  # where the document of a block's first token starts
    inside_B = doc_start_T[BLOCK_SIZE - 1::BLOCK_SIZE] <= token[::BLOCK_SIZE]  # one document in the whole block
    # Where the document of a block's last token ends: at the first start in a later block, or at T.
    first_B = torch.where(ids_T == doc_token, token, T).view(-1, BLOCK_SIZE).amin(1)
    end_B = F.pad(first_B.flip(0).cummin(0).values.flip(0)[1:], (0, 1), value=T)
    keys = block + 1 - start_B // BLOCK_SIZE, torch.where(inside_B, block - (start_B + BLOCK_SIZE - 1) // BLOCK_SIZE, 0)
    queries = (end_B - 1) // BLOCK_SIZE + 1 - block, torch.where(inside_B, (end_B - after) // BLOCK_SIZE, 0)

    def in_document(b, h, q, k):
        return (q >= k) & (k >= doc_start_T[q])

    def mask(w: Tensor) -> BlockMask:
        (key_B, full_key_B), (query_B, full_query_B), num_blocks, mask_mod = keys, queries, w, in_document
        if exact:  # tokens of two blocks at distance d are 128 d - 127 to 128 d + 127 apart
            mask_mod = lambda b, h, q, k: in_document(b, h, q, k) & (q - k <= w)  # noqa: E731
            most = ((w + 1) // BLOCK_SIZE - 1).clamp_min(0)
            full_key_B, full_query_B = full_key_B.minimum(most), full_query_B.minimum(most)
            num_blocks = (w + BLOCK_SIZE - 1) // BLOCK_SIZE + 1
        lists = *block_lists(key_B, full_key_B, -1, num_blocks), *block_lists(query_B, full_query_B, 1, num_blocks)
        return BlockMask((T, T), *(x[None, None] for x in lists), BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
                         mask_mod=mask_mod)

    return tuple(mask(w) for w in windows)


def dense_mask(block_mask: BlockMask) -> Tensor:
    """The pairs that `block_mask` lets attend, [T, T] bool: for a CPU, where FlexAttention has no backward."""
    visible_BB = block_mask.to_dense()[0, 0].bool()
    position = torch.arange(len(visible_BB) * BLOCK_SIZE, device=visible_BB.device)
    # In a full block mask_mod is true for every pair.
    return (visible_BB.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)
            & block_mask.mask_mod(0, 0, position[:, None], position))


def attention_masks(ids_T: Tensor, windows: tuple[Tensor, ...], doc_token: int, exact: bool = False
                    ) -> tuple[BlockMask | Tensor, ...]:
    """`block_masks`, dense on a CPU."""
    masks = block_masks(ids_T, windows, doc_token, exact)
    return masks if ids_T.is_cuda else tuple(dense_mask(mask) for mask in masks)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor, scale: float, kernel_options: dict) -> Tensor:
    """Softmax attention, [1, T, H, D] -> [1, T, H, D]. k and v may have fewer heads: each then serves several of q's.

    A BlockMask goes to FlexAttention, which must be compiled (eager, it ignores block lists), a dense one to torch's.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=kernel_options)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Updates: arithmetic of the rules, then banks and shards

def newton_schulz(x: Tensor, coefficients: Iterable[tuple[float, float, float]], first_norm: float = 1.0,
                  eps: float = 1e-7) -> Tensor:
    """Orthogonalise [n, rows <= cols] nearly, in x's dtype. coefficients a, b, c of X <- aX + (bA + cA^2)X, A = XXT.

    first_norm: Frobenius norm of the first X, at most 1 for the iteration to converge.
    """
    x = x / (x.norm(dim=(-2, -1), keepdim=True) / first_norm + eps)
    for a, b, c in coefficients:
        A = symmetric_product(x, 1.0, 0.0)
        x = a * x + symmetric_product(A, c, b) @ x
    return x


def read_weights(p: Tensor, mantissa: Tensor) -> Tensor:
    """Weights in fp32: of a bf16 parameter, the upper 16 bits, and its mantissa (int16), the lower 16."""
    if p.dtype == torch.float32:
        return p
    # int32 arithmetic runs on a CPU too; uint32 shifts do not.
    return ((p.view(torch.int16).int() << 16) | (mantissa.int() & 0xFFFF)).view(torch.float32)


def write_weights(p: Tensor, mantissa: Tensor, w: Tensor) -> None:
    """The inverse of read_weights, in place. The upper bits are truncated, not rounded."""
    if p.dtype == torch.float32:
        p.copy_(w)
    else:
        bits = w.view(torch.int32)
        p.copy_((bits >> 16).short().view(torch.bfloat16))
        mantissa.copy_(bits.short())


def average_ranks(parts: Tensor) -> Tensor:
    """Mean over ranks [world_size, n] -> [n], summed in fp32 and rounded once to the gradients' dtype."""
    sums = parts.float()  # by pairs, so that equal gradients of 2, 4, 8, ... ranks average to themselves
    while len(sums) > 1:
        pairs = sums[0:-1:2] + sums[1::2]
        sums = pairs if len(sums) % 2 == 0 else torch.cat((pairs, sums[-1:]))
    return (sums[0] / len(parts)).to(parts.dtype)


class Bank:
    """Parameters of one rule and one unit, end to end in one buffer that divides evenly among the ranks.

    unit: what one rank updates as a whole: a matrix, or 128 numbers of an elementwise rule, without which a CPU's
    vectors would round the last ones of a share in another way. The parameters become views of the buffer, which zeros
    pad to a multiple of world.size units. `shard` [n, *unit] is this rank's share, whose states it alone holds; grads,
    its averaged gradients; grad_square, their sum of squares in fp32 (of the last update, where a group does not update
    at every step): not finite where one of them is not.
    """
    def __init__(self, params: list[nn.Parameter], unit: tuple[int, ...], world: World, average: Callable):
        self.params, self.world, self.average = params, world, average
        self.padding = -sum(p.numel() for p in params) % (math.prod(unit) * world.size)
        self.buffer = self._end_to_end([p.data for p in params])
        for p, part in zip(params, self.buffer[:len(self.buffer) - self.padding].split([p.numel() for p in params])):
            p.data = part.view_as(p)
        self.shard = self.buffer.view(world.size, -1, *unit)[world.rank]
        self.state: dict[str, Tensor] = {}  # of the rule and of Snoo
        self.grad_square = torch.zeros((), device=self.buffer.device)

    def _end_to_end(self, tensors: list[Tensor]) -> Tensor:
        parts = [x.flatten() for x in tensors]
        if self.padding:
            parts.append(parts[0].new_zeros(self.padding))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def send_grads(self) -> None:
        """Send every rank its share of the gradients, and drop them."""
        grads = self._end_to_end([p.grad for p in self.params])
        for p in self.params:
            p.grad = None
        if self.world.size == 1:
            self.received = grads
        else:
            self.received = torch.empty_like(grads)
            self.work = dist.all_to_all_single(self.received, grads, async_op=True)

    def average_grads(self) -> None:
        """Average this rank's share of the gradients over the ranks, once they have arrived."""
        self.wait()
        received, self.received = self.received, None
        if self.world.size > 1:
            received = self.average(received.view(self.world.size, -1))
        self.grads = received.view_as(self.shard)
        # By rows first: a CPU would add all numbers up one after the other. Without a copy in fp32.
        self.grad_square = torch.linalg.vector_norm(self.grads, dim=-1, dtype=torch.float32).square().sum()

    def send_params(self) -> None:
        """Send this rank's updated parameters to all."""
        if self.world.size > 1:
            # torch 2.13's name, or the older one's
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            self.work = gather(self.buffer, self.shard.flatten(), async_op=True)

    def wait(self) -> None:
        """Wait for the last collective."""
        if self.world.size > 1:
            self.work.wait()
            self.work = None  # it holds what was sent


class Optimizer:
    """All updates: gradients averaged over the ranks, each group's rule, then Snoo. Each rank updates its own shards.

    The last part of a parameter's name is its role, which selects its group. A group has a bank a unit and dtype. A
    step has three phases on every rank; on one rank nothing is sent.
    1. All banks' gradients are sent to the ranks that own them, at once, in the order of the groups.
    2. As they arrive, in the same order, a group's shards are updated and sent to all: updates overlap with the
       gradients still arriving and the parameters being sent. With clip_norm, all gradients are awaited before the
       first update, and one more collective of 4 bytes adds up their squares.
    3. The parameters that arrive last are waited for.
    A group with `every` n takes part in every n-th step only; until then its gradients add up where they are.
    One collective for each bank and direction: `python records/tools/bench/plan.py` prints order, bytes and padding.
    Gradients are exchanged all-to-all and averaged by their owner: the traffic of a reduce-scatter, but rounded once,
    and identical whatever algorithm the library picks.
    """
    def __init__(self, model: nn.Module, config: Run, world: World, compiled: Callable = lambda function: function):
        """compiled: torch.compile on a GPU, the identity on a CPU."""
        self.config, self.snoo, self.params = config, config.snoo, list(model.parameters())
        by_role: dict[str, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            by_role.setdefault(name.split(".")[-1], []).append(p)
        unknown = by_role.keys() - {role for group in config.groups for role in group.roles}
        if unknown:
            raise UserError(f"no group has the role {min(unknown)}: add it to a row of GROUPS.")
        self.groups: list[tuple[Group, Callable[..., None], list[Bank]]] = []
        average = compiled(average_ranks)
        self.banks: dict[str, Bank] = {}  # in the order of sending
        for group in config.groups:
            rule = group.rule
            alike: dict[tuple, dict[str, list[nn.Parameter]]] = {}  # by unit and dtype, then by role
            for role, p in ((role, p) for role in group.roles for p in by_role.get(role, [])):
                unit = tuple(p.shape[-rule.unit_dims:]) if rule.unit_dims else (128,)
                alike.setdefault((unit, p.dtype), {}).setdefault(role, []).append(p)
            banks = []
            for (unit, _), params in alike.items():
                # A group's only bank has its name, otherwise the names of its roles; a number where that is taken.
                name = group.name if len(alike) == 1 else "_".join(params)
                name = f"{name}_{len(self.banks)}" if name in self.banks else name
                self.banks[name] = Bank([*chain(*params.values())], unit, world, average)
                banks.append(self.banks[name])
            if banks:
                self.groups.append((group, compiled(rule.update) if rule.compiles else rule.update, banks))
        self.reset_states()

    @torch.no_grad()
    def reset_states(self) -> None:
        """All states as before the first step, for the parameters as they are."""
        for group, _, banks in self.groups:
            for bank in banks:
                bank.state = {}  # the old tensors are freed before new ones are made
                bank.state = group.rule.new_state(bank.shard) | (self.snoo.new_state(bank.shard) if self.snoo else {})

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update the groups due at step number `step` (from 0) from their gradients, and drop these."""
        due = [row for row in self.groups if (step + 1) % row[0].every == 0]
        sent = [bank for *_, banks in due for bank in banks]
        for bank in sent:
            bank.send_grads()
        if self.config.clip_norm is not None:
            self._clip_grads(sent, self.config.clip_norm)
        for group, update, banks in due:
            hyperparameters = {name: torch.tensor(value, dtype=torch.float64)  # tensors: schedules do not recompile
                               for name, value in group.rule.hyperparameters(step, self.config).items()}
            shards, states = [bank.shard for bank in banks], [bank.state for bank in banks]
            if self.config.clip_norm is None:
                for bank in banks:
                    bank.average_grads()
            update(shards, [bank.grads for bank in banks], states, **hyperparameters)
            for bank in banks:
                bank.grads = None
            if self.snoo and step % self.snoo.every == 0:
                self.snoo.update(shards, states)
            for bank in banks:
                bank.send_params()
        for bank in sent:
            bank.wait()

    def _clip_grads(self, banks: list[Bank], max_norm: float) -> None:
        """Average these banks' gradients and scale them, where needed, to a norm of max_norm over all and all ranks."""
        for bank in banks:
            bank.average_grads()
        square = torch.stack([bank.grad_square for bank in banks]).sum()
        if bank.world.size > 1:
            dist.all_reduce(square)
        scale = (max_norm / square.sqrt()).clamp(max=1)
        for bank in banks:
            bank.grads.mul_(scale)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """This rank's states by bank, not copied."""
        return {name: bank.state for name, bank in self.banks.items()}

    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        for name, bank in self.banks.items():
            for key, tensor in bank.state.items():
                tensor.copy_(saved[name][key])


# ----------------------------------------------------------------------------------------------------------------------
# Data: shards of 256 little-endian int32 (the header), then uint16 token ids

HEADER_BYTES = 256 * 4


class Shard(NamedTuple):
    path: Path
    num_tokens: int

    def read(self, start: int, count: int, vocab_size: int) -> Tensor:
        """`count` tokens from `start` on, int32. Raises UserError if they are gone or not the model's ids."""
        try:
            tokens = np.fromfile(self.path, dtype="<u2", count=count, offset=HEADER_BYTES + 2 * start)
        except OSError as error:
            raise UserError(f"{self.path} is gone ({error.strerror}): fetch or make it again.") from error
        if len(tokens) < count:
            raise UserError(f"{self.path} ends after {start + len(tokens):,} tokens: fetch or make it again.")
        if tokens.max() >= vocab_size:
            raise UserError(f"{self.path} holds id {tokens.max()}, outside the vocabulary of {vocab_size}: replace it.")
        return torch.from_numpy(tokens.astype(np.int32))


def open_shard(path: Path, config: Run) -> Shard:
    """Check a shard's header and size against the format and the model's vocabulary. Raises UserError."""
    try:
        header = np.fromfile(path, dtype="<i4", count=256)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): put a shard there.") from error
    if len(header) < 256 or [*header[:2]] != [20240520, 1]:  # magic number and version
        raise UserError(f"{path} is not a version 1 token shard: fetch or make it again.")
    num_tokens, vocab_size, doc_token = int(header[2]), int(header[3]) or 50257, int(header[4]) or 50256
    if num_tokens < 1 or size != HEADER_BYTES + 2 * num_tokens:
        raise UserError(f"{path} is damaged: {size:,} bytes are not {num_tokens:,} tokens: fetch or make it again.")
    if (vocab_size, doc_token) != (config.vocab_size, config.doc_token):
        raise UserError(f"{path} holds ids of a vocabulary of {vocab_size} with document id {doc_token}, preset "
                        f"{config.preset} needs {config.vocab_size} and {config.doc_token}: use other shards.")
    # Nothing vouches for an empty field, and so many tokens are more than one document.
    many = 2**22
    if not header[4] and num_tokens > many and doc_token not in np.fromfile(path, "<u2", many, offset=HEADER_BYTES):
        raise UserError(f"{path} begins with {many:,} tokens and no document id {doc_token}: another tokenizer made "
                        f"it: use other shards.")
    return Shard(path, num_tokens)


def consecutive_pieces(shard: Shard, position: int, num_pieces: int, piece_len: int
                       ) -> tuple[list[list[range]], int] | None:
    """Ranges of a shard's tokens, a list of them for each piece, and the position after; see Run.next_batch.

    position: 0 in a new shard, then what the last call returned. A piece has one token more than its length, its last
    target. None where the rest of the shard is too short.
    """
    end = position + num_pieces * piece_len
    if end >= shard.num_tokens:
        return None
    return [[range(start, start + piece_len + 1)] for start in range(position, end, piece_len)], end


def batch_places(shards: Iterable[Shard], config: Run) -> Iterator[tuple[Shard, list[list[range]]]]:
    """Where each step's batch lies: its shard, and the ranges of tokens there that make its pieces, by next_batch.

    A shard's tail that is too short for the next batch is dropped. Raises UserError where the shards end before the
    schedule does, or one is shorter than a batch.
    """
    remaining = cycle(shards) if config.repeat_shards else iter(shards)
    shard, position = None, 0
    for step in range(config.num_iterations):
        batch = config.next_batch(shard, position, step) if shard else None
        if batch is None:
            previous, shard = shard, next(remaining, None)
            if shard is None:
                raise UserError(f"training data ended with {previous.path}: the schedule needs more shards.")
            batch = config.next_batch(shard, 0, step)
            if batch is None:
                tokens = config.batch_tokens(step) + 1
                raise UserError(f"{shard.path} is too short: a batch needs {tokens:,} tokens: use longer shards.")
        pieces, position = batch
        yield shard, pieces


def find_shards(config: Run) -> tuple[list[Shard], Shard]:
    """The training shards that the schedule consumes, in order, and the validation shard. Reads headers only.

    Raises UserError where one is missing, damaged or foreign, or where all of them are too few.
    """
    folder = Path(config.data_dir)
    prefixes = sorted({path.name.split("_train_")[0] for path in folder.glob("*_train_*.bin")})
    if len(prefixes) > 1:
        raise UserError(f"{folder} mixes shards of {' and '.join(prefixes)}: keep each kind in a folder of its own.")
    prefix, = prefixes or [config.shard_prefix]
    train_shards: list[Shard] = []

    def read_headers() -> Iterator[Shard]:
        while (path := folder / f"{prefix}_train_{len(train_shards) + 1:06d}.bin").exists():
            train_shards.append(open_shard(path, config))
            yield train_shards[-1]
        if config.repeat_shards and train_shards:
            return
        needed = shards_needed(config, train_shards)
        raise UserError(f"{path} is missing: {config.num_iterations:,} steps need {needed} training shards, up to "
                        f"{prefix}_train_{needed:06d}.bin (data/README.md says how to get or make them).")

    for _ in batch_places(read_headers(), config):
        pass
    val_shard = open_shard(folder / f"{prefix}_val_000000.bin", config)
    if val_shard.num_tokens <= config.val_tokens:
        raise UserError(f"{val_shard.path} is too short for {config.val_tokens + 1:,} tokens: fetch or make it again.")
    return train_shards, val_shard


def shards_needed(config: Run, known: list[Shard]) -> int:
    """How many training shards the schedule consumes, if those that follow `known` are as long as its last one."""
    length = known[-1].num_tokens if known else 100_000_000  # of a published one
    numbered = chain(known, (Shard(Path(f"shard {n}"), length) for n in count()))
    return len({shard for shard, _ in batch_places(numbered, config)})


def inputs_and_targets(pieces: Tensor) -> tuple[Tensor, Tensor]:
    """[n, T + 1] int32 tokens -> inputs [n, T] int32, targets [n, T] int64, shifted by one."""
    return pieces[:, :-1].contiguous(), pieces[:, 1:].long()


def split_pieces(tokens: Tensor, piece_len: int) -> tuple[Tensor, Tensor]:
    """[n * piece_len + 1] consecutive tokens -> inputs and targets [n, piece_len]."""
    return inputs_and_targets(tokens.unfold(0, piece_len + 1, piece_len))


class TrainLoader:
    """This rank's pieces of the batch of every step: (inputs [n, T] int32, targets [n, T] int64).

    Rank r takes the r-th run of consecutive pieces. A thread reads ahead; its errors are raised when a batch is due.
    """
    def __init__(self, shards: list[Shard], config: Run, world: World, first_step: int = 0):
        self.config, self.world = config, world
        self.places = islice(batch_places(shards, config), first_step, None)
        self.pinned = world.device.type == "cuda"  # a fresh thread would pin memory in a context of GPU 0
        self.pool = ThreadPoolExecutor(1, initializer=torch.cuda.set_device if self.pinned else None,
                                       initargs=(world.device,) if self.pinned else ())
        self.pending = deque(self.pool.submit(self._read_batch) for _ in range(8))

    def __next__(self) -> tuple[Tensor, Tensor]:
        pieces = self.pending.popleft().result()
        self.pending.append(self.pool.submit(self._read_batch))
        return inputs_and_targets(pieces.to(self.world.device, non_blocking=True))

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _read_batch(self) -> Tensor:
        shard, pieces = next(self.places)
        share = len(pieces) // self.world.size
        mine = pieces[self.world.rank * share:(self.world.rank + 1) * share]
        tokens = torch.stack([torch.cat([shard.read(ids.start, len(ids), self.config.vocab_size) for ids in piece])
                              for piece in mine])
        return tokens.pin_memory() if self.pinned else tokens


# ----------------------------------------------------------------------------------------------------------------------
# The run: clock, log, steps, validation

class Clock:
    """Training time alone. Both switches wait for the GPU and for all ranks, if they change anything."""
    def __init__(self, world: World, seconds: float = 0.0):
        self.world, self.seconds, self.started = world, seconds, None

    def start(self) -> None:
        if self.started is None:
            self._wait_for_all()
            self.started = time.perf_counter()

    def stop(self) -> None:
        if self.started is not None:
            self._wait_for_all()
            self.seconds, self.started = self.read_seconds(), None

    def _wait_for_all(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        if self.world.size > 1:
            dist.barrier()

    def read_seconds(self) -> float:
        """Without waiting for the GPU, which may be some steps behind: exact only while stopped."""
        return self.seconds + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def fields(self, step: int) -> str:
        """The time of `step` steps and its mean, for a line of the log."""
        train_ms = 1000 * self.read_seconds()
        return f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError where `path` cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
        raise UserError(f"{path} cannot be written ({str(error).splitlines()[0]}; {free >> 20:,} MiB free): make room.")


class Log:
    """logs/<run id>.txt through one handle, written by rank 0 alone and flushed line by line."""
    def __init__(self, run_id: str, world: World):
        self.file, self.path = None, Path("logs") / f"{run_id}.txt"
        if world.rank == 0:
            with writing(self.path):
                self.path.parent.mkdir(exist_ok=True)
                self.file = open(self.path, "w", buffering=1)

    def __call__(self, text: str, console: bool = False) -> None:
        if self.file is not None:
            with writing(self.path):
                print(text, file=self.file)
            if console:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()


class Watch:
    """Every step's loss and gradient norms: logged, and a reason to stop where not finite. No step waits for them.

    The device keeps them for some steps. Every so many steps an all-reduce sums them over the ranks; its copy to the
    host is asynchronous and read at the next look, so that all ranks stop together. A line names its own step.
    """
    def __init__(self, banks: Iterable[str], config: Run, world: World, log: Callable[[str], None]):
        self.banks, self.config, self.world, self.log = list(banks), config, world, log
        self.noted = torch.zeros(config.watch_every, 1 + len(self.banks), device=world.device)
        self.steps: list[int] = []  # whose figures `noted` holds
        self.asked: list[int] = []  # whose sums over the ranks are in `answer`, once they have arrived
        self.answer = self.noted
        nothing = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        self.arrived = torch.cuda.Event() if world.device.type == "cuda" else nothing

    def note(self, step: int, loss: Tensor, grad_squares: list[Tensor]) -> None:
        """After `step` completed steps: this rank's mean loss, and each bank's sum over this rank's share."""
        self.noted[len(self.steps)] = torch.stack([loss / self.world.size, *grad_squares])
        self.steps.append(step)
        if step % self.config.watch_every == 0:
            self.read()
            self.ask()

    def ask(self) -> None:
        sums = self.noted[:len(self.steps)].clone()
        if self.world.size > 1 and self.steps:
            dist.all_reduce(sums)
        self.asked, self.steps = self.steps, []
        self.answer = sums.to("cpu", non_blocking=True)
        self.arrived.record()

    def read(self) -> None:
        """Log the last answer. Raises UserError, the same on all ranks, at the first step that is not finite."""
        self.arrived.synchronize()
        asked, self.asked = self.asked, []
        for step, (loss, *squares) in zip(asked, self.answer.tolist()):
            norms = {f"grad_norm_{name}": math.sqrt(square) for name, square in zip(self.banks, squares)}
            self.log(f"step:{step}/{self.config.num_iterations} {as_fields({'train_loss': loss} | norms)}")
            for cause, x in zip(("loss", *(f"{name} gradient" for name in self.banks)), (loss, *squares)):
                if not math.isfinite(x):
                    raise UserError(f"the {cause} of step {step} was not finite: lower the rates, check the data.")


def force_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def load_part(path: Path, mmap: bool = False) -> dict:
    """One rank's part of a checkpoint, on the CPU. Raises whatever zipfile, pickle and torch raise if it is torn."""
    if zipfile.ZipFile(path).testzip() is not None:  # torch.load does not compare the check sums
        raise zipfile.BadZipFile
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


class Checkpoints:
    """checkpoints/<run id>/step_000125/rank_3.pt: with the other ranks' files, all that resumes a run bit for bit.

    Each rank writes its shards of the parameters and their optimizer states, its random states, the completed steps,
    the clock and the seed, and what made the checkpoint: a run of another script, other constants, data or number of
    ranks refuses it. The newest two are kept. Ranks agree through gloo on the host, without waiting for a GPU.
    """
    def __init__(self, config: Run, source: str, shards: list[Shard], run_id: str, seed: int, world: World):
        self.config, self.seed, self.world, self.last = config, seed, world, None
        self.received = self.stopped_by = 0  # signals to stop: this rank's, any rank's
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.folder = Path("checkpoints") / self._gather(run_id)[0]
        self.made_by = {name: json.dumps(value, default=str) for name, value in asdict(config).items()}
        del self.made_by["data_dir"]  # the shards may have moved
        self.made_by |= {"number of ranks": world.size, "version of torch": str(torch.__version__),
                         "script": hashlib.sha256(source.strip().encode()).hexdigest(),
                         "set of shards": [(shard.path.name, shard.num_tokens) for shard in shards]}
        self.saved_at = time.monotonic()
        with self._agreed(), writing(self.folder):
            self.folder.parent.mkdir(exist_ok=True)

    def _gather(self, value) -> list:
        """The values of all ranks."""
        values = [value] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextlib.contextmanager
    def _agreed(self) -> Iterator[None]:
        """A UserError of one rank is raised on all."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        problems = [found for found in self._gather(problem) if found]
        if problems:
            raise UserError(problems[0])

    def _note(self, number: int, _) -> None:
        self.received = number

    @contextlib.contextmanager
    def signals_noted(self) -> Iterator[None]:
        """Signals to stop are kept, so that the run can end after the step in progress; SIGHUP is a lost ssh session's.

        A step that never ends, as one that waits for a dead rank, is torchrun's to kill, 30 s after its own signal.
        """
        numbers = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                   if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup sets it
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def due(self, step: int) -> bool:
        """Whether all ranks are to save after `step` steps. `stopped_by` is the signal that any received."""
        every, limit = self.config.checkpoint_every, 60 * self.config.checkpoint_minutes
        told = self._gather((self.received, 0 < limit <= time.monotonic() - self.saved_at))
        self.stopped_by = max(number for number, _ in told)
        asked = self.stopped_by > 0 or any(late for _, late in told) or (every > 0 and step % every == 0)
        return asked and step % self.config.update_every == 0  # a checkpoint holds no gradients

    def save(self, step: int, seconds: float, optimizer: Optimizer) -> None:
        """After `step` steps and `seconds` of training. Raises UserError on all ranks if one cannot write."""
        folder, name = self.folder / f"step_{step:06d}", f"rank_{self.world.rank}.pt"
        content = dict(made_by=self.made_by, step=step, seconds=seconds, seed=self.seed, rng=torch.get_rng_state(),
                       gpu_rng=torch.cuda.get_rng_state() if self.world.device.type == "cuda" else None,
                       shards={name: bank.shard.to("cpu", copy=True) for name, bank in optimizer.banks.items()},
                       optimizer=optimizer.state_dict())
        unfinished = folder / f"{name}.unfinished"
        try:
            with self._agreed(), writing(folder / name):
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(content, unfinished)
                force_to_disk(unfinished)
                os.replace(unfinished, folder / name)
                for renamed_in in (folder, self.folder, self.folder.parent):
                    force_to_disk(renamed_in)
        finally:
            unfinished.unlink(missing_ok=True)
        self.last, self.saved_at = folder, time.monotonic()
        for old in sorted(self.folder.glob("step_*"))[:-2]:
            (old / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other ranks' parts are still in it, or another rank was faster
                old.rmdir()

    def read(self, where: str) -> dict:
        """This rank's file of the checkpoint `where`, or of the newest one in the run's folder `where`.

        Raises UserError on all ranks where one's part is missing or torn, or was made with anything else than this run.
        """
        folder, name = Path(where), f"rank_{self.world.rank}.pt"
        if not folder.name.startswith("step_"):  # the last one that all ranks completed
            folder = min(self._gather(max((part.parent for part in folder.glob(f"step_*/{name}")), default=folder)))
        with self._agreed():
            saved = self._read_part(folder / name)
        self.last, self.seed = folder, saved["seed"]
        return saved

    def _read_part(self, path: Path) -> dict:
        try:
            saved = load_part(path)
            theirs = saved["made_by"]
            other = next((name for name, value in self.made_by.items() if theirs.get(name) != value), None)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): name a run or checkpoint with as many ranks.")
        except Exception as error:
            before = max((step for step in path.parent.parent.glob("step_*") if step < path.parent), default=None)
            way_out = f"RESUME_FROM={before} resumes from the one before it" if before else "none is before it"
            raise UserError(f"{path} is torn or damaged: {way_out}.") from error
        if other:
            values = [str(made_by.get(other)) for made_by in (theirs, self.made_by)]
            start = max(len(os.path.commonprefix(values)) - 20, 0)  # long values differ late
            raise UserError(f"{path} was made with another {other} ({values[0][start:start + 80]}, here "
                            f"{values[1][start:start + 80]}): resume with what made it (its log holds the script).")
        return saved

    def restore(self, saved: dict, optimizer: Optimizer) -> None:
        """Parameters, optimizer states and random states, as they were."""
        for name, bank in optimizer.banks.items():
            bank.shard.copy_(saved["shards"][name])
            bank.send_params()
            bank.wait()
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if saved["gpu_rng"] is not None:
            torch.cuda.set_rng_state(saved["gpu_rng"])


def inputs_at(step: int, config: Run, device: torch.device) -> dict[str, Tensor]:
    """The model's keyword arguments as tensors filled on the device: no number recompiles, and no copy is awaited."""
    return {name: torch.full((), value, dtype=torch.int32 if isinstance(value, int) else torch.float32, device=device)
            for name, value in config.model_inputs(step).items()}


def update_mean(mean: Tensor, grad: Tensor, n: int) -> None:
    """The fp32 mean of n - 1 gradients becomes that of n. A running mean of equal gradients equals them exactly."""
    # In chunks, so that a large gradient is never held in fp32 as a whole.
    for mean_chunk, grad_chunk in zip(mean.flatten().split(2 ** 24), grad.flatten().split(2 ** 24)):
        mean_chunk.lerp_(grad_chunk.float(), 1 / n)


def train_step(model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
    """One step on this rank's pieces [n, T]: gradients are averaged over them (in fp32) and ranks. Their mean loss."""
    model_inputs = inputs_at(step, model.config, inputs.device)
    earlier = {p: p.grad for p in optimizer.params if p.grad is not None}  # of steps without an update of its group
    for p in earlier:
        p.grad = None
    losses: list[Tensor] = []
    means = {p: torch.zeros_like(p, dtype=torch.float32) for p in optimizer.params if len(inputs) > 1}
    for n, (ids, target) in enumerate(zip(inputs, targets), start=1):
        loss = model(ids, target, **model_inputs)
        loss.backward()
        losses.append(loss.detach())
        for p, mean in means.items():
            update_mean(mean, p.grad, n)
            p.grad = None
    for p in list(means):
        p.grad = means.pop(p).to(p.dtype)  # popped, so that each mean is freed at once
    for p, grad in earlier.items():
        p.grad.add_(grad)
    optimizer.step(step)
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(model: nn.Module, shard: Shard, step: int, world: World) -> float:
    """Mean loss in nats over the first val_tokens targets after `step` steps, on all ranks. UserError if not finite."""
    config = model.config
    inputs, targets = split_pieces(shard.read(0, config.val_tokens + 1, config.vocab_size), config.val_piece_len)
    model_inputs = inputs_at(step, config, world.device)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for i in range(world.rank, len(inputs), world.size):
        total += model(inputs[i].to(world.device), targets[i].to(world.device), **model_inputs)
    if world.size > 1:
        dist.all_reduce(total)
    val_loss = total.item() / len(inputs)
    if not math.isfinite(val_loss):
        raise UserError(f"validation loss is {val_loss} after {step} steps: lower the learning rates, check the data.")
    return val_loss


def warm_up(model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Compile and run everything on random tokens, then put every parameter and every optimizer state back.

    Steps are spread over the schedule, so that windows differ, and visit every length of a piece and the updates of all
    groups. Parameters wait on the host: the GPU may lack room.
    """
    config, rng = model.config, np.random.default_rng(world.rank)
    before = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}

    def random_pieces(num_tokens: int, piece_len: int) -> tuple[Tensor, Tensor]:
        ids = rng.integers(config.vocab_size, size=num_tokens + 1, dtype=np.int32)
        return split_pieces(torch.from_numpy(ids).to(world.device), piece_len)

    steps = {i * config.num_iterations // config.kernel_warmup_steps for i in range(config.kernel_warmup_steps)}
    if steps:
        lengths = [config.pieces(config.stage(step))[1] for step in range(config.num_iterations)]
        steps |= {step for step in range(1, len(lengths)) if lengths[step] != lengths[step - 1]}
    for first in sorted(steps):
        first -= first % config.update_every
        for step in range(first, first + config.update_every):
            num_pieces, piece_len = config.pieces(config.stage(step))
            pieces = random_pieces(num_pieces * piece_len // world.size, piece_len)
            train_step(model, optimizer, *pieces, step)
    with torch.no_grad():
        ids, targets = random_pieces(config.val_piece_len, config.val_piece_len)
        model(ids[0], targets[0], **inputs_at(0, config, world.device))
    model.load_state_dict(before)
    optimizer.reset_states()


def as_fields(values: dict[str, float], spec: str = ".6g") -> str:
    """name:value pairs for a line of the log; whole numbers in full."""
    return " ".join(f"{name}:{value if isinstance(value, int) else format(value, spec)}"
                    for name, value in values.items())


def train(model: nn.Module, optimizer: Optimizer, loader: TrainLoader, val_shard: Shard, world: World, log: Log,
          checkpoints: Checkpoints | None = None, first_step: int = 0, seconds: float = 0.0) -> float:
    """The loop: steps, and a validation before the first, every val_every and after the last, whose loss it returns.

    first_step, seconds: what a resumed run has behind it. A number that is not finite, or a signal to stop, raises
    UserError on all ranks.
    """
    config = model.config
    clock = Clock(world, seconds)
    num_tokens = sum(config.batch_tokens(step) for step in range(first_step))
    watch = Watch(optimizer.banks, config, world, log)
    progress = tqdm(total=config.num_iterations, initial=first_step, unit="step", disable=world.rank > 0 or None)
    for step in range(first_step, config.num_iterations + 1):  # the last pass only validates
        finished = step == config.num_iterations
        validates = finished or step % config.val_every == 0
        saves = checkpoints is not None and step > first_step and (checkpoints.due(step) or finished)
        if validates or saves:
            clock.stop()
            watch.read()  # what was asked before, then all that was noted since
            watch.ask()
            watch.read()
        if saves:
            checkpoints.save(step, clock.seconds, optimizer)
            if checkpoints.stopped_by and not finished:
                raise UserError(f"{signal.Signals(checkpoints.stopped_by).name} ended the run after step {step}.")
        if validates:
            val_loss = evaluate(model, val_shard, step, world)
            log(f"step:{step}/{config.num_iterations} val_loss:{val_loss:.6f} {clock.fields(step)} "
                f"{as_fields(model.report(), '.6f')}", console=True)
        if finished:
            break
        clock.start()
        loss = train_step(model, optimizer, *next(loader), step)
        watch.note(step + 1, loss, [bank.grad_square for bank in optimizer.banks.values()])
        num_tokens += config.batch_tokens(step)
        log(f"step:{step + 1}/{config.num_iterations} {clock.fields(step + 1)} "
            f"{as_fields({'tokens': num_tokens} | config.step_fields(step))}")
        progress.update()
    return val_loss


# ----------------------------------------------------------------------------------------------------------------------
# Start and end

def read_launcher() -> list[int]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE of torchrun, or of one process without it. Raises UserError."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    found = {name: os.environ.get(name, default) for name, default in defaults.items()}
    wrong = [f"{name} is {value or 'empty'}, no number" for name, value in found.items() if not value.isdecimal()]
    if "WORLD_SIZE" not in os.environ:  # each process of srun or mpirun would train alone
        others = (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
                  ("PMI_SIZE", "PMI_RANK"))
        wrong += [f"{name} is {os.environ[name]} and WORLD_SIZE is missing" for name, rank in others
                  if rank in os.environ and os.environ.get(name, "1") != "1"]
    elif found["WORLD_SIZE"] != "1":
        wrong += [f"{name} is missing" for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if not wrong and int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        wrong = [f"RANK is {found['RANK']} and WORLD_SIZE {found['WORLD_SIZE']}"]
    if wrong:
        raise UserError(f"{wrong[0]}: start with torchrun, or unset what another launcher has set.")
    return [int(value) for value in found.values()]


def find_world(config: Run) -> World:
    """This process's place among those that torchrun started (one, without it). Raises UserError if it cannot work."""
    rank, size, local_rank, local_size = read_launcher()
    uneven = [n for row in config.stages if (n := config.pieces(row)[0]) % size]
    if uneven:
        raise UserError(f"{size} processes cannot share {uneven[0]} pieces equally: start fewer or cut micro_seq_len.")
    if not torch.cuda.is_available():
        if config.needs_gpu:
            raise UserError(f"preset {config.preset} needs a CUDA GPU and none is visible: on a CPU, use preset tiny.")
        return World(rank, size, torch.device("cpu"))
    if local_size > torch.cuda.device_count():
        raise UserError(f"{local_size} processes but {torch.cuda.device_count()} visible GPUs: start one per GPU.")
    torch.cuda.set_device(local_rank)
    return World(rank, size, torch.device("cuda", local_rank))


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, with a word of warning if it is not the kind this script is tuned for."""
    if device.type == "cpu":
        return "CPU process"
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return torch.cuda.get_device_name(device) + ("" if is_hopper else " (tuned for Hopper: it should run, but slower)")


def peak_memory(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10} MiB resident"
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return f"{allocated // 2**20} MiB allocated, {reserved // 2**20} MiB reserved"


def draw_seed(config: Run, world: World) -> int:
    """The configured seed, or one from the system that all ranks share."""
    drawn = int.from_bytes(os.urandom(4), "little") if config.seed is None else config.seed
    seed = torch.tensor(drawn, device=world.device)
    if world.size > 1:
        dist.broadcast(seed, src=0)
    return int(seed)


def set_up_compiler(coordinate_descent_tuning: bool) -> None:
    """TorchInductor's settings. Imported here: the compiler takes as long to import as all else together."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    inductor.coordinate_descent_tuning = coordinate_descent_tuning
    # By default graphs with a custom autograd Function are not cached: a warm start would trace them again.
    functorch.autograd_cache_allow_custom_autograd_functions = True


def compile_model(model: nn.Module, whole: bool, **options) -> None:
    """In place. whole: one graph, the fastest steps. Otherwise parts compile alone, and blocks of one kind share code.

    Then gradients between parts are summed unfused, in bf16: 8 % more traffic, a quarter of the time to compile.
    """
    options = dict(dynamic=False, fullgraph=True) | options
    # torch's caches know an operation by its name and would return the graph of one that has been edited. So the key
    # holds the sections that define operations, here and in another recipe, and no more: an edit keeps its graphs.
    files = {__file__, sys.modules[type(model.config).__module__].__file__}
    sections = [Path(file).read_text().partition("\n# Kernels:")[2].partition("\n# ---")[0] for file in sorted(files)]
    torch.compiler.config.cache_key_tag = hashlib.sha256("".join(sections).encode()).hexdigest()
    # Enough for a graph for training and one for validation of every kind of block, and one of every kind of bank.
    from torch._dynamo import config
    config.recompile_limit = max(config.recompile_limit, 2 * len(list(model.parameters())))
    if whole:
        model.compile(**options)
        return
    for name in model.compiled_alone:
        part = getattr(model, name)
        if isinstance(part, nn.ModuleList):
            for block in part:
                block.compile(**options)
        else:
            setattr(model, name, torch.compile(part, **options))


@contextlib.contextmanager
def compile_progress(world: World) -> Iterator[None]:
    """Prints a line on rank 0's console as each compilation begins, so that minutes of them do not look like a hang."""
    from torch._dynamo.callback import callback_handler
    began, number = time.perf_counter(), count(1)

    def announce(_) -> None:
        if world.rank == 0:
            print(f"warm-up: compilation {next(number)} begins after {time.perf_counter() - began:.0f} s", flush=True)

    callback_handler.register_start_callback(announce)
    yield
    callback_handler.remove_start_callback(announce)


def ask_nvidia_smi(limit_s: float = 20) -> str:
    """nvidia-smi's table, or why there is none."""
    try:
        process = subprocess.Popen(["nvidia-smi"], stdout=subprocess.PIPE, text=True, errors="replace")
        return process.communicate(timeout=limit_s)[0]
    except OSError:
        return "no nvidia-smi"
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a driver that hangs holds it
        return "nvidia-smi did not answer"


def describe_run(config: Run, train_shards: list[Shard], seed: int, world: World) -> str:
    """Versions, hardware, every constant, data and seed, for the head of the log."""
    note = " (SYNTHETIC tokens: losses mean nothing)" if train_shards[0].path.name.startswith("synthetic") else ""
    return "\n".join((
        f"Running Python {sys.version}",
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}",
        f"on {world.size} x {device_name(world.device)}",
        ask_nvidia_smi(),
        *(f"{item.name} = {getattr(config, item.name)!r}" for item in fields(config)),
        f"seed drawn or given: {seed}",
        f"training shards: {train_shards[0].path} to {train_shards[-1].path}{note}",
    ))


def read_sources(config: Run, script: str | None = None) -> str:
    """Of the script that was started (by default the recipe's), the recipe and the machine, each once."""
    recipe = sys.modules[type(config).__module__].__file__
    first, *others = dict.fromkeys(Path(file).resolve() for file in (script or recipe, recipe, __file__))
    named = [f"\n{'=' * 100}\n# {path.name}\n{path.read_text()}" for path in others]
    return "".join([first.read_text(), *named])


def main(config: Run, resume_from: str | None = None, script: str | None = None) -> float:
    """Train as `config` says and return the final validation loss. Raises UserError for what the user can put right.

    resume_from: the folder of a checkpoint, or of a run, whose last checkpoint is meant. script: see read_sources.
    """
    source, run_id = read_sources(config, script), str(uuid.uuid4())
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    world = find_world(config)
    train_shards, val_shard = find_shards(config)
    on_gpu = world.device.type == "cuda"
    if world.size > 1:
        # NCCL's own 10 minutes end the run where one rank's compiler cache is empty and the others' are not.
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=world.device if on_gpu else None,
                                timeout=timedelta(hours=1))
    saved = dict(step=0, seconds=0.0, seed=draw_seed(config, world))
    checkpoints, resumed = None, ""
    if config.checkpoint_every or config.checkpoint_minutes or resume_from:
        checkpoints = Checkpoints(config, source, [*train_shards, val_shard], run_id, saved["seed"], world)
    if resume_from:
        saved = checkpoints.read(resume_from)
        resumed = f"\nresumed from {checkpoints.last}: not eligible as a timed record"
    torch.manual_seed(saved["seed"])
    log = Log(run_id, world)
    if world.rank == 0:
        description = describe_run(config, train_shards, saved["seed"], world) + resumed
        log("\n".join((source, "=" * 100, description, "=" * 100)))
        print(f"preset {config.preset}, {world.size}x {device_name(world.device)}, log {log.path}{resumed}", flush=True)
    with world.device:
        model = config.make_model()
    compiled = partial(torch.compile, dynamic=False, fullgraph=True) if on_gpu else lambda function: function
    if on_gpu:
        set_up_compiler(config.coordinate_descent_tuning)
        compile_model(model, whole=config.coordinate_descent_tuning)
    if world.size > 1:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)
    optimizer = Optimizer(model, config, world, compiled)
    with compile_progress(world) if on_gpu else contextlib.nullcontext():
        warm_up(model, optimizer, world)
    if resume_from:
        checkpoints.restore(saved, optimizer)
    loader = TrainLoader(train_shards, config, world, first_step=saved["step"])
    try:
        with checkpoints.signals_noted() if checkpoints else contextlib.nullcontext():
            val_loss = train(model, optimizer, loader, val_shard, world, log, checkpoints, saved["step"],
                             saved["seconds"])
    except UserError as error:
        last = checkpoints and checkpoints.last
        way_on = f"RESUME_FROM={last} resumes from the last checkpoint." if last else "No checkpoint was kept."
        with contextlib.suppress(UserError):  # of the log's disk
            log(f"stopped: {error} {way_on}")
        raise UserError(f"{error} {way_on}") from None
    finally:
        loader.close()
    log(f"peak memory: {peak_memory(world.device)}", console=True)
    if world.size > 1:
        dist.destroy_process_group()  # only here: after an error on one rank it would wait for the others
    return val_loss


def choose_config(presets: dict[str, Callable[[], Run]], arguments: list[str]) -> Run:
    """The preset named on the command line (the first one by default), with its data where DATA_PATH says."""
    preset = arguments[0] if arguments else next(iter(presets))
    if len(arguments) > 1 or preset not in presets:
        raise UserError(f"{' '.join(arguments)!r} is not a preset: choose one of {', '.join(presets)}.")
    config = presets[preset]()
    return replace(config, preset=preset, data_dir=os.environ.get("DATA_PATH") or config.data_dir)


def start(presets: dict[str, Callable[[], Run]]) -> None:
    """A recipe's command line: train the preset that it names. Exits with status 1 and one sentence on a UserError."""
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show a letter of a path
    try:
        main(choose_config(presets, sys.argv[1:]), os.environ.get("RESUME_FROM"), sys.modules["__main__"].__file__)
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"error: the ranks cannot meet ({reason}): start with torchrun, or mend MASTER_ADDR or MASTER_PORT.")
    except UserError as error:
        # Ranks that find the same say it once: torchrun's store counts them, and only the first prints the sentence.
        said_before = 0
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            with contextlib.suppress(Exception):
                said_before = next(dist.rendezvous("env://"))[0].add(str(error), 1) - 1
        sys.exit(f"error: {error}" if not said_before else 1)


if __name__ == "__main__":
    start(PRESETS)
