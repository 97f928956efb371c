"""Logs and record folders that nobody trained: what the tools in records/ read, written from a few numbers."""
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np

from run_log import read_log

SOURCE = '''"""A stand-in for the training script."""
import math
import torch
from torch import nn

num_iterations = {num_iterations}
val_tokens = 10485760  # how many tokens of validation data
torch._inductor.config.coordinate_descent_tuning = True
model = torch.compile(nn.Linear(1, 1), dynamic=False, fullgraph=True)
print(f"step:{{step}} val_loss:{{loss}} train_time:{{ms}}ms")
'''
BATCH = 524_288  # tokens
LOSSES = (2.918312, 2.918915, 2.917737, 2.919458, 2.918264, 2.918821, 2.918007, 2.918640)  # mean 2.918519, std 0.00055
SMI_RULE = "+-----------------------------------------------------------------------------------------+"
SMI_ROW = """|   {index}  {name:<28}  On  |   00000000:{bus}:00.0 Off |                    0 |
| N/A   38C    P0             118W /  700W |    7713MiB /  81559MiB |      0%      Default |"""


@dataclass(frozen=True)
class Spec:
    """One log. The loss falls to `loss` along a fixed curve; a step takes ms_per_step, plus ms_per_block a block, times
    its share of a full batch."""
    loss: float = 2.919
    seed: int = 0
    num_iterations: int = 200
    val_every: int = 25
    ms_per_step: float = 220.0
    ms_per_block: float = 1.5
    source: str = SOURCE
    torch: str = "2.10.0.dev20251103+cu126"
    cuda: str = "12.6"
    driver: str = "550.127.05"
    gpus: tuple[str, ...] = ("NVIDIA H100 80GB HBM3",) * 8
    decimals: int = 6
    smear_lambda: float | None = 0.0078  # at the end; None: no extra fields
    constants: str = "seed drawn or given: {seed}\ntraining shards: data/fineweb10B/fineweb_train_000001.bin to ..."
    last_step: int | None = None  # the log stops here
    last_window: int = 27  # blocks; the window grows linearly
    small_batches: int = 0  # the first steps, each of a quarter of the tokens
    is_old: bool = False  # the step lines state no tokens and no windows

    @property
    def run_id(self) -> str:
        return str(UUID(int=self.seed + 10 ** 30))


def curve(step, spec: Spec) -> float:
    """10.83 at first, spec.loss at the end; strictly falling."""
    p = step / spec.num_iterations
    return spec.loss + (10.825840 - spec.loss) * (np.exp(-40 * p) * 0.9 + 0.1 * (1 - p) ** 2)


def window_blocks(spec: Spec) -> np.ndarray:
    """Of every step. No recipe grows so: a tool that computes windows instead of reading them is found out."""
    return 1 + np.arange(spec.num_iterations) * spec.last_window // spec.num_iterations


def batch_tokens(spec: Spec) -> np.ndarray:
    return np.where(np.arange(spec.num_iterations) < spec.small_batches, BATCH // 4, BATCH)


def step_ms(spec: Spec) -> np.ndarray:
    """Of every step, without jitter."""
    return (spec.ms_per_step + spec.ms_per_block * window_blocks(spec)) * batch_tokens(spec) / BATCH


def log_text(spec: Spec) -> str:
    gpus = [SMI_ROW.format(index=i, name=name, bus=f"{16 + i:02X}") for i, name in enumerate(spec.gpus)]
    smi = "\n".join(["Tue Nov  4 10:00:00 2025", SMI_RULE, f"| NVIDIA-SMI {spec.driver}             Driver Version: "
                     f"{spec.driver}     CUDA Version: 12.6     |", *gpus, SMI_RULE,
                     "|    0   N/A  N/A      1234      C   /usr/bin/python3                       0MiB |", SMI_RULE])
    head = [spec.source.format(num_iterations=spec.num_iterations), "=" * 100,
            "Running Python 3.12.7 (main, Oct 16 2024, 04:37:19) [GCC 13.2.0]",
            f"Running PyTorch {spec.torch} compiled for CUDA {spec.cuda}", smi,
            spec.constants.format(seed=spec.seed), "=" * 100]
    jitter = np.random.default_rng(spec.seed).normal(0, 0.2, spec.num_iterations)
    ends = np.concatenate([[0], np.cumsum(step_ms(spec) + jitter)])
    tokens, windows = np.cumsum(batch_tokens(spec)), window_blocks(spec)
    lines = []
    total = spec.num_iterations
    for step in range(total + 1):
        ms = round(ends[step])
        if step:
            stated = "" if spec.is_old else f" tokens:{tokens[step - 1]} window_blocks:{windows[step - 1]}"
            lines.append(f"step:{step}/{total} train_time:{ms}ms step_avg:{ends[step] / step:.2f}ms{stated}")
        if step % spec.val_every == 0 or step == total:
            extras = "" if spec.smear_lambda is None else (
                f" smear_lambda:{spec.smear_lambda * step / total:.6f} backout_lambda_0:{1 - 0.2 * step / total:.6f}"
                f" backout_lambda_1:{-0.3 * step / total:.6f}")
            lines.append(f"step:{step}/{total} val_loss:{curve(step, spec):.{spec.decimals}f} train_time:{ms}ms "
                         f"step_avg:{ends[step] / max(step, 1):.2f}ms{extras}")
        if step == spec.last_step:
            return "\n".join([*head, *lines]) + "\n"
    return "\n".join([*head, *lines, "peak memory allocated: 38000 MiB reserved: 40010 MiB"]) + "\n"


def write_log(folder: Path, spec: Spec, name: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"{spec.run_id}.txt")
    path.write_text(log_text(spec))
    return path


def write_logs(folder: Path, specs: list[Spec]) -> Path:
    for spec in specs:
        write_log(folder, spec)
    return folder


def record_specs(losses=LOSSES, **changes) -> list[Spec]:
    return [Spec(**{"loss": loss, "seed": seed} | changes) for seed, loss in enumerate(losses)]


def baseline_specs(**changes) -> list[Spec]:
    return [Spec(**{"loss": loss + 0.0003, "seed": 100 + i, "num_iterations": 210, "ms_per_step": 222.0} | changes)
            for i, loss in enumerate(LOSSES[:4])]


def readme_text(folder: Path, specs: list[Spec]) -> str:
    """A README whose figures are those of the logs in `folder`."""
    seconds = [read_log(folder / f"{spec.run_id}.txt").train_seconds for spec in specs]
    rows = [f"| {i} | {spec.loss:.{spec.decimals}f} | {s:.3f} |" for i, (spec, s) in enumerate(zip(specs, seconds), 1)]
    mean = np.mean([round(spec.loss, spec.decimals) for spec in specs])
    return "\n".join([
        "# A made-up record", "", f"All {len(specs)} runs. The mean loss is {mean:.6f}, the mean time "
        f"{np.mean(seconds):.3f} s.", "", "| run | val loss | train time (s) |", "| --- | --- | --- |", *rows, ""])


def write_record(folder: Path, specs: list[Spec] | None = None, baseline: list[Spec] | None = None) -> Path:
    """A folder that keeps every rule: logs, a baseline's logs and a README."""
    specs = record_specs() if specs is None else specs
    write_logs(folder, specs)
    write_logs(folder / "baseline", baseline_specs() if baseline is None else baseline)
    (folder / "README.md").write_text(readme_text(folder, specs))
    return folder


