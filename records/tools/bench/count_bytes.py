"""Bytes that forward and backward of one full slice move, for the plain twin and for the trainer, of both recipes.

    python records/tools/bench/count_bytes.py TOOL      TOOL is a copy of kernel_bytes.py; about 8 minutes, no GPU

TOOL schedules a model for an H100 with TorchInductor, executes nothing, prints its largest kernels and writes a JSON of
what each reads and writes. It needs a CUDA build of torch. Attention is left out on both sides. A hand-written kernel
counts its inputs and outputs once: TOOL sees what our operations read but, in torch 2.11, not what they write, which is
added here. The sums are kernel_bytes.json.
"""
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "records" / "2026-04-27_MUDD")]
import torch  # noqa: E402

import train_gpt_medium as tgm  # noqa: E402
import train_gpt_mudd as mudd  # noqa: E402

BUILD = '''
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/records/2026-04-27_MUDD"]
from types import SimpleNamespace
import torch
import torch.nn.functional as F
import kernel_bytes
import plain_twin
import train_gpt_medium as tgm
import train_gpt_mudd as mudd

@torch.library.custom_op("counted::cross_entropy", mutates_args=())
def functional(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError

@functional.register_fake
def _(logits, targets):
    return logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(logits)

def cross_entropy(logits, targets, softcap, with_grad):
    """TOOL loses sight of a tensor that an operation overwrites: here the gradient is a result."""
    losses, grad = functional(logits, targets)
    logits.copy_(grad)
    return losses

def scaled_product(a, b, scale_a, scale_b, out_dtype, fast=False):
    """As on a GPU."""
    scales = (torch.full((), scale, device=a.device) for scale in (scale_a, scale_b))
    return torch._scaled_mm(a.contiguous(), b.mT.contiguous().mT, *scales, out_dtype=out_dtype, use_fast_accum=fast)

def plain_mudd():
    """The MUDD recipe without an operation of ours."""
    # torch 2.13 fails to join reductions over 65,536 and 65,535 tokens in one kernel.
    torch._inductor.config.triton.mix_order_reduction = False
    model = mudd.GPT(sized(mudd))
    mudd.look_up = lambda ids, *tables: tuple(F.embedding(ids, table) for n_tables in tables for table in n_tables)
    mudd.ReluSquaredMLP = SimpleNamespace(apply=lambda x, fc, proj: F.linear(F.relu(F.linear(x, fc)).square(), proj))
    mudd.MtpHead = SimpleNamespace(apply=lambda latents, head, targets, weights, fp8: model.loss(
        latents, targets, weights))
    return model

def sized(recipe):
    return recipe.Config(val_seq_len=65536, val_tokens=65536)

def build():
    tgm.cross_entropy, mudd.scaled_product = cross_entropy, scaled_product
    tgm.block_masks, plain_twin.window_block_mask = lambda *_: (None, None), lambda *_: None
    for module in (tgm, plain_twin):
        module.dense_mask = lambda mask: mask
        module.attend = lambda q, k, v, *_: kernel_bytes.attention(q, k, v)
    model = {model}
    further = tgm.inputs_at(model.config.num_iterations, model.config, torch.device("cpu"))
    return model, (torch.zeros(65536, dtype=torch.int32), torch.zeros(65536, dtype=torch.int64), *further.values())
'''


def written_bytes(recipe: ModuleType) -> dict[str, int]:
    """By all calls of each hand-written operation in a recipe's published run, in bf16; FP8 is the MUDD head's."""
    config = recipe.Config()
    with torch.device("meta"):
        model = config.make_model()
    T, hidden = config.seq_len, sum(len(block.mlp_fc) for block in model.blocks)
    both = {"mlp_up": 2 * T * hidden, "mlp_down_grad": 2 * T * hidden}
    if recipe is tgm:
        return both | {"cross_entropy": 2 * T * len(model.lm_head) + 4 * T, "embedding_grad": model.embeds.nbytes}
    return both | {"mtp_cross_entropy": T * len(model.tied) + 4 * T, "embedding_grad": (
        model.tied[:, 1].nbytes + model.embeds.nbytes + model.bigram_embed.nbytes)}


def count(tool: Path, recipe: ModuleType, model: str) -> dict[str, float]:
    """GB by kind of kernel, their sum without attention, and what the forward pass keeps. model: what gives it."""
    with tempfile.TemporaryDirectory() as folder:
        build, out = Path(folder) / "build.py", Path(folder) / "out.json"
        build.write_text(BUILD.format(root=str(ROOT), model=model))
        environment = os.environ | {"PYTHONPATH": f"{folder}:{tool.parent}"}
        subprocess.run([sys.executable, str(tool), str(build), "--top", "60", "--json", str(out)], env=environment,
                       check=True)
        counted = json.loads(out.read_text())
    total = dict.fromkeys(("fused", "extern", "gemm", "attention"), 0.0)
    for row in counted["rows"]:
        total[row["kind"]] += (row["read"] + row["write"]) / 1e9
    for name, num_bytes in written_bytes(recipe).items():
        if rows := [row for row in counted["rows"] if f".{name}." in row["ops"]]:
            assert sum(row["write"] for row in rows) == 0, f"{name}: TOOL counts what it writes already"
            total["extern"] += num_bytes / 1e9
    total |= {"all_but_attention": sum(total.values()) - total["attention"], "saved": counted["saved"] / 1e9}
    return {name: round(gb, 2) for name, gb in total.items()}


if __name__ == "__main__":
    tool = Path(sys.argv[1]).resolve()
    result = {"date": str(datetime.date.today()), "torch": torch.__version__,
              "unit": "GB of one slice of 65,536 tokens",
              "twin": count(tool, tgm, "plain_twin.GPT(sized(tgm))"), "fast": count(tool, tgm, "tgm.GPT(sized(tgm))"),
              "mudd_twin": count(tool, mudd, "plain_mudd()"), "mudd_fast": count(tool, mudd, "mudd.GPT(sized(mudd))")}
    Path(__file__).with_name("kernel_bytes.json").write_text(json.dumps(result, indent=1) + "\n")
    for recipe in ("", "mudd_"):
        for name in ("all_but_attention", "saved"):
            twin, fast = (result[recipe + side][name] for side in ("twin", "fast"))
            print(f"{recipe}{name}: {fast} / {twin} GB = {fast / twin:.3f}")
