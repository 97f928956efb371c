"""What a change to the trainer costs or wins: two models side by side on one GPU, and kernel by kernel.

    python records/tools/bench/bench.py    # the trainer against its plain twin, one slice, window 14
    bench.py --windows all --json ab.json    # all six windows that stand for the run
    bench.py --sides ours,baseline --profile smear    # and a profile of each side
    bench.py --diff smear.baseline.json smear.ours.json    # kernels gained and lost; no GPU
    bench.py --kernels            # each hand-written kernel against a library's or plain version
    bench.py --optimizer          # a rank's step against the frozen optimizer's, alone and of 8
    bench.py --sweep-attention    # FlexAttention's block sizes, warps and stages
    bench.py --choose FILE        # the script's two dictionaries of them, from a sweep's results

With --json, what is measured lies in the file as it comes, so that a killed run leaves it.
Without a GPU the first command counts instead of timing: FLOPs, saved activations, registers, bytes per kernel.
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention.flex_attention import flex_attention

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import plain_optimizer  # noqa: E402
import plain_twin  # noqa: E402
import train_gpt_medium as tgm  # noqa: E402
from stages import write_json  # noqa: E402
from step_model import gemm_tflop  # noqa: E402

# Long windows, in blocks, that stand for the run, and the share of its steps that each stands for.
WINDOW_WEIGHTS = {3: .055, 7: .074, 11: .130, 14: .481, 17: .130, 23: .129}
SIDES = ("ours", "plain", "baseline")  # the baseline is the record without Smear-MTP
DATA_SEED = 77  # of the first hundred, the slice whose attention at window 14 comes closest to the run's 10.0 TFLOP
WARM_STEPS, LOAD_SECONDS = 10, 5  # the load brings clocks and temperature to where a run holds them
ROUNDS, BLOCK_STEPS = 4, 5  # each round is the blocks A B B A
HEAD_START = 10**7  # cycles that the GPU sleeps before a block, about 5 ms: launches are then not what is timed
PROFILED_STEPS = 3
NOISE = 0.005  # differences below this share of a step are noise
KERNEL_BYTES = ROOT / "records" / "tools" / "bench" / "kernel_bytes.json"

BODY, HEAD = "GEMMs of the body", "GEMM of the head"
# The first pattern found in a kernel's name decides. Inductor names a fused kernel after all operations in it, so one
# that gathers an embedding and also mixes it counts as embeddings. Sorts serve masks as well as embedding gradients.
GROUP_PATTERNS = {
    "attention": r"^triton_tem_.*flex_attention",  # its sum of o * do is a kernel of its own, and elementwise
    "cross-entropy": r"cross_entropy|softmax|nll_loss",
    "embeddings": r"embedding",
    BODY: r"mlp_gemm_kernel|gemm|nvjet|cutlass|sm90_xmma|splitK",
    "masks and the rest": r"(?i)cumsum|sort|bitwise|memcpy|memset",
    "elementwise and norms": r"^triton_|elementwise|reduce_kernel",
}

# The dictionaries of the script that a sweep chooses, and their windows
SWEPT_WINDOWS = {"LONG_WINDOW_KERNEL": 14, "SHORT_WINDOW_KERNEL": 7}  # in the middle of the run
# Forward: BLOCK_M, BLOCK_N, stages, warps. Backward: BLOCK_M1, BLOCK_N1, BLOCK_M2, BLOCK_N2, stages, warps.
FORWARD_BLOCKS = ((128, 128, 2, 8), (128, 128, 1, 8), *((128, 64, stages, warps) for stages in (2, 3, 4)
                  for warps in (4, 8)), (64, 64, 3, 4), (64, 128, 3, 4))
BACKWARD_BLOCKS = (*((64, 64, 64, 64, stages, 4) for stages in (2, 3, 4)), (64, 128, 128, 64, 2, 8),
                   (64, 128, 128, 64, 3, 8), (32, 128, 128, 32, 3, 8))


# ----------------------------------------------------------------------------------------------------------------------
# What is measured: data like the run's, weights unlike the initial ones

def real_looking_ids(num_tokens: int, config: tgm.Config, seed: int) -> Tensor:
    """[num_tokens] int32: Zipf ids in documents of FineWeb's lengths, each beginning with config.doc_token.

    Uniformly random ids would have neither documents nor embedding rows that many tokens share.
    """
    rng = np.random.default_rng(seed)
    num_documents = num_tokens // 32 + 1  # no document is shorter than 32
    lengths = 398 * np.exp(0.88 * rng.standard_normal(num_documents))
    long = rng.random(num_documents) < 0.01
    lengths[long] = 6000 * (1 + rng.pareto(1.2, long.sum()))
    starts = np.cumsum(np.clip(lengths, 32, 130_000).astype(np.int64)) - int(np.clip(lengths[0], 32, 130_000))
    words = rng.permutation(np.delete(np.arange(config.vocab_size, dtype=np.int32), config.doc_token))
    frequency = 1 / np.arange(1, len(words) + 1)
    ids = words[rng.choice(len(words), num_tokens, p=frequency / frequency.sum())]
    ids[starts[starts < num_tokens]] = config.doc_token
    return torch.from_numpy(ids)


def as_window(blocks: int, device: torch.device) -> Tensor:
    """The model's window_blocks."""
    return torch.tensor(blocks, dtype=torch.int32, device=device)


def one_slice(config: tgm.Config, device: torch.device) -> tuple[Tensor, Tensor]:
    inputs, targets = tgm.split_pieces(real_looking_ids(config.seq_len + 1, config, DATA_SEED), config.seq_len)
    return inputs[0].to(device), targets[0].to(device)


@torch.no_grad()
def leave_initial_values(model: nn.Module) -> None:
    """Zeros become N(0, 0.02), since zero matrices run up to 13 % faster; no scalar stays at its first 0 or 1."""
    for name, p in model.named_parameters():
        if "lambda" in name or name == "skip_weights":
            p += 0.1 * torch.randn_like(p)
        else:
            p.copy_(torch.where(p == 0, 0.02 * torch.randn_like(p), p))


class Side(NamedTuple):
    name: str
    model: nn.Module


def make_sides(names: Iterable[str], config: tgm.Config, device: torch.device) -> list[Side]:
    """The named models, all with the same weights."""
    torch.manual_seed(0)
    sides = []
    with device:
        ours = tgm.GPT(config)
        leave_initial_values(ours)
        for name in names:
            model = ours
            if name == "plain":
                model = plain_twin.GPT(config)
                plain_twin.copy_weights(ours, model)
            elif name == "baseline":
                model, weights = tgm.GPT(replace(config, smear_mtp=False)), ours.state_dict()
                model.load_state_dict({key: weights[key] for key in model.state_dict()})
            sides.append(Side(name, model))
    return sides


# ----------------------------------------------------------------------------------------------------------------------
# Timing on a GPU

def record(forward: Callable, backward: Callable | None = None) -> list[torch.cuda.Event]:
    """Events before and after forward(), and after backward(its result) if there is one."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3 if backward else 2)]
    events[0].record()
    result = forward()
    events[1].record()
    if backward:
        backward(result)
        events[2].record()
    return events


def step(model: nn.Module, ids: Tensor, targets: Tensor, window: Tensor) -> list[torch.cuda.Event]:
    """Forward and backward of a slice."""
    events = record(lambda: model(ids, targets, window), Tensor.backward)
    model.zero_grad(set_to_none=True)
    return events


def interleave(calls: dict[str, Callable[[], list]], rounds: int, block: int) -> dict[str, np.ndarray]:
    """Milliseconds [round, call, phase] by name, in blocks of calls in the order A B B A, so that drift cancels."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name in (*calls, *reversed(calls)):
            torch.cuda._sleep(HEAD_START)
            recorded = [calls[name]() for _ in range(block)]
            torch.cuda.synchronize()
            times[name] += [[a.elapsed_time(b) for a, b in pairwise(events)] for events in recorded]
    return {name: np.array(rows).reshape(rounds, 2 * block, -1) for name, rows in times.items()}


def warm_up(calls: dict[str, Callable[[], list]]) -> None:
    """Compile everything, then some seconds of load."""
    interleave(calls, rounds=1, block=WARM_STEPS // 2)
    started = time.perf_counter()
    while time.perf_counter() - started < LOAD_SECONDS:
        interleave(calls, rounds=1, block=BLOCK_STEPS)


def spread(ms: np.ndarray) -> dict[str, float]:
    return dict(zip(("median", "lower_quartile", "upper_quartile"), np.quantile(ms, (0.5, 0.25, 0.75)).tolist()))


def ask_nvidia_smi(fields: str) -> str:
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    try:
        done = subprocess.run(["nvidia-smi", f"--id={gpu}", f"--query-gpu={fields}", "--format=csv,noheader"],
                              capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def clocks_under(call: Callable) -> str:
    """Clocks and power while the GPU works through calls queued just before."""
    for _ in range(BLOCK_STEPS):
        call()
    state = ask_nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")
    torch.cuda.synchronize()
    return state


def step_memory(model: nn.Module, ids: Tensor, targets: Tensor, window: Tensor) -> dict[str, float]:
    """GB above what lay on the card before the step: both models do, and neither is part of the other's step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = model(ids, targets, window)
    saved = torch.cuda.memory_allocated() - before
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    model.zero_grad(set_to_none=True)
    return {"saved_gb": saved / 1e9, "peak_gb": peak / 1e9}


def compare_sides(sides: list[Side], ids: Tensor, targets: Tensor, window_blocks: int) -> dict:
    """The protocol at one window: warm steps, sustained load, then the rounds; prints a row per side."""
    window = as_window(window_blocks, ids.device)
    calls = {side.name: partial(step, side.model, ids, targets, window) for side in sides}
    warm_up(calls)
    before = clocks_under(calls[sides[0].name])
    times = interleave(calls, ROUNDS, BLOCK_STEPS)
    after = clocks_under(calls[sides[0].name])
    rows = {}
    for side in sides:
        ms = times[side.name]
        rows[side.name] = {"forward_ms": spread(ms[..., 0]), "backward_ms": spread(ms[..., 1]),
                           "sum_ms": spread(ms.sum(-1)), **step_memory(side.model, ids, targets, window)}
        forward_ms, backward_ms, sum_ms, saved_gb, peak_gb = rows[side.name].values()
        numbers = (forward_ms["median"], backward_ms["median"], *sum_ms.values(), saved_gb, peak_gb)
        print(f"{window_blocks:6d} {side.name:>9}", *(f"{number:9.2f}" for number in numbers), flush=True)
    by_round = np.divide(*(np.median(times[side.name].sum(-1), axis=1) for side in sides))
    ratio = float(np.divide(*(rows[side.name]["sum_ms"]["median"] for side in sides)))
    print(f"{'':6} {sides[0].name}/{sides[1].name} {ratio:.4f}, by round {by_round.min():.4f} to {by_round.max():.4f}; "
          f"GPU before: {before}; after: {after}")
    return {"sides": rows, "ratio": ratio, "ratio_by_round": by_round.tolist(), "gpu_before": before,
            "gpu_after": after}


def emulated_world(size: int, device: torch.device) -> tgm.World:
    """Rank 0 of `size`, of which the others do not exist: torch's fake process group moves nothing and never waits."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    return tgm.World(0, size, device)


def optimizer_call(optimizer, grads: list[Tensor], step: int) -> list[torch.cuda.Event]:
    for p, grad in zip(optimizer.params, grads):
        p.grad = grad.clone()
    return record(partial(optimizer.step, step))


def time_optimizers(config: tgm.Config, device: torch.device, save: Callable[[dict], None]) -> None:
    """An inner step of the trainer's optimizer and of the frozen one, on one rank alone and on one of eight.

    The eight are emulated: everything a rank computes, nothing of what travels. GB: states and what a step adds.
    """
    compiled, results = partial(torch.compile, dynamic=False, fullgraph=True), {}
    print(f"{'ranks':>6} {'optimizer':>9}", *(f"{title:>9}" for title in ("ms", "25 %", "75 %", "states", "peak")))
    for size in (1, 8):
        world, calls, gigabytes = emulated_world(size, device), {}, {}
        for name in ("ours", "frozen"):
            (side,) = make_sides(("ours",), config, device)
            before = torch.cuda.memory_allocated()
            optimizer = (tgm.Optimizer(side.model, config, world, compiled) if name == "ours" else
                         plain_optimizer.Optimizer(side.model, config, world, compiled(plain_optimizer.muon_update)))
            grads = [0.01 * torch.randn_like(p) for p in optimizer.params]
            calls[name] = partial(optimizer_call, optimizer, grads, 1)  # an inner step
            calls[name]()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            calls[name]()
            grad_bytes = sum(grad.nbytes for grad in grads)
            gigabytes[name] = {"states_gb": (held - before - grad_bytes) / 1e9,
                               "peak_gb": (torch.cuda.max_memory_allocated() - held) / 1e9}
        warm_up(calls)
        rows = {name: spread(ms) | gigabytes[name] for name, ms in interleave(calls, ROUNDS, BLOCK_STEPS).items()}
        for name, row in rows.items():
            print(f"{size:6d} {name:>9}", *(f"{number:9.2f}" for number in row.values()), flush=True)
        ratio = rows["ours"]["median"] / rows["frozen"]["median"]
        print(f"{'':6} ours/frozen {ratio:.4f}", flush=True)
        results[size] = {"optimizers": rows, "ratio": ratio}
        save({"ranks": results})
    torch.distributed.destroy_process_group()


def run_comparison(names: list[str], windows: list[int], profile: str | None, config: tgm.Config,
                   device: torch.device, save: Callable[[dict], None]) -> None:
    """A against B at each window, then the profiles asked for."""
    ids, targets = one_slice(config, device)
    sides = make_sides(names, config, device)
    for side in sides:
        tgm.compile_model(side.model, whole=True)
    print(f"Forward and backward of {config.seq_len:,} tokens, medians and quartiles of their sum in ms, memory in GB "
          f"above what lies on the card between steps.\nDifferences under {NOISE:.1%} are noise. Compare sums: the "
          f"trainer computes the head's gradients in its forward pass, the twin in its backward.")
    print(f"{'window':>6}", *(f"{title:>9}" for title in (
        "side", "forward", "backward", "sum", "25 %", "75 %", "saved", "peak")))
    results = {"config": asdict(config), "windows": {}}
    for blocks in windows:
        results["windows"][blocks] = compare_sides(sides, ids, targets, blocks)
        save(results)
    if WINDOW_WEIGHTS.keys() <= set(windows):
        totals = [sum(weight * results["windows"][w]["sides"][name]["sum_ms"]["median"]
                      for w, weight in WINDOW_WEIGHTS.items()) for name in names]
        print(f"{names[0]}/{names[1]}, windows weighted as in the run: {totals[0] / totals[1]:.4f}")
        save(results | {"weighted_ratio": totals[0] / totals[1]})
    for side in sides if profile else ():
        kernels = profile_side(side, ids, targets, windows[0])
        write_json(f"{profile}.{side.name}.json",
                   environment() | {"side": side.name, "window": windows[0], "kernels": kernels})
        print_profile(f"{side.name}, window {windows[0]}", kernels)


# ----------------------------------------------------------------------------------------------------------------------
# Profiles and their difference

def group_of(kernel: str) -> str:
    return next((group for group, pattern in GROUP_PATTERNS.items() if re.search(pattern, kernel)),
                "masks and the rest")


def tabulate(events: Iterable, num_steps: int, head_rows: int) -> list[dict]:
    """Kernels by name and group, longest first, from the profiler's events.

    Names do not tell the head's GEMMs from the body's; the operation that launched them does, if it is one of aten's:
    one of its inputs has the padded vocabulary's length. A GEMM launched by anything else counts to the body.
    """
    rows: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:  # annotations span other kernels
            rows[event.name, group_of(event.name)] += (1, event.time_range.elapsed_us())
        elif event.name.startswith("aten::") and any(head_rows in shape for shape in event.input_shapes):
            for kernel in (kernel for kernel in event.kernels if group_of(kernel.name) == BODY):
                rows[kernel.name, HEAD] += (1, kernel.duration)
                rows[kernel.name, BODY] -= (1, kernel.duration)
    return sorted(({"name": name, "group": group, "calls_per_step": calls / num_steps, "us_per_step": us / num_steps}
                   for (name, group), (calls, us) in rows.items() if calls), key=lambda row: -row["us_per_step"])


def profile_side(side: Side, ids: Tensor, targets: Tensor, window_blocks: int) -> list[dict]:
    window = as_window(window_blocks, ids.device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(PROFILED_STEPS):
            step(side.model, ids, targets, window)
        torch.cuda.synchronize()
    return tabulate(profiler.events(), PROFILED_STEPS, side.model.lm_head.size(0))


def group_totals(kernels: list[dict]) -> dict[str, float]:
    totals = dict.fromkeys((BODY, HEAD, *GROUP_PATTERNS), 0.0)
    for row in kernels:
        totals[row["group"]] += row["us_per_step"]
    return totals


def print_profile(title: str, kernels: list[dict]) -> None:
    totals = group_totals(kernels)
    whole = sum(totals.values())
    print(f"\n{title}: {whole / 1e3:.2f} ms of kernels a step")
    for group, us in totals.items():
        print(f"  {group:24} {us / 1e3:9.3f} ms {us / whole:6.1%}")
    for row in kernels[:20]:
        print(f"  {row['us_per_step'] / 1e3:9.3f} ms {row['calls_per_step']:6.1f} x  {row['group']:24} {row['name']}")


def read_profile(path: str) -> list[dict]:
    """The kernels of a profile. Raises UserError if it is not there or is no profile."""
    try:
        return json.loads(Path(path).read_text())["kernels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise tgm.UserError(f"{path} is not there or not a profile: make one with --profile.") from error


def sum_by_name(kernels: list[dict]) -> dict[tuple[str, str], np.ndarray]:
    """(calls, us) a step by (group, name) without the number that Inductor puts last, new in every compilation."""
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for row in kernels:
        name = re.sub(r"_\d+$", "", row["name"]) if row["name"].startswith("triton_") else row["name"]
        sums[row["group"], name] += (row["calls_per_step"], row["us_per_step"])
    return dict(sums)


def diff_profiles(before: list[dict], after: list[dict]) -> list[dict]:
    """Kernels gained, lost, slower and faster, the largest effect first; changes under the noise are left out."""
    old, new = sum_by_name(before), sum_by_name(after)
    threshold = NOISE * sum(us for _, us in old.values())
    changes = []
    for key in old.keys() | new.keys():
        (old_calls, old_us), (new_calls, new_us) = old.get(key, (0, 0)), new.get(key, (0, 0))
        if key in old and key in new and abs(new_us - old_us) < threshold:
            continue
        kind = "gained" if key not in old else "lost" if key not in new else "slower" if new_us > old_us else "faster"
        changes.append({"kind": kind, "group": key[0], "name": key[1], "us": new_us - old_us,
                        "calls": f"{old_calls:g} -> {new_calls:g}"})
    return sorted(changes, key=lambda change: (-abs(change["us"]), change["name"]))


def print_diff(before: list[dict], after: list[dict]) -> None:
    for change in diff_profiles(before, after):
        print(f"{change['kind']:7} {change['us'] / 1e3:+9.3f} ms, calls {change['calls']:10} {change['group']:24} "
              f"{change['name']}")
    print(f"\n{'group':24} {'before':>9} {'after':>9} {'change':>9} ms a step")
    old, new = ({**totals, "all": sum(totals.values())} for totals in (group_totals(before), group_totals(after)))
    for group in old:
        print(f"{group:24} {old[group] / 1e3:9.3f} {new[group] / 1e3:9.3f} {(new[group] - old[group]) / 1e3:+9.3f}")


# ----------------------------------------------------------------------------------------------------------------------
# Kernels by themselves

def plain_loss(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    z = logits.float()
    return F.cross_entropy(softcap * z * torch.rsqrt(z.square() + softcap ** 2), targets)


def plain_up(x: Tensor, fc: Tensor) -> Tensor:
    return F.relu(F.linear(x, fc)).square()


def kernel_cases(config: tgm.Config, device: torch.device) -> Iterator[tuple[str, float, dict[str, Callable]]]:
    """Unit of the rate, work in that unit times seconds, versions (the hand-written one first), at full size."""
    T, C, hidden = config.seq_len, config.model_dim, config.mlp_factor * config.model_dim
    randn = partial(torch.randn, device=device, dtype=config.dtype)
    compiled = partial(torch.compile, dynamic=False, fullgraph=True)
    x, dy, fc, proj = randn(T, C), randn(T, C), 0.02 * randn(hidden, C), 0.02 * randn(C, hidden)
    post = plain_up(x, fc)
    mlp_tflop = 2 * T * C * hidden / 1e12
    yield "TFLOP/s", mlp_tflop, {
        "mlp_up": lambda: tgm.mlp_up(x, fc), "library GEMM alone": lambda: F.linear(x, fc),
        "GEMM, then relu squared compiled": partial(compiled(plain_up), x, fc)}
    yield "TFLOP/s", mlp_tflop, {
        "mlp_down_grad": lambda: tgm.mlp_down_grad(dy, proj, post), "library GEMM alone": lambda: dy @ proj}

    ids, targets = one_slice(config, device)
    logits = randn(T, -(-config.vocab_size // 128) * 128)
    leaf, loss = logits.clone().requires_grad_(), compiled(plain_loss)
    # Overwritten logits are smaller the next time; the work is the same.
    yield "GB/s", 2 * logits.nbytes / 1e9, {
        "cross_entropy": lambda: tgm.cross_entropy(logits, targets, config.logit_softcap, True),
        "compiled plain, both passes": lambda: torch.autograd.grad(loss(leaf, targets, config.logit_softcap), leaf)}

    for count in (4, 32):  # the MLP matrices of one rank of eight, and of one alone
        X = randn(count, C, hidden)
        A = X @ X.mT / hidden
        yield "TFLOP/s", 2 * X.numel() * C / 1e12, {
            f"symmetric_product, {count} matrices": lambda: tgm.symmetric_product(X, 1.0, 0.0),
            "library product": lambda: X @ X.mT}
        yield "TFLOP/s", 2 * A.numel() * C / 1e12, {
            f"symmetric_product plus x, {count} matrices": lambda: tgm.symmetric_product(A, 1.2, -3.1),
            "library product plus x": lambda: torch.baddbmm(A, A, A, beta=-3.1, alpha=1.2)}

    num_tables, vocab_size = 2 + len({layer.value_embed for layer in config.layers} - {None}), config.vocab_size
    grads = randn(num_tables, T, C)
    backward = torch.ops.aten.embedding_dense_backward
    yield "GB/s", (grads.nbytes + num_tables * vocab_size * C * grads.itemsize) / 1e9, {
        "embedding_grad": lambda: tgm.embedding_grad(grads, ids, vocab_size),
        "aten, a table at a time": lambda: [backward(grad, ids, vocab_size, -1, False) for grad in grads]}


def time_kernels(config: tgm.Config, device: torch.device, save: Callable[[dict], None]) -> None:
    """Every hand-written kernel against what it replaces; a GEMM of ours must stay within 6 % of the library's."""
    results = {}
    print(f"{'':38}", *(f"{title:>9}" for title in ("ms", "25 %", "75 %", "ours/this", "rate")))
    for unit, work, functions in kernel_cases(config, device):
        calls = {name: partial(record, function) for name, function in functions.items()}
        warm_up(calls)
        rows = {name: spread(ms) for name, ms in interleave(calls, ROUNDS, BLOCK_STEPS).items()}
        ours = next(iter(rows))
        for name, row in rows.items():
            numbers = (*row.values(), rows[ours]["median"] / row["median"])
            print(f"{name:38}", *(f"{number:9.3f}" for number in numbers), f"{work / row['median'] * 1e3:9.0f} {unit}",
                  flush=True)
        results[ours] = {"unit": unit, "work": work, "versions": rows}
        save({"kernels": results})


def attention_options() -> Iterator[dict]:
    """Torch's defaults, then one change at a time."""
    yield {}
    # Safe only where a tile holds all keys of a block: a query's first tile must hold a key that it may attend to.
    yield {"fwd_ROWS_GUARANTEED_SAFE": True, "fwd_BLOCK_N": 128, "fwd_num_stages": 2}
    for side, names, choices in (("fwd", ("BLOCK_M", "BLOCK_N", "num_stages", "num_warps"), FORWARD_BLOCKS),
                                 ("bwd", ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_stages", "num_warps"),
                                  BACKWARD_BLOCKS)):
        yield {f"{side}_USE_TMA": True}
        for blocks in choices:
            yield {f"{side}_{name}": value for name, value in zip(names, blocks)}


def time_attention(options: dict, qkv: tuple[Tensor, ...], dy: Tensor, masks: Iterable, scale: float) -> list[dict]:
    """For each mask, the options with median ms of forward and backward, or why they do not run."""
    torch._dynamo.reset()  # every configuration is a recompilation, and eight of them are the limit
    attend, rows = torch.compile(flex_attention, dynamic=False, fullgraph=True), []
    for mask in masks:
        forward = partial(attend, *qkv, block_mask=mask, scale=scale, kernel_options=options)
        call = partial(record, forward, lambda y: torch.autograd.grad(y, qkv, dy))
        try:
            y = forward()
            if not all(x.isfinite().all() for x in (y, *torch.autograd.grad(y, qkv, dy))):
                raise FloatingPointError("attention or a gradient is not finite")
            interleave({"": call}, rounds=1, block=BLOCK_STEPS)
            ms = np.median(interleave({"": call}, ROUNDS, BLOCK_STEPS)[""], axis=(0, 1)).tolist()
            rows.append({"options": options, "forward_ms": ms[0], "backward_ms": ms[1]})
        except Exception as error:  # torch names no common class for what does not fit or does not compile
            failed = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
            rows.append({"options": options, "failed": failed})
            torch.cuda.synchronize()  # after an illegal access this raises too: no later row could be believed
    return rows


def ms_of(row: dict, *phases: str) -> float:
    """Of these phases, or of both."""
    return math.inf if "failed" in row else sum(row[f"{phase}_ms"] for phase in phases or ("forward", "backward"))


def best_row(rows: list[dict], *phases: str) -> dict:
    """The fastest, in these phases or in both; the first, untuned one where it wins no more than noise."""
    ms = [ms_of(row, *phases) for row in rows]
    return rows[ms.index(min(ms))] if min(ms) < (1 - NOISE) * ms[0] else rows[0]


def best_of_both(rows: list[dict]) -> dict:
    """The best forward's options with the best backward's."""
    return {name: value for phase, other in (("forward", "bwd_"), ("backward", "fwd_"))
            for name, value in best_row(rows, phase)["options"].items() if not name.startswith(other)}


def sweep_attention(config: tgm.Config, device: torch.device, save: Callable[[dict], None]) -> None:
    """FlexAttention's options for a long-window and a short-window call, fastest first."""
    ids, _ = one_slice(config, device)
    masks = tgm.block_masks(ids, tuple(as_window(w, device) for w in SWEPT_WINDOWS.values()), config.doc_token)
    shape = (1, config.seq_len, config.num_heads, config.head_dim)
    *qkv, dy = (torch.randn(shape, device=device, dtype=config.dtype).transpose(1, 2) for _ in range(4))
    qkv = tuple(x.requires_grad_() for x in qkv)
    swept: list[list[dict]] = [[] for _ in masks]

    def add(options: dict, numbers: Iterable[int]) -> None:
        for number, row in zip(numbers, time_attention(options, qkv, dy, [masks[i] for i in numbers],
                                                       config.attention_scale)):
            swept[number].append(row)
        save({"attention": {window: {"best": best_row(rows), "candidates": rows}
                            for window, rows in zip(SWEPT_WINDOWS.values(), swept) if rows}})

    for options in attention_options():
        add(options, range(len(masks)))
    for number, rows in enumerate(swept):
        if (chosen := best_of_both(rows)) not in [row["options"] for row in rows]:
            add(chosen, [number])
    for window, rows in zip(SWEPT_WINDOWS.values(), swept):
        print(f"\nwindow {window}: forward, backward, sum in ms")
        for row in sorted(rows, key=ms_of):
            times = "".join(f"{ms:8.3f}" for ms in (ms_of(row, "forward"), ms_of(row, "backward"), ms_of(row)))
            print(f"failed: {row['failed']}" if "failed" in row else times, row["options"] or "defaults", sep="  ")


def print_choice(path: str) -> None:
    """The script's two dictionaries, to paste, as the sweep in `path` chooses them. Raises UserError if it is none."""
    try:
        content = json.loads(Path(path).read_text())
        attention = content["stages"]["e"]["result"]["attention"] if "stages" in content else content["attention"]
        print(f"# by a sweep on {content['gpu']}, torch {content['torch']}")
        for name, window in SWEPT_WINDOWS.items():
            best, (untuned, *_) = attention[str(window)]["best"], attention[str(window)]["candidates"]
            print(f"# window {window}: {ms_of(best):.3f} ms, untuned {ms_of(untuned):.3f}")
            print(textwrap.fill(f"{name} = {best['options']}", 120, subsequent_indent=" " * (len(name) + 4)))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise tgm.UserError(f"{path} holds no sweep: make one with --sweep-attention --json FILE.") from error


# ----------------------------------------------------------------------------------------------------------------------
# Counts: what a machine without a GPU can say

def attention_tflop(ids: Tensor, window_blocks: int, config: tgm.Config) -> float:
    """TFLOP of forward and backward over the visible 128 x 128 tiles: 2 products a tile forward, 5 backward."""
    num_tiles = 0
    for long_window in (True, False):
        window = torch.tensor(window_blocks if long_window else window_blocks // config.short_window_divisor)
        mask = plain_twin.window_block_mask(ids, window, config.doc_token)
        num_layers = sum(layer.attention and layer.long_window == long_window for layer in config.layers)
        num_tiles += num_layers * int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    return num_tiles * 7 * 2 * tgm.BLOCK_SIZE ** 2 * config.model_dim / 1e12


def saved_bytes_per_token(model: nn.Module, ids: Tensor, targets: Tensor) -> float:
    """Bytes that an eager forward keeps for backward, each storage once, per token; not parameters and buffers."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {}  # holds them, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept and tensor.shape[-2:] != (len(ids), len(ids)):  # a dense mask: only on a CPU
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, targets, as_window(2, ids.device))
    return sum(storage.nbytes() for storage in storages.values()) / len(ids)


def print_kernel_specs() -> None:
    if find_spec("triton") is None:
        print("Registers and spills of the hand-written kernels are not counted: triton is not installed.")
        return
    import kernel_specs  # imports triton
    print("Hand-written kernels compiled for sm_90 (spills must be 0):")
    print(f"  {'':40} {'registers':>9} {'shared B':>9} {'warps':>6} {'spilled B, stores':>18} {'loads':>6}")
    for spec in kernel_specs.compile_kernels():
        print(f"  {spec.name:40} {spec.registers:9d} {spec.shared_bytes:9d} {spec.num_warps:6d} "
              f"{spec.spill_store_bytes:18d} {spec.spill_load_bytes:6d}")


def print_kernel_bytes() -> None:
    if not KERNEL_BYTES.exists():
        print(f"Bytes per kernel: {KERNEL_BYTES} is missing.")
        return
    counts = json.loads(KERNEL_BYTES.read_text())
    print(f"Bytes that kernels move in a slice, GB, counted {counts['date']} with torch {counts['torch']}:")
    print(f"  {'':24} {'twin':>9} {'fast':>9} {'fast/twin':>9}")
    for key in ("forward", "backward", "all_but_attention", "saved"):
        for part in counts["twin"][key] if isinstance(counts["twin"][key], dict) else (None,):
            twin, fast = (counts[side][key][part] if part else counts[side][key] for side in ("twin", "fast"))
            ratio = f"{fast / twin:9.2f}" if twin else f"{'-':>9}"
            print(f"  {f'{key} {part}' if part else key:24} {twin:9.2f} {fast:9.2f} {ratio}")


def print_counts(windows: list[int], config: tgm.Config) -> None:
    print("No CUDA GPU is visible, and times on a CPU mean nothing for this model: here is what can be counted.\n")
    tflop = gemm_tflop(config)
    ids, _ = one_slice(config, torch.device("cpu"))
    body = ", ".join(f"{name} {tflop[name]:.1f}" for name in ("QKV", "O", "MLP"))
    print(f"TFLOP of forward and backward of {config.seq_len:,} tokens:")
    print(f"  {BODY:24} {sum(tflop.values()) - tflop['head']:6.1f} ({body})\n  {HEAD:24} {tflop['head']:6.1f}")
    for blocks in windows:
        print(f"  {f'attention, window {blocks}':24} {attention_tflop(ids, blocks, config):6.1f} (this slice's tiles)")
    import helpers  # imports pytest, which no measurement needs
    small = helpers.small_config(seq_len=512)
    ids, targets = one_slice(small, torch.device("cpu"))
    ours, twin = (saved_bytes_per_token(model(small), ids, targets) for model in (tgm.GPT, plain_twin.GPT))
    print(f"Saved activations, bytes a token: ours {ours:,.0f}, plain twin {twin:,.0f}, ratio {ours / twin:.2f}. This "
          f"is eager code at width {small.model_dim} with a vocabulary of {small.vocab_size}:\n"
          f"  compiled code keeps less, so the figures do not scale to the full size (below: saved GB, as compiled).")
    print_kernel_specs()
    print_kernel_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def environment() -> dict[str, str]:
    import triton
    return {"date": datetime.now().isoformat(timespec="seconds"), "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__, "triton": triton.__version__, "driver": ask_nvidia_smi("driver_version")}


def choose(sides: str, windows: str) -> tuple[list[str], list[int]]:
    """The two sides and the windows that the command line names."""
    names, known = sides.split(","), [str(blocks) for blocks in range(1, 28)]
    if len(names) != 2 or names[0] == names[1] or set(names) - set(SIDES):
        raise tgm.UserError(f"--sides {sides}: give two different names of {', '.join(SIDES)}, with a comma between.")
    if windows == "all":
        return names, [*WINDOW_WEIGHTS]
    if set(windows.split(",")) - set(known):
        raise tgm.UserError(f"--windows {windows}: give all, or some of 1 to 27 with commas between.")
    return names, [int(blocks) for blocks in windows.split(",")]


def full_size() -> tuple[tgm.Config, torch.device]:
    """What is timed, and where."""
    return tgm.Config(), torch.device("cuda")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="ours,plain", help=f"A,B out of {', '.join(SIDES)} (default: %(default)s)")
    parser.add_argument("--windows", default="14", help="all, or long windows in blocks, such as 3,14 (default: 14)")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--profile", metavar="FILE_PREFIX", help="profile each side at the first window")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--kernels", action="store_true", help="time the hand-written kernels by themselves")
    mode.add_argument("--optimizer", action="store_true", help="time the optimizer's step of one rank, alone and of 8")
    mode.add_argument("--sweep-attention", action="store_true", help="time FlexAttention's configurations")
    mode.add_argument("--choose", metavar="FILE", help="print the options that a sweep's results choose, to paste")
    mode.add_argument("--diff", nargs=2, metavar=("BEFORE", "AFTER"), help="compare two profiles")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Do what the command line says. Raises UserError for what the user can put right."""
    options = parse_arguments(arguments)
    if options.diff:
        print_diff(*(read_profile(path) for path in options.diff))
        return
    if options.choose:
        print_choice(options.choose)
        return
    names, windows = choose(options.sides, options.windows)
    if not torch.cuda.is_available():
        for flag in ("json", "profile", "kernels", "optimizer", "sweep_attention"):
            if getattr(options, flag):
                raise tgm.UserError(f"--{flag.replace('_', '-')} needs a CUDA GPU and none is visible.")
        print_counts(windows, tgm.Config())
        return
    if options.profile and (options.kernels or options.optimizer or options.sweep_attention):
        raise tgm.UserError("--profile profiles two sides: give it without --kernels, --optimizer, --sweep-attention.")
    for path in filter(None, (options.json, options.profile)):
        if not Path(path).parent.is_dir():  # better now than after the measurement
            raise tgm.UserError(f"{path} cannot be written: its folder does not exist.")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in a run
    torch._inductor.config.coordinate_descent_tuning = False  # minutes of compilation, and another result every time
    (config, device), facts = full_size(), environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))

    def save(results: dict) -> None:
        if options.json:
            write_json(options.json, facts | results)

    if options.kernels:
        time_kernels(config, device, save)
    elif options.optimizer:
        time_optimizers(config, device, save)
    elif options.sweep_attention:
        sweep_attention(config, device, save)
    else:
        run_comparison(names, windows, options.profile, config, device, save)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except tgm.UserError as error:
        sys.exit(f"error: {error}")
