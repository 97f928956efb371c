"""The optimizer step as it was when every gradient was all-reduced and every rank updated all of AdamW: the reference
that the trainer's must equal. Frozen at de3f882; schedules are the trainer's, constants the record's.
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from train_gpt_medium import GPT, Config, World, lr_factor, muon_momentum

# One row per Newton-Schulz step: a, b, c of X <- aX + (bA + cA^2)X [@YouJiacheng, modded-nanogpt].
NEWTON_SCHULZ_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(g: Tensor) -> Tensor:
    """Orthogonalise matrices [..., rows, cols] approximately, in the dtype of `g` throughout [@kellerjordan, 2024]."""
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        A = x @ x.mT
        x = a * x + (b * A + (c * A) @ A) @ x
    return x.mT if g.size(-2) > g.size(-1) else x


def join_mantissa(upper: Tensor, mantissa: Tensor) -> Tensor:
    """fp32 numbers from their upper 16 bits (bf16) and lower 16 bits (int16). int32 arithmetic runs on a CPU too."""
    return ((upper.view(torch.int16).int() << 16) | (mantissa.int() & 0xFFFF)).view(torch.float32)


def split_mantissa(w: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (upper 16 bits as bf16: truncated, not rounded; lower 16 bits as int16)."""
    bits = w.view(torch.int32)
    return (bits >> 16).short().view(torch.bfloat16), bits.short()


def muon_update(p: Tensor, grad: Tensor, momentum_buffer: Tensor, smooth: Tensor, mantissa: Tensor, momentum: Tensor,
                lr: Tensor, decay: Tensor, smoothing: float) -> None:
    """One Muon step, in place, on a matrix or batch of matrices [..., rows, cols] [@snimu, modded-nanogpt].

    p, grad, smooth: the model's dtype. momentum_buffer: fp32. mantissa: int16, lower half of a bf16 p; unused if p is
    fp32. momentum, lr, decay: zero-dim fp64 tensors on the CPU, so that schedules do not recompile.
    """
    fresh = (1 - momentum) * grad.float()
    momentum_buffer.copy_(momentum * momentum_buffer + fresh)
    u = newton_schulz((momentum * momentum_buffer + fresh).to(p.dtype))
    c = torch.tensor(smoothing, dtype=smooth.dtype)
    smooth.copy_(c * smooth + (1 - c) * u)
    w = p if p.dtype == torch.float32 else join_mantissa(p, mantissa)
    w = w * (1 - lr * decay) - lr * max(1, p.size(-2) / p.size(-1)) ** 0.5 * smooth.float()
    if p.dtype == torch.float32:
        p.copy_(w)
    else:
        upper, lower = split_mantissa(w)
        p.copy_(upper)
        mantissa.copy_(lower)


class Muon:
    """Muon on the blocks' matrices, each updated by one rank and then sent to all.

    params: (parameter, decay) pairs in the same order on every rank; the i-th belongs to rank i % world.size, which
    alone holds its state: momentum (fp32), smoothed update (the parameter's dtype), mantissa (int16).
    """
    def __init__(self, params: list[tuple[nn.Parameter, float]], smoothing: float, world: World,
                 update: Callable[..., None] = muon_update):
        self.params, self.smoothing, self.world, self.update = params, smoothing, world, update
        self.state = {
            i: dict(momentum_buffer=torch.zeros_like(p, dtype=torch.float32), smooth=torch.zeros_like(p),
                    mantissa=torch.zeros_like(p, dtype=torch.int16))
            for i, (p, _) in enumerate(params) if i % world.size == world.rank
        }

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        as_tensor = partial(torch.tensor, dtype=torch.float64)
        for i, state in self.state.items():
            p, decay = self.params[i]
            self.update(p, p.grad, **state, momentum=as_tensor(momentum), lr=as_tensor(lr), decay=as_tensor(decay),
                        smoothing=self.smoothing)
        if self.world.size > 1:
            for i, (p, _) in enumerate(self.params):
                dist.broadcast(p.data, src=i % self.world.size)


class Snoo:
    """Step-K Nesterov outer optimizer, on every rank [@dominikkallusky, Snoo, arXiv 2510.15830]."""
    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float):
        self.params = params
        self.outer = [p.detach().clone() for p in params]
        # Fused rounds least; on a CPU torch 2.13's fused SGD leaves bf16 parameters where they were.
        self.sgd = torch.optim.SGD(self.outer, lr=lr, momentum=momentum, nesterov=True, fused=self.outer[0].is_cuda)

    @torch.no_grad()
    def step(self) -> None:
        for outer, p in zip(self.outer, self.params):
            outer.grad = outer - p
        self.sgd.step()
        self.sgd.zero_grad(set_to_none=True)
        for outer, p in zip(self.outer, self.params):
            p.copy_(outer)


def average_over_ranks(grad: Tensor, world_size: int) -> None:
    """Replace `grad` by its mean over ranks, summed in fp32 by pairs, rounded once to its own dtype."""
    assert world_size & (world_size - 1) == 0, "pairs need a power of two"
    flat = F.pad(grad.flatten(), (0, -grad.numel() % world_size))
    received = torch.empty_like(flat)
    dist.all_to_all_single(received, flat)
    parts = received.view(world_size, -1).float()
    while parts.size(0) > 1:
        parts = parts[0::2] + parts[1::2]
    dist.all_gather_into_tensor(flat, (parts[0] / world_size).to(grad.dtype))
    grad.copy_(flat[:grad.numel()].view_as(grad))


class Optimizer:
    """All parameters' updates, in the order of the record: gradients averaged over ranks, AdamW, Muon, Snoo."""
    def __init__(self, model: GPT, config: Config, world: World, muon_update: Callable[..., None] = muon_update):
        self.config, self.world = config, world
        scalars = ("skip_weights", "block_lambdas", "attn_lambdas", "smear_lambda", "backout_lambdas")
        adam_lr = {"lm_head": 1 / 320, "embeds": 0.3, **dict.fromkeys(scalars, 0.015)}
        muon_decay = {"qkvo": 0.01, "mlp_fc": 0.02, "mlp_proj": 0.02}
        by_role: dict[str, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():  # embeds, blocks.5.mlp_fc
            role, *rest = name.removeprefix("blocks.").split(".")
            by_role.setdefault(rest[0] if role.isdigit() else role, []).append(p)
        self.params = list(model.parameters())
        # fused: states in the parameter's dtype, arithmetic in fp32, rounded to nearest.
        self.adamw = torch.optim.AdamW(
            [dict(params=by_role[role], base_lr=lr) for role, lr in adam_lr.items() if role in by_role],
            betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
        self.muon = Muon([(p, decay) for role, decay in muon_decay.items() for p in by_role[role]],
                         0.2, world, muon_update)
        self.snoo = Snoo(self.params, lr=0.68, momentum=0.37)

    def step(self, step: int) -> None:
        """Update all parameters from their gradients of step number `step` (from 0), and drop the gradients."""
        if self.world.size > 1:
            for p in self.params:
                average_over_ranks(p.grad, self.world.size)
        factor = lr_factor(step, self.config)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.adamw.step()
        self.muon.step(0.03 * factor, muon_momentum(step, self.config))
        if step % self.config.snoo.every == 0:
            self.snoo.step()
        for p in self.params:
            p.grad = None
