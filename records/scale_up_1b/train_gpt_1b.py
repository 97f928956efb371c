"""Smear-MTP scaled up: a plain transformer of 1,549,467,648 parameters on 10B tokens of FineWeb, with or without it.

The experiment beside the record of 2025-11-02: does adding the previous token's output latent still help at 1.5B
parameters? Published final validation losses: 2.7299 without, 2.7296 with Smear-MTP (README.md in this folder).

    torchrun --standalone --nproc_per_node=8 records/scale_up_1b/train_gpt_1b.py         # 1, 2 or 4 GPUs also work
    python records/scale_up_1b/train_gpt_1b.py tiny                                      # a small model on a CPU

Shards are read from the preset's `data_dir`, or from the folder named by the environment variable DATA_PATH.
Shapes: B sequences, T tokens of a sequence, C channels, H heads, D channels of a head, V rows of the tied matrix.
"""
import math
import os
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SMEAR_MTP = True  # False is the baseline of the comparison


class World(NamedTuple):
    """This process among the ranks of the run."""
    rank: int
    size: int
    device: torch.device


class UserError(Exception):
    """Something the user can put right: shown as one sentence, without a traceback."""


@dataclass(frozen=True)
class Config:
    """Every constant of a run; the defaults are the published run's."""
    preset: str = "1b"
    # data
    data_dir: str = "data/fineweb10B"
    vocab_size: int = 50257  # ids; the tied matrix has rows for a multiple of 128
    seq_len: int = 1024  # tokens
    micro_batch: int = 12  # sequences of one forward pass
    batch: int = 480  # sequences of a step
    val_tokens: int = 10_420_224  # 848 micro-batches, which 1, 2, 4 and 8 ranks share equally
    # model
    num_layers: int = 52
    num_heads: int = 12
    head_dim: int = 128
    rotary_base: float = 10_000.0
    smear_mtp: bool = SMEAR_MTP
    dtype: torch.dtype = torch.bfloat16  # of autocast and Newton-Schulz; parameters are fp32
    # AdamW, for the tied matrix and Smear-MTP's scalar: torch's own eps, no decay
    tied_lr: float = 0.0018
    scalar_lr: float = 0.015
    adam_betas: tuple[float, float] = (0.9, 0.95)
    # Muon, for the blocks' matrices
    muon_lr: float = 0.00018
    muon_momentum: float = 0.95
    # schedule, in steps
    num_iterations: int = 20_344
    cooldown_steps: int = 5_812  # the last ones
    untimed_steps: int = 10  # compilation
    val_every: int = 125
    # run
    seed: int | None = None  # None draws one, so that runs are independent samples; the log names it

    def __post_init__(self):
        if self.batch % (8 * self.micro_batch) or self.val_tokens % (8 * self.micro_tokens):
            raise UserError(f"Config: batch {self.batch} and val_tokens {self.val_tokens} must be multiples of 8 "
                            f"micro-batches of {self.micro_batch} sequences of {self.seq_len} tokens.")

    @property
    def model_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_rows(self) -> int:
        return -(-self.vocab_size // 128) * 128

    @property
    def micro_tokens(self) -> int:
        return self.micro_batch * self.seq_len


PRESETS = {config.preset: config for config in (
    Config(),
    # fp32: a CPU without AVX-512 multiplies bf16 matrices ten times slower. Narrow matrices bear a higher lr.
    Config(preset="tiny", data_dir="data/text", vocab_size=257, seq_len=128, micro_batch=2, batch=32, val_tokens=2**14,
           num_layers=4, num_heads=2, head_dim=32, dtype=torch.float32, muon_lr=0.003, num_iterations=64,
           cooldown_steps=24, val_every=16),
)}


# ----------------------------------------------------------------------------------------------------------------------
# Model

def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, H, T, D], tables [T, D / 2]; channel i of the first half turns with i of the second."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).type_as(x)


def smear(x: Tensor, smear_lambda: Tensor) -> Tensor:
    """Smear-MTP: y[t] = x[t] + lambda x[t - 1], y[0] = x[0]; [B, T, C] -> [B, T, C]."""
    return torch.cat((x[:, :1], x[:, 1:] + smear_lambda * x[:, :-1]), dim=1)


class Block(nn.Module):
    """Attention, then an MLP with relu squared. Both outputs start at zero, so that a new block changes nothing."""
    def __init__(self, config: Config):
        super().__init__()
        C = config.model_dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.mlp_in = nn.Linear(C, 4 * C, bias=False)
        self.mlp_out = nn.Linear(4 * C, C, bias=False)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = norm(x)
        q, k, v = (linear(h).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.relu(self.mlp_in(norm(x))).square())


class GPT(nn.Module):
    """The plain transformer. Initial values are drawn here: torch's own, but for the zeros in the blocks."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # One matrix [V, C] is embedding and head. With ids that do not repeat the first loss is sqrt(C) E|e|, e a row:
        # entries are uniform in +-1/sqrt(C), so E|e| is 1/sqrt(3) less 6e-5; new blocks change nothing, so the token's
        # own logit is the norm's scale times |e| and leads the others, which are N(0, 1/3), by so much that it is the
        # log of the sum (but for 1e-5); the target's is 0 in the mean. rms_norm's epsilon takes off 0.006: 22.62.
        self.tied = nn.Linear(config.model_dim, config.num_rows, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if config.smear_mtp:
            self.smear_lambda = nn.Parameter(torch.tensor(0.0))  # zero-dim: a [1] tensor would promote bf16 to fp32
        frequencies = config.rotary_base ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        theta = torch.outer(torch.arange(config.seq_len).float(), frequencies)
        self.register_buffer("cos", theta.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", theta.sin().bfloat16(), persistent=False)

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] integer, T at most seq_len -> [B, T, V] in the dtype of autocast."""
        x = F.embedding(ids, self.tied.weight)
        cos, sin = self.cos[:ids.size(1)], self.sin[:ids.size(1)]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = norm(x)
        return self.tied(smear(x, self.smear_lambda) if self.config.smear_mtp else x)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats (fp32). ids, targets: [B, T] int64."""
        with torch.autocast(ids.device.type, self.config.dtype, enabled=self.config.dtype != torch.float32):
            logits = self.logits(ids)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers: every rank updates its share of the parameters

def lr_factor(step: int, config: Config) -> float:
    """Of the step in progress, counted from 0: 1, then linear to 0 at the end of the run."""
    return min(1.0, (config.num_iterations - step) / config.cooldown_steps)


def newton_schulz(x: Tensor) -> Tensor:
    """Orthogonalise a matrix with rows <= cols, approximately, in the dtype of `x`: Muon [@kellerjordan, 2024]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x


def muon_update(w: Tensor, grad: Tensor, buf: Tensor, lr: float, momentum: float, dtype: torch.dtype) -> None:
    """One Muon step in place on a matrix [rows, cols] with rows <= cols; buf is its momentum, fp32."""
    buf.mul_(momentum).add_(grad)
    u = newton_schulz((grad + momentum * buf).to(dtype))
    w.add_(u, alpha=-lr * max(w.shape) ** 0.5)


def wide(matrix: Tensor) -> Tensor:
    """The view with rows <= cols. Muon commutes with transposition, so that both MLP matrices are of one shape."""
    return matrix if matrix.size(0) <= matrix.size(1) else matrix.mT


def average_own(grads: list[Tensor], world: World) -> Tensor:
    """Mean over ranks of one gradient of `grads`, which holds one for each rank to own, all of one shape.

    All-to-all, then sums of pairs: the same bits whatever the library, and equal gradients average to themselves.
    """
    parts = torch.stack(grads)
    if world.size > 1:
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        parts = received
        while len(parts) > 1:
            parts = (parts[0::2] + parts[1::2]) / 2
    return parts[0]


def gather_own(own: Tensor, world: World) -> list[Tensor]:
    """What every rank has for `own`, by rank."""
    gathered = [torch.empty_like(own) for _ in range(world.size)]
    if world.size > 1:
        dist.all_gather(gathered, own)
    return gathered if world.size > 1 else [own]


class Optimizer:
    """Muon for the blocks' matrices, AdamW for the tied matrix and the scalar.

    The blocks' matrices stand in groups of one for each rank, of one shape: a rank averages, updates and sends to all
    its matrix of each group and alone holds its momentum. Of the tied matrix it owns a run of rows. That is the traffic
    of an all-reduce of the gradients, and a share of Newton-Schulz (README.md counts both). The scalar is everyone's.
    """
    def __init__(self, model: GPT, config: Config, world: World):
        self.config, self.world, self.params = config, world, list(model.parameters())
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in model.blocks.parameters():
            by_shape.setdefault(wide(p).shape, []).append(p)
        assert all(len(matrices) % world.size == 0 for matrices in by_shape.values()), "a group without enough matrices"
        self.groups = [matrices[i:i + world.size] for matrices in by_shape.values()
                       for i in range(0, len(matrices), world.size)]
        self.momenta = [torch.zeros_like(wide(group[world.rank]), memory_format=torch.contiguous_format)
                        for group in self.groups]
        self.tied, self.scalars = model.tied.weight, [model.smear_lambda] if config.smear_mtp else []
        self.own_rows = self.tied.data.chunk(world.size)[world.rank]
        self.adamw = torch.optim.AdamW(
            [dict(params=[self.own_rows], base_lr=config.tied_lr), dict(params=self.scalars, base_lr=config.scalar_lr)],
            betas=config.adam_betas, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters from their gradients of step number `step` (from 0), and drop the gradients."""
        config, world, factor = self.config, self.world, lr_factor(step, self.config)
        for group, buf in zip(self.groups, self.momenta):
            grad, own = average_own([wide(p.grad) for p in group], world), wide(group[world.rank])
            muon_update(own, grad, buf, config.muon_lr * factor, config.muon_momentum, config.dtype)
            for p, updated in zip(group, gather_own(own.contiguous(), world)):
                wide(p).copy_(updated)
        self.own_rows.grad = average_own(list(self.tied.grad.chunk(world.size)), world)
        for scalar in self.scalars:
            scalar.grad = average_own([scalar.grad] * world.size, world)
        for param_group in self.adamw.param_groups:
            param_group["lr"] = param_group["base_lr"] * factor
        self.adamw.step()
        for rows, updated in zip(self.tied.data.chunk(world.size), gather_own(self.own_rows, world)):
            rows.copy_(updated)
        for p in (*self.params, self.own_rows):
            p.grad = None


# ----------------------------------------------------------------------------------------------------------------------
# Data: shards of 256 little-endian int32 (the header), then uint16 token ids

def open_shard(path: Path, config: Config, needed: int) -> np.ndarray:
    """The tokens of a shard, mapped into memory. Raises UserError if it is none or holds fewer than `needed`."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or [*header[:2]] != [20240520, 1] or path.stat().st_size != 1024 + 2 * int(header[2]):
        raise UserError(f"{path} is damaged or not a version 1 token shard: fetch or make it anew.")
    if (vocab_size := int(header[3]) or 50257) != config.vocab_size:
        raise UserError(f"{path} holds ids of a vocabulary of {vocab_size}, preset {config.preset} needs "
                        f"{config.vocab_size}: use other shards.")
    if header[2] < needed:
        raise UserError(f"{path} is too short: it holds {header[2]:,} tokens, preset {config.preset} reads {needed:,} "
                        f"of a shard at least: use longer shards.")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def find_shards(config: Config) -> tuple[list[np.ndarray], np.ndarray]:
    """The training shards in the order of their names, and the validation shard. Raises UserError."""
    train_paths, val_paths = (sorted(Path(config.data_dir).glob(f"*_{kind}_*.bin")) for kind in ("train", "val"))
    if not train_paths or len(val_paths) != 1:
        raise UserError(f"{config.data_dir} holds {len(train_paths)} training and {len(val_paths)} validation shards: "
                        f"it needs one or more, and one (data/README.md says how to get or make them).")
    return ([open_shard(path, config, config.batch * config.seq_len + 1) for path in train_paths],
            open_shard(val_paths[0], config, config.val_tokens + 1))


def split(tokens: np.ndarray, config: Config, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Tokens and the one after the last -> (ids, targets) of each micro-batch, [B, T] int64. Raises UserError."""
    if tokens.max() >= config.vocab_size:
        raise UserError(f"a shard of {config.data_dir} holds id {tokens.max()}, outside the vocabulary of "
                        f"{config.vocab_size}: fetch or make it anew.")
    tokens = torch.from_numpy(tokens.astype(np.int64)).to(device)
    shape = (-1, config.micro_batch, config.seq_len)
    return list(zip(tokens[:-1].view(shape), tokens[1:].view(shape)))


def train_batches(shards: list[np.ndarray], config: Config, world: World) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """This rank's micro-batches of step 0, 1, ...: the rank-th run of the batch. From the last shard back to the first.

    A shard's tail that does not hold a whole batch and the token after it is dropped.
    """
    batch_tokens = config.batch * config.seq_len
    own_tokens = batch_tokens // world.size
    for shard in cycle(shards):
        for start in range(0, len(shard) - batch_tokens, batch_tokens):
            own = start + world.rank * own_tokens
            yield split(shard[own:own + own_tokens + 1], config, world.device)


# ----------------------------------------------------------------------------------------------------------------------
# The run

class Clock:
    """Training time. Stopped: the first steps and validation. Both switches wait for the GPU and for all ranks."""
    def __init__(self, world: World):
        self.world, self.seconds, self.started = world, 0.0, None

    def switch(self, on: bool) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        if self.world.size > 1:
            dist.barrier()
        self.seconds, self.started = self.read_seconds(), time.perf_counter() if on else None

    def read_seconds(self) -> float:
        """Without waiting for the GPU: exact only while stopped."""
        return self.seconds + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def fields(self, num_timed: int) -> str:
        """Of a line of the log: the time and its mean over the timed steps, nan before there is one."""
        train_ms = 1000 * self.read_seconds()
        return f"train_time:{train_ms:.0f}ms step_avg:{train_ms / num_timed if num_timed > 0 else math.nan:.2f}ms"


class Log:
    """logs/<run id>.txt through one handle, written by rank 0 alone and flushed line by line."""
    def __init__(self, world: World):
        self.path, self.file = Path("logs") / f"{uuid.uuid4()}.txt", None
        if world.rank == 0:
            try:
                self.path.parent.mkdir(exist_ok=True)
                self.file = open(self.path, "w", buffering=1)
            except OSError as error:
                raise UserError(f"{self.path} cannot be written ({error.strerror}): make room for it.") from error

    def __call__(self, text: str, console: bool = False) -> None:
        if self.file is not None:
            print(text, file=self.file)
            if console:
                print(text, flush=True)


def train_step(model: GPT, optimizer: Optimizer, micro_batches: list[tuple[Tensor, Tensor]], step: int) -> None:
    """One step on this rank's micro-batches: their gradients averaged, then over the ranks, then applied."""
    means: dict[nn.Parameter, Tensor] = {}
    for n, (ids, targets) in enumerate(micro_batches, start=1):
        model(ids, targets).backward()
        for p in optimizer.params:
            # A running mean leaves equal gradients exactly equal, which a sum divided at the end does not.
            means[p] = means[p].lerp_(p.grad, 1 / n) if n > 1 else p.grad
            p.grad = None
    for p, mean in means.items():
        p.grad = mean
    optimizer.step(step)


@torch.no_grad()
def evaluate(model: GPT, shard: np.ndarray, step: int, world: World) -> float:
    """Mean loss in nats over the first val_tokens targets after `step` completed steps, the same on all ranks.

    A rank takes one run of the micro-batches. Raises UserError if the loss is not finite.
    """
    config = model.config
    own_tokens = config.val_tokens // world.size
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for ids, targets in split(shard[world.rank * own_tokens:(world.rank + 1) * own_tokens + 1], config, world.device):
        total += model(ids, targets)
    if world.size > 1:
        dist.all_reduce(total)
    val_loss = total.item() / (config.val_tokens // config.micro_tokens)
    if not math.isfinite(val_loss):
        raise UserError(f"validation loss is {val_loss} after {step} steps: lower the learning rates, check the data.")
    return val_loss


def train(model: GPT, optimizer: Optimizer, batches: Iterator, val_shard: np.ndarray, world: World, log: Log) -> float:
    """The loop: num_iterations steps, and a validation before the first, every val_every and after the last.

    Returns the final validation loss.
    """
    config, clock = model.config, Clock(world)
    for step in range(config.num_iterations + 1):  # the last pass only validates
        finished, num_timed = step == config.num_iterations, step - config.untimed_steps
        if finished or step % config.val_every == 0:
            clock.switch(on=False)
            val_loss = evaluate(model, val_shard, step, world)
            scalars = f" smear_lambda:{model.smear_lambda.item():.6f}" if config.smear_mtp else ""
            log(f"step:{step}/{config.num_iterations} val_loss:{val_loss:.6f} {clock.fields(num_timed)}{scalars}",
                console=True)
        if finished:
            return val_loss
        if clock.started is None and num_timed >= 0:
            clock.switch(on=True)
        train_step(model, optimizer, next(batches), step)
        log(f"step:{step + 1}/{config.num_iterations} {clock.fields(num_timed + 1)}")


# ----------------------------------------------------------------------------------------------------------------------
# Start and end

def find_world(config: Config) -> World:
    """This process's place among those that torchrun started (one, without it). Raises UserError if it cannot work."""
    rank, size, local_rank = (int(os.environ.get(name, default))
                              for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    num_gpus = torch.cuda.device_count()
    if size not in (1, 2, 4, 8):
        raise UserError(f"{size} processes cannot share batch and matrices equally: give --nproc_per_node 1, 2, 4, 8.")
    if not num_gpus and config.preset != "tiny":
        raise UserError(f"preset {config.preset} needs a CUDA GPU and none is visible: on a CPU, use preset tiny.")
    if num_gpus and local_rank >= num_gpus:
        raise UserError(f"there are more processes than the {num_gpus} visible GPUs: give --nproc_per_node {num_gpus}.")
    return World(rank, size, torch.device("cuda", local_rank) if num_gpus else torch.device("cpu"))


def describe_run(config: Config, num_shards: int, seed: int, hardware: str) -> str:
    """Versions, hardware, every constant, data and seed, for the head of the log."""
    return "\n".join((
        f"Running Python {sys.version}",
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}",
        f"on {hardware}",
        subprocess.run("nvidia-smi || echo none on this machine", shell=True, capture_output=True, text=True).stdout,
        *(f"{name} = {value!r}" for name, value in asdict(config).items()),
        f"seed drawn or given: {seed}",
        f"training shards: {num_shards} in {config.data_dir}",
    ))


def main(config: Config) -> float:
    """Train as `config` says and return the final validation loss. Raises UserError for what the user can put right."""
    source = Path(__file__).read_text()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    world = find_world(config)
    train_shards, val_shard = find_shards(config)
    log, on_gpu = Log(world), world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(1)  # of matrices as narrow as tiny's: more threads wait for each other
    seed = torch.tensor(int.from_bytes(os.urandom(4), "little") if config.seed is None else config.seed,
                        device=world.device)
    if world.size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=world.device if on_gpu else None)
        dist.broadcast(seed, src=0)  # one seed, one model: nothing else needs to be sent
    torch.manual_seed(int(seed))
    hardware = f"{world.size} x {torch.cuda.get_device_name(world.device) if on_gpu else 'CPU process'}"
    log("\n".join((source, "=" * 100, describe_run(config, len(train_shards), int(seed), hardware), "=" * 100)))
    if world.rank == 0:
        print(f"preset {config.preset}, {hardware}, log {log.path}", flush=True)
    with world.device:
        model = GPT(config)
    if on_gpu:
        model.compile(dynamic=False, fullgraph=True)
    batches = train_batches(train_shards, config, world)
    val_loss = train(model, Optimizer(model, config, world), batches, val_shard, world, log)
    log(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB allocated" if on_gpu else
        f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10} MiB resident", console=True)
    if world.size > 1:
        dist.destroy_process_group()  # only here: after an error on one rank it would wait for the others
    return val_loss


def choose_config(arguments: list[str]) -> Config:
    """The preset named on the command line (1b by default), with its data where DATA_PATH says."""
    preset = arguments[0] if arguments else "1b"
    if len(arguments) > 1 or preset not in PRESETS:
        raise UserError(f"{' '.join(arguments)!r} is not a preset: choose one of {', '.join(PRESETS)}; "
                        f"every other constant is edited at the top of the script.")
    return replace(PRESETS[preset], data_dir=os.environ.get("DATA_PATH") or PRESETS[preset].data_dir)


if __name__ == "__main__":
    try:
        main(choose_config(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
