"""Bytes that forward and backward of one full slice move, for the plain twin and for the trainer.

    python records/tools/bench/count_bytes.py TOOL      TOOL is a copy of kernel_bytes.py; about 4 minutes, no GPU

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

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import train_gpt_medium as tgm  # noqa: E402

BUILD = '''
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import kernel_bytes
import plain_twin
import train_gpt_medium as tgm

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

def build():
    tgm.cross_entropy = cross_entropy
    tgm.block_masks, plain_twin.window_block_mask = lambda *_: (None, None), lambda *_: None
    for module in (tgm, plain_twin):
        module.dense_mask = lambda mask: mask
        module.attend = lambda q, k, v, *_: kernel_bytes.attention(q, k, v)
    model = {side}.GPT(tgm.Config(val_seq_len=65536, val_tokens=65536))
    return model, (torch.zeros(65536, dtype=torch.int32), torch.zeros(65536, dtype=torch.int64),
                   torch.tensor(14, dtype=torch.int32))
'''


def replace_file(name: str, text: str) -> None:
    """Write beside this script, complete or not at all."""
    target = Path(__file__).with_name(name)
    target.with_suffix(".tmp").write_text(text)
    target.with_suffix(".tmp").rename(target)


def written_bytes() -> dict[str, int]:
    """By all calls of each hand-written operation in the record, in bf16."""
    config = tgm.Config()
    with torch.device("meta"):
        model = config.make_model()
    T, hidden = config.seq_len, sum(len(block.mlp_fc) for block in model.blocks)
    return {"mlp_up": 2 * T * hidden, "mlp_down_grad": 2 * T * hidden,
            "cross_entropy": 2 * T * len(model.lm_head) + 4 * T, "embedding_grad": model.embeds.nbytes}


def count(tool: Path, side: str) -> dict[str, float]:
    """GB by kind of kernel, their sum without attention, and what the forward pass keeps."""
    with tempfile.TemporaryDirectory() as folder:
        build, out = Path(folder) / "build.py", Path(folder) / "out.json"
        build.write_text(BUILD.format(root=str(ROOT), side=side))
        environment = os.environ | {"PYTHONPATH": f"{folder}:{tool.parent}"}
        subprocess.run([sys.executable, str(tool), str(build), "--top", "60", "--json", str(out)], env=environment,
                       check=True)
        counted = json.loads(out.read_text())
    total = dict.fromkeys(("fused", "extern", "gemm", "attention"), 0.0)
    for row in counted["rows"]:
        total[row["kind"]] += (row["read"] + row["write"]) / 1e9
    for name, num_bytes in written_bytes().items():
        if rows := [row for row in counted["rows"] if f".{name}." in row["ops"]]:
            assert sum(row["write"] for row in rows) == 0, f"{name}: TOOL counts what it writes already"
            total["extern"] += num_bytes / 1e9
    total |= {"all_but_attention": sum(total.values()) - total["attention"], "saved": counted["saved"] / 1e9}
    return {name: round(gb, 2) for name, gb in total.items()}


if __name__ == "__main__":
    tool = Path(sys.argv[1]).resolve()
    result = {"date": str(datetime.date.today()), "torch": torch.__version__,
              "unit": "GB of one slice of 65,536 tokens", "twin": count(tool, "plain_twin"), "fast": count(tool, "tgm")}
    replace_file("kernel_bytes.json", json.dumps(result, indent=1) + "\n")
    for name in ("all_but_attention", "saved"):
        twin, fast = result["twin"][name], result["fast"][name]
        print(f"{name}: {fast} / {twin} GB = {fast / twin:.3f}")
