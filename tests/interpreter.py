"""Right bf16 in Triton's interpreter, which holds it as uint16, computes with those integers and truncates fp32."""
import numpy as np
import pytest
import triton.language as tl
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


def fix_bf16(patch: pytest.MonkeyPatch) -> None:
    """Casts, dots and operators, computed in fp32 and rounded once. Reductions of bf16 itself stay wrong."""
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, x, dtype):
        if dtype.scalar == tl.bfloat16:
            return to_bf16(cast(self, to_fp32(x), tl.float32))
        return cast(self, to_fp32(x), dtype)

    def in_fp32(operation):
        def run(self, *arguments):
            result = operation(self, *map(to_fp32, arguments))
            # The last operand, of a dot the accumulator, has the result's dtype. Comparisons give bool.
            last = [x for x in arguments if isinstance(x, TensorHandle)][-1]
            return to_bf16(result) if is_bf16(last) and result.data.dtype == np.float32 else result
        return run

    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    for name in ("create_dot", "binary_op", "unary_op"):
        patch.setattr(InterpreterBuilder, name, in_fp32(getattr(InterpreterBuilder, name)))
