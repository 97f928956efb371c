"""GPT-2-Medium speedrun: train a 16-layer, 1024-wide GPT on FineWeb to a validation loss of 2.92 on 8xH100.

The idea that gives the run its name is Smear-MTP: just before the language head, the output latent of the previous
token, times one learned scalar, is added to the current one. This file reproduces the record of 2025-11-02
(26 runs: mean loss 2.9193, mean time 1374.7 s; records/2025-11-02_SmearMTP/).

    torchrun --standalone --nproc_per_node=8 train_gpt_medium.py           # the record; 1, 2 or 4 GPUs also work
    torchrun --standalone --nproc_per_node=1 train_gpt_medium.py short     # a 300-step schedule, for trying ideas
    python train_gpt_medium.py tiny                                        # a small model on a CPU

Shards are read from the preset's `data_dir`, or from the folder named by the environment variable DATA_PATH.
RESUME_FROM=checkpoints/<run id> goes on where that run, of this very script, left its last checkpoint.
Shapes: T tokens of a sequence, C channels, H heads, D channels of a head, V rows of the head, B = T / 128 blocks.
"""
import contextlib
import copy
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

try:  # comes with torch for GPUs; where it is missing, the plain versions of the kernels run
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=int)

# ----------------------------------------------------------------------------------------------------------------------
# Constants: everything that an experiment changes

SMEAR_MTP = True  # False, with num_iterations = 5550, is the previous record: the baseline of the comparison
BLOCK_SIZE = 128  # tokens of an attention block
# FlexAttention's options for long and short windows. A token sees itself, so no row is empty; tiles, warps and stages
# (fwd_BLOCK_M, bwd_num_warps, ...) are torch's own until tests/bench.py --sweep-attention has found better ones.
LONG_WINDOW_KERNEL = {"ROWS_GUARANTEED_SAFE": True}
SHORT_WINDOW_KERNEL = {"ROWS_GUARANTEED_SAFE": True}
WATCH_EVERY = 16  # steps between two looks of all ranks at what is not finite, for which no step waits
STOP_LIMIT_S = 20  # for the step in progress to end after SIGTERM; torchrun kills after 30, or --shutdown-timeout


class Layer(NamedTuple):
    """One row of the layer plan."""
    attention: bool = True
    long_window: bool = False  # w blocks; the others see w // 2
    value_embed: int | None = None  # table mixed into the values
    skip_from: int | None = None  # earlier layer whose output is added first, weighted by skip_weights[skip_from]


# Long windows and value embeddings at both ends, U-net skips in the middle [@KoszarskyB, modded-nanogpt];
# no attention in layer 7 [@YouJiacheng, modded-nanogpt].
RECORD_LAYERS = (
    Layer(value_embed=0, long_window=True),
    Layer(value_embed=1),
    Layer(value_embed=2),
    Layer(value_embed=3),
    Layer(value_embed=4, long_window=True),
    Layer(),
    Layer(),
    Layer(attention=False),
    Layer(),
    Layer(skip_from=6),
    Layer(skip_from=4),
    Layer(skip_from=2, value_embed=0, long_window=True),
    Layer(value_embed=1),
    Layer(value_embed=2),
    Layer(value_embed=3),
    Layer(value_embed=4, long_window=True),
)


class World(NamedTuple):
    """This process among the ranks of the run."""
    rank: int
    size: int
    device: torch.device


class UserError(Exception):
    """Something the user can put right: shown as one sentence, without a traceback."""


@dataclass(frozen=True)
class Config:
    """Every constant of a run; the defaults are the record. Lengths are in tokens unless a name says otherwise."""
    preset: str = "medium"
    # data
    data_dir: str = "data/fineweb10B"
    vocab_size: int = 50257
    doc_token: int = 50256  # begins every document
    seq_len: int = 64 * 1024  # one slice
    num_slices: int = 8  # of the global batch
    # A slice is processed in pieces of at most this length, which the ranks share: shorter ones fit smaller cards and
    # more ranks. Windows, documents, positions and Smear-MTP's neighbour end at their borders; in validation likewise.
    micro_seq_len: int = 64 * 1024
    val_tokens: int = 10_485_760  # the task's definition
    val_seq_len: int = 4 * 64 * 1024
    val_loss_chunks: int = 4  # logits of a validation sequence do not fit at once
    # model
    layers: tuple[Layer, ...] = RECORD_LAYERS
    num_heads: int = 8
    head_dim: int = 128
    smear_mtp: bool = SMEAR_MTP
    backout_from: int = 11  # layer whose output is mixed into the last latent
    attention_scale: float = 0.12  # in place of 1/sqrt(D), since q and k are normed
    rotary_base: float = 1024.0
    logit_softcap: float = 15.0
    init_scale: float = 0.5  # of 1/sqrt(C), as a standard deviation
    dtype: torch.dtype = torch.bfloat16  # of weights, activations and Newton-Schulz; float32 for known answers
    # AdamW: learning rates are multiplied by the schedule's factor
    head_lr: float = 1 / 320
    embed_lr: float = 0.3
    scalar_lr: float = 0.015
    adam_betas: tuple[float, float] = (0.8, 0.95)
    adam_eps: float = 1e-10
    # Muon
    muon_lr: float = 0.03
    muon_decay: float = 0.01
    mlp_decay_factor: float = 2.0  # MLP matrices decay faster than attention's
    momentum_start: float = 0.85
    momentum_end: float = 0.95
    momentum_warmup_steps: int = 300
    update_smoothing: float = 0.2
    # Snoo, the outer optimizer
    snoo_every: int = 28  # inner steps
    snoo_lr: float = 0.68
    snoo_momentum: float = 0.37
    # schedule
    num_iterations: int = 5535
    flat_fraction: float = 0.3  # of the run at the full learning rate
    final_lr_factor: float = 0.01
    max_window: int = 27 * 128
    val_every: int = 125
    # run
    seed: int | None = None  # None draws one, so that runs are independent samples; the log names it
    warmup_steps: int = 4  # untimed, on random tokens; what they change is put back
    coordinate_descent_tuning: bool = True  # faster kernels for minutes of compilation
    # Checkpoints every so many steps, or minutes; 0: never. With either, the end, SIGTERM and SIGINT save one too.
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0

    def __post_init__(self):
        tables = [layer.value_embed for layer in self.layers if layer.value_embed is not None]
        for ok, sentence in (
            (self.seq_len % BLOCK_SIZE == 0, f"seq_len {self.seq_len} is not a multiple of {BLOCK_SIZE}"),
            (self.micro_seq_len >= BLOCK_SIZE and self.seq_len % self.piece_len == 0 == self.piece_len % BLOCK_SIZE,
             f"micro_seq_len {self.micro_seq_len} is no multiple of {BLOCK_SIZE} that divides seq_len {self.seq_len}"),
            (self.val_seq_len * self.piece_len % (self.seq_len * BLOCK_SIZE) == 0,
             f"val_seq_len {self.val_seq_len} cannot be cut as seq_len is, to pieces of a multiple of {BLOCK_SIZE}"),
            (self.val_piece_len % self.val_loss_chunks == 0, "val_loss_chunks does not divide val_seq_len's pieces"),
            (self.val_tokens % self.val_seq_len == 0, f"val_tokens {self.val_tokens} is not a multiple of val_seq_len"),
            (self.head_dim % 4 == 0, f"head_dim {self.head_dim} is not a multiple of 4"),
            (self.num_slices in (1, 2, 4, 8), f"num_slices {self.num_slices} is not 1, 2, 4 or 8"),
            (self.val_every > 0, f"val_every {self.val_every} is not positive"),
            (self.checkpoint_every >= 0 <= self.checkpoint_minutes,
             f"checkpoint_every {self.checkpoint_every} or checkpoint_minutes {self.checkpoint_minutes} is negative"),
            (self.doc_token < self.vocab_size, f"doc_token {self.doc_token} is not below vocab_size {self.vocab_size}"),
            (all(layer.skip_from is None or 0 <= layer.skip_from < i for i, layer in enumerate(self.layers)),
             "a layer skips from itself or a later one"),
            (set(tables) == set(range(len(set(tables)))), f"value_embeds {tables} do not count tables from 0"),
            (all(layer.attention or layer.value_embed is None for layer in self.layers),
             "a layer without attention has a value_embed"),
            (any(layer.skip_from is not None for layer in self.layers),
             "no layer has a skip_from, and skip_weights would have no gradient"),
            (0 <= self.backout_from < len(self.layers), f"backout_from {self.backout_from} is not a layer"),
        ):
            if not ok:
                raise UserError(f"Config: {sentence}.")

    @property
    def model_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def batch_tokens(self) -> int:
        return self.num_slices * self.seq_len

    @property
    def piece_len(self) -> int:
        """Tokens of a forward and backward pass."""
        return min(self.micro_seq_len, self.seq_len)

    @property
    def val_piece_len(self) -> int:
        """Tokens of a forward pass of validation: as much shorter than val_seq_len as a piece is than a slice."""
        return self.val_seq_len * self.piece_len // self.seq_len

    @property
    def num_pieces(self) -> int:
        """Of the global batch, shared out over the ranks."""
        return self.batch_tokens // self.piece_len


PRESETS = {config.preset: config for config in (
    Config(),
    Config(preset="short", num_iterations=300, val_tokens=2**20, val_seq_len=2**17, val_every=50,
           coordinate_descent_tuning=False),
    # fp32: a CPU without AVX-512 multiplies bf16 matrices ten times slower.
    Config(preset="tiny", data_dir="data/text", vocab_size=257, doc_token=256, seq_len=512, num_heads=4, head_dim=32,
           dtype=torch.float32, num_iterations=64, max_window=4 * 128, snoo_every=14, momentum_warmup_steps=16,
           val_tokens=2**14, val_seq_len=2**11, val_every=16, warmup_steps=1, coordinate_descent_tuning=False),
)}


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: what torch.compile cannot fuse by itself. Each is a custom operation, a Triton kernel on a GPU and the same
# function in plain torch elsewhere; the autograd Function behind it says what is kept for the backward pass.

HOPPER_SHARED_BYTES = 227 * 1024  # of a multiprocessor for one program; an A100 has 163 KiB, graphics cards 99


def kernel(function: Callable) -> Callable:
    return triton.jit(function) if triton else function


def runs_kernels(x: Tensor, shared_bytes: int = 0) -> bool:
    """fp32, which known answers use, is left to the plain versions: Triton would multiply it in tf32.

    shared_bytes: what the GPU must have for the kernel's tiles, where not every GPU has enough.
    """
    if not x.is_cuda or x.dtype == torch.float32:
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
        z_target = tl.load(z_row + target).to(tl.float32)  # now: later, another warp may have overwritten it
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
                slope = softcap * tl.rsqrt(zs * zs + softcap * softcap)  # of the cap, to the power of 1 / 3
                excess = tl.exp(zs * slope - log_sum) - tl.where(column == target, 1.0, 0.0)
                grad = excess * slope * slope * slope * grad_scale
                tl.store(z_row + column, grad.to(logits.dtype.element_ty), mask=column < num_columns)


@torch.library.custom_op("smear_mtp::cross_entropy", mutates_args=("logits",))
def cross_entropy(logits: Tensor, targets: Tensor, softcap: float, with_grad: bool) -> Tensor:
    """Softcapped cross-entropy of logits [T, V], not yet capped, and targets [T]: losses [T] in nats, fp32.

    with_grad: the logits are overwritten by the gradient of the mean loss. They are read from memory once: a program
    takes one row at a time, and few enough programs run for their rows (100 KB each) to be in the L2 cache when the
    second loop comes. No fp32 copy exists. The plain version moves 3 times 6.6 GB of logits, this one 2.
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


@cross_entropy.register_fake
def _(logits, targets, softcap, with_grad):
    return logits.new_empty(len(logits), dtype=torch.float32)


class HeadLoss(torch.autograd.Function):
    """Mean loss of latents [T, C] under the head [V, C]. Gradients are computed at once, so that the logits, the
    largest tensor of all, are gone when this returns: 0.2 GB are kept for the backward pass in place of 6.6."""
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


@kernel
def mlp_gemm_kernel(a_desc, b_desc, post_desc, out_desc, M, N, K, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        # GROUP_M tiles below each other run at once, so that their columns of b are read from the L2 cache.
        group = tile // (GROUP_M * num_n)
        group_m = min(num_m - group * GROUP_M, GROUP_M)
        m = (group * GROUP_M + tile % (GROUP_M * num_n) % group_m) * BLOCK_M
        n = (tile % (GROUP_M * num_n) // group_m) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            b = b_desc.load([k, n]) if BACKWARD else b_desc.load([n, k]).T
            acc = tl.dot(a_desc.load([m, k]), b, acc)
        # In halves, so that the tile on its way out leaves shared memory for the pipeline.
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
    """relu(a bT)^2 without post, 2 sqrt(post) (a b) with it: [M, K] and [N, K] or [K, N] -> [M, N]."""
    assert a.is_contiguous() and b.is_contiguous()
    (M, K), N = a.shape, b.size(0 if post is None else 1)
    out = torch.empty(M, N, dtype=a.dtype, device=a.device)
    BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
    in_blocks = TensorDescriptor.from_tensor
    out_desc = in_blocks(out, [BLOCK_M, BLOCK_N // 2])
    mlp_gemm_kernel[(min(num_multiprocessors(a.device), triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)),)](
        in_blocks(a, [BLOCK_M, BLOCK_K]), in_blocks(b, [BLOCK_N, BLOCK_K] if post is None else [BLOCK_K, BLOCK_N]),
        out_desc if post is None else in_blocks(post, [BLOCK_M, BLOCK_N // 2]), out_desc, M, N, K,
        BACKWARD=post is not None, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=8,
        num_warps=8, num_stages=4 if post is None else 3)
    return out


@torch.library.custom_op("smear_mtp::mlp_up", mutates_args=())
def mlp_up(x: Tensor, fc: Tensor) -> Tensor:
    """relu(x fcT)^2: [T, C], [4C, C] -> [T, 4C]. The product before the relu never leaves the multiprocessor.

    Fusing relu^2 into the product is from [@andrewbriand, modded-nanogpt].
    """
    if runs_kernels(x, HOPPER_SHARED_BYTES):
        return launch_mlp_gemm(x, fc, None)
    return F.relu(F.linear(x, fc)).square()


@mlp_up.register_fake
def _(x, fc):
    return x.new_empty(len(x), len(fc))


@torch.library.custom_op("smear_mtp::mlp_down_grad", mutates_args=())
def mlp_down_grad(dy: Tensor, proj: Tensor, post: Tensor) -> Tensor:
    """Gradient before relu^2: 2 sqrt(post) (dy proj). dy [T, C], proj [C, 4C], post [T, 4C] -> [T, 4C].

    The square's derivative is 2 relu(h), and relu(h) is the root of post: with half of post's rounding error.
    """
    if runs_kernels(dy, HOPPER_SHARED_BYTES):
        return launch_mlp_gemm(dy, proj, post)
    return ((dy @ proj).float() * 2 * post.float().sqrt()).to(dy.dtype)


@mlp_down_grad.register_fake
def _(dy, proj, post):
    return torch.empty_like(post)


class ReluSquaredMLP(torch.autograd.Function):
    """proj(relu(fc(x))^2). For the backward pass it keeps post = relu()^2 alone (8.6 GB less in 16 layers) and moves
    34 GB less than with relu^2 in kernels of its own."""
    @staticmethod
    def forward(ctx, x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
        post = mlp_up(x, fc)
        ctx.save_for_backward(x, fc, proj, post)
        return F.linear(post, proj)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, fc, proj, post = ctx.saved_tensors
        dh = mlp_down_grad(dy, proj, post)
        return dh @ fc, dh.mT @ x, dy.mT @ post


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

    The tokens are sorted once; a program sums the rows of one id in one table. So no fp32 table is filled with zeros,
    added to atomically, and cast: 1.7 GB where torch moves 6, and the same bits in every run.
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


@embedding_grad.register_fake
def _(grads, ids, vocab_size):
    return grads.new_empty(len(grads), vocab_size, grads.size(2))


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
    """scale x xT: [n, rows, K] -> [n, rows, rows]; of a symmetric x, whose x_scale is not 0, scale x x + x_scale x.

    The kernel computes the tiles on and below the diagonal and mirrors them: 36 of the 64 in 1024 rows.
    From [@byronxu99, modded-nanogpt].
    """
    n, num_rows, K = x.shape
    BLOCK, BLOCK_K = 128, 64
    if not runs_kernels(x, HOPPER_SHARED_BYTES) or num_rows % BLOCK or K % BLOCK_K:
        return (scale * x) @ x + x_scale * x if x_scale else (scale * x) @ x.mT
    assert x.is_contiguous()
    out, in_blocks = x.new_empty(n, num_rows, num_rows), TensorDescriptor.from_tensor
    x_flat, out_flat, tiles = x.view(-1, K), out.view(-1, num_rows), num_rows // BLOCK
    symmetric_product_kernel[(tiles, tiles, n)](
        in_blocks(x_flat, [BLOCK, BLOCK_K]), in_blocks(x_flat, [BLOCK, BLOCK]), in_blocks(out_flat, [BLOCK, BLOCK]),
        num_rows, K, scale, x_scale, ADD_X=x_scale != 0, BLOCK=BLOCK, BLOCK_K=BLOCK_K, num_warps=8, num_stages=4)
    return out


@symmetric_product.register_fake
def _(x, scale, x_scale):
    return x.new_empty(x.size(0), x.size(1), x.size(1))


class Embed(torch.autograd.Function):
    """Rows of n tables [n, V, C] at ids [T]: n tensors [T, C]."""
    @staticmethod
    def forward(ctx, tables: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(ids)
        ctx.vocab_size = tables.size(1)
        return tuple(F.embedding(ids, table) for table in tables)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        ids, = ctx.saved_tensors
        return embedding_grad(torch.stack(grads), ids, ctx.vocab_size), None


# ----------------------------------------------------------------------------------------------------------------------
# Attention: documents and sliding windows in blocks of 128 tokens

def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),))


def block_lists(num_visible_B: Tensor, num_full_B: Tensor, step: int, w: Tensor) -> tuple[Tensor, ...]:
    """Numbers [B] and lists [B, B] of the partial and then of the full blocks that a block keeps in a window w.

    The blocks that see each other lie side by side: first the block itself, partial; then the full ones; then the other
    partial ones. step: -1 to list keys of queries, 1 queries of keys. Entries past a number are not read.
    """
    block = torch.arange(len(num_visible_B), device=w.device, dtype=torch.int32)
    num_partial_B = torch.minimum(num_visible_B - num_full_B, (w - num_full_B).clamp_min(1))
    partial_BB = block[:, None] + step * (block + torch.where(block > 0, num_full_B[:, None], 0))
    full_BB = block[:, None] + step * (block + 1)
    return (num_partial_B, partial_BB.clamp(0, len(block) - 1),
            torch.minimum(num_full_B, (w - 1).clamp_min(0)), full_BB.clamp(0, len(block) - 1))


def block_masks(ids_T: Tensor, window_blocks: Tensor, doc_token: int) -> tuple[BlockMask, BlockMask]:
    """Causal attention within documents, cut to the nearest blocks, for the windows w and w // 2.

    ids_T: integer ids, T a multiple of 128. window_blocks: zero-dim int32 tensor w, so that a growing window does not
    recompile. A query block keeps its nearest w - 1 full and max(w - full, 1) partial blocks. Full: both blocks lie in
    one document, every pair attends. Partial: q >= k and the same document are tested token by token.
    Source of the scheme: [@KoszarskyB and @YouJiacheng, modded-nanogpt].
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
    long_mask, short_mask = (
        BlockMask((T, T), *(x[None, None] for x in (*block_lists(*keys, -1, w), *block_lists(*queries, 1, w))),
                  BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE), mask_mod=lambda b, h, q, k: (q >= k) & (k >= doc_start_T[q]))
        for w in (window_blocks, window_blocks // 2))
    return long_mask, short_mask


def dense_mask(block_mask: BlockMask) -> Tensor:
    """The pairs that `block_mask` lets attend, [T, T] bool: the CPU's and the tests' view of the same block lists."""
    num_blocks = block_mask.kv_indices.size(-1)
    position = torch.arange(num_blocks * BLOCK_SIZE, device=block_mask.kv_indices.device)

    def listed(num: Tensor, index: Tensor) -> Tensor:
        kept_BB = position[:num_blocks] < num[0, 0, :, None]
        chosen_BB = torch.zeros_like(index[0, 0]).scatter_add_(1, index[0, 0].long(), kept_BB.int()) > 0
        return chosen_BB.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)

    partial_TT = listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    full_TT = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return full_TT | (partial_TT & block_mask.mask_mod(0, 0, position[:, None], position))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor, scale: float, kernel_options: dict) -> Tensor:
    """Softmax attention, [1, T, H, D] -> [1, T, H, D].

    A BlockMask goes to FlexAttention with its kernel_options, which must be compiled: eager FlexAttention ignores block
    lists. A dense [T, T] mask goes to torch's own attention: FlexAttention has no backward on a CPU.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=kernel_options)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers: Muon and AdamW, then Snoo

# One row per Newton-Schulz step: a, b, c of X <- aX + (bA + cA^2)X [@YouJiacheng, modded-nanogpt].
NEWTON_SCHULZ_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(x: Tensor) -> Tensor:
    """Orthogonalise matrices [n, rows, cols], rows <= cols, approximately, in the dtype of `x` throughout.

    Singular values end up near 1, not at it. Source: Muon [@kellerjordan, 2024].
    """
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        A = symmetric_product(x, 1.0, 0.0)
        x = a * x + symmetric_product(A, c, b) @ x
    return x


def join_mantissa(upper: Tensor, mantissa: Tensor) -> Tensor:
    """fp32 numbers from their upper 16 bits (bf16) and lower 16 bits (int16). int32 arithmetic runs on a CPU too."""
    return ((upper.view(torch.int16).int() << 16) | (mantissa.int() & 0xFFFF)).view(torch.float32)


def split_mantissa(w: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (upper 16 bits as bf16: truncated, not rounded; lower 16 bits as int16)."""
    bits = w.view(torch.int32)
    return (bits >> 16).short().view(torch.bfloat16), bits.short()


def muon_update(params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], momentum: Tensor,
                lr: Tensor, decay: Tensor, smoothing: float) -> None:
    """One Muon step, in place, on batches of matrices [n, rows, cols] that are of one shape but for transposition.

    params, grads, smooth: the model's dtype. momentum_buffer: fp32. mantissa: int16, lower half of a bf16 parameter;
    unused if it is fp32. momentum, lr, decay: zero-dim fp64 tensors on the CPU, so that schedules do not recompile.
    All matrices go through Newton-Schulz as one batch: two of 1024 x 4096 have 72 symmetric tiles for 132 processors.
    Smoothing (an average of updates) and mantissas are from the medium track [@snimu, modded-nanogpt].
    """
    directions = []
    for p, grad, state in zip(params, grads, states):
        fresh = (1 - momentum) * grad.float()
        state["momentum_buffer"].copy_(momentum * state["momentum_buffer"] + fresh)
        u = (momentum * state["momentum_buffer"] + fresh).to(p.dtype)
        directions.append(u.mT if p.size(-2) > p.size(-1) else u)
    orthogonal = newton_schulz(torch.cat(directions)).split([len(p) for p in params])
    for p, u, state in zip(params, orthogonal, states):
        tall, smooth = p.size(-2) > p.size(-1), state["smooth"]
        c = torch.tensor(smoothing, dtype=smooth.dtype)
        smooth.copy_(c * smooth + (1 - c) * (u.mT if tall else u))
        w = p if p.dtype == torch.float32 else join_mantissa(p, state["mantissa"])
        w = w * (1 - lr * decay) - lr * max(1, p.size(-2) / p.size(-1)) ** 0.5 * smooth.float()
        if p.dtype == torch.float32:
            p.copy_(w)
        else:
            upper, lower = split_mantissa(w)
            p.copy_(upper)
            state["mantissa"].copy_(lower)


def average_parts(parts: Tensor) -> Tensor:
    """Mean over ranks [world_size, n] -> [n], summed in fp32 and rounded once to the gradients' dtype.

    The sum is pairwise, so that equal gradients of 2, 4, 8, ... ranks average to themselves.
    """
    sums = parts.float()
    while len(sums) > 1:
        pairs = sums[0:-1:2] + sums[1::2]
        sums = pairs if len(sums) % 2 == 0 else torch.cat((pairs, sums[-1:]))
    return (sums[0] / len(parts)).to(parts.dtype)


class Bank:
    """Parameters that are updated by one rule, end to end in one buffer that divides evenly among the ranks.

    The parameters become views of the buffer. `shard` [n, *unit] is the part that this rank updates and whose optimizer
    states it alone holds. unit: the shape of what is not divided: (rows, cols) of a matrix, or (128,) where numbers
    stand for themselves: a CPU rounds what is left over from whole vectors differently, wherever shards end. What is
    missing to a multiple of world.size units is padded with zeros, which stay zero.
    grad_sum: of the shard's last averaged gradients, fp32, zero-dim: finite if they all are.
    """
    def __init__(self, params: list[nn.Parameter], unit: tuple[int, ...], world: World,
                 average: Callable[[Tensor], Tensor]):
        self.params, self.world, self.average = params, world, average
        self.padding = -sum(p.numel() for p in params) % (math.prod(unit) * world.size)
        self.buffer = self._end_to_end([p.data for p in params])
        for p, part in zip(params, self.buffer[:len(self.buffer) - self.padding].split([p.numel() for p in params])):
            p.data = part.view_as(p)
        self.shard = self.buffer.view(world.size, -1, *unit)[world.rank]

    def _end_to_end(self, tensors: list[Tensor]) -> Tensor:
        parts = [x.flatten() for x in tensors]
        if self.padding:
            parts.append(parts[0].new_zeros(self.padding))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def start_reduce(self) -> None:
        """Send every rank its part of the gradients, and drop them."""
        grads = self._end_to_end([p.grad for p in self.params])
        for p in self.params:
            p.grad = None
        if self.world.size == 1:
            self.received = grads
        else:
            self.received = torch.empty_like(grads)
            self.work = dist.all_to_all_single(self.received, grads, async_op=True)

    def finish_reduce(self) -> Tensor:
        """This rank's part of the gradients, averaged over the ranks, in the shape of `shard`."""
        self._wait()
        received, self.received = self.received, None
        if self.world.size > 1:
            received = self.average(received.view(self.world.size, -1))
        self.grad_sum = received.sum(dtype=torch.float32)
        return received.view_as(self.shard)

    def start_gather(self) -> None:
        """Send this rank's updated parameters to all."""
        if self.world.size > 1:
            # torch 2.13's name, or the older one's
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            self.work = gather(self.buffer, self.shard.flatten(), async_op=True)

    def finish_gather(self) -> None:
        self._wait()

    def _wait(self) -> None:
        if self.world.size > 1:
            self.work.wait()
            self.work = None  # it holds what was sent


class Muon:
    """Muon on this rank's matrices in banks of one shape but for transposition.

    States, by bank: momentum (fp32), smoothed update (the parameters' dtype), mantissa (int16).
    """
    def __init__(self, banks: list[Bank], decay: float, smoothing: float, update: Callable[..., None]):
        self.banks, self.decay, self.smoothing, self.update = banks, decay, smoothing, update
        self.states = [dict(momentum_buffer=torch.zeros_like(bank.shard, dtype=torch.float32),
                            smooth=torch.zeros_like(bank.shard),
                            mantissa=torch.zeros_like(bank.shard, dtype=torch.int16)) for bank in banks]

    @torch.no_grad()
    def step(self, grads: list[Tensor], lr: float, momentum: float) -> None:
        as_tensor = partial(torch.tensor, dtype=torch.float64)
        self.update([bank.shard for bank in self.banks], grads, self.states, momentum=as_tensor(momentum),
                    lr=as_tensor(lr), decay=as_tensor(self.decay), smoothing=self.smoothing)

    def state_dict(self) -> list[dict[str, Tensor]]:
        return self.states

    def load_state_dict(self, saved: list[dict[str, Tensor]]) -> None:
        for state, saved_state in zip(self.states, saved, strict=True):
            for name, tensor in state.items():
                tensor.copy_(saved_state[name])


class Snoo:
    """Step-K Nesterov outer optimizer: SGD at the last outer weights, with the way since then as the gradient.

    Holds a copy of its parameters and their momentum, in the parameters' dtypes.
    Source: [@dominikkallusky, Snoo, arXiv 2510.15830].
    """
    def __init__(self, params: list[Tensor], lr: float, momentum: float):
        self.outer = {p: p.detach().clone() for p in params}
        # Fused rounds least; on a CPU torch 2.13's fused SGD leaves bf16 parameters where they were.
        self.sgd = torch.optim.SGD(self.outer.values(), lr=lr, momentum=momentum, nesterov=True,
                                   fused=params[0].is_cuda)

    @torch.no_grad()
    def step(self, params: list[Tensor]) -> None:
        """An outer step of these parameters; the others wait for theirs."""
        for p in params:
            self.outer[p].grad = self.outer[p] - p
        self.sgd.step()
        self.sgd.zero_grad(set_to_none=True)
        for p in params:
            p.copy_(self.outer[p])

    def state_dict(self) -> dict:
        return {"outer": list(self.outer.values()), "sgd": self.sgd.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        for outer, tensor in zip(self.outer.values(), saved["outer"], strict=True):
            outer.copy_(tensor)
        self.sgd.load_state_dict(saved["sgd"])


class Optimizer:
    """All parameters' updates: gradients averaged over the ranks, AdamW or Muon, Snoo; each rank updates its shards.

    A step has three phases on every rank. What travels is given for the record on 8 ranks; on one rank nothing does.
    1. Every bank's gradients are sent to the ranks that own them, all at once, the longest computation's first.
    2. As they arrive, in the same order, a bank's shard is updated and sent to all. The updates of the matrices run
       while the gradients of head and tables still travel, those of head and tables while matrices are sent.
    3. The last parameters to arrive are waited for.

        bank        dtype     numbers   padding      MB
        mlp_fc      bf16     67108864         0   134.2
        mlp_proj    bf16     67108864         0   134.2
        qkvo        bf16     62914560   4194304   134.2
        lm_head     fp32     51511296         0   206.0
        scalars     fp32           99       925     0.0
        embeds      bf16    360242176         0   720.5

    A collective a bank and direction, 12 in all where the record's script issues 56 and more; 7/8 of a bank leave a
    rank each way. Gradients are exchanged all-to-all and summed by their owner: the bytes of a reduce-scatter, but one
    rounding where a ring has seven, and the same bits whatever the library's algorithm. Banks are disjoint, so that
    their order is free; Snoo follows each one's inner step. A parameter's role, its name without block numbers, selects
    its bank; a role that has none, or a parameter without a gradient, is an error.
    """
    def __init__(self, model: "GPT", config: Config, world: World, compiled: Callable = lambda function: function):
        """compiled: applied to the functions of tensors that a GPU should run in few kernels (torch.compile)."""
        self.config, self.params, C = config, list(model.parameters()), config.model_dim
        units = {"mlp_fc": (4 * C, C), "mlp_proj": (C, 4 * C), "qkvo": (C, C),  # in the order of sending
                 "lm_head": (128,), "scalars": (128,), "embeds": (128,)}
        scalars = {"skip_weights", "block_lambdas", "attn_lambdas", "smear_lambda", "backout_lambdas"}
        params: dict[str, list[nn.Parameter]] = {name: [] for name in units}
        for name, p in model.named_parameters():  # embeds, blocks.5.mlp_fc
            role = name.split(".")[-1] if name.startswith("blocks.") else name
            if role not in units.keys() | scalars:
                raise ValueError(f"no optimizer for {name}")
            params["scalars" if role in scalars else role].append(p)
        average, update = compiled(average_parts), compiled(muon_update)
        self.banks = {name: Bank(params[name], unit, world, average) for name, unit in units.items()}
        mlp_decay, smoothing = config.muon_decay * config.mlp_decay_factor, config.update_smoothing
        self.muons = [Muon([self.banks["mlp_fc"], self.banks["mlp_proj"]], mlp_decay, smoothing, update),
                      Muon([self.banks["qkvo"]], config.muon_decay, smoothing, update)]
        adam_lr = {"lm_head": config.head_lr, "scalars": config.scalar_lr, "embeds": config.embed_lr}
        self.adam_banks = [self.banks[name] for name in adam_lr]
        # fused: states in the parameter's dtype, arithmetic in fp32, rounded to nearest.
        self.adamw = torch.optim.AdamW(
            [dict(params=[self.banks[name].shard], base_lr=lr) for name, lr in adam_lr.items()],
            betas=config.adam_betas, eps=config.adam_eps, weight_decay=0.0, fused=True)
        self.snoo = Snoo([bank.shard for bank in self.banks.values()], config.snoo_lr, config.snoo_momentum)

    def step(self, step: int) -> None:
        """Update all parameters from their gradients of step number `step` (from 0), and drop the gradients."""
        factor = lr_factor(step, self.config)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * factor
        for bank in self.banks.values():
            bank.start_reduce()
        for muon in self.muons:
            muon.step([bank.finish_reduce() for bank in muon.banks], self.config.muon_lr * factor,
                      muon_momentum(step, self.config))
            self._send_off(muon.banks, step)
        for bank in self.adam_banks:
            bank.shard.grad = bank.finish_reduce()
            self.adamw.step()  # of the one shard that has a gradient
            bank.shard.grad = None
            self._send_off([bank], step)
        for bank in self.banks.values():
            bank.finish_gather()

    def _send_off(self, banks: list[Bank], step: int) -> None:
        """The outer step, if this step has one, and the way to all ranks, of shards whose inner step is done."""
        if step % self.config.snoo_every == 0:
            self.snoo.step([bank.shard for bank in banks])
        for bank in banks:
            bank.start_gather()

    def state_dict(self) -> dict:
        """This rank's states, not copied."""
        return {"adamw": self.adamw.state_dict(), "muon": [muon.state_dict() for muon in self.muons],
                "snoo": self.snoo.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        self.adamw.load_state_dict(saved["adamw"])
        for muon, saved_muon in zip(self.muons, saved["muon"], strict=True):
            muon.load_state_dict(saved_muon)
        self.snoo.load_state_dict(saved["snoo"])


# ----------------------------------------------------------------------------------------------------------------------
# Model

class Rotary(nn.Module):
    """Rotary positions on half of the channels of a head; the other half never rotates.

    Truncated base-frequency tuning: [@YouJiacheng, modded-nanogpt].
    """
    def __init__(self, head_dim: int, base: float, max_len: int):
        super().__init__()
        frequencies = (1 / base) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float32)
        theta = torch.outer(torch.arange(max_len, dtype=torch.float32), F.pad(frequencies, (0, head_dim // 4)))
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
        C = config.model_dim
        self.num_heads, self.attention_scale = config.num_heads, config.attention_scale
        self.has_attention = layer.attention
        self.kernel_options = LONG_WINDOW_KERNEL if layer.long_window else SHORT_WINDOW_KERNEL
        bound = 3 ** 0.5 * config.init_scale * C ** -0.5  # uniform in +-bound
        if layer.attention:
            qkvo = torch.empty(4, C, C).uniform_(-bound, bound)
            qkvo[3] = 0
            self.qkvo = nn.Parameter(qkvo.to(config.dtype))
        self.mlp_fc = nn.Parameter(torch.empty(4 * C, C).uniform_(-bound, bound).to(config.dtype))
        self.mlp_proj = nn.Parameter(torch.zeros(C, 4 * C, dtype=config.dtype))

    def forward(self, x: Tensor, x00: Tensor, x01: Tensor, value_embed: Tensor | None, block_lambdas: Tensor,
                attn_lambdas: Tensor, rotary: Rotary, mask: BlockMask | Tensor) -> Tensor:
        """x, x00, x01, value_embed: [T, C]; block_lambdas: [3], the shares of x, x00 and x01 -> [T, C]."""
        x = block_lambdas[0] * x + block_lambdas[1] * x00 + block_lambdas[2] * x01
        if self.has_attention:
            x = x + self.attention(x, value_embed, attn_lambdas, rotary, mask)
        return x + self.mlp(x)

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

    def mlp(self, x: Tensor) -> Tensor:
        return ReluSquaredMLP.apply(norm(x), self.mlp_fc, self.mlp_proj)


def smear(x: Tensor, smear_lambda: Tensor) -> Tensor:
    """Smear-MTP: y[t] = x[t] + lambda x[t - 1], [T, C] -> [T, C]; y[0] = x[0]. Looks across document borders."""
    return torch.cat((x[:1], x[1:] + smear_lambda * x[:-1]))


class GPT(nn.Module):
    """The record's model: 16 layers, value embeddings, skips, backout, Smear-MTP. Initial values are drawn here."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        num_layers, C = len(config.layers), config.model_dim
        num_value_embeds = len({layer.value_embed for layer in config.layers} - {None})
        # Two tables for the input, the others for values.
        self.embeds = nn.Parameter(torch.randn(2 + num_value_embeds, config.vocab_size, C).to(config.dtype))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.rotary = Rotary(config.head_dim, config.rotary_base, max(config.piece_len, config.val_piece_len))
        # Rows are padded to a multiple of 128 [@Grad62304977, modded-nanogpt]; all of them count in the loss.
        self.lm_head = nn.Parameter(torch.zeros(-(-config.vocab_size // 128) * 128, C, dtype=torch.float32))
        self.skip_weights = nn.Parameter(torch.ones(num_layers))
        self.block_lambdas = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]).repeat(num_layers, 1))
        self.attn_lambdas = nn.Parameter(torch.full((num_layers, 2), 0.5))
        if config.smear_mtp:
            self.smear_lambda = nn.Parameter(torch.tensor(0.0))  # zero-dim: a [1] tensor would promote bf16 to fp32
        self.backout_lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def embed(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids [T] integer -> x00, x01 and the value embeddings, each [T, C]."""
        embed1, embed2, *value_embeds = Embed.apply(self.embeds, ids)
        return norm(embed1), norm(embed2), *value_embeds

    def finish(self, x: Tensor, middle: Tensor) -> Tensor:
        """Outputs of the last and of the backout layer -> the head's input, each [T, C]."""
        x = self.backout_lambdas[0] * norm(x) + self.backout_lambdas[1] * norm(middle)
        return smear(x, self.smear_lambda) if self.config.smear_mtp else x

    def latents(self, ids: Tensor, window_blocks: Tensor) -> Tensor:
        """ids [T] integer, window_blocks zero-dim integer -> the head's input [T, C], smeared."""
        long_mask, short_mask = block_masks(ids, window_blocks, self.config.doc_token)
        if not ids.is_cuda:
            long_mask, short_mask = dense_mask(long_mask), dense_mask(short_mask)
        x00, x01, *value_embeds = self.embed(ids)
        x = x00.view_as(x00)  # another object: one tensor passed twice would make the first block a kind of its own
        outputs: list[Tensor] = []
        for i, (layer, block) in enumerate(zip(self.config.layers, self.blocks)):
            if layer.skip_from is not None:
                x = x + self.skip_weights[layer.skip_from] * outputs[layer.skip_from]
            value_embed = None if layer.value_embed is None else value_embeds[layer.value_embed]
            x = block(x, x00, x01, value_embed, self.block_lambdas[i], self.attn_lambdas[i], self.rotary,
                      long_mask if layer.long_window else short_mask)
            outputs.append(x)
        return self.finish(x, outputs[self.config.backout_from])

    def forward(self, ids: Tensor, targets: Tensor, window_blocks: Tensor) -> Tensor:
        """Mean cross-entropy in nats (fp32). ids: [T] integer, targets: [T] int64, window_blocks: zero-dim integer."""
        latents, head = self.latents(ids, window_blocks), self.lm_head.to(self.config.dtype)
        softcap, chunks = self.config.logit_softcap, self.config.val_loss_chunks
        if torch.is_grad_enabled():
            return HeadLoss.apply(latents, head, targets, softcap)
        return torch.cat([cross_entropy(y @ head.mT, t, softcap, False)
                          for y, t in zip(latents.chunk(chunks), targets.chunk(chunks))]).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Data: shards of 256 little-endian int32 (the header), then uint16 token ids

HEADER_BYTES = 256 * 4
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
PUBLISHED_SHARD_TOKENS = 100_000_000  # to say how many shards a run needs before one is there to be read


class Shard(NamedTuple):
    path: Path
    num_tokens: int

    def num_batches(self, batch_tokens: int) -> int:
        """Whole global batches, each of which also needs the next token as its last target; the tail is dropped."""
        return (self.num_tokens - 1) // batch_tokens

    def read(self, count: int, vocab_size: int) -> np.ndarray:
        """The first `count` tokens, uint16. Raises UserError if they are gone or not the model's ids."""
        try:
            tokens = np.fromfile(self.path, dtype="<u2", count=count, offset=HEADER_BYTES)
        except OSError as error:
            raise UserError(f"{self.path} is gone ({error.strerror}): fetch or make it anew.") from error
        if len(tokens) < count:
            raise UserError(f"{self.path} ends after {len(tokens):,} of {count:,} tokens: fetch or make it anew.")
        if tokens.max() >= vocab_size:
            raise UserError(f"{self.path} holds id {tokens.max()}, outside the vocabulary of {vocab_size}: "
                            f"fetch or make it anew.")
        return tokens


def open_shard(path: Path, config: Config) -> Shard:
    """Check a shard's header and size against the format and the model's vocabulary. Raises UserError."""
    try:
        header = np.fromfile(path, dtype="<i4", count=256)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): put a shard there.") from error
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is not a version {SHARD_VERSION} token shard: fetch or make it anew.")
    num_tokens, vocab_size, doc_token = int(header[2]), int(header[3]) or 50257, int(header[4]) or 50256
    if size != HEADER_BYTES + 2 * num_tokens or num_tokens < 1:
        raise UserError(f"{path} is damaged: {size:,} bytes where its header's {num_tokens:,} tokens need "
                        f"{HEADER_BYTES + 2 * num_tokens:,}: fetch or make it anew.")
    if (vocab_size, doc_token) != (config.vocab_size, config.doc_token):
        raise UserError(f"{path} holds ids of a vocabulary of {vocab_size} with document id {doc_token}, preset "
                        f"{config.preset} needs {config.vocab_size} and {config.doc_token}: use other shards.")
    return Shard(path, num_tokens)


def find_shards(config: Config) -> tuple[list[Shard], Shard]:
    """The training shards that the schedule consumes, in order, and the validation shard. Reads headers only.

    Raises UserError where one is missing, damaged or foreign, or where all of them are too few.
    """
    folder = Path(config.data_dir)
    prefixes = sorted({path.name.split("_train_")[0] for path in folder.glob("*_train_*.bin")})
    if len(prefixes) > 1:
        raise UserError(f"{folder} mixes shards of {' and '.join(prefixes)}: keep each kind in a folder of its own.")
    prefix, = prefixes or [Path(config.data_dir).name if config.preset == "tiny" else "fineweb"]
    train_shards: list[Shard] = []
    num_batches, per_shard = 0, (PUBLISHED_SHARD_TOKENS - 1) // config.batch_tokens
    while num_batches < config.num_iterations:
        path = folder / f"{prefix}_train_{len(train_shards) + 1:06d}.bin"
        if not path.exists():
            needed = len(train_shards) + math.ceil((config.num_iterations - num_batches) / per_shard)
            raise UserError(f"{path} is missing: {config.num_iterations:,} steps of {config.batch_tokens:,} tokens need"
                            f" {needed} training shards, {prefix}_train_000001.bin to {prefix}_train_{needed:06d}.bin "
                            f"(data/README.md says how to get or make them).")
        shard = open_shard(path, config)
        per_shard = shard.num_batches(config.batch_tokens)
        if per_shard == 0:
            raise UserError(f"{path} is too short: its {shard.num_tokens:,} tokens do not hold one global batch of "
                            f"{config.batch_tokens:,} and its last target: use longer shards.")
        train_shards.append(shard)
        num_batches += per_shard
    val_shard = open_shard(folder / f"{prefix}_val_000000.bin", config)
    if val_shard.num_tokens <= config.val_tokens:
        raise UserError(f"{val_shard.path} is too short: validation needs {config.val_tokens + 1:,} tokens, it holds "
                        f"{val_shard.num_tokens:,}: fetch or make it anew.")
    return train_shards, val_shard


def split_slices(tokens: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """[n * seq_len + 1] int32 tokens -> inputs [n, seq_len] int32 and targets [n, seq_len] int64, shifted by one."""
    return tokens[:-1].view(-1, seq_len), tokens[1:].long().view(-1, seq_len)


class TrainLoader:
    """This rank's pieces of batch 0, 1, 2, ...: (inputs [n, piece_len] int32, targets [n, piece_len] int64) per step.

    Of the global batch's num_pieces pieces, rank r takes the r-th run of num_pieces / world.size. A thread makes
    the next batch and another reads the next shard; what goes wrong in either is raised as soon as it is known.
    first_batch: the one to begin with; shards that lie before it are not read.
    """
    def __init__(self, shards: list[Shard], config: Config, world: World, first_batch: int = 0):
        while first_batch >= shards[0].num_batches(config.batch_tokens) and len(shards) > 1:
            first_batch -= shards[0].num_batches(config.batch_tokens)
            shards = shards[1:]
        self.shards, self.config, self.world = shards, config, world
        self.pinned = world.device.type == "cuda"  # a fresh thread would pin memory in a context of GPU 0
        self.pool = ThreadPoolExecutor(2, initializer=torch.cuda.set_device if self.pinned else None,
                                       initargs=(world.device,) if self.pinned else ())
        self.source = self._batches(first_batch)
        self.pending = self.pool.submit(next, self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        tokens = self.pending.result()
        self.pending = self.pool.submit(next, self.source)
        return split_slices(tokens.to(self.world.device, non_blocking=True), self.config.piece_len)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self, first_batch: int) -> Iterator[Tensor]:
        """first_batch: of the first shard."""
        batch_tokens, rank_tokens = self.config.batch_tokens, self.config.batch_tokens // self.world.size
        vocab_size = self.config.vocab_size
        upcoming = self.pool.submit(self.shards[0].read, self.shards[0].num_tokens, vocab_size)
        for shard, following in zip(self.shards, [*self.shards[1:], None]):
            tokens = upcoming.result()
            if following is not None:
                upcoming = self.pool.submit(following.read, following.num_tokens, vocab_size)
            for batch in range(first_batch, shard.num_batches(batch_tokens)):
                if upcoming.done():
                    upcoming.result()  # a shard that cannot be read stops the run now, not when its turn comes
                start = batch * batch_tokens + self.world.rank * rank_tokens
                out = torch.from_numpy(tokens[start:start + rank_tokens + 1].astype(np.int32))
                yield out.pin_memory() if self.pinned else out
            first_batch = 0
        raise UserError(f"training data ended with {self.shards[-1].path}: the schedule needs more shards.")


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: functions of the step in progress, counted from 0

def lr_factor(step: int, config: Config) -> float:
    """Flat, then linear down to final_lr_factor at the end of the run."""
    progress = step / config.num_iterations
    if progress < config.flat_fraction:
        return 1.0
    remaining = (1 - progress) / (1 - config.flat_fraction)
    return remaining * 1.0 + (1 - remaining) * config.final_lr_factor


def muon_momentum(step: int, config: Config) -> float:
    warmed = min(step / config.momentum_warmup_steps, 1)
    return (1 - warmed) * config.momentum_start + warmed * config.momentum_end


def num_window_blocks(step: int, config: Config) -> int:
    """Long window in blocks: grows fast, rests in the middle of the run, grows again [@Gusarich, modded-nanogpt]."""
    p = step / config.num_iterations
    window = config.max_window * (4 * p ** 3 - 6 * p ** 2 + 3 * p)
    return max(1, math.ceil(window / BLOCK_SIZE))


# ----------------------------------------------------------------------------------------------------------------------
# The run: clock, log, steps, validation

class Clock:
    """Training time. Stopped: compilation, warm-up, validation and checkpoints.

    Both switches wait for the GPU and for all ranks, if they change anything.
    """
    def __init__(self, world: World, seconds: float = 0.0):
        self.world, self.seconds, self.started = world, seconds, None

    def _wait_for_all(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        if self.world.size > 1:
            dist.barrier()

    def start(self) -> None:
        if self.started is None:
            self._wait_for_all()
            self.started = time.perf_counter()

    def stop(self) -> None:
        if self.started is not None:
            self._wait_for_all()
            self.seconds = self.read_seconds()
            self.started = None

    def read_seconds(self) -> float:
        """Without waiting for the GPU: exact only while stopped."""
        return self.seconds + (time.perf_counter() - self.started if self.started is not None else 0.0)


class Log:
    """logs/<run id>.txt through one handle, written by rank 0 alone and flushed line by line."""
    def __init__(self, run_id: str, world: World):
        self.file, self.path = None, Path("logs") / f"{run_id}.txt"
        if world.rank == 0:
            try:
                self.path.parent.mkdir(exist_ok=True)
                self.file = open(self.path, "w", buffering=1)
            except OSError as error:
                raise UserError(f"{self.path} cannot be written ({error.strerror}): make room for it.") from error

    def __call__(self, text: str, console: bool = False) -> None:
        if self.file is not None:
            try:
                print(text, file=self.file)
            except OSError as error:
                self.file = None
                raise UserError(f"{self.path} cannot be written any more ({error.strerror}): make room.") from error
            if console:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()


class Watch:
    """Stops all ranks together where a loss or an averaged gradient is not finite, and no step waits for it.

    The device keeps the first step at which each cause was not finite. Every WATCH_EVERY steps the ranks agree on it;
    the answer travels to the host during the next steps and is read before the next one is asked for.
    """
    def __init__(self, causes: list[str], world: World):
        self.causes, self.world, self.answer = causes, world, torch.full((len(causes),), math.inf)
        self.first_bad = self.answer.to(world.device, copy=True)
        nothing = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        self.arrived = torch.cuda.Event() if world.device.type == "cuda" else nothing

    def note(self, step: int, values: list[Tensor]) -> None:
        """values: what the step that made `step` complete ones left, a zero-dim fp32 tensor a cause."""
        bad = torch.stack(values).isfinite().logical_not()
        self.first_bad.masked_fill_(bad & self.first_bad.isinf(), step)  # a number, so that nothing waits for a copy
        if step % WATCH_EVERY == 0:
            self.read()
            self.ask()

    def ask(self) -> None:
        agreed = self.first_bad.clone()
        if self.world.size > 1:
            dist.all_reduce(agreed, dist.ReduceOp.MIN)
        self.answer = agreed.to("cpu", non_blocking=True)
        self.arrived.record()

    def read(self) -> None:
        """Look at the last answer. Raises UserError, the same on all ranks, if anything was not finite."""
        self.arrived.synchronize()
        steps = self.answer.tolist()
        if min(steps) < math.inf:
            raise UserError(f"the {self.causes[steps.index(min(steps))]} of step {min(steps):.0f} was not finite: "
                            f"lower the learning rates, check the data.")


class StopSignals:
    """Between enter and exit, SIGTERM and SIGINT are noted in `received`, for the run to end when a step is complete.

    Whoever sees to it sets `seen`. If nobody does for STOP_LIMIT_S, as when the step waits for a rank that died, the
    process exits: a thread counts, since Python's own handlers do not run while a collective waits.
    """
    def __init__(self):
        self.received, self.seen = 0, threading.Event()

    def __enter__(self) -> "StopSignals":
        read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        signal.set_wakeup_fd(self.write_end)
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._count, args=(read_end,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self.seen.set()
        os.close(self.write_end)  # which ends the thread

    def _note(self, number: int, _) -> None:
        self.received = number

    def _count(self, read_end: int) -> None:
        while os.read(read_end, 1):  # a byte a signal; open to the end, as a signal to a closed pipe prints an error
            if not self.seen.wait(STOP_LIMIT_S):
                print(f"error: no step ended within {STOP_LIMIT_S} s of a signal to stop: go on from the last "
                      f"checkpoint.", file=sys.stderr, flush=True)
                os._exit(1)
        os.close(read_end)


def force_to_disk(path: Path) -> None:
    """A file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def load_part(path: Path, mmap: bool = False) -> dict:
    """One rank's part of a checkpoint, on the CPU. Raises whatever zipfile, pickle and torch raise if it is torn."""
    if zipfile.ZipFile(path).testzip() is not None:  # torch.load does not compare the check sums
        raise zipfile.BadZipFile
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


class Checkpoints:
    """checkpoints/<run id>/step_000125/rank_3.pt: with the other ranks', all that a run needs to go on bit for bit.

    Each rank writes its shards of the parameters and their optimizer states, its random states, the completed steps,
    which are the place in the data, the clock and the seed; and what made it, so that no other script, constants, data
    or number of ranks goes on with it. The last two are kept. Ranks agree through gloo, on the host: no GPU is waited
    for. None of this exists in a run without checkpoints.
    """
    def __init__(self, config: Config, source: str, shards: list[Shard], run_id: str, seed: int, world: World):
        self.config, self.seed, self.world, self.last = config, seed, world, None
        self.signals, self.stopped_by = StopSignals(), 0
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.folder = Path("checkpoints") / self._gather(run_id)[0]
        self.made_by = {name: json.dumps(value, default=str) for name, value in asdict(config).items()}
        del self.made_by["data_dir"]  # the shards may have moved
        self.made_by |= {"number of ranks": world.size, "version of torch": str(torch.__version__),
                         "script": hashlib.sha256(source.strip().encode()).hexdigest(),
                         "set of shards": [(shard.path.name, shard.num_tokens) for shard in shards]}
        self.saved_at = time.monotonic()
        problem = None
        try:
            self.folder.parent.mkdir(exist_ok=True)
        except OSError as error:
            problem = f"{self.folder} cannot be written ({error.strerror}): make room for it."
        self._agree(problem)

    def _gather(self, value) -> list:
        """The values of all ranks."""
        values = [value] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def _agree(self, problem: str | None) -> None:
        """Raises UserError on all ranks if one has a problem."""
        problems = [found for found in self._gather(problem) if found]
        if problems:
            raise UserError(problems[0])

    def due(self, step: int) -> bool:
        """Whether all ranks are to save after `step` steps. `stopped_by` is the signal that any received."""
        limit = 60 * self.config.checkpoint_minutes
        told = self._gather((self.signals.received, 0 < limit <= time.monotonic() - self.saved_at))
        self.stopped_by = max(number for number, _ in told)
        if self.stopped_by:
            self.signals.seen.set()
        every = self.config.checkpoint_every
        return self.stopped_by > 0 or any(late for _, late in told) or (every > 0 and step % every == 0)

    def save(self, step: int, seconds: float, optimizer: Optimizer) -> None:
        """After `step` steps and `seconds` of training. Raises UserError on all ranks if one cannot write."""
        folder, name = self.folder / f"step_{step:06d}", f"rank_{self.world.rank}.pt"
        content = dict(made_by=self.made_by, step=step, seconds=seconds, seed=self.seed, rng=torch.get_rng_state(),
                       gpu_rng=torch.cuda.get_rng_state() if self.world.device.type == "cuda" else None,
                       shards={name: bank.shard.to("cpu", copy=True) for name, bank in optimizer.banks.items()},
                       optimizer=optimizer.state_dict())
        unfinished, problem = folder / f"{name}.unfinished", None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(content, unfinished)
            force_to_disk(unfinished)
            os.replace(unfinished, folder / name)
            for renamed_in in (folder, self.folder, self.folder.parent):
                force_to_disk(renamed_in)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
            problem = (f"{folder / name} cannot be written ({str(error).splitlines()[0]}; "
                       f"{shutil.disk_usage(self.folder.parent).free / 2**20:,.0f} MiB are free): make room for it.")
            unfinished.unlink(missing_ok=True)
        self._agree(problem)
        self.last, self.saved_at = folder, time.monotonic()
        for old in sorted(self.folder.glob("step_*"))[:-2]:
            (old / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other ranks' parts are still in it, or another rank was faster
                old.rmdir()

    def read(self, where: str) -> dict:
        """This rank's part of a checkpoint: of the folder of one, or of the last one in a run's folder.

        Raises UserError on all ranks where one's part is missing or torn, or was made with anything else than this run.
        """
        folder, name, problem, saved = Path(where), f"rank_{self.world.rank}.pt", None, {}
        if not folder.name.startswith("step_"):  # the last one that all ranks completed
            folder = min(self._gather(max((part.parent for part in folder.glob(f"step_*/{name}")), default=folder)))
        path = folder / name
        try:
            saved = load_part(path)
            theirs = saved["made_by"]
            other = [name for name, value in self.made_by.items() if theirs.get(name) != value]
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            problem = (f"{path} cannot be read ({error.strerror}): RESUME_FROM needs a run's folder or checkpoint, and "
                       f"its number of ranks.")
        except Exception:
            before = max((other for other in folder.parent.glob("step_*") if other < folder), default=None)
            problem = (f"{path} is torn or damaged: "
                       f"{f'RESUME_FROM={before} goes on from the one before it' if before else 'none is before it'}.")
        else:
            if other:
                problem = (f"{path} was made with another {other[0]} ({theirs.get(other[0])!s:.80}, here "
                           f"{self.made_by[other[0]]!s:.80}): go on with the script at the head of its run's log, the "
                           f"same preset, shards, torch and number of ranks.")
        self._agree(problem)
        self.last, self.seed = folder, saved["seed"]
        return saved

    def restore(self, saved: dict, optimizer: Optimizer) -> None:
        """Parameters, optimizer states and random states, as they were."""
        for name, bank in optimizer.banks.items():
            bank.shard.copy_(saved["shards"][name])
            bank.start_gather()
            bank.finish_gather()
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if saved["gpu_rng"] is not None:
            torch.cuda.set_rng_state(saved["gpu_rng"])


def as_window(blocks: int, device: torch.device) -> Tensor:
    """A tensor, so that a growing window does not recompile; filled on the device, so that nothing waits."""
    return torch.full((), blocks, dtype=torch.int32, device=device)


def train_step(model: GPT, optimizer: Optimizer, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
    """One step on this rank's pieces [n, T]: gradients averaged over pieces (in fp32) and ranks, then applied.

    Returns the mean training loss of these pieces, on the device.
    """
    window_blocks = as_window(num_window_blocks(step, model.config), inputs.device)
    losses: list[Tensor] = []
    means: dict[nn.Parameter, Tensor] = {}
    for n, (ids, target) in enumerate(zip(inputs, targets), start=1):
        loss = model(ids, target, window_blocks)
        loss.backward()
        losses.append(loss.detach())
        if len(inputs) > 1:
            for p in optimizer.params:
                # A running mean leaves equal gradients exactly equal, which a sum divided at the end does not.
                means[p] = means[p].lerp_(p.grad.float(), 1 / n) if n > 1 else p.grad.float()
                p.grad = None
    while means:
        p, mean = means.popitem()
        p.grad = mean.to(p.dtype)
    optimizer.step(step)
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(model: GPT, shard: Shard, step: int, world: World) -> float:
    """Mean loss in nats over the first val_tokens targets after `step` completed steps, the same on all ranks.

    Sequences are dealt out to the ranks in turn. Raises UserError if the loss is not finite.
    """
    config = model.config
    tokens = torch.from_numpy(shard.read(config.val_tokens + 1, config.vocab_size).astype(np.int32))
    inputs, targets = split_slices(tokens, config.val_piece_len)
    window_blocks = as_window(num_window_blocks(step, config), world.device)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for i in range(world.rank, len(inputs), world.size):
        total += model(inputs[i].to(world.device), targets[i].to(world.device), window_blocks)
    if world.size > 1:
        dist.all_reduce(total)
    val_loss = total.item() / len(inputs)
    if not math.isfinite(val_loss):
        raise UserError(f"validation loss is {val_loss} after {step} steps: lower the learning rates, check the data.")
    return val_loss


def warm_up(model: GPT, optimizer: Optimizer, world: World) -> None:
    """Compile and run everything on random tokens, then put every parameter and every optimizer state back.

    The tokens come from a generator of their own; steps are spread over the schedule, so that windows differ.
    """
    config = model.config
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    rng = np.random.default_rng(world.rank)

    def random_slices(num_slices: int, seq_len: int) -> tuple[Tensor, Tensor]:
        ids = rng.integers(config.vocab_size, size=num_slices * seq_len + 1, dtype=np.int32)
        return split_slices(torch.from_numpy(ids).to(world.device), seq_len)

    for i in range(config.warmup_steps):
        step = i * config.num_iterations // config.warmup_steps
        train_step(model, optimizer, *random_slices(config.num_pieces // world.size, config.piece_len), step)
    with torch.no_grad():
        ids, targets = random_slices(1, config.val_piece_len)
        model(ids[0], targets[0], as_window(1, world.device))
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])


def report_scalars(model: GPT) -> str:
    """What the learned scalars of the run's ideas have come to, as fields of a validation line."""
    values = {"smear_lambda": model.smear_lambda.item()} if model.config.smear_mtp else {}
    values |= {f"backout_lambda_{i}": value for i, value in enumerate(model.backout_lambdas.tolist())}
    return " ".join(f"{name}:{value:.6f}" for name, value in values.items())


def train(model: GPT, optimizer: Optimizer, loader: TrainLoader, val_shard: Shard, world: World, log: Log,
          checkpoints: Checkpoints | None = None, first_step: int = 0, seconds: float = 0.0) -> float:
    """The loop: num_iterations steps, and a validation before the first, every val_every and after the last.

    first_step, seconds: what is done already. Returns the final validation loss. Raises UserError, on all ranks, where
    something is not finite or a signal ended the run.
    """
    config, clock = model.config, Clock(world, seconds)
    watch = Watch(["loss", *(f"{name} gradient" for name in optimizer.banks)], world)
    progress = tqdm(total=config.num_iterations, initial=first_step, unit="step",
                    disable=None if world.rank == 0 else True)
    for step in range(first_step, config.num_iterations + 1):  # the last pass only validates
        finished = step == config.num_iterations
        validates = finished or step % config.val_every == 0
        saves = checkpoints is not None and step > first_step and (checkpoints.due(step) or finished)
        if validates or saves:
            clock.stop()
            watch.ask()
            watch.read()
        if saves:
            checkpoints.save(step, clock.seconds, optimizer)
            if checkpoints.stopped_by:
                raise UserError(f"{signal.Signals(checkpoints.stopped_by).name} ended the run after step {step}.")
        if validates:
            val_loss = evaluate(model, val_shard, step, world)
            train_ms = 1000 * clock.seconds
            log(f"step:{step}/{config.num_iterations} val_loss:{val_loss:.6f} train_time:{train_ms:.0f}ms "
                f"step_avg:{train_ms / max(step, 1):.2f}ms {report_scalars(model)}", console=True)
        if finished:
            break
        clock.start()
        loss = train_step(model, optimizer, *next(loader), step)
        watch.note(step + 1, [loss, *(bank.grad_sum for bank in optimizer.banks.values())])
        train_ms = 1000 * clock.read_seconds()  # no synchronisation for a log line: the GPU may be a few steps behind
        log(f"step:{step + 1}/{config.num_iterations} train_time:{train_ms:.0f}ms "
            f"step_avg:{train_ms / (step + 1):.2f}ms")
        progress.update()
    progress.close()
    return val_loss


# ----------------------------------------------------------------------------------------------------------------------
# Start and end

def find_world(config: Config) -> World:
    """This process's place among those that torchrun started (one, without it). Raises UserError if it cannot work."""
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if config.num_pieces % size:
        raise UserError(f"{size} processes cannot share {config.num_pieces} pieces of a batch equally: start a divisor "
                        f"of {config.num_pieces}, or make more pieces by a smaller micro_seq_len.")
    if not torch.cuda.is_available():
        if config.preset != "tiny":
            raise UserError(f"preset {config.preset} needs a CUDA GPU and none is visible: on a CPU, use preset tiny.")
        return World(rank, size, torch.device("cpu"))
    if local_size > torch.cuda.device_count():
        raise UserError(f"{local_size} processes but {torch.cuda.device_count()} visible GPUs: "
                        f"give --nproc_per_node the number of GPUs.")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return World(rank, size, device)


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, with a word of warning if it is not the kind this script is tuned for."""
    if device.type == "cpu":
        return "CPU process"
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    note = "" if hopper else " (not a Hopper GPU, for which this script is tuned: it should run, but slower)"
    return torch.cuda.get_device_name(device) + note


def peak_memory(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB resident"
    return (f"{torch.cuda.max_memory_allocated() // 2**20} MiB allocated, "
            f"{torch.cuda.max_memory_reserved() // 2**20} MiB reserved")


def draw_seed(config: Config, world: World) -> int:
    """The configured seed, or one from the system that all ranks share."""
    drawn = int.from_bytes(os.urandom(4), "little") if config.seed is None else config.seed
    seed = torch.tensor(drawn, device=world.device)
    if world.size > 1:
        dist.broadcast(seed, src=0)
    return int(seed)


def compile_model(model: GPT, whole: bool, **options) -> None:
    """In place. whole: one graph, the fastest steps. Otherwise blocks compile once per kind and share the code.

    Between blocks autograd then adds the gradients of x00, x01 and the value embeddings in passes of their own, rounded
    to bf16 at each: 8 % more bytes for a quarter of the time to compile (records/bench/README.md).
    """
    options = dict(dynamic=False, fullgraph=True) | options
    if whole:
        model.compile(**options)
        return
    # A kind of block is a graph for training and one for validation, all of one function.
    torch._dynamo.config.recompile_limit = 2 * len(model.blocks)
    model.embed, model.finish = (torch.compile(method, **options) for method in (model.embed, model.finish))
    for block in model.blocks:
        block.compile(**options)


class CompileProgress:
    """Says on rank 0's console which graph is compiling, and how long each took.

    What a kernel's first launch tunes is not announced: it is part of the seconds so far.
    """
    def __init__(self, world: World):
        self.shown, self.number, self.began, self.started = world.rank == 0, 0, time.perf_counter(), 0.0

    def __enter__(self) -> None:
        if self.shown:
            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)

    def __exit__(self, *_) -> None:
        if self.shown:
            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)
            if self.number:  # none on a CPU
                print(f"warm-up: {self.number} compilations, {time.perf_counter() - self.began:.0f} s", flush=True)

    def _start(self, _) -> None:
        self.number, self.started = self.number + 1, time.perf_counter()
        print(f"warm-up: compilation {self.number} ... ", end="", flush=True)

    def _end(self, _) -> None:
        now = time.perf_counter()
        print(f"{now - self.started:.0f} s ({now - self.began:.0f} s so far)", flush=True)


def describe_run(config: Config, train_shards: list[Shard], seed: int, world: World) -> str:
    """Versions, hardware, every constant, data and seed, for the head of the log."""
    try:
        nvidia_smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    except OSError:
        nvidia_smi = "no nvidia-smi on this machine"
    synthetic = train_shards[0].path.name.startswith("synthetic")
    return "\n".join((
        f"Running Python {sys.version}",
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}",
        f"on {world.size} x {device_name(world.device)}",
        nvidia_smi,
        *(f"{name} = {value!r}" for name, value in asdict(config).items()),
        f"seed drawn or given: {seed}",
        f"training shards: {train_shards[0].path} to {train_shards[-1].path}"
        + (" (SYNTHETIC tokens: times count, losses mean nothing)" if synthetic else ""),
    ))


def main(config: Config, resume_from: str | None = None) -> float:
    """Train as `config` says and return the final validation loss. Raises UserError for what the user can put right.

    resume_from: the folder of a checkpoint, or of a run whose last one is meant, to go on from.
    """
    source, run_id = Path(__file__).read_text(), str(uuid.uuid4())
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    world = find_world(config)
    train_shards, val_shard = find_shards(config)
    on_gpu = world.device.type == "cuda"
    if world.size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=world.device if on_gpu else None)
    seed, checkpoints, saved, resumed = draw_seed(config, world), None, dict(step=0, seconds=0.0), ""
    if config.checkpoint_every or config.checkpoint_minutes or resume_from:
        checkpoints = Checkpoints(config, source, [*train_shards, val_shard], run_id, seed, world)
    if resume_from:
        saved = checkpoints.read(resume_from)
        seed = saved["seed"]
        resumed = f"\nresumed from {checkpoints.last}: not eligible as a timed record"
    torch.manual_seed(seed)
    log = Log(run_id, world)
    if world.rank == 0:
        log("\n".join((source, "=" * 100, describe_run(config, train_shards, seed, world) + resumed, "=" * 100)))
        print(f"preset {config.preset}, {world.size} x {device_name(world.device)}, log {log.path}" + resumed,
              flush=True)
    with world.device:
        model = GPT(config)
    compiled = partial(torch.compile, dynamic=False, fullgraph=True) if on_gpu else lambda function: function
    if on_gpu:
        torch._inductor.config.coordinate_descent_tuning = config.coordinate_descent_tuning
        # By default a custom autograd Function keeps its graph out of the cache: a warm start differentiates it anew.
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        compile_model(model, whole=config.coordinate_descent_tuning)
    if world.size > 1:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)
    optimizer = Optimizer(model, config, world, compiled)
    with CompileProgress(world):
        warm_up(model, optimizer, world)
    if resume_from:
        checkpoints.restore(saved, optimizer)
    loader = TrainLoader(train_shards, config, world, first_batch=saved["step"])
    try:
        with checkpoints.signals if checkpoints else contextlib.nullcontext():
            val_loss = train(model, optimizer, loader, val_shard, world, log, checkpoints, saved["step"],
                             saved["seconds"])
    except UserError as error:
        last = checkpoints and checkpoints.last
        way_on = f"RESUME_FROM={last} goes on from the last checkpoint." if last else "No checkpoint was kept."
        with contextlib.suppress(UserError):  # of the log's disk
            log(f"stopped: {error} {way_on}")
        raise UserError(f"{error} {way_on}") from None
    finally:
        loader.close()
    log(f"peak memory: {peak_memory(world.device)}", console=True)
    if world.size > 1:
        dist.destroy_process_group()  # only here: after an error on one rank it would wait for the others
    return val_loss


def choose_config(arguments: list[str]) -> Config:
    """The preset named on the command line (medium by default), with its data where DATA_PATH says."""
    preset = arguments[0] if arguments else "medium"
    if len(arguments) > 1 or preset not in PRESETS:
        raise UserError(f"{' '.join(arguments)!r} is not a preset: choose one of {', '.join(PRESETS)}; "
                        f"every other constant is edited at the top of the script.")
    config = PRESETS[preset]
    return replace(config, data_dir=os.environ.get("DATA_PATH") or config.data_dir)


if __name__ == "__main__":
    try:
        main(choose_config(sys.argv[1:]), resume_from=os.environ.get("RESUME_FROM"))
    except UserError as error:
        sys.exit(f"error: {error}")
