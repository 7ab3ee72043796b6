"""Triton's interpreter as the tests use it: two gaps closed (both seen in Triton 3.9), and most of its time saved.

It holds bfloat16 as uint16. Rounding float32 to it cuts the lower bits off, where a GPU rounds to nearest even; and
`tl.dot` multiplies the bits of two bfloat16 blocks as if they were integers (1e10 where 1 is right).

Most of its time goes into Python around numpy's calls. What is saved of it here changes no bit of a result:
`test_triton_interpreter.py` compares the two.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.cache
def close_gaps() -> None:
    """Round as a GPU does, and multiply bfloat16 blocks as float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def widen(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def convert_float(value: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return np.where(np.isnan(value), np.uint16(0x7FC0), rounded).astype(np.uint16).reshape(value.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return widen(value)
        return convert(value, source, target, rounding_mode)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(widen(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


@functools.cache
def save_time() -> None:
    """Leave out what the interpreter computes over and over, or computes and drops."""
    _prepare_the_language_once()
    _remember_types()
    _compare_types_first()
    _scan_whole_slices()


def _prepare_the_language_once() -> None:
    """Each start of a kernel, and each call of one jitted function by another, `tl.sum` among them, replaces the whole
    of `triton.language` again: 1 ms a call. And each sum or product of int32 is computed once more in int64, to be
    compared with int32's range for an assertion that is then left out, as the kernels are not compiled for debugging:
    a third of an attention kernel's time.
    """
    from triton.runtime import interpreter

    prepare, attach = interpreter._patch_lang, interpreter._patch_attr
    prepared: set[str] = set()

    def prepare_once(function: Any) -> Any:
        if function.__module__ not in prepared:
            prepared.add(function.__module__)
            prepare(function)
        return interpreter._LangPatchScope()

    def attach_directly(target: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        inner = getattr(member, "__wrapped__", None)
        if inner is None:
            attach(target, name, member, builder, scope)
            return

        def called(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return inner(*args, **kwargs)

        scope.set_attr(target, name, called)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepare_once(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = prepare_once
    interpreter._patch_attr = attach_directly
    interpreter.InterpretedFunction.__call__ = call
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _remember_types() -> None:
    """A block's type, and the shape that its tensors show, are made anew from dozens of objects for each operation."""
    import triton.language as tl
    from triton.runtime import interpreter

    make_block_type, numpy_dtype = tl.block_type.__init__, interpreter._get_np_dtype
    shapes: dict[tuple[int, ...], tuple[Any, ...]] = {}
    names: dict[tuple[str, tuple[int, ...]], str] = {}
    dtypes: dict[str, Any] = {}
    scalar = (tl.constexpr(1), tl.tuple([]))

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple(one.value if isinstance(one, tl.constexpr) else one for one in shape)
        name = names.get((element_ty.name, key))
        if name is None:
            make_block_type(self, element_ty, shape)
            names[element_ty.name, key] = self.name
            shown = tl.constexpr(self.numel), tl.tuple([tl.constexpr(one) for one in self.shape])
            shapes.setdefault(key, (self.shape, self.numel, shown))
        else:
            self.name, self.element_ty = name, element_ty
        self.shape, self.numel, self.shown = shapes[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.shown if type.is_block() else scalar

    def get_np_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(kind)
        return dtypes[name]

    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor
    interpreter._get_np_dtype = get_np_dtype


def _compare_types_first() -> None:
    """Two operands of one type need no promotion, and two of one shape no broadcasting."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    promote, broadcast, equal = (
        TritonSemantic.binary_op_type_checking_impl,
        TritonSemantic.broadcast_impl_value,
        tl.dtype.__eq__,
    )
    plain = ("int1", "int32", "int64", "fp16", "bf16", "fp32", "fp64")

    def dtype_equal(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    def spread(one: Any, shape: Any) -> Any:
        if one.type.is_block() and one.type.shape.values == shape:
            return one
        data = np.empty(shape, one.handle.data.dtype)
        data[...] = one.handle.data
        return tl.tensor(interpreter.TensorHandle(data, one.dtype), tl.block_type(one.dtype, shape))

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = (one.type.shape.values if one.type.is_block() else None for one in (lhs, rhs))
        if a == b:
            return lhs, rhs
        if a is None or b is None:
            return spread(lhs, a or b), spread(rhs, a or b)
        if len(a) == len(b) and all(m == n or m == 1 or n == 1 for m, n in zip(a, b, strict=True)):
            both = [max(m, n) for m, n in zip(a, b, strict=True)]
            return spread(lhs, both), spread(rhs, both)
        return broadcast(self, lhs, rhs)

    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *rest: bool, **options: bool) -> Any:
        # The fourth of the rest is "a division or remainder", which has rules of its own.
        if (
            isinstance(lhs, tl.tensor)
            and isinstance(rhs, tl.tensor)
            and lhs.dtype.name == rhs.dtype.name
            and lhs.dtype.name in plain
            and len(rest) < 4
            and not options
        ):
            return broadcast_impl_value(self, lhs, rhs)
        return promote(self, lhs, rhs, *rest, **options)

    tl.dtype.__eq__ = dtype_equal
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl


def _scan_whole_slices() -> None:
    """`tl.associative_scan` joins one element with one other; here, in the same order, all at one place of the axis."""
    from triton.runtime import interpreter

    def generic_scan(self: Any, inputs: Any) -> Any:
        given = [np.moveaxis(one.handle.data, self.axis, 0) for one in inputs]
        found = [np.empty_like(one) for one in given]
        for place in range(given[0].shape[0]):
            here = tuple(self.to_tensor(data[place], one.dtype) for data, one in zip(given, inputs, strict=True))
            joined = here
            if place:
                before = (self.to_tensor(data[place - 1], one.dtype) for data, one in zip(found, inputs, strict=True))
                joined = self.combine_fn.fn(*before, *here)
                joined = joined if isinstance(joined, tuple) else (joined,)
            for data, one in zip(found, joined, strict=True):
                data[place] = one.handle.data.reshape(data.shape[1:])
        return [
            self.to_tensor(np.ascontiguousarray(np.moveaxis(data, 0, self.axis)), one.dtype)
            for data, one in zip(found, inputs, strict=True)
        ]

    interpreter.ScanOps.generic_scan = generic_scan
