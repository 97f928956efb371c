"""Smear-MTP scaled up: a plain transformer of 1.5 billion parameters on 10B tokens of FineWeb, with or without it.

The experiment beside the record of 2025-11-02: does adding the previous token's output latent still help at 1.5B
parameters? Published final validation losses: 2.7299 without, 2.7296 with Smear-MTP (README.md in this folder).

    torchrun --standalone --nproc_per_node=8 records/scale_up_1b/train_gpt_1b.py           # 1, 2 or 4 GPUs also work
    torchrun --standalone --nproc_per_node=8 records/scale_up_1b/train_gpt_1b.py baseline  # without Smear-MTP
    python records/scale_up_1b/train_gpt_1b.py tiny                                        # a small model on a CPU

This file is the recipe. The machine that runs it is train_gpt_medium.py; the log holds both sources.
Shards are read from the preset's `data_dir`, or from the folder named by the environment variable DATA_PATH.
Shapes: B sequences, T tokens of a sequence, C channels, H heads, D channels of a head, V rows of the tied matrix.
"""
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_medium as tgm  # noqa: E402
from train_gpt_medium import Group, Run, Stage, main, norm  # noqa: E402, F401 (main runs this recipe too)


@dataclass(frozen=True, kw_only=True)
class Config(Run):
    """Every constant of a run; the defaults are the published run's. A slice is the micro-batch of a forward pass."""
    preset: str = "1b"
    num_iterations: int = 20_344
    stages: tuple[Stage, ...] = (Stage(num_slices=40),)
    groups: tuple[Group, ...] = field(default_factory=lambda: make_groups(muon_lr=0.00018, dtype=torch.bfloat16))
    snoo: None = None
    repeat_shards: bool = True
    kernel_warmup_steps: int = 1
    coordinate_descent_tuning: bool = False
    seq_len: int = 12 * 1024
    val_seq_len: int = 12 * 1024
    val_tokens: int = 10_420_224  # 848 micro-batches
    # model
    context_len: int = 1024  # tokens of a sequence
    num_layers: int = 52
    num_heads: int = 12
    head_dim: int = 128
    rotary_base: float = 10_000.0
    smear_mtp: bool = True
    dtype: torch.dtype = torch.bfloat16  # of autocast; parameters are fp32
    # schedule
    cooldown_steps: int = 5_812  # the last ones

    def checks(self) -> list[tuple[bool, str]]:
        return super().checks() + [
            (self.piece_len % self.context_len == 0 == self.val_piece_len % self.context_len,
             f"a forward pass of {self.piece_len} or {self.val_piece_len} tokens is no number of sequences of "
             f"{self.context_len}")]

    @property
    def model_dim(self) -> int:
        return self.num_heads * self.head_dim

    def model_inputs(self, step: int) -> dict[str, int]:
        return {}

    def make_model(self) -> "GPT":
        return GPT(self)


def lr_factor(step: int, config: Config) -> float:
    """Of the step in progress, counted from 0: 1, then linear to 0 at the end of the run."""
    return min(1.0, (config.num_iterations - step) / config.cooldown_steps)


# ----------------------------------------------------------------------------------------------------------------------
# Model

def matrix(rows: int, columns: int) -> nn.Parameter:
    """With torch's own initial values of a linear layer."""
    return nn.Parameter(torch.empty(rows, columns).uniform_(-1, 1) / columns ** 0.5)


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
        self.q, self.k, self.v = matrix(C, C), matrix(C, C), matrix(C, C)
        self.o = nn.Parameter(torch.zeros(C, C))
        self.mlp_in = matrix(4 * C, C)
        self.mlp_out = nn.Parameter(torch.zeros(4 * C, C))  # [in, out], so that both MLP matrices are of one shape

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = norm(x)
        q, k, v = (F.linear(h, w).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v, is_causal=True)
        x = x + F.linear(y.transpose(1, 2).flatten(2), self.o)
        return x + F.relu(F.linear(norm(x), self.mlp_in)).square() @ self.mlp_out


class GPT(nn.Module):
    """The plain transformer. Initial values are drawn here."""
    compiled_alone = ("forward",)  # which is all, in one graph

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # One matrix [V, C] is embedding and head. With ids that do not repeat the first loss is sqrt(C) E|e|, e a row:
        # entries are uniform in +-1/sqrt(C), so E|e| is 1/sqrt(3) less 6e-5; new blocks change nothing, so the token's
        # own logit is the norm's scale times |e| and leads the others, which are N(0, 1/3), by so much that it is the
        # log of the sum (but for 1e-5); the target's is 0 in the mean. rms_norm's epsilon takes off 0.006: 22.62.
        self.tied = matrix(-(-config.vocab_size // 128) * 128, config.model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if config.smear_mtp:
            self.smear_lambda = nn.Parameter(torch.tensor(0.0))  # zero-dim: a [1] tensor would promote bf16 to fp32
        frequencies = config.rotary_base ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        theta = torch.outer(torch.arange(config.context_len).float(), frequencies)
        self.register_buffer("cos", theta.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", theta.sin().bfloat16(), persistent=False)

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] integer, T at most context_len -> [B, T, V] in the dtype of autocast."""
        x = F.embedding(ids, self.tied)
        cos, sin = self.cos[:ids.size(1)], self.sin[:ids.size(1)]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = norm(x)
        return F.linear(smear(x, self.smear_lambda) if self.config.smear_mtp else x, self.tied)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats (fp32). ids [n] integer, targets [n] int64: sequences, one after the other."""
        with torch.autocast(ids.device.type, self.config.dtype, enabled=self.config.dtype != torch.float32):
            logits = self.logits(ids.view(-1, self.config.context_len))
        return F.cross_entropy(logits.float().flatten(0, 1), targets)

    def report(self) -> dict[str, float]:
        """The learned scalar that a validation line of the log shows."""
        return {"smear_lambda": self.smear_lambda.item()} if self.config.smear_mtp else {}


# ----------------------------------------------------------------------------------------------------------------------
# Update rules and parameter groups

@dataclass(frozen=True)
class Muon:
    """Momentum, orthogonalised in `dtype`: Muon [@kellerjordan, 2024]. It commutes with transposition."""
    lr: float  # before the schedule
    dtype: torch.dtype
    momentum: float = 0.95
    newton_schulz: tuple[tuple[float, float, float], ...] = 5 * ((3.4445, -4.7750, 2.0315),)
    unit_dims = 2  # a matrix stays whole
    compiles = True

    def hyperparameters(self, step: int, config: Config) -> dict[str, float]:
        return {"lr": self.lr * lr_factor(step, config)}

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return dict(momentum_buffer=torch.zeros_like(p))

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: Tensor) -> None:
        """In place, on batches of matrices [n, rows, cols]."""
        for p, grad, state in zip(params, grads, states):
            buf, is_tall = state["momentum_buffer"], p.size(-2) > p.size(-1)
            buf.copy_(self.momentum * buf + grad)
            u = (grad + self.momentum * buf).to(self.dtype)
            u = tgm.newton_schulz(u.mT.contiguous() if is_tall else u, self.newton_schulz)
            p.sub_(lr * max(p.shape[-2:]) ** 0.5 * (u.mT if is_tall else u).float())


@dataclass(frozen=True)
class AdamW(tgm.AdamW):
    """With this run's constants and schedule; torch's own eps, no decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def hyperparameters(self, step: int, config: Config) -> dict[str, float]:
        return {"lr": self.lr * lr_factor(step, config)}


def make_groups(muon_lr: float, dtype: torch.dtype) -> tuple[Group, ...]:
    """The parameter table. dtype: of Newton-Schulz."""
    return (
        Group("mlp", ("mlp_in", "mlp_out"), Muon(muon_lr, dtype)),
        Group("attention", ("q", "k", "v", "o"), Muon(muon_lr, dtype)),
        Group("tied", ("tied",), AdamW(lr=0.0018)),
        Group("scalar", ("smear_lambda",), AdamW(lr=0.015)),
    )


PRESETS = {  # made and checked when they are chosen
    "1b": Config,
    "baseline": partial(Config, preset="baseline", smear_mtp=False),
    # fp32: a CPU without AVX-512 multiplies bf16 matrices ten times slower. Narrow matrices bear a higher lr.
    "tiny": partial(Config, preset="tiny", data_dir="data/text", vocab_size=257, doc_token=256, context_len=128,
                    seq_len=256, val_seq_len=256, val_tokens=2**14, stages=(Stage(num_slices=16),), num_layers=4,
                    num_heads=2, head_dim=32, dtype=torch.float32, groups=make_groups(0.003, torch.float32),
                    num_iterations=64, cooldown_steps=24, val_every=16, needs_gpu=False),
}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # of matrices as narrow as tiny's: more threads wait for each other
    tgm.start(PRESETS)
