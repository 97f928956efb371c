"""Model of a step on 8 H100s: the record's plain version and this trainer's, part by part.

    python records/tools/bench/step_model.py        the tables of README.md; needs no GPU

Work is counted: FLOPs from the model's shapes, bytes of kernels from kernel_bytes.json, what travels from the trainer's
own Optimizer (plan.py). Rates are assumptions, each with its source below. Only the plain version's sum can be held
against a measured one.
"""
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from plan import plan_optimizer, tgm

CONFIG, RANKS = tgm.Config(), 8
PUBLISHED_MS = {"window 14": 248.9, "mean": 248.0}  # of the record's published log

# Rates. The first four are what the published log's steps fit (GEMMs and attention within 2 % at all windows).
GEMM_TFLOPS = 665  # of 989; 44 % of the peak over the whole step
ATTENTION_TFLOP, ATTENTION_TFLOPS, ATTENTION_LAYER_MS = 10.0, 350, 0.35  # tiles at window 14; a layer's floor
MEMORY_TBS = 3.0  # of 3.35
REST_MS = 1.0
RECORD_TAIL_MS = 11.0  # optimizer and communication, exposed: what remains of the log's step
OWN_GEMM_SHARE = 0.94  # of the library's speed: what bench.py --kernels must show, or the MLP product goes
NEWTON_SCHULZ_TFLOPS = 300  # unbatched products of 1024 rows; a batch should do better
NVLINK_GBS = 330  # bus bandwidth of NCCL's all-to-all and all-gather between 8 H100s, large messages
COLLECTIVE_MS = 0.03  # latency of one


class Message(NamedTuple):
    """A bank on its way: bytes of the whole, and what it costs its owner once it has arrived."""
    name: str
    num_bytes: float
    pack_bytes: float  # moved before it is sent; none where the bank is one parameter
    update_ms: float


def newton_schulz_tflop(num_matrices: int, rows: int, cols: int) -> float:
    """Five steps; the kernel computes 36 of 64 tiles of the two symmetric products."""
    kept = 36 / 64
    return num_matrices * 5 * 2 * (kept * rows * rows * cols + kept * rows ** 3 + rows * rows * cols) / 1e12


def memory_ms(num_bytes: float) -> float:
    return num_bytes / (1e9 * MEMORY_TBS)


def update_ms(rule: tgm.Muon | tgm.AdamW, shards: list[torch.Tensor]) -> float:
    """Of a group's shards."""
    if isinstance(rule, tgm.AdamW):  # reads gradient, two states and parameter, writes all but the first
        return memory_ms(7 * sum(shard.nbytes for shard in shards))
    # Muon reads and writes momentum, smoothed update, mantissa and weight, and once more the direction.
    tflop = newton_schulz_tflop(sum(map(len, shards)), *sorted(shards[0].shape[1:]))
    return 1e3 * tflop / NEWTON_SCHULZ_TFLOPS + memory_ms(34 * sum(shard.numel() for shard in shards))


def messages() -> list[list[Message]]:
    """The banks by group, in the order of sending. A group is updated when its last bank has arrived."""
    optimizer, groups = plan_optimizer(CONFIG, RANKS), []
    names = iter(optimizer.banks)
    for rule, _, banks in optimizer.groups:
        # Averaging reads a part from each rank and writes one, which the watch reads.
        costs = [memory_ms((RANKS + 2) * bank.shard.nbytes) for bank in banks]
        costs[-1] += update_ms(rule, [bank.shard for bank in banks])
        packed = [len(bank.params) > 1 or bank.padding > 0 for bank in banks]
        groups.append([Message(next(names), bank.buffer.nbytes, 2 * bank.buffer.nbytes * is_packed, cost)
                       for bank, is_packed, cost in zip(banks, packed, costs)])
    return groups


def travel_ms(message: Message) -> float:
    return COLLECTIVE_MS + message.num_bytes * (RANKS - 1) / RANKS / (NVLINK_GBS * 1e6)


def simulate(groups: list[list[Message]]) -> dict[str, float]:
    """The step's tail on one rank, in ms: one stream of kernels, one of collectives, each in order of issue."""
    everything = sum(groups, [])
    compute = network = 0.0
    arrived = []
    for message in everything:
        compute += memory_ms(message.pack_bytes)
        network = max(network, compute) + travel_ms(message)
        arrived.append(network)
    updated = []
    for group in groups:
        for message in group:
            compute = max(compute, arrived.pop(0)) + message.update_ms
        updated += [compute] * len(group)
    for message, ready in zip(everything, updated):
        network = max(network, ready) + travel_ms(message)
    return {"tail": network, "collectives": 2 * sum(map(travel_ms, everything)),
            "updates": sum(message.update_ms for message in everything)}


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
    T, C, hidden = CONFIG.seq_len, CONFIG.model_dim, CONFIG.mlp_factor * CONFIG.model_dim
    num_layers, num_attention = len(CONFIG.layers), sum(layer.attention for layer in CONFIG.layers)
    *body, head = gemm_tflop(CONFIG).values()
    own_gemm = gemm_tflop(CONFIG)["MLP"] / 3  # mlp_up and mlp_down_grad are two of six products
    # bf16: both read weights and [T, C]; mlp_up writes post, mlp_down_grad reads it and writes its gradient.
    own_gemm_bytes = 2 * num_layers * (2 * (hidden * C + T * C) + 3 * T * hidden)
    pointwise = {side: sum(counted[side][phase][kind] for phase in ("forward", "backward")
                           for kind in ("fused", "extern")) for side in ("twin", "fast")}
    pointwise["fast"] -= own_gemm_bytes / 1e9
    attention = 1e3 * ATTENTION_TFLOP / ATTENTION_TFLOPS + num_attention * ATTENTION_LAYER_MS
    return {
        "products of the body": (1e3 * sum(body) / GEMM_TFLOPS,
                                 1e3 * (sum(body) - own_gemm + own_gemm / OWN_GEMM_SHARE) / GEMM_TFLOPS),
        "products of the head": (1e3 * head / GEMM_TFLOPS,) * 2,
        "attention": (attention,) * 2,
        "kernels bound by memory": (memory_ms(1e9 * pointwise["twin"]), memory_ms(1e9 * pointwise["fast"])),
        "optimizer and communication, exposed": (RECORD_TAIL_MS, simulate(messages())["tail"]),
        "block masks and the rest": (REST_MS, REST_MS / 2),
    }


def tables() -> str:
    """Both tables of README.md, and the mean step."""
    rows = parts()
    before, after = map(sum, zip(*rows.values()))
    lines = ["| part, window 14, 8xH100 | plain, ms | this trainer, ms |", "|---|---|---|"]
    lines += [f"| {name} | {ms[0]:.1f} | {ms[1]:.1f} |" for name, ms in rows.items()]
    lines += [f"| **sum** | {before:.1f} | {after:.1f} |",
              f"| published log | {PUBLISHED_MS['window 14']} | |",
              f"| the log, times the ratio of the sums | | **{PUBLISHED_MS['window 14'] * after / before:.1f}** |",
              "", "| bank | MB | travels, ms each way | its update, ms |", "|---|---|---|---|"]
    groups = messages()
    for message in sum(groups, []):
        lines.append(f"| {message.name} | {message.num_bytes / 1e6:.1f} | {travel_ms(message):.2f} | "
                     f"{message.update_ms:.2f} |")
    tail, num_bytes = simulate(groups), sum(message.num_bytes for message in sum(groups, []))
    lines.append(f"| **all** | {num_bytes / 1e6:.1f} | {tail['collectives'] / 2:.2f} | {tail['updates']:.2f} |")
    mean_ms = PUBLISHED_MS["mean"] * after / before
    lines += ["", f"mean step {mean_ms:.0f} ms, {mean_ms * CONFIG.num_iterations / 6e4:.1f} minutes"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
