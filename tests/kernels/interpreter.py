"""Two gaps of Triton's interpreter, closed for tests: it has no bfloat16 of its own (seen in Triton 3.9).

It holds bfloat16 as uint16. Rounding float32 to it cuts the lower bits off, where a GPU rounds to nearest even; and
`tl.dot` multiplies the bits of two bfloat16 blocks as if they were integers (1e10 where 1 is right).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def close_gaps() -> None:
    """Round as a GPU does, and multiply bfloat16 blocks as float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(value: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return np.where(np.isnan(value), np.uint16(0x7FC0), rounded).astype(np.uint16).reshape(value.shape)
        return convert(value, source, target, rounding_mode)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
