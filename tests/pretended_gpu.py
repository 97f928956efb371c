"""bench.py on a CPU, with stand-ins for all that only a GPU answers: what tests/gpu.sh --rehearse runs in its place.

    python tests/pretended_gpu.py --kernels --json FILE    # every option of bench.py that times
"""
import sys
from itertools import count, cycle
from pathlib import Path

if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(ROOT), str(ROOT / "records" / "tools" / "bench")]

import pytest
import torch
import torch.nn.functional as F

import bench
import train_gpt_medium as tgm
from helpers import CPU, small_config

FACTS = {"gpu": "none", "date": "today", "torch": "2.x"}


def pretend(patch: pytest.MonkeyPatch) -> None:
    """The clock goes on by 1 ms at every event, nothing is compiled, memory is 10, 13 and 15 GB."""
    clock = count()

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, end: "Event") -> float:
            return float(end.at - self.at)

    def attention(q, k, v, block_mask, scale, kernel_options):
        if kernel_options.get("fwd_BLOCK_M") == 64:
            raise RuntimeError("out of resource\nand more")
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=tgm.dense_mask(block_mask), scale=scale)
        return y * torch.nan if kernel_options.get("fwd_num_stages") == 1 else y

    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("synchronize", "reset_peak_memory_stats"):
        patch.setattr(torch.cuda, name, lambda: None)
    for name, gigabytes in {"memory_allocated": (10, 13), "max_memory_allocated": (15,)}.items():
        patch.setattr(torch.cuda, name, lambda answers=cycle(gigabytes): next(answers) * 10 ** 9)
    patch.setattr(torch, "compile", lambda function, **_: function)
    patch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    patch.setattr(bench, "full_size", lambda: (small_config(), CPU))
    patch.setattr(bench, "environment", lambda: FACTS)
    patch.setattr(bench, "ask_nvidia_smi", lambda fields: "1980 MHz")
    patch.setattr(bench, "flex_attention", attention)
    for name, value in dict(WARM_STEPS=2, LOAD_SECONDS=0, ROUNDS=2, BLOCK_STEPS=1).items():
        patch.setattr(bench, name, value)


if __name__ == "__main__":
    pretend(pytest.MonkeyPatch())
    bench.main(sys.argv[1:])
