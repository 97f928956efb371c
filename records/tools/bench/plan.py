"""The communication plan of a training step: what the trainer's own Optimizer sends, and in which order.

    python records/tools/bench/plan.py [PRESET] [RANKS]      medium on 8 ranks unless named; needs no GPU

A bank travels twice in a step: its gradients to the ranks that own them, then its parameters to all. MB: sent one way,
padding included. unit: what ranks never divide.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import train_gpt_medium as tgm  # noqa: E402


def plan_optimizer(config: tgm.Run, num_ranks: int) -> tgm.Optimizer:
    """The Optimizer of rank 0, of meta tensors: they have shapes and dtypes and take no memory."""
    with torch.device("meta") as meta:
        return tgm.Optimizer(config.make_model(), config, tgm.World(0, num_ranks, meta))


def format_plan(config: tgm.Run, num_ranks: int) -> str:
    """A line for each bank in the order of sending, then their sum and the number of collectives."""
    banks = plan_optimizer(config, num_ranks).banks
    lines = [f"{'bank':12} {'dtype':8} {'numbers':>11} {'padding':>9} {'MB':>8}  unit"]
    for name, bank in banks.items():
        lines.append(f"{name:12} {str(bank.buffer.dtype).removeprefix('torch.'):8} "
                     f"{len(bank.buffer) - bank.padding:11} {bank.padding:9} {bank.buffer.nbytes / 1e6:8.1f}  "
                     f"{' x '.join(map(str, bank.shard.shape[1:]))}")
    lines.append(f"{'all':43} {sum(bank.buffer.nbytes for bank in banks.values()) / 1e6:8.1f}")
    return "\n".join((*lines, f"{2 * len(banks) if num_ranks > 1 else 0} collectives in a step"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", choices=tgm.PRESETS, default="medium")
    parser.add_argument("ranks", nargs="?", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.ranks < 1:
        parser.error(f"argument ranks: {arguments.ranks} is not a number of processes")
    print(format_plan(tgm.PRESETS[arguments.preset](), arguments.ranks))
