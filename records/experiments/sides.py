"""The sides of the experiment on what Smear-MTP does, as presets SIDE_SEED, and those of the sweep before it."""
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from train_gpt_medium import GPT, GROUPS, LAYERS, ON_CPU, AdamW, Config, Group, Stage, norm, smear, start


class Detached(GPT):
    """No gradient reaches the previous latent: it is mixed in, and learns nothing of the next token."""
    def finish(self, x: Tensor, middle: Tensor, ids: Tensor) -> Tensor:
        x = self.backout_lambdas[0] * norm(x) + self.backout_lambdas[1] * norm(middle)
        return torch.cat((x[:1], x[1:] + self.smear_lambda * x[:-1].detach()))


class Fixed(GPT):
    """Smear-MTP with a scalar that is not learned; its Config has smear_mtp=False."""
    def finish(self, x: Tensor, middle: Tensor, ids: Tensor) -> Tensor:
        return smear(super().finish(x, middle, ids), torch.tensor(FIXED_LAMBDAS[self.config.side], device=x.device))


FIXED_LAMBDAS = {"E": 0.008, "F": -0.05}  # 0.008: the record's, at its end
MODELS = {"A": GPT, "B": GPT, "C": Detached, "D": GPT, "E": Fixed, "F": Fixed}
SLOW_LAMBDA = tuple(group._replace(roles=tuple(role for role in group.roles if role != "smear_lambda"))
                    for group in GROUPS) + (Group("smear", ("smear_lambda",), AdamW(lr=0.0015)),)


@dataclass(frozen=True, kw_only=True)
class Experiment(Config):
    """Adds the side."""
    side: str = "A"

    def make_model(self) -> GPT:
        return MODELS[self.side](self)


def stages(factor: float) -> tuple[Stage, ...]:
    """The window widens once, in the middle of the run. factor: of all learning rates."""
    return (Stage(until=0.5, num_slices=2, window=256, lr_factor=factor),
            Stage(num_slices=2, window=512, lr_factor=factor))


BYTES = partial(Experiment, **ON_CPU.keywords | dict(
    num_heads=2, layers=LAYERS[:4] + LAYERS[-4:], backout_from=5, num_iterations=240, momentum_warmup_steps=60,
    val_tokens=2**13, val_every=24))

PRESETS = {f"sweep_{factor}_{seed}": partial(BYTES, smear_mtp=False, seed=seed, preset=f"sweep_{factor}_{seed}",
                                             stages=stages(factor))
           for factor in (0.25, 0.5, 1.0, 2.0) for seed in (100, 101, 102)}

if __name__ == "__main__":
    start(PRESETS)
