"""Model of a step on 8 H100s: the record's plain version and this trainer's, part by part.

    python records/bench/step_model.py        the tables of README.md; no GPU, under a second

Work is counted: FLOPs from shapes, bytes from kernel_bytes.json; what travels agrees with the plan of the trainer's
Optimizer (a test holds them together). Rates are assumptions, each with its source below. Only the plain version's sum
can be held against a measured one.
"""
import json
from pathlib import Path
from typing import NamedTuple

T, C, LAYERS, ATTENTION_LAYERS, V, V_HEAD, TABLES, RANKS, STEPS = 65536, 1024, 16, 15, 50257, 50304, 7, 8, 5535
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
PACKED_GBS = 1000 * MEMORY_TBS


class Bucket(NamedTuple):
    """A bank on its way: bytes of the whole, what its update costs its owner."""
    name: str
    num_bytes: float
    pack_bytes: float  # moved before it is sent; none where the bank is one parameter
    update_ms: float


def newton_schulz_tflop(num_matrices: int, rows: int, cols: int, symmetric: bool) -> float:
    """Five steps; the kernel computes 36 of 64 tiles of the two symmetric products."""
    kept = 36 / 64 if symmetric else 1.0
    return num_matrices * 5 * 2 * (kept * rows * rows * cols + kept * rows ** 3 + rows * rows * cols) / 1e12


def buckets() -> list[Bucket]:
    """The banks in the order of sending, on 8 ranks."""
    def update_ms(tflop: float, numbers: float, bytes_per_number: float) -> float:
        return 1e3 * tflop / NEWTON_SCHULZ_TFLOPS + numbers / RANKS * bytes_per_number / (1e9 * MEMORY_TBS)

    mlp, qkvo, head, tables = LAYERS * 4 * C * C, 64 * C * C, V_HEAD * C, TABLES * V * C
    # Averaging reads 8 parts and writes one, which the watch reads (20 bytes a number in bf16, 40 in fp32).
    # Muon reads and writes momentum, smoothed update, mantissa and weight, and once more the direction (34 bytes);
    # AdamW gradient, two states and the parameter (14 bytes in bf16, 28 in fp32).
    per_matrix = newton_schulz_tflop(1, C, 4 * C, True)
    return [
        Bucket("mlp_fc", 2 * mlp, 4 * mlp, update_ms(0, mlp, 20)),  # waits for mlp_proj: one batch
        Bucket("mlp_proj", 2 * mlp, 4 * mlp, update_ms(2 * LAYERS / RANKS * per_matrix, mlp, 20 + 2 * 34)),
        Bucket("qkvo", 2 * qkvo, 4 * qkvo,
               update_ms(newton_schulz_tflop(64 // RANKS, C, C, True), qkvo, 20 + 34)),
        Bucket("lm_head", 4 * head, 0, update_ms(0, head, 40 + 28)),
        Bucket("scalars", 4 * 1024, 4 * 1024, update_ms(0, 1024, 68)),
        Bucket("embeds", 2 * tables, 0, update_ms(0, tables, 20 + 14)),
    ]


def simulate(banks: list[Bucket]) -> dict[str, float]:
    """The step's tail on one rank, in ms: one stream of kernels, one of collectives, each in order of issue."""
    def travel_ms(bank: Bucket) -> float:
        return COLLECTIVE_MS + bank.num_bytes * (RANKS - 1) / RANKS / (NVLINK_GBS * 1e6)

    compute = network = 0.0
    arrived = []
    for bank in banks:
        compute += bank.pack_bytes / (1e6 * PACKED_GBS)
        network = max(network, compute) + travel_ms(bank)
        arrived.append(network)
    updated = []
    for bank, arrival in zip(banks, arrived):
        compute = max(compute, arrival) + bank.update_ms
        updated.append(compute)
    updated[0] = updated[1]  # the MLP's banks are updated together
    for bank, ready in zip(banks, updated):
        network = max(network, ready) + travel_ms(bank)
    return {"tail": network, "collectives": 2 * sum(map(travel_ms, banks)),
            "updates": sum(bank.update_ms for bank in banks)}


def parts() -> dict[str, tuple[float, float]]:
    """Milliseconds by part at window 14: the plain version, this trainer."""
    counted = json.loads(Path(__file__).with_name("kernel_bytes.json").read_text())
    body = 3 * (2 * T * C * 4 * C * ATTENTION_LAYERS + 2 * 2 * T * C * 4 * C * LAYERS) / 1e12
    head = 3 * 2 * T * C * V_HEAD / 1e12
    own_gemm = 2 * 2 * T * C * 4 * C * LAYERS / 1e12  # mlp_up and mlp_down_grad
    own_gemm_bytes = 2 * LAYERS * (T * C + 4 * C * C + T * 4 * C) + 2 * LAYERS * (T * C + 4 * C * C + 2 * T * 4 * C)
    pointwise = {}
    for side in ("twin", "fast"):
        total = sum(counted[side][phase][kind] for phase in ("forward", "backward") for kind in ("fused", "extern"))
        pointwise[side] = (total - (own_gemm_bytes / 1e9 if side == "fast" else 0)) / MEMORY_TBS
    attention = 1e3 * ATTENTION_TFLOP / ATTENTION_TFLOPS + ATTENTION_LAYERS * ATTENTION_LAYER_MS
    return {
        "products of the body": (1e3 * body / GEMM_TFLOPS,
                                 1e3 * (body - own_gemm + own_gemm / OWN_GEMM_SHARE) / GEMM_TFLOPS),
        "products of the head": (1e3 * head / GEMM_TFLOPS,) * 2,
        "attention": (attention,) * 2,
        "kernels bound by memory": (pointwise["twin"], pointwise["fast"]),
        "optimizer and communication, exposed": (RECORD_TAIL_MS, simulate(buckets())["tail"]),
        "block masks and the rest": (REST_MS, REST_MS / 2),
    }


def tables() -> str:
    """Both tables of README.md."""
    rows = parts()
    before, after = (sum(ms[side] for ms in rows.values()) for side in (0, 1))
    lines = ["| part, window 14, 8xH100 | plain, ms | this trainer, ms |", "|---|---|---|"]
    lines += [f"| {name} | {ms[0]:.1f} | {ms[1]:.1f} |" for name, ms in rows.items()]
    lines += [f"| **sum** | {before:.1f} | {after:.1f} |",
              f"| published log | {PUBLISHED_MS['window 14']} | |",
              f"| the log, times the ratio of the sums | | **{PUBLISHED_MS['window 14'] * after / before:.1f}** |",
              "", "| bank | MB | travels, ms each way | its update, ms |", "|---|---|---|---|"]
    for bank in buckets():
        travel = COLLECTIVE_MS + bank.num_bytes * (RANKS - 1) / RANKS / (NVLINK_GBS * 1e6)
        lines.append(f"| {bank.name} | {bank.num_bytes / 1e6:.1f} | {travel:.2f} | {bank.update_ms:.2f} |")
    tail = simulate(buckets())
    lines.append(f"| **all** | {sum(bank.num_bytes for bank in buckets()) / 1e6:.1f} | {tail['collectives'] / 2:.2f} | "
                 f"{tail['updates']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
    before, after = (sum(ms[side] for ms in parts().values()) for side in (0, 1))
    mean_ms = PUBLISHED_MS["mean"] * after / before
    print(f"\nmean step {mean_ms:.0f} ms, {mean_ms * STEPS / 6e4:.1f} minutes")
