"""Model of a step on 8 H100s: the record's plain version and this trainer's, part by part.

    python records/tools/bench/step_model.py        the table of README.md; needs no GPU

Work is counted: FLOPs from the model's shapes, bytes of kernels from kernel_bytes.json, what travels from the trainer's
own Optimizer. Rates are assumptions, each with its source below. Only the plain version's sum can be held against a
measured one.
"""
import json
from collections import Counter
from pathlib import Path

import torch

from plan import memory, tgm

CONFIG, RANKS = tgm.Config(), 8
PUBLISHED_MS = {"window 14": 248.9, "mean": 248.0}  # of the record's published log

# Rates. The first four are what the published log's steps fit (GEMMs and attention within 2 % at all windows).
GEMM_TFLOPS = 665  # of 989; 44 % of the peak over the whole step
ATTENTION_TFLOP, ATTENTION_TFLOPS, ATTENTION_LAYER_MS = 10.0, 350, 0.35  # tiles at window 14; a layer's floor
MEMORY_TBS = 3.0  # of 3.35
REST_MS = 1.0
RECORD_TAIL_MS = 11.0  # optimizer and communication, exposed: what remains of the log's step
OWN_GEMM_SHARE = 0.94  # of the library's speed: what bench.py --kernels must show, or the MLP product goes
NVLINK_GBS = 330  # bus bandwidth of NCCL's all-to-all and all-gather between 8 H100s, large messages
COLLECTIVE_MS = 0.03  # latency of one


def memory_ms(num_bytes: float) -> float:
    return num_bytes / (1e9 * MEMORY_TBS)


def tail_ms() -> float:
    """The first bank is packed, then all travel twice. Updates, some 2.7 ms, and other packing run meanwhile."""
    sizes = [bank.buffer.nbytes for bank in memory.optimizer_of(CONFIG, RANKS).banks.values()]
    return memory_ms(2 * sizes[0]) + 2 * sum(COLLECTIVE_MS + size * (RANKS - 1) / RANKS / (NVLINK_GBS * 1e6)
                                             for size in sizes)


def gemm_tflop(config: tgm.Config) -> dict[str, float]:
    """TFLOP of forward and backward of a slice by GEMM: for each weight and token one product, and two backward."""
    weights = Counter()
    with torch.device("meta"):
        for name, p in config.make_model().named_parameters():
            weights[name.split(".")[-1]] += p.numel()
    shares = {"QKV": weights["qkvo"] * 3 / 4, "O": weights["qkvo"] / 4, "MLP": weights["mlp_fc"] + weights["mlp_proj"],
              "head": weights["lm_head"]}
    return {name: 3 * 2 * config.seq_len * number / 1e12 for name, number in shares.items()}


def parts() -> dict[str, tuple[float, float]]:
    """Milliseconds by part at window 14: the plain version, this trainer."""
    counted = json.loads(Path(__file__).with_name("kernel_bytes.json").read_text())
    twin, fast = (1e9 * (counted[side]["fused"] + counted[side]["extern"]) for side in ("twin", "fast"))
    T, C, hidden = CONFIG.seq_len, CONFIG.model_dim, CONFIG.mlp_factor * CONFIG.model_dim
    # mlp_up and mlp_down_grad, two of the MLP's six products, count as products. In bf16 both read weights and [T, C];
    # mlp_up writes post, mlp_down_grad reads it and writes its gradient.
    fast -= 2 * len(CONFIG.layers) * (2 * (hidden * C + T * C) + 3 * T * hidden)
    tflop, num_attention = gemm_tflop(CONFIG), sum(layer.attention for layer in CONFIG.layers)
    head, slower = tflop.pop("head"), tflop["MLP"] / 3 * (1 / OWN_GEMM_SHARE - 1)
    attention = 1e3 * ATTENTION_TFLOP / ATTENTION_TFLOPS + num_attention * ATTENTION_LAYER_MS
    return {
        "products of the body": tuple(1e3 * (sum(tflop.values()) + more) / GEMM_TFLOPS for more in (0, slower)),
        "products of the head": (1e3 * head / GEMM_TFLOPS,) * 2,
        "attention": (attention,) * 2,
        "kernels bound by memory": (memory_ms(twin), memory_ms(fast)),
        "optimizer and communication, exposed": (RECORD_TAIL_MS, tail_ms()),
        "block masks and the rest": (REST_MS, REST_MS / 2),
    }


def table() -> str:
    """README.md's, and the mean step."""
    rows = parts()
    before, after = map(sum, zip(*rows.values()))
    lines = ["| part, window 14, 8xH100 | plain, ms | this trainer, ms |", "|---|---|---|"]
    lines += [f"| {name} | {ms[0]:.1f} | {ms[1]:.1f} |" for name, ms in rows.items()]
    lines += [f"| **sum** | {before:.1f} | {after:.1f} |",
              f"| published log | {PUBLISHED_MS['window 14']} | |",
              f"| the log, times the ratio of the sums | | **{PUBLISHED_MS['window 14'] * after / before:.1f}** |"]
    mean_ms = PUBLISHED_MS["mean"] * after / before
    lines += ["", f"{mean_ms:.0f} ms in the mean, {mean_ms * CONFIG.num_iterations / 6e4:.1f} minutes"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
