"""Triton's interpreter, mended: right bf16 and e5m2, NVIDIA's functions, no access outside of a launch's arguments.

The interpreter holds bf16 as uint16, computes with those integers, and truncates fp32. To e5m2 it rounds without a
carry into the exponent.
"""
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def is_bf16(x) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def to_fp32(x):
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x) else x


def to_bf16(x: TensorHandle) -> TensorHandle:
    """To nearest, ties to even; a NaN stays one."""
    bits = x.data.view(np.uint32)
    upper = np.where(np.isnan(x.data), bits >> 16 | 0x40, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return TensorHandle(upper.astype(np.uint16), tl.bfloat16)


def fix_rounding(patch: pytest.MonkeyPatch) -> None:
    """Casts, dots and operators, computed in fp32 and rounded once. Reductions of bf16 itself stay wrong."""
    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, x, dtype):
        if dtype.scalar == tl.bfloat16:
            return to_bf16(cast(self, to_fp32(x), tl.float32))
        return cast(self, to_fp32(x), dtype)

    def create_fp_to_fp(self, x, dtype, rounding_mode):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.float8e5):
            return convert(self, x, dtype, rounding_mode)
        return TensorHandle(torch.from_numpy(x.data).to(torch.float8_e5m2).view(torch.uint8).numpy(), tl.float8e5)

    def in_fp32(operation):
        def run(self, *arguments):
            result = operation(self, *map(to_fp32, arguments))
            # The last operand, of a dot the accumulator, has the result's dtype. Comparisons give bool.
            last = [x for x in arguments if isinstance(x, TensorHandle)][-1]
            return to_bf16(result) if is_bf16(last) and result.data.dtype == np.float32 else result
        return run

    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    patch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
    for name in ("create_dot", "binary_op", "unary_op"):
        patch.setattr(InterpreterBuilder, name, in_fp32(getattr(InterpreterBuilder, name)))


class Libdevice:
    """NVIDIA's functions of tensors, by numpy's; one that is missing here raises AttributeError."""
    named_otherwise = {"rsqrt": lambda x: 1 / np.sqrt(x), "pow": np.power, "fabs": np.abs, "nearbyint": np.rint,
                       "erf": lambda x: torch.erf(torch.as_tensor(x)).numpy()}

    def __getattr__(self, name: str) -> Callable[..., tl.tensor]:
        function = self.named_otherwise.get(name) or getattr(np, name)

        def call(*arguments):
            x = next(a for a in arguments if isinstance(a, tl.tensor))
            result = np.asarray(function(*(a.handle.data if isinstance(a, tl.tensor) else a for a in arguments)))
            dtype = tl.int32 if result.dtype == bool else x.dtype
            data = result.astype(interpreter._get_np_dtype(dtype))
            return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, x.shape) if x.type.is_block() else dtype)
        return call


def patch_language_once(patch: pytest.MonkeyPatch) -> None:
    """Triton patches its language before every call of a function and restores it after, which takes the most time."""
    patch_lang = interpreter._patch_lang
    patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))


def check_addresses(patch: pytest.MonkeyPatch) -> None:
    """Every masked load and store must lie in what the sizes and strides of one of the launch's tensors span."""
    executor, spans = interpreter.GridExecutor, []
    init = executor._init_args_hst

    def init_args(self, args, kwargs):
        host_args, host_kwargs = init(self, args, kwargs)
        spans.clear()
        for x in (*host_args, *host_kwargs.values()):
            x = getattr(x, "base", x)  # of a tensor descriptor
            if isinstance(x, torch.Tensor) and x.numel():
                last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
                spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
        return host_args, host_kwargs

    def check(pointers: TensorHandle, mask: TensorHandle) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if addresses.size:
            first, end = addresses.min(), addresses.max() + max(1, pointers.dtype.element_ty.primitive_bitwidth // 8)
            if not any(low <= first and end <= high for low, high in spans):
                raise IndexError(f"addresses {first:x} to {end:x} lie outside of every argument")

    def load(self, pointers, mask, *rest, **options):
        check(pointers, mask)
        return masked_load(self, pointers, mask, *rest, **options)

    def store(self, pointers, value, mask, *rest, **options):
        check(pointers, mask)
        return masked_store(self, pointers, value, mask, *rest, **options)

    masked_load, masked_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    patch.setattr(executor, "_init_args_hst", init_args)
    patch.setattr(InterpreterBuilder, "create_masked_load", load)
    patch.setattr(InterpreterBuilder, "create_masked_store", store)


def mend(patch: pytest.MonkeyPatch) -> None:
    """All of the above, for TorchInductor's kernels as well."""
    from torch._inductor.runtime import triton_compat, triton_helpers
    fix_rounding(patch)
    patch_language_once(patch)
    check_addresses(patch)
    for module in (triton_helpers, triton_compat):
        patch.setattr(module, "libdevice", Libdevice())
