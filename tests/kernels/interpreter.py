"""Two gaps of Triton's interpreter, closed for tests: it has no bfloat16 of its own (seen in Triton 3.9). And one cost.

It holds bfloat16 as uint16. Rounding float32 to it cuts the lower bits off, where a GPU rounds to nearest even; and
`tl.dot` multiplies the bits of two bfloat16 blocks as if they were integers (1e10 where 1 is right).

Each call of one jitted function by another, `tl.sum` among them, replaces the whole of `triton.language` again, though
the kernel's start has done so: 1 ms a call, half of an attention kernel's time.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def close_gaps() -> None:
    """Round as a GPU does, multiply bfloat16 blocks as float32, and call jitted functions without more ado."""
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

    prepared: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module not in prepared:
            prepared.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
