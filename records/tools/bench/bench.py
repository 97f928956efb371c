"""What a change to the trainer costs or wins on one GPU: two models side by side, and kernel by kernel.

    python records/tools/bench/bench.py    # the trainer against its plain twin, one slice, window 14
    bench.py --windows 3 14 27 --profile --json ab.json    # windows in blocks; and the kernels of both sides
    bench.py --kernels            # each hand-written kernel: its error, and its time against what it replaces
    bench.py --sweep-attention    # FlexAttention's block sizes, warps and stages
    bench.py --choose FILE        # the script's two dictionaries of them, from a sweep by tests/gpu.sh

A line says what each measurement found; with --json, all of it lies in the file as it comes, so that a killed run
leaves it.
"""
import argparse
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention.flex_attention import flex_attention

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "data")]

import plain_twin  # noqa: E402
import train_gpt_medium as tgm  # noqa: E402
from generate import synthetic_pieces  # noqa: E402
from stages import write_json  # noqa: E402

DATA_SEED = 28  # of the first thirty, the slice whose attention at window 14 comes closest to the run's 10.0 TFLOP
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

Save = Callable[[str, dict, str], None]  # writes down at once what was found, by its name, and its summary


# ----------------------------------------------------------------------------------------------------------------------
# What is measured: data like the run's, weights unlike the initial ones

def as_window(blocks: int, device: torch.device) -> Tensor:
    """The model's window_blocks."""
    return torch.tensor(blocks, dtype=torch.int32, device=device)


def one_slice(config: tgm.Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [T] int32 and targets [T] int64: documents as long as FineWeb's and ids as uneven as words.

    Uniformly random ids would have neither documents nor embedding rows that many tokens share.
    """
    ids = np.concatenate([*synthetic_pieces(config.seq_len + 1, DATA_SEED, 1, config.doc_token)])
    inputs, targets = tgm.split_pieces(torch.from_numpy(ids.astype(np.int32)), config.seq_len)
    return inputs[0].to(device), targets[0].to(device)


@torch.no_grad()
def leave_initial_values(model: nn.Module) -> None:
    """Zeros become N(0, 0.02), since zero matrices run up to 13 % faster; no scalar stays at its first 0 or 1."""
    for name, p in model.named_parameters():
        if "lambda" in name or name == "skip_weights":
            p += 0.1 * torch.randn_like(p)
        else:
            p.copy_(torch.where(p == 0, 0.02 * torch.randn_like(p, dtype=torch.float32), p))


def make_sides(config: tgm.Config, device: torch.device) -> dict[str, nn.Module]:
    """The trainer's model and its plain twin, with the same weights."""
    torch.manual_seed(0)
    with device:
        ours, plain = tgm.GPT(config), plain_twin.GPT(config)
        leave_initial_values(ours)
        plain_twin.copy_weights(ours, plain)
    return {"ours": ours, "plain": plain}


# ----------------------------------------------------------------------------------------------------------------------
# Timing on a GPU

def record(call: Callable) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events before and after it."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    return before, after


def interleave(calls: dict[str, Callable[[], tuple]], rounds: int, block: int) -> dict[str, np.ndarray]:
    """Milliseconds [round, call] by name, in blocks of calls in the order A B B A, so that drift cancels."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name in (*calls, *reversed(calls)):
            torch.cuda._sleep(HEAD_START)
            recorded = [calls[name]() for _ in range(block)]
            torch.cuda.synchronize()
            times[name] += [before.elapsed_time(after) for before, after in recorded]
    return {name: np.array(ms).reshape(rounds, 2 * block) for name, ms in times.items()}


def compare(title: str, calls: dict[str, Callable[[], tuple]]) -> tuple[dict[str, dict], str]:
    """Times by name, and a summary. All compiled and warm, some seconds of load, then the rounds of `interleave`.

    ratio: the first one's median to this one's, of all rounds, the least and the greatest of one.
    """
    interleave(calls, rounds=1, block=WARM_STEPS // 2)
    started = time.perf_counter()
    while time.perf_counter() - started < LOAD_SECONDS:
        interleave(calls, rounds=1, block=BLOCK_STEPS)
    times, rows = interleave(calls, ROUNDS, BLOCK_STEPS), {}
    first = times[next(iter(calls))]
    for name, ms in times.items():
        by_round = np.median(first, axis=1) / np.median(ms, axis=1)
        ratios = np.median(first) / np.median(ms), by_round.min(), by_round.max()
        rows[name] = {"ms": np.quantile(ms, (0.5, 0.25, 0.75)).tolist(), "ratio": [*map(float, ratios)]}
    return rows, f"{title}: " + ", ".join(f"{name} {row['ms'][0]:.3f} ms" for name, row in rows.items())


def step(model: nn.Module, ids: Tensor, targets: Tensor, window: Tensor) -> tuple:
    """Forward and backward of a slice, as one: ours computes the head's gradients forward, the twin backward."""
    events = record(lambda: model(ids, targets, window).backward())
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


def profile_side(model: nn.Module, ids: Tensor, targets: Tensor, window: Tensor) -> dict[str, tuple[float, float]]:
    """(calls, ms) a step by kernel, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step(model, ids, targets, window)
        torch.cuda.synchronize()
    rows = [row for row in profiler.key_averages()
            if row.device_type == DeviceType.CUDA and not row.is_user_annotation]  # which spans other kernels
    return {row.key: (row.count / PROFILED_STEPS, row.self_device_time_total / 1e3 / PROFILED_STEPS)
            for row in sorted(rows, key=lambda row: -row.self_device_time_total)}


def compare_sides(windows: list[int], profile: bool, config: tgm.Config, device: torch.device, save: Save) -> None:
    """Both sides at each window; then, if asked for, their kernels at the first."""
    ids, targets = one_slice(config, device)
    sides = make_sides(config, device)
    for model in sides.values():
        tgm.compile_model(model, whole=True)
    for blocks in windows:
        inputs = ids, targets, as_window(blocks, device)
        rows, says = compare(f"window {blocks}", {
            name: partial(step, model, *inputs) for name, model in sides.items()})
        for name, model in sides.items():
            rows[name] |= step_memory(model, *inputs)
        peaks = " and ".join(f"{row['peak_gb']:.1f}" for row in rows.values())
        save(f"window {blocks}", rows, f"{says}, ratio {rows['plain']['ratio'][0]:.3f}, peaks {peaks} GB")
    for name, model in sides.items() if profile else ():
        kernels = profile_side(model, ids, targets, as_window(windows[0], device))
        save(f"profile of {name}", kernels, f"{len(kernels)} kernels of {name}")


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
    cases, wrong = partial(kernel_cases, config, device=device), []
    for small, case in zip(cases(T=min(config.seq_len, 4096)), cases(T=config.seq_len)):
        error = kernel_error(small)  # fp32 logits of a whole slice would not fit
        rows, says = compare(case.name, {name: partial(record, partial(function, *case.inputs))
                                         for name, function in ({"ours": case.ours} | case.others).items()})
        save(case.name, rows | {"error": error}, f"{says}, error {error:.2%}")
        wrong += [case.name] * (not error < MARGIN)
    if wrong:
        raise tgm.UserError(f"not within {MARGIN:.0%} of fp32: {', '.join(wrong)}")


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
        def both() -> tuple[Tensor, ...]:
            y = attend(*qkv, block_mask=mask, scale=scale, kernel_options=options)
            return y, *torch.autograd.grad(y, qkv, dy)

        try:
            if not all(x.isfinite().all() for x in both()):
                raise FloatingPointError("attention or a gradient is not finite")
            ms, = interleave({"": partial(record, both)}, ROUNDS, BLOCK_STEPS).values()
            rows.append({"options": options, "ms": np.median(ms).item()})
        except Exception as error:  # torch names no common class for what does not fit or does not compile
            failed = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
            rows.append({"options": options, "ms": math.inf, "failed": failed})
            torch.cuda.synchronize()  # after an illegal access this raises too: no later row could be believed
    return rows


def choose(rows: list[dict]) -> tuple[dict, float]:
    """The best forward's options with the best backward's, as far as they win more than noise on torch's own, the first
    row; and the ms that both should take."""
    chosen, untuned = {}, rows[0]["ms"]
    ms = untuned
    for prefix in ("fwd_", "bwd_"):
        best = min((row for row in rows if all(name.startswith(prefix) for name in row["options"])),
                   key=lambda row: row["ms"])
        if best["ms"] < (1 - NOISE) * untuned:
            chosen, ms = chosen | best["options"], ms - untuned + best["ms"]
    return chosen, ms


def sweep_attention(config: tgm.Config, device: torch.device, save: Save) -> None:
    """FlexAttention's options for a long-window and a short-window call."""
    ids, _ = one_slice(config, device)
    masks = tgm.block_masks(ids, tuple(as_window(w, device) for w in SWEPT_WINDOWS.values()), config.doc_token)
    shape = (1, config.seq_len, config.num_heads, config.head_dim)
    *qkv, dy = (torch.randn(shape, device=device, dtype=config.dtype).transpose(1, 2) for _ in range(4))
    qkv = tuple(x.requires_grad_() for x in qkv)
    swept: dict[str, list[dict]] = {name: [] for name in SWEPT_WINDOWS}
    for options in attention_options():
        for (name, rows), row in zip(swept.items(), time_attention(options, qkv, dy, masks, config.attention_scale)):
            rows.append(row)
            chosen, ms = choose(rows)
            save(name, {"chosen": chosen, "candidates": rows}, f"window {SWEPT_WINDOWS[name]}: {rows[0]['ms']:.3f} ms, "
                 f"{ms:.3f} with {chosen}; {sum('failed' in row for row in rows)} configurations fail")


def print_choice(path: str) -> None:
    """The script's two dictionaries, to paste, from the newest sweep in a file of tests/gpu.sh."""
    runs = json.loads(Path(path).read_text())["runs"]
    result = [run["result"] for run in runs if SWEPT_WINDOWS.keys() <= run["result"].keys()][-1]
    for name in SWEPT_WINDOWS:
        print(textwrap.fill(f"{name} = {result[name]['chosen']}", 120, subsequent_indent=" " * (len(name) + 4)))


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def main(arguments: list[str], config: tgm.Config = tgm.Config(), device: torch.device = torch.device("cuda")) -> None:
    """Do what the command line says, with this model on this device. UserError for what the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", nargs="+", type=int, choices=range(1, 28), default=[14], metavar="BLOCKS",
                        help="long windows, 1 to 27 blocks")
    parser.add_argument("--profile", action="store_true", help="both sides' kernels at the first window, for --json")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    mode = parser.add_mutually_exclusive_group()
    for flag, measure in {"--kernels": time_kernels, "--sweep-attention": sweep_attention}.items():
        mode.add_argument(flag, dest="measure", action="store_const", const=measure, help=measure.__doc__)
    mode.add_argument("--choose", metavar="FILE", help="print the options that a sweep's results choose, to paste")
    options = parser.parse_args(arguments)
    if options.choose:
        print_choice(options.choose)
        return
    if not torch.cuda.is_available():
        raise tgm.UserError("a measurement needs a CUDA GPU and none is visible.")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in a run
    torch._inductor.config.coordinate_descent_tuning = False  # minutes of compilation, another result every time
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": metadata.version("triton"),
             "date": datetime.now().isoformat(timespec="seconds")}
    print(", ".join(facts.values()))
    results: dict = facts | {"says": {}}

    def save(name: str, found: dict, says: str) -> None:
        results[name], results["says"][name] = found, says
        print(says, flush=True)
        if options.json:
            write_json(options.json, results)

    measure = options.measure or partial(compare_sides, options.windows, options.profile)
    measure(config, device, save)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except tgm.UserError as error:
        sys.exit(f"error: {error}")
