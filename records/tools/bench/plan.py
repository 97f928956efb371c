"""The communication plan of a training step: what the trainer's own Optimizer sends, and in which order.

    python records/tools/bench/plan.py [PRESET] [RANKS]      medium on 8 ranks unless named; needs no GPU

A bank travels twice in a step: its gradients to the ranks that own them, then its parameters to all. MB: sent one way,
padding included. unit: what ranks never divide.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "preflight")]
import memory  # noqa: E402
import train_gpt_medium as tgm  # noqa: E402


def format_plan(config: tgm.Run, num_ranks: int) -> str:
    """A line for each bank in the order of sending, their sum, the number of collectives, and banks full of padding."""
    optimizer = memory.optimizer_of(config, num_ranks)
    lines = [f"{'bank':12} {'dtype':8} {'numbers':>11} {'padding':>9} {'MB':>8}  unit"]
    for name, bank in optimizer.banks.items():
        lines.append(f"{name:12} {str(bank.buffer.dtype).removeprefix('torch.'):8} "
                     f"{len(bank.buffer) - bank.padding:11} {bank.padding:9} {bank.buffer.nbytes / 1e6:8.1f}  "
                     f"{' x '.join(map(str, bank.shard.shape[1:]))}")
    lines.append(f"{'all':43} {sum(bank.buffer.nbytes for bank in optimizer.banks.values()) / 1e6:8.1f}")
    lines.append(f"{2 * len(optimizer.banks) if num_ranks > 1 else 0} collectives in a step")
    return "\n".join(lines + memory.padded_banks(optimizer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", choices=tgm.PRESETS, default="medium")
    parser.add_argument("ranks", nargs="?", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.ranks < 1:
        parser.error(f"argument ranks: {arguments.ranks} is not a number of processes")
    print(format_plan(tgm.PRESETS[arguments.preset](), arguments.ranks))
