"""The optimizer step as it was when every rank updated all parameters: the reference that the trainer's must equal.

Frozen at de3f882, of one rank; schedules are the trainer's, constants the record's.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from train_gpt_medium import GPT, Config, lr_factor, muon_momentum, read_weights, write_weights

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
    w = read_weights(p, mantissa)
    w = w * (1 - lr * decay) - lr * max(1, p.size(-2) / p.size(-1)) ** 0.5 * smooth.float()
    write_weights(p, mantissa, w)


class Optimizer:
    """All parameters' updates, in the order of the record: AdamW, Muon, Snoo [@dominikkallusky, arXiv 2510.15830]."""
    def __init__(self, model: GPT, config: Config, muon_update: Callable[..., None] = muon_update):
        self.config, self.muon_update = config, muon_update
        scalars = ("skip_weights", "block_lambdas", "attn_lambdas", "smear_lambda", "backout_lambdas")
        adam_lr = {"lm_head": 1 / 320, "embeds": 0.3, **dict.fromkeys(scalars, 0.015)}
        muon_decay = {"qkvo": 0.01, "mlp_fc": 0.02, "mlp_proj": 0.02}
        by_role: dict[str, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():  # embeds, blocks.5.mlp_fc
            by_role.setdefault(name.split(".")[-1], []).append(p)
        self.params = list(model.parameters())
        # fused: states in the parameter's dtype, arithmetic in fp32, rounded to nearest.
        self.adamw = torch.optim.AdamW(
            [dict(params=by_role[role], base_lr=lr) for role, lr in adam_lr.items() if role in by_role],
            betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
        self.muon = [(p, decay, dict(momentum_buffer=torch.zeros_like(p, dtype=torch.float32),
                                     smooth=torch.zeros_like(p), mantissa=torch.zeros_like(p, dtype=torch.int16)))
                     for role, decay in muon_decay.items() for p in by_role[role]]
        self.outer = [p.detach().clone() for p in self.params]
        # Fused rounds least; on a CPU torch 2.13's fused SGD leaves bf16 parameters where they were.
        self.sgd = torch.optim.SGD(self.outer, lr=0.68, momentum=0.37, nesterov=True, fused=self.outer[0].is_cuda)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters from their gradients of step number `step` (from 0), and drop the gradients."""
        factor, as_tensor = lr_factor(step, self.config), partial(torch.tensor, dtype=torch.float64)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.adamw.step()
        for p, decay, state in self.muon:
            self.muon_update(p, p.grad, **state, momentum=as_tensor(muon_momentum(step, self.config)),
                             lr=as_tensor(0.03 * factor), decay=as_tensor(decay), smoothing=0.2)
        if step % self.config.snoo.every == 0:
            for outer, p in zip(self.outer, self.params):
                outer.grad = outer - p
            self.sgd.step()
            for outer, p in zip(self.outer, self.params):
                p.copy_(outer)
        for p in self.params:
            p.grad = None
