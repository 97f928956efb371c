"""What a change to the trainer costs or wins on one GPU: two models side by side, and kernel by kernel.

    python records/tools/bench/bench.py    # the trainer against its plain twin, one slice, window 14
    bench.py --sides ours baseline --windows 3 14 27    # the record without Smear-MTP; windows in blocks
    bench.py --profile --json ab.json    # and the kernels of both sides
    bench.py --diff before.json after.json    # the trainer's kernels in two such files; no GPU
    bench.py --kernels            # each hand-written kernel: its error, and its time against what it replaces
    bench.py --optimizer          # a rank's step against the frozen optimizer's, alone and of 8
    bench.py --sweep-attention    # FlexAttention's block sizes, warps and stages
    bench.py --choose FILE        # the script's two dictionaries of them, from a sweep's results

With --json, what is measured lies in the file as it comes, so that a killed run leaves it.
Without a GPU the first command counts instead of timing: FLOPs and saved activations.
"""
import argparse
import json
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib import metadata
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

SIDES = ("ours", "plain", "baseline")  # the baseline is the record without Smear-MTP
DATA_SEED = 77  # of the first hundred, the slice whose attention at window 14 comes closest to the run's 10.0 TFLOP
WARM_STEPS, LOAD_SECONDS = 10, 5  # the load brings clocks and temperature to where a run holds them
ROUNDS, BLOCK_STEPS = 4, 5  # each round is the blocks A B B A
HEAD_START = 10**7  # cycles that the GPU sleeps before a block, about 5 ms: launches are then not what is timed
PROFILED_STEPS = 3
NOISE = 0.005  # differences below this share of a step are noise
MARGIN = 0.02  # of an operation in bf16 against fp32: its roundings are some 2^-9

# The dictionaries of the script that a sweep chooses, and their windows
SWEPT_WINDOWS = {"LONG_WINDOW_KERNEL": 14, "SHORT_WINDOW_KERNEL": 7}  # in the middle of the run
# Forward: BLOCK_M, BLOCK_N, stages, warps. Backward: BLOCK_M1, BLOCK_N1, BLOCK_M2, BLOCK_N2, stages, warps.
FORWARD_BLOCKS = ((128, 128, 2, 8), (128, 128, 1, 8), *((128, 64, stages, warps) for stages in (2, 3, 4)
                  for warps in (4, 8)), (64, 64, 3, 4), (64, 128, 3, 4))
BACKWARD_BLOCKS = (*((64, 64, 64, 64, stages, 4) for stages in (2, 3, 4)), (64, 128, 128, 64, 2, 8),
                   (64, 128, 128, 64, 3, 8), (32, 128, 128, 32, 3, 8))

Save = Callable[[dict], None]  # writes down what has been found so far


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


def make_sides(names: Iterable[str], config: tgm.Config, device: torch.device) -> dict[str, nn.Module]:
    """The named models, all with the same weights."""
    torch.manual_seed(0)
    sides = {}
    with device:
        ours = tgm.GPT(config)
        leave_initial_values(ours)
        for name in names:
            sides[name] = ours
            if name == "plain":
                sides[name] = plain_twin.GPT(config)
                plain_twin.copy_weights(ours, sides[name])
            elif name == "baseline":
                sides[name], weights = tgm.GPT(replace(config, smear_mtp=False)), ours.state_dict()
                sides[name].load_state_dict({key: weights[key] for key in sides[name].state_dict()})
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


def compare(calls: dict[str, Callable[[], list]]) -> dict[str, np.ndarray]:
    """The protocol: all compiled and warm, some seconds of load, then the rounds that `interleave` times."""
    interleave(calls, rounds=1, block=WARM_STEPS // 2)
    started = time.perf_counter()
    while time.perf_counter() - started < LOAD_SECONDS:
        interleave(calls, rounds=1, block=BLOCK_STEPS)
    return interleave(calls, ROUNDS, BLOCK_STEPS)


def spread(ms: np.ndarray) -> dict[str, float]:
    return dict(zip(("median", "lower_quartile", "upper_quartile"), np.quantile(ms, (0.5, 0.25, 0.75)).tolist()))


def show(label: str, *columns: float | str, end: str = "") -> None:
    """A row of a table."""
    print(f"{label:40}", *(f"{x:>9}" if isinstance(x, str) else f"{x:9.3f}" for x in columns), end, flush=True)


def step(model: nn.Module, ids: Tensor, targets: Tensor, window: Tensor) -> list[torch.cuda.Event]:
    """Forward and backward of a slice."""
    events = record(lambda: model(ids, targets, window), Tensor.backward)
    model.zero_grad(set_to_none=True)
    return events


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


def compare_sides(names: list[str], windows: list[int], profile: bool, config: tgm.Config, device: torch.device,
                  save: Save) -> None:
    """A against B at each window; then, if asked for, their kernels at the first."""
    ids, targets = one_slice(config, device)
    sides, results = make_sides(names, config, device), {"says": [], "windows": {}}
    for model in sides.values():
        tgm.compile_model(model, whole=True)
    print(f"Forward and backward of {config.seq_len:,} tokens in ms; GB above what lies on the card between steps.\n"
          "The trainer computes the head's gradients in its forward pass, the twin in its backward.")
    show("window, side", "forward", "backward", "sum", "25 %", "75 %", "saved", "peak")
    for blocks in windows:
        inputs, rows = (ids, targets, as_window(blocks, device)), {}
        times = compare({name: partial(step, model, *inputs) for name, model in sides.items()})
        for name, ms in times.items():
            rows[name] = {"forward_ms": spread(ms[..., 0]), "backward_ms": spread(ms[..., 1]),
                          "sum_ms": spread(ms.sum(-1)), **step_memory(sides[name], *inputs)}
            forward, backward, total, *memory = rows[name].values()
            show(f"{blocks:6} {name}", forward["median"], backward["median"], *total.values(), *memory)
        by_round = np.divide(*(np.median(ms.sum(-1), axis=1) for ms in times.values())).tolist()
        ratio = np.divide(*(row["sum_ms"]["median"] for row in rows.values())).item()
        show(f"{'':6} {'/'.join(names)}, and by round", ratio, *by_round)
        results["windows"][blocks] = {"sides": rows, "ratio": ratio, "ratio_by_round": by_round}
        results["says"].append(f"window {blocks}: " + ", ".join(
            f"{name} {row['sum_ms']['median']:.1f} ms, {row['peak_gb']:.1f} GB" for name, row in rows.items()))
        save(results)
    if profile:
        inputs = ids, targets, as_window(windows[0], device)
        results["profiles"] = {name: profile_side(model, *inputs) for name, model in sides.items()}
        save(results)
        print_profiles(*reversed(results["profiles"].values()))


def optimizer_call(optimizer, grads: list[Tensor]) -> list[torch.cuda.Event]:
    """An inner step, without the copies of the gradients."""
    for p, grad in zip(optimizer.params, grads):
        p.grad = grad.clone()
    return record(partial(optimizer.step, 1))


def time_optimizers(config: tgm.Config, device: torch.device, save: Save) -> None:
    """An inner step of the trainer's optimizer and of the frozen one, on one rank alone and on one of eight.

    The eight are emulated by torch's fake process group, which moves nothing and never waits: everything a rank
    computes, nothing of what travels.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore
    compiled = partial(torch.compile, dynamic=False, fullgraph=True)
    results = {"says": [], "ranks": {}}
    show("ranks, optimizer", "ms", "25 %", "75 %")
    for size in (1, 8):
        torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        world, calls = tgm.World(0, size, device), {}
        for name in ("ours", "frozen"):
            model = make_sides(("ours",), config, device)["ours"]
            optimizer = (tgm.Optimizer(model, config, world, compiled) if name == "ours" else
                         plain_optimizer.Optimizer(model, config, world, compiled(plain_optimizer.muon_update)))
            calls[name] = partial(optimizer_call, optimizer, [0.01 * torch.randn_like(p) for p in optimizer.params])
        rows = {name: spread(ms) for name, ms in compare(calls).items()}
        for name, row in rows.items():
            show(f"{size:6} {name}", *row.values())
        results["ranks"][size] = rows
        results["says"].append(f"one of {size} ranks: " + ", ".join(
            f"{name} {row['median']:.1f} ms" for name, row in rows.items()))
        save(results)
        torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Profiles

def tabulate(events: Iterable, num_steps: int) -> dict[str, list[float]]:
    """[calls, ms] a step by kernel, from the profiler's events. Inductor's last number is new in every compilation."""
    kernels: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:  # annotations span other kernels
            name = re.sub(r"_\d+$", "", event.name) if event.name.startswith("triton_") else event.name
            calls, ms = kernels.get(name, (0, 0))
            kernels[name] = [calls + 1 / num_steps, ms + event.time_range.elapsed_us() / 1e3 / num_steps]
    return kernels


def profile_side(model: nn.Module, ids: Tensor, targets: Tensor, window: Tensor) -> dict[str, list[float]]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step(model, ids, targets, window)
        torch.cuda.synchronize()
    return tabulate(profiler.events(), PROFILED_STEPS)


def print_profiles(before: dict[str, list[float]], after: dict[str, list[float]]) -> None:
    """Kernels above the noise, those that differ most first. One that was gained or lost has no calls on a side."""
    show("ms a step", "before", "after", "change", "calls", "after")
    totals = [[sum(numbers) for numbers in zip(*side.values())] for side in (before, after)]
    rows = [(name, *before.get(name, (0, 0)), *after.get(name, (0, 0))) for name in before | after]
    for name, calls, ms, new_calls, new_ms in [("all", *totals[0], *totals[1]),
                                               *sorted(rows, key=lambda row: -abs(row[4] - row[2]))]:
        if max(ms, new_ms) >= NOISE * totals[0][1]:
            show(name[:40], ms, new_ms, new_ms - ms, f"{calls:g}", f"{new_calls:g}", end=name[40:])


# ----------------------------------------------------------------------------------------------------------------------
# Kernels by themselves

class Case(NamedTuple):
    """A hand-written operation, its inputs, and what it replaces."""
    name: str
    inputs: tuple[Tensor, ...]
    ours: Callable
    others: dict[str, Callable]


def plain_loss(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    z = logits.float()
    return F.cross_entropy(softcap * z * torch.rsqrt(z.square() + softcap ** 2), targets)


def plain_up(x: Tensor, fc: Tensor) -> Tensor:
    return F.relu(F.linear(x, fc)).square()


def kernel_cases(config: tgm.Config, T: int, device: torch.device) -> Iterator[Case]:
    """All of them, for T tokens."""
    C, hidden, vocab_size = config.model_dim, config.mlp_factor * config.model_dim, config.vocab_size
    randn = partial(torch.randn, device=device, dtype=config.dtype)
    compiled = partial(torch.compile, dynamic=False, fullgraph=True)
    x, fc, proj = randn(T, C), 0.02 * randn(hidden, C), 0.02 * randn(C, hidden)
    yield Case("mlp_up", (x, fc), tgm.mlp_up, {
        "library GEMM alone": F.linear, "GEMM, then relu squared compiled": compiled(plain_up)})
    yield Case("mlp_down_grad", (randn(T, C), proj, plain_up(x, fc)), tgm.mlp_down_grad, {
        "library GEMM alone": lambda dy, proj, _: dy @ proj})

    ids, targets = (tokens[:T] for tokens in one_slice(config, device))
    logits, softcap, loss = randn(T, -(-vocab_size // 128) * 128), config.logit_softcap, compiled(plain_loss)

    def plain_gradient(logits: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, targets, softcap), leaf)[0]

    # Ours overwrites the logits by their gradient, which is smaller the next time; the work is the same.
    yield Case("cross_entropy", (logits,), lambda z: tgm.cross_entropy(z, targets, softcap, True), {
        "compiled plain, both passes": plain_gradient})

    for count in (4, 32):  # the MLP matrices of one rank of eight, and of one alone
        X = randn(count, C, hidden)
        A = X @ X.mT / hidden
        yield Case(f"symmetric_product, {count} matrices", (X,), lambda X: tgm.symmetric_product(X, 1.0, 0.0), {
            "library product": lambda X: X @ X.mT})
        yield Case(f"symmetric_product plus x, {count} matrices", (A,), lambda A: tgm.symmetric_product(
            A, 1.2, -3.1), {"library product plus x": lambda A: torch.baddbmm(A, A, A, beta=-3.1, alpha=1.2)})

    num_tables = 2 + len({layer.value_embed for layer in config.layers} - {None})
    grads, backward = randn(num_tables, T, C), torch.ops.aten.embedding_dense_backward
    yield Case("embedding_grad", (grads,), lambda grads: tgm.embedding_grad(grads, ids, vocab_size), {
        "aten, a table at a time": lambda grads: [backward(grad, ids, vocab_size, -1, False) for grad in grads]})


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def kernel_error(case: Case) -> float:
    """Of the operation in bf16, on a GPU its kernel, against its plain version in fp32; nan if anything is."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.to(dtype, copy=True) for x in case.inputs]
        results.append((case.ours(*inputs), *inputs))  # which cross_entropy overwrites
    return np.max([*map(relative, *results)]).item()


def time_kernels(config: tgm.Config, device: torch.device, save: Save) -> None:
    """Every hand-written kernel against what it replaces; a GEMM of ours must stay within 6 % of the library's."""
    results, cases = {"says": [], "kernels": {}}, partial(kernel_cases, config, device=device)
    show("", "ms", "25 %", "75 %", "ours/this")
    for small, case in zip(cases(T=min(config.seq_len, 4096)), cases(T=config.seq_len)):
        error = kernel_error(small)  # fp32 logits of a whole slice would not fit
        versions = {case.name: case.ours} | case.others
        times = compare({name: partial(record, partial(f, *case.inputs)) for name, f in versions.items()})
        rows = {name: spread(ms) for name, ms in times.items()}
        for name, row in rows.items():
            show(name, *row.values(), rows[case.name]["median"] / row["median"])
        results["kernels"][case.name] = {"error": error, "versions": rows}
        results["says"].append(", ".join(f"{name} {row['median']:.3f} ms" for name, row in rows.items()))
        show("its relative error", f"{error:.2%}")
        save(results)
    if wrong := {name: row["error"] for name, row in results["kernels"].items() if not row["error"] < MARGIN}:
        raise tgm.UserError(f"not within {MARGIN:.0%} of fp32: {wrong}")


# ----------------------------------------------------------------------------------------------------------------------
# FlexAttention's options

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


def choose(rows: list[dict]) -> tuple[dict, float]:
    """The best forward's options with the best backward's, and the sum of their ms; torch's own, the first row, where
    they win no more than noise."""
    chosen, sum_ms = {}, 0.0
    for phase, prefix in (("forward", "fwd_"), ("backward", "bwd_")):
        ms = [row.get(f"{phase}_ms", math.inf) for row in rows]
        best = ms.index(min(ms)) if min(ms) < (1 - NOISE) * ms[0] else 0
        chosen |= {name: value for name, value in rows[best]["options"].items() if name.startswith(prefix)}
        sum_ms += ms[best]
    return chosen, sum_ms


def sweep_attention(config: tgm.Config, device: torch.device, save: Save) -> None:
    """FlexAttention's options for a long-window and a short-window call."""
    ids, _ = one_slice(config, device)
    masks = tgm.block_masks(ids, tuple(as_window(w, device) for w in SWEPT_WINDOWS.values()), config.doc_token)
    shape = (1, config.seq_len, config.num_heads, config.head_dim)
    *qkv, dy = (torch.randn(shape, device=device, dtype=config.dtype).transpose(1, 2) for _ in range(4))
    qkv = tuple(x.requires_grad_() for x in qkv)
    swept: dict[int, list[dict]] = {window: [] for window in SWEPT_WINDOWS.values()}
    for options in attention_options():
        for (window, rows), row in zip(swept.items(), time_attention(options, qkv, dy, masks, config.attention_scale)):
            rows.append(row)
            show(f"window {window}, forward and backward", row.get("forward_ms", "-"), row.get("backward_ms", "-"),
                 end=f"{options or 'defaults'} {row.get('failed', '')}")
        says = [f"window {window}: {choose(rows)[1]:.3f} ms, untuned {choose(rows[:1])[1]:.3f}, "
                f"{sum('failed' in row for row in rows)} configurations fail" for window, rows in swept.items()]
        save({"says": says, "attention": swept})


def read_results(path: str, key: str, option: str) -> dict:
    """The newest that have the key, in a file of --json or of tests/gpu.sh. Raises UserError where there are none."""
    try:
        content = json.loads(Path(path).read_text())
        found = [run["result"] for run in content["runs"]] if "runs" in content else [content]
        return [results for results in found if key in results][-1]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise tgm.UserError(f"{path} has no {key}: make it with {option} --json FILE.") from error


def print_choice(path: str) -> None:
    """The script's two dictionaries, to paste, as the sweep in `path` chooses them."""
    results = read_results(path, "attention", "--sweep-attention")
    print(f"# by a sweep on {results['gpu']}, torch {results['torch']}")
    for name, window in SWEPT_WINDOWS.items():
        rows = results["attention"][str(window)]
        options, ms = choose(rows)
        print(f"# window {window}: {ms:.3f} ms, untuned {choose(rows[:1])[1]:.3f}")
        print(textwrap.fill(f"{name} = {options}", 120, subsequent_indent=" " * (len(name) + 4)))


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


def print_counts(windows: list[int], config: tgm.Config) -> None:
    print("No CUDA GPU is visible, and times on a CPU mean nothing for this model: here is what can be counted.")
    cpu = torch.device("cpu")
    ids, _ = one_slice(config, cpu)
    show(f"TFLOP, forward and backward of {config.seq_len:,} tokens")
    for name, tflop in gemm_tflop(config).items():
        show(f"GEMMs, {name}", tflop)
    for blocks in windows:
        show(f"attention, window {blocks}, this slice's tiles", attention_tflop(ids, blocks, config))
    small = replace(config, num_heads=2, head_dim=32, vocab_size=257, doc_token=256, seq_len=512, val_seq_len=512)
    show(f"saved bytes a token, eager, width {small.model_dim}")
    for name, model in make_sides(SIDES, small, cpu).items():
        show(name, saved_bytes_per_token(model, *one_slice(small, cpu)))


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def main(arguments: list[str], config: tgm.Config = tgm.Config(), device: torch.device = torch.device("cuda")) -> None:
    """Do what the command line says, with this model on this device. UserError for what the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs=2, choices=SIDES, default=["ours", "plain"])
    parser.add_argument("--windows", nargs="+", type=int, choices=range(1, 28), default=[14], metavar="BLOCKS",
                        help="long windows, 1 to 27 blocks")
    parser.add_argument("--profile", action="store_true", help="the kernels of both sides at the first window")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    mode = parser.add_mutually_exclusive_group()
    for flag, measure in {"--kernels": time_kernels, "--optimizer": time_optimizers,
                          "--sweep-attention": sweep_attention}.items():
        mode.add_argument(flag, dest="measure", action="store_const", const=measure, help=measure.__doc__)
    mode.add_argument("--choose", metavar="FILE", help="print the options that a sweep's results choose, to paste")
    mode.add_argument("--diff", nargs=2, metavar=("BEFORE", "AFTER"), help="the kernels of `ours` in two profiles")
    options = parser.parse_args(arguments)
    if options.sides[0] == options.sides[1]:
        parser.error(f"argument --sides: {options.sides[0]} against itself: name two")
    if options.profile and options.measure:
        parser.error("argument --profile: it profiles two sides, give it alone or with --sides and --windows")
    if options.diff:
        print_profiles(*(read_results(path, "profiles", "--profile")["profiles"]["ours"] for path in options.diff))
    elif options.choose:
        print_choice(options.choose)
    elif torch.cuda.is_available():
        if options.json and not Path(options.json).parent.is_dir():  # better now than after the measurement
            raise tgm.UserError(f"{options.json} cannot be written: its folder does not exist.")
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in a run
        torch._inductor.config.coordinate_descent_tuning = False  # minutes of compilation, another result every time
        facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": metadata.version("triton"),
                 "date": datetime.now().isoformat(timespec="seconds")}
        print(", ".join(facts.values()))
        measure = options.measure or partial(compare_sides, options.sides, options.windows, options.profile)
        measure(config, device, lambda results: options.json and write_json(options.json, facts | results))
    elif options.measure or options.profile or options.json:
        raise tgm.UserError("a measurement needs a CUDA GPU and none is visible: without options, this counts.")
    else:
        print_counts(options.windows, config)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except tgm.UserError as error:
        sys.exit(f"error: {error}")
