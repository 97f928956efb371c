"""The trainer's Triton kernels as a training step launches them, compiled for an H100 (sm_90). Needs no GPU.

    python records/bench/kernel_specs.py [--json]

Prints registers, shared memory and spills of each, from ptxas. Must run where TRITON_INTERPRET is not set.
"""
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_medium as tgm  # noqa: E402


class CompiledKernel(NamedTuple):
    name: str
    num_warps: int
    registers: int
    shared_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def recorded_launches() -> list[tuple[str, object, dict, dict]]:
    """(name, kernel, arguments by name, options) of every launch of a training and a validation step at full width.

    The operations write down what they would launch, and launch nothing: so a tile size stands in the trainer alone.
    """
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
                arguments = dict(zip(self.kernel.arg_names, args)) | kwargs
                launches.append((self.kernel.__name__, self.kernel, arguments, options))
            return launch

    recorders = {name: Recorder(getattr(tgm, name)) for name in dir(tgm) if name.endswith("_kernel")}
    config = tgm.Config()
    C, V, T, hidden = config.model_dim, config.vocab_size, 256, config.mlp_factor * config.model_dim
    bf16 = torch.bfloat16
    x, post, fc = (torch.empty(shape, dtype=bf16) for shape in ((T, C), (T, hidden), (hidden, C)))
    logits, ids = torch.empty(T, -(-V // 128) * 128, dtype=bf16), torch.zeros(T, dtype=torch.int64)
    with mock.patch.multiple(tgm, runs_kernels=lambda *_: True, num_multiprocessors=lambda device: 132, **recorders):
        tgm.mlp_up(x, fc)
        tgm.mlp_down_grad(x, fc.mT.contiguous(), post)
        tgm.cross_entropy(logits, ids, config.logit_softcap, True)
        tgm.cross_entropy(logits, ids, config.logit_softcap, False)
        tgm.embedding_grad(x[None], ids.int(), V)
        for K, x_scale in ((hidden, 0.0), (C, 1.0)):
            tgm.symmetric_product(torch.empty(1, C, K, dtype=bf16), 1.0, x_scale)
    return launches


def signature_of(value) -> str:
    """Triton's name of an argument's type."""
    types = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}
    if isinstance(value, torch.Tensor):
        return f"*{types[value.dtype]}"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{types[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    return "fp32" if isinstance(value, float) else "i32"


def compile_kernels() -> list[CompiledKernel]:
    """Compile every recorded launch for sm_90. Raises ImportError without triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    triton.knobs.compilation.always_compile = True  # a cached kernel would not pass ptxas
    triton.knobs.nvidia.dump_ptxas_log = True
    compiled = []
    for name, kernel, arguments, options in recorded_launches():
        constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
        signature = {name: "constexpr" if name in constants else signature_of(arguments[name])
                     for name in kernel.arg_names}
        # What a launch finds out: pointers and sizes that 16 divides.
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
                   if signature[name].startswith("*") or signature[name] == "i32" and arguments[name] % 16 == 0}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        stores, loads, registers = (int(re.search(pattern, log.getvalue())[1]) for pattern in (
            r"(\d+) bytes spill stores", r"(\d+) bytes spill loads", r"Used (\d+) registers"))
        switches = ",".join(f"{n}={v}" for n, v in constants.items() if isinstance(v, bool))
        compiled.append(CompiledKernel(f"{name}({switches})" if switches else name, binary.metadata.num_warps,
                                       registers, binary.metadata.shared, stores, loads))
    return compiled


if __name__ == "__main__":
    kernels = compile_kernels()
    if "--json" in sys.argv:
        print(json.dumps([kernel._asdict() for kernel in kernels]))
    else:
        for kernel in kernels:
            print(f"{kernel.name:42} {kernel.num_warps:3} warps {kernel.registers:4} registers "
                  f"{kernel.shared_bytes:7} B shared, spills {kernel.spill_store_bytes} / {kernel.spill_load_bytes} B")
