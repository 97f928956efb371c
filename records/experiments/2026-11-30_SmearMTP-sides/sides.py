"""The sides of the experiment on what Smear-MTP does, as presets: SEED=0 python sides.py A."""
import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import train_gpt_medium as tgm
from train_gpt_medium import GPT, AdamW, Config, Group, norm, smear


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
                    for group in tgm.GROUPS) + (Group("smear", ("smear_lambda",), AdamW(lr=0.0015)),)


@dataclass(frozen=True, kw_only=True)
class Experiment(Config):
    """Adds the side."""
    side: str = "A"

    def make_model(self) -> GPT:
        return MODELS[self.side](self)


BYTES = partial(Experiment, **tgm.PRESETS["small"].keywords)
SIDES = {
    "A": dict(smear_mtp=False),
    "B": dict(),  # Smear-MTP as published
    "C": dict(),  # the previous latent detached
    "D": dict(groups=SLOW_LAMBDA),  # lambda at a tenth of its rate
    "E": dict(smear_mtp=False),  # lambda fixed at the record's end
    "F": dict(smear_mtp=False),  # lambda fixed below zero
}
PRESETS = {side: partial(BYTES, side=side, seed=int(os.environ.get("SEED", "0")), **changes)
           for side, changes in SIDES.items()}

if __name__ == "__main__":
    tgm.start(PRESETS)
