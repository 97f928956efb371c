"""The Triton kernels of a run, compiled for a GPU that is not there: registers, shared memory and spills.

    python records/tools/bench/kernel_specs.py                            the hand-written ones, for an H100
    python records/tools/bench/kernel_specs.py medium short --gpu 90 120  and all that TorchInductor generates for these
                                                                          presets, for several GPUs; minutes for each

Presets and a recipe's own kernels are those of the script that TRAIN_SCRIPT names, or of train_gpt_medium.py.
No GPU is needed, but a C++ compiler: tensors are fake, and a stub of the driver says that there is one (fake_gpu.py).
The trainer itself then compiles its model and its updates, at full size; every configuration counts that is compiled
before a kernel's first launch. Coordinate descent tries others later, and passes over those that fail. Exits with
status 1 if a kernel needs more shared memory than a program can have. Must run without TRITON_INTERPRET.
"""
import argparse
import contextlib
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "preflight")]
import fake_gpu  # noqa: E402
import memory  # noqa: E402
import train_gpt_medium as tgm  # noqa: E402

script = memory.load_script()


class CompiledKernel(NamedTuple):
    """A kernel in one configuration. phase: what launches it."""
    phase: str
    num_warps: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    config: str
    name: str


def as_config(values: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items()) or "-"


@contextlib.contextmanager
def ptxas_log() -> Iterator[io.StringIO]:
    """What ptxas says of a kernel that is compiled meanwhile."""
    import triton
    triton.knobs.compilation.always_compile = True  # a cached kernel would not pass ptxas
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        yield log


def describe(phase: str, name: str, config: dict[str, Any], metadata, log: io.StringIO) -> CompiledKernel:
    """metadata: of Triton's binary."""
    registers, stores, loads = (int(re.search(pattern, log.getvalue())[1]) for pattern in (
        r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"))
    return CompiledKernel(phase, metadata.num_warps, registers, stores, loads, metadata.shared, as_config(config), name)


# ----------------------------------------------------------------------------------------------------------------------
# Hand-written kernels

def by_hand() -> dict[str, ModuleType]:
    """Where each kernel of the machine and of the script stands, by its name."""
    return {name: module for module in (tgm, script) for name in dir(module) if name.endswith("_kernel")}


def recorded_launches(gpu: SimpleNamespace) -> list[tuple[object, dict, dict]]:
    """(kernel, arguments by name, options) of every launch on `gpu` of a training and a validation step at full width.

    The operations write down what they would launch, and launch nothing: so a tile size stands in the trainer alone.
    """
    def runs_kernels(x: Tensor, shared_bytes: int = 0) -> bool:
        return shared_bytes <= gpu.shared_memory_per_block_optin

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
                launches.append((self.kernel, dict(zip(self.kernel.arg_names, args)) | kwargs, options))
            return launch

    config = tgm.Config()
    C, V, T, hidden = config.model_dim, config.vocab_size, 256, config.mlp_factor * config.model_dim
    bf16 = torch.bfloat16
    x, post, fc = (torch.empty(shape, dtype=bf16) for shape in ((T, C), (T, hidden), (hidden, C)))
    logits, ids = torch.empty(T, -(-V // 128) * 128, dtype=bf16), torch.zeros(T, dtype=torch.int64)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(tgm, runs_kernels=runs_kernels, num_multiprocessors=lambda device: 132))
        for name, module in by_hand().items():
            stack.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name))))
        tgm.mlp_up(x, fc)
        for proj in (fc.mT.contiguous(), fc.mT):  # stored either way
            tgm.mlp_down_grad(x, proj, post)
        tgm.cross_entropy(logits, ids, config.logit_softcap, True)
        tgm.cross_entropy(logits, ids, config.logit_softcap, False)
        for num_rows in (V, logits.size(1)):
            tgm.embedding_grad(x[None], ids.int(), num_rows)
        for K, x_scale in ((hidden, 0.0), (C, 1.0)):
            tgm.symmetric_product(torch.empty(1, C, K, dtype=bf16), 1.0, x_scale)
        if hasattr(script, "mtp_cross_entropy"):
            for fp8 in (True, False):
                script.mtp_cross_entropy(logits, ids, torch.ones(3), fp8)
    return launches


def signature_of(value) -> str:
    """Triton's name of an argument's type."""
    types = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
             torch.float8_e5m2: "fp8e5"}
    if isinstance(value, Tensor):
        return f"*{types[value.dtype]}"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{types[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    return "fp32" if isinstance(value, float) else "i32"


def compile_kernels(arch: str = "90", prefix: str = "") -> list[CompiledKernel]:
    """Compile every recorded launch, of kernels whose names begin so, for a row of fake_gpu.GPUS.

    Raises ImportError without triton.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernels = []
    launches = recorded_launches(fake_gpu.GPUS[arch])
    for kernel, arguments, options in (row for row in launches if row[0].__name__.startswith(prefix)):
        constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
        signature = {name: "constexpr" if name in constants else signature_of(arguments[name])
                     for name in kernel.arg_names}
        # What a launch finds out: pointers and sizes that 16 divides.
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
                   if signature[name].startswith("*") or signature[name] == "i32" and arguments[name] % 16 == 0}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
        switches = as_config({name: value for name, value in constants.items() if isinstance(value, bool)})
        tiles = {name: value for name, value in constants.items() if not isinstance(value, bool)}
        name = kernel.__name__ + (f"({switches})" if switches != "-" else "")
        with ptxas_log() as log:
            binary = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)
        kernels.append(describe("hand-written", name, tiles, binary.metadata, log))
    return kernels


# ----------------------------------------------------------------------------------------------------------------------
# Generated kernels

def compiled(expression: str) -> list[CompiledKernel]:
    """The kernels that an expression gives in a new Python, which finds a GPU's driver. Raises UserError."""
    try:
        rows = fake_gpu.run_with_driver("kernel_specs", expression, [str(Path(__file__).parent), *sys.path[:2]])
    except RuntimeError as error:
        raise tgm.UserError(f"{error}\na kernel or graph does not compile, see above") from None
    return [CompiledKernel(*row) for row in rows]


@dataclass
class Found:
    """phase: what the trainer compiles at this moment; kernels: what it has compiled."""
    phase: str = ""
    kernels: list[CompiledKernel] = field(default_factory=list)


def watch_compilation(found: Found) -> None:
    """Compile in this process for the GPU that is pretended, and launch nothing."""
    from torch._inductor.compile_fx import _InProcessFxCompile
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    # Graphs: compiled, then called for the shapes of their results
    generate = _InProcessFxCompile.codegen_and_compile

    def codegen_and_compile(self, graph, inputs, inputs_to_check, options):
        results = [getattr(node, "meta", {}).get("val") for node in graph.graph.output_node().args[0]]
        phase = found.phase
        if phase == "training":
            found.phase += "-backward" if options["is_backward"] else "-forward"
        print(f"{found.phase}: a graph of {len(graph.graph.nodes)} nodes", file=sys.stderr)
        code = generate(self, graph, inputs, inputs_to_check, options)
        found.phase = phase
        code.current_callable = lambda inputs: [
            torch.empty_strided(r.size(), r.stride(), dtype=r.dtype, device=r.device) if isinstance(r, Tensor) else r
            for r in results]
        return code

    _InProcessFxCompile.codegen_and_compile = codegen_and_compile

    # Kernels: compiled in each configuration, and not loaded
    precompile = CachingAutotuner._precompile_config

    def precompile_config(self, config):
        tiles = {name: value for name, value in self.inductor_meta.get("config_args", {}).items()  # of a template
                 if name.startswith("BLOCK_")} | config.kwargs
        name = self.inductor_meta["kernel_name"]
        with ptxas_log() as log:
            try:
                result = precompile(self, config)
            except Exception as error:  # Inductor would drop a configuration that ptxas refuses
                raise tgm.UserError(f"{name} ({as_config(tiles)}) does not compile.") from error
        kernel = describe(found.phase, name, tiles, result.kernel.metadata, log)
        result.kernel.n_regs = kernel.registers  # a reduction that takes many is compiled with smaller blocks too
        found.kernels.append(kernel)
        return result

    CachingAutotuner._precompile_config = precompile_config
    CachingAutotuner._make_launchers = lambda self: None


def compile_generated(config: tgm.Config, arch: str = "90", world_sizes: tuple[int, ...] = (1, 8)
                      ) -> list[CompiledKernel]:
    """All kernels that TorchInductor generates for a run of `config`, in the order in which they are compiled.

    arch: a row of fake_gpu.GPUS. world_sizes: numbers of ranks whose updates are compiled, each as its rank 0. Only in
    `compiled`. A build of torch without CUDA takes norms apart in another way.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
    found, device = Found(), torch.device("cuda", 0)
    fake_gpu.pretend(fake_gpu.GPUS[arch])
    watch_compilation(found)
    torch._inductor.config.coordinate_descent_tuning = config.coordinate_descent_tuning

    def optimizer_of(size: int) -> tgm.Optimizer:
        return tgm.Optimizer(model, config, tgm.World(0, size, device),
                             partial(torch.compile, dynamic=False, fullgraph=True))

    def inputs(num_tokens: int) -> dict[str, Tensor]:
        ids = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        return dict(ids=ids, targets=ids.long(), **tgm.inputs_at(0, config, device))

    with FakeTensorMode():
        with device:
            model = config.make_model()
        tgm.compile_model(model, whole=config.coordinate_descent_tuning)
        optimizer_of(1)  # parameters lie in its buffers: not all at multiples of 16 bytes
        found.phase = "training"
        for length in {config.pieces(stage)[1] for stage in config.stages}:
            model(**inputs(length)).backward()
        found.phase = "validation"
        with torch.no_grad():
            model(**inputs(config.val_piece_len))
        for size in world_sizes:
            found.phase = f"updates-{size}-rank{'s' * (size > 1)}"
            if size > 1:
                torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
            optimizer = optimizer_of(size)
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step(1)  # a step without Snoo, of which nothing is compiled
    return found.kernels


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def format_table(kernels: Iterable[CompiledKernel]) -> str:
    """A line for each kernel and configuration, with how often it comes; the kernels' own numbers are cut."""
    counts = Counter(k._replace(name=re.sub(r"_\d+$", "", k.name)) for k in kernels)
    cells = [["number", *CompiledKernel._fields], *([str(n), *map(str, k)] for k, n in counts.items())]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def sum_up(arch: str, kernels: list[CompiledKernel]) -> str:
    """A GPU in one line: how many kernels, which spill or do not fit, what is left to torch."""
    gpu = fake_gpu.GPUS[arch]
    limit = gpu.shared_memory_per_block_optin
    spills = Counter(re.sub(r"_\d+$", "", k.name) for k in kernels if k.spill_store_bytes or k.spill_load_bytes)
    worst = max((k.spill_store_bytes for k in kernels), default=0)
    too_large = [k.name for k in kernels if k.shared_bytes > limit]
    left = sorted(by_hand().keys() - {k.name.split("(")[0] for k in kernels if k.phase == "hand-written"})
    which = f", a thread at most {worst:,} bytes ({', '.join(f'{n} {name}' for name, n in spills.items())})"
    return (f"sm_{arch}, {gpu.name}: {len(kernels)} kernels compile, {len(too_large)} need more than {limit:,} bytes "
            f"of shared memory (the largest {max(k.shared_bytes for k in kernels):,}); {sum(spills.values())} spill"
            f"{which if spills else ''}; left to torch: {', '.join(left) or 'none'}")


def refuse_too_large(kernels: Iterable[CompiledKernel], arch: str = "90") -> None:
    """Raises UserError if a kernel would fail at its first launch."""
    limit = fake_gpu.GPUS[arch].shared_memory_per_block_optin
    for k in kernels:
        if k.shared_bytes > limit:
            raise tgm.UserError(f"{k.name} ({k.config}) needs {k.shared_bytes:,} bytes of shared memory, a program can "
                                f"have {limit:,}: cut its tiles or stages.")


def main(arguments: list[str]) -> None:
    """Print every GPU's kernels and its line. Raises UserError if one of them does not compile or fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="whose generated kernels are compiled too")
    parser.add_argument("--gpu", nargs="+", default=["90"], choices=fake_gpu.GPUS, help="compute capabilities")
    args = parser.parse_args(arguments)
    for preset in args.presets:
        tgm.choose_config(script.PRESETS, [preset])
    found = {}
    for arch in args.gpu:
        found[arch] = compiled(f"compile_kernels({arch!r})")
        for preset in args.presets:
            found[arch] += compiled(f"compile_generated(script.PRESETS[{preset!r}](), {arch!r})")
        print(f"{sum_up(arch, found[arch])}\n\n{format_table(found[arch])}\n", flush=True)
    for arch, kernels in found.items():
        refuse_too_large(kernels, arch)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except tgm.UserError as error:
        sys.exit(f"error: {error}")
