"""The Triton kernels of a run, compiled for an H100 (sm_90) that is not there: registers, shared memory and spills.

    python records/tools/bench/kernel_specs.py               the hand-written ones; half a minute
    python records/tools/bench/kernel_specs.py medium short  and all that TorchInductor generates for these presets, in
                                                             kernel_specs_<version of torch>.txt; 4 minutes

The second needs a CUDA build of torch and a C++ compiler, but no GPU: tensors are fake, and a stub of the driver says
that there is one. The trainer itself then compiles its model and its updates, at full size; every configuration counts
that is compiled before a kernel's first launch. Coordinate descent tries others later, and passes over those that fail.
Exits with status 1 if a kernel needs more shared memory than a program can have. Must run without TRITON_INTERPRET.
"""
import contextlib
import datetime
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import train_gpt_medium as tgm  # noqa: E402
from count_bytes import replace_file  # noqa: E402

H100 = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
                       warp_size=32, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
                       regs_per_multiprocessor=65536, shared_memory_per_block=48 * 1024, L2_cache_size=50 << 20,
                       shared_memory_per_block_optin=tgm.HOPPER_SHARED_BYTES, gcnArchName="", uuid="",
                       shared_memory_per_multiprocessor=228 * 1024)


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

def recorded_launches() -> list[tuple[object, dict, dict]]:
    """(kernel, arguments by name, options) of every launch of a training and a validation step at full width.

    The operations write down what they would launch, and launch nothing: so a tile size stands in the trainer alone.
    """
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
                launches.append((self.kernel, dict(zip(self.kernel.arg_names, args)) | kwargs, options))
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
    if isinstance(value, Tensor):
        return f"*{types[value.dtype]}"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{types[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    return "fp32" if isinstance(value, float) else "i32"


def compile_kernels() -> list[CompiledKernel]:
    """Compile every recorded launch for sm_90. Raises ImportError without triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernels = []
    for kernel, arguments, options in recorded_launches():
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
            binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        kernels.append(describe("hand-written", name, tiles, binary.metadata, log))
    return kernels


# ----------------------------------------------------------------------------------------------------------------------
# Generated kernels

# What torch asks the CUDA runtime and driver while it only traces: one device, and no stream but the default one. In a
# build of torch without CUDA, only who guards the current device.
FAKE_DRIVER = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
extern "C" {
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
}
"""


def run_with_fake_driver(code: str) -> list[CompiledKernel]:
    """The kernels that the expression `code` gives in a new Python, which finds a GPU's driver and empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / "libcuda.so.1"
        home = Path(torch.__file__).parent
        if shutil.which("c++") is None:
            raise tgm.UserError("c++ is missing, with which the stub of the driver is built: install a C++ compiler.")
        subprocess.run(["c++", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", "-x", "c++", "-", f"-L{home}/lib",
                        f"-Wl,-rpath,{home}/lib,-soname,libcuda.so.1", "-lc10", "-o", str(driver)],
                       input=FAKE_DRIVER, text=True, check=True)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
            "LD_PRELOAD": str(driver), "TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        script = f"import json\nfrom kernel_specs import *\nprint(json.dumps({code}))"
        done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, env=environment,
                              stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise tgm.UserError(f"{code} failed: a kernel or graph does not compile, see above.")
    return [CompiledKernel(*row) for row in json.loads(done.stdout.splitlines()[-1])]


@dataclass
class Found:
    """phase: what the trainer compiles at this moment; kernels: what it has compiled."""
    phase: str = ""
    kernels: list[CompiledKernel] = field(default_factory=list)


def pretend_h100(found: Found) -> None:
    """Make torch compile for an H100 in this process, and launch nothing."""
    import torch._inductor.config as inductor
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.compile_fx import _InProcessFxCompile
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses import fake_tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only
    from triton.backends.compiler import GPUTarget

    # The device
    torch.cuda.is_available, torch.cuda._lazy_init = lambda: True, lambda: None
    for name in ("current_device", "_exchange_device", "_maybe_exchange_device"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.cuda.get_device_properties = lambda *_: H100
    torch.cuda.get_device_capability = lambda *_: (H100.major, H100.minor)
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, lambda *_: None
    CudaInterface.get_device_properties = CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: H100)
    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.FakeTensorMode.avoid_device_init = True
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    triton_helpers.set_driver_to_gpu = lambda: None
    inductor.compile_threads, inductor.use_static_triton_launcher = 1, False

    class OnCPU(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*tree_map_only(torch.device, lambda _: torch.device("cpu"), args),
                            **tree_map_only(torch.device, lambda _: torch.device("cpu"), kwargs or {}))

    for name in ("_deduce_value", "_add_peephole_patterns"):  # computes constants with real tensors
        def computed(self, *args, method=getattr(UniformValueConstantFolder, name)):
            with OnCPU():
                return method(self, *args)
        setattr(UniformValueConstantFolder, name, computed)

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


def compile_generated(config: tgm.Config, world_sizes: tuple[int, ...] = (1, 8)) -> list[CompiledKernel]:
    """All kernels that TorchInductor generates for a run of `config`, in the order in which they are compiled.

    world_sizes: numbers of ranks whose updates are compiled, each as its rank 0. Only in run_with_fake_driver. A build
    of torch without CUDA has no backward pass on a GPU, not even a fake one: it leaves training out. It also takes
    norms apart in another way.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
    found, device = Found(), torch.device("cuda", 0)
    pretend_h100(found)
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
        if torch.version.cuda:
            found.phase = "training"
            model(**inputs(config.piece_len)).backward()
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
# Table

def format_table(kernels: dict[str, list[CompiledKernel]]) -> str:
    """A line for each kernel and configuration, with their number in each preset; the kernels' own numbers are cut."""
    counts = {preset: Counter(k._replace(name=re.sub(r"_\d+$", "", k.name)) for k in rows)
              for preset, rows in kernels.items()}
    table = [[*counts, *CompiledKernel._fields]]
    table += [[*(count[k] for count in counts.values()), *k] for k in dict.fromkeys(chain(*counts.values()))]
    cells = [[*map(str, row)] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells) + "\n"


def read_table(text: str) -> list[CompiledKernel]:
    """What format_table has written, without its numbers and whatever stands before it."""
    _, rows = text.split(CompiledKernel._fields[-1] + "\n")
    columns = (row.split()[-len(CompiledKernel._fields):] for row in rows.splitlines())
    return [CompiledKernel(phase, *map(int, numbers), config, name) for phase, *numbers, config, name in columns]


def with_spills_first(table: str) -> str:
    """The table, below a line for every kernel that spills."""
    spills = [f"{k.name} spills: a thread stores {k.spill_store_bytes} bytes and loads {k.spill_load_bytes}\n"
              for k in read_table(table) if k.spill_store_bytes + k.spill_load_bytes]
    return "".join(spills) + "\n" + table


def refuse_too_large(kernels: Iterable[CompiledKernel]) -> None:
    """Raises UserError if a kernel would fail at its first launch."""
    for k in kernels:
        if k.shared_bytes > tgm.HOPPER_SHARED_BYTES:
            raise tgm.UserError(f"{k.name} ({k.config}) needs {k.shared_bytes:,} bytes of shared memory, a program can "
                                f"have {tgm.HOPPER_SHARED_BYTES:,}: cut its tiles or stages.")


def main(presets: list[str]) -> None:
    """Print the table of the hand-written kernels; if presets are named, of all, and write it. Raises UserError."""
    for preset in presets:
        tgm.choose_config(tgm.PRESETS, [preset])
    if presets and not torch.version.cuda:
        raise tgm.UserError(f"torch {torch.__version__} has no backward pass on a GPU: use a CUDA build.")
    import triton
    by_hand = compile_kernels()
    kernels = {preset: by_hand + run_with_fake_driver(f"compile_generated(tgm.PRESETS[{preset!r}]())")
               for preset in presets} or {"every": by_hand}
    table = with_spills_first(format_table(kernels))
    print(table, end="")
    if presets:
        version = ".".join(torch.__version__.split(".")[:2])
        replace_file(f"kernel_specs_{version}.txt", f"{datetime.date.today()}, torch {torch.__version__}, triton "
                     f"{triton.__version__}: python records/tools/bench/kernel_specs.py {' '.join(presets)}\n{table}")
    refuse_too_large(chain(*kernels.values()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except tgm.UserError as error:
        sys.exit(f"error: {error}")
