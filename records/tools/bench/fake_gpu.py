"""A GPU that is not there: torch compiles for it, nothing is launched. For kernel_specs.py and the tests' harness.

The driver is a stub that run_with_driver loads into a new Python; `pretend` then tells torch which GPU it is.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# What torch asks while it only traces: one device, and no stream but the default one. A build of torch without CUDA has
# no CUDA runtime to answer; there the stub also takes the place of what says that an accelerator exists.
DRIVER = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
const auto CUDA = c10::DeviceType::CUDA;
struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return c10::Device(CUDA, 0); }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
};
static c10::impl::DeviceGuardImplRegistrar guard(CUDA, new Guard());
#ifdef WITHOUT_CUDA
#include <ATen/detail/CUDAHooksInterface.h>
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
namespace accelerator { std::optional<c10::DeviceType> getAccelerator(bool) { return CUDA; } }
}
#endif
extern "C" {
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
}
"""


def describe_gpu(name: str, capability: tuple[int, int], num_multiprocessors: int, shared_kib: int,
                 threads: int, memory_gib: int) -> SimpleNamespace:
    """torch's device properties. shared_kib: shared memory of a program; threads: of a multiprocessor."""
    return SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=num_multiprocessors,
        total_memory=memory_gib << 30, warp_size=32, max_threads_per_multi_processor=threads,
        max_threads_per_block=1024, regs_per_multiprocessor=65536, shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=shared_kib * 1024, shared_memory_per_multiprocessor=(shared_kib + 1) * 1024,
        L2_cache_size=50 << 20, gcnArchName="", uuid="")


# By compute capability, from NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities.
GPUS = {
    "80": describe_gpu("A100 80GB", (8, 0), 108, 163, 2048, 80),
    "86": describe_gpu("RTX 3090", (8, 6), 82, 99, 1536, 24),
    "89": describe_gpu("RTX 4090", (8, 9), 128, 99, 1536, 24),
    "90": describe_gpu("H100 80GB", (9, 0), 132, 227, 2048, 80),
    "100": describe_gpu("B200", (10, 0), 148, 227, 2048, 180),
    "120": describe_gpu("RTX 5090", (12, 0), 170, 99, 1536, 32),
}


class OnCPU(TorchDispatchMode):
    """Operations that name a GPU run on the CPU."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs or {}))
        return function(*args, **kwargs)


def run_with_driver(module: str, expression: str, path: list[str], **variables: str) -> Any:
    """The JSON value of an expression in the names of `module`, in a new Python with the stub as driver and no caches.

    path: folders to import from; variables: added to the environment. Raises RuntimeError where it fails.
    """
    if shutil.which("c++") is None:
        raise RuntimeError("c++ is missing, with which the stub of the driver is built: install a C++ compiler.")
    with tempfile.TemporaryDirectory() as folder:
        driver, home = Path(folder) / "libcuda.so.1", Path(torch.__file__).parent
        without_cuda = [] if torch.version.cuda else ["-DWITHOUT_CUDA", "-ltorch_cpu"]
        subprocess.run(["c++", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", "-x", "c++", "-", f"-L{home}/lib",
                        f"-Wl,-rpath,{home}/lib,-soname,libcuda.so.1", "-lc10", *without_cuda, "-o", str(driver)],
                       input=DRIVER, text=True, check=True)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
            "LD_PRELOAD": str(driver), "TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "PYTHONPATH": ":".join(path)} | variables
        script = f"import json\nfrom {module} import *\nprint(json.dumps({expression}))"
        done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{expression} failed:\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def pretend(gpu: SimpleNamespace) -> None:
    """Make torch compile for `gpu` in this process, for good. Only where run_with_driver started it."""
    import torch._inductor.config as inductor
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    torch.cuda.is_available, torch.cuda._lazy_init = lambda: True, lambda: None
    torch.cuda.is_current_stream_capturing = lambda: False
    for name in ("current_device", "_exchange_device", "_maybe_exchange_device", "set_device"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.cuda.get_device_properties = lambda *_: gpu
    torch.cuda.get_device_capability = lambda *_: (gpu.major, gpu.minor)
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, lambda *_: None
    CudaInterface.get_device_properties = CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: gpu)
    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.FakeTensorMode.avoid_device_init = True
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * gpu.major + gpu.minor, 32)))
    triton_helpers.set_driver_to_gpu = lambda: None
    inductor.compile_threads, inductor.use_static_triton_launcher = 1, False
    for name in ("_deduce_value", "_add_peephole_patterns"):  # computes constants with real tensors
        def computed(self, *args, method=getattr(UniformValueConstantFolder, name)):
            with OnCPU():
                return method(self, *args)
        setattr(UniformValueConstantFolder, name, computed)
