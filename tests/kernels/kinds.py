"""Kinds of inputs that have broken kernels, for any operator whose rows are independent of one another: layouts,
neighbours in memory, poison, empty axes, offsets above 2**31; with the promises that go with them.

The subclasses are `conformance.OperatorConformance` for what runs over time, and the one-token steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from star_kernels import _triton
from tests.kernels.checks import (
    Case,
    Outputs,
    assert_close,
    call,
    gradients,
    offset_slices,
    reversed_axes,
    same,
    upstream,
)

LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (reversed_axes, offset_slices)


class Kinds:
    """The suite. `batched` names the tensors with a batch axis first; `variants` counts what `case` knows."""

    operator: ClassVar[str]
    batched: ClassVar[tuple[str, ...]]
    variants: ClassVar[int] = 1
    axes: ClassVar[tuple[dict[str, int], ...]] = ()
    """Sizes that may be 0, each as the axis that has it in every tensor that does."""
    lanes: ClassVar[dict[str, int]] = {}
    """Channels or heads that know nothing of one another: their axis in every tensor that has it, the one whose layout
    the output has first."""
    lane_variant: ClassVar[int] = 0
    torch_backends: ClassVar[tuple[str, ...]] = ("reference",)
    """Backends whose matrix products are torch's, whose rounding depends on the layout and the threads."""
    torch_variants: ClassVar[tuple[int, ...]] = ()
    """Variants served by torch's own matrix product, whose rounding depends on the layout."""

    def case(self, batch: int, length: int, variant: int) -> Case:
        """Build a case in float64, the same one for the same arguments."""
        raise NotImplementedError

    def run(self, backend: str, leaves: dict[str, Tensor], options: dict[str, Any]) -> Outputs:
        """Call the operator."""
        return call(self.operator, backend, leaves, options)

    def rows_of(self, tensors: dict[str, Any], rows: slice) -> dict[str, Any]:
        """Cut rows of the batch out of tensors or options."""
        return {name: one[rows] if name in self.batched else one for name, one in tensors.items()}

    def test_gradcheck(self, backend: str, variant: int) -> None:
        case = self.case(2, 3, variant)
        names = list(case.tensors)

        def function(*values: Tensor) -> Outputs:
            return self.run(backend, dict(zip(names, values, strict=True)), case.options)

        leaves = case.leaves(torch.float64)
        assert torch.autograd.gradcheck(function, [leaves[name] for name in names], fast_mode=True)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
    def test_layouts_and_neighbours_change_no_bit(self, backend: str, dtype: torch.dtype, variant: int) -> None:
        """Transposed inputs, and slices at storage offset 1 of a buffer that is NaN elsewhere; gradients likewise."""
        exact = backend not in self.torch_backends and variant not in self.torch_variants
        case = self.case(2, 9, variant)
        want_leaves = case.leaves(dtype)
        want = self.run(backend, want_leaves, case.options)
        dy = upstream(want)
        want_gradients = gradients(want, want_leaves, dy)
        for lay_out in LAYOUTS:
            leaves = {name: lay_out(one.detach()).requires_grad_() for name, one in want_leaves.items()}
            outputs = self.run(backend, leaves, case.options)
            found = gradients(outputs, leaves, tuple(lay_out(one) for one in dy))
            for index, (got, expected) in enumerate(zip(outputs, want, strict=True)):
                assert_bits(got, expected, f"output {index}, {lay_out.__name__}", exact)
            for name in leaves:
                assert_bits(found[name], want_gradients[name], f"gradient of {name}, {lay_out.__name__}", exact)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
    def test_gradient_of_stride_zero(self, backend: str, dtype: torch.dtype) -> None:
        """`y.sum().backward()` sends a gradient whose strides are all zero."""
        case = self.case(2, 9, 0)
        leaves = case.leaves(dtype)
        outputs = self.run(backend, leaves, case.options)
        dense = gradients(outputs, leaves, tuple(torch.ones_like(one) for one in outputs))
        flat = gradients(outputs, leaves, tuple(torch.ones((), dtype=one.dtype).expand_as(one) for one in outputs))
        for name in leaves:
            assert_bits(flat[name], dense[name], f"gradient of {name}", backend not in self.torch_backends)

    def test_offsets_above_two_to_the_31(self, backend: str) -> None:
        """A stride of 2**31 elements from row to row, of every input and of the gradients that come in.

        The memory between the rows is never touched, so it costs nothing.
        """
        torch.utils.deterministic.fill_uninitialized_memory = False
        case = self.case(2, 3, 0)
        leaves = {name: one.detach().bfloat16().requires_grad_() for name, one in case.tensors.items()}
        want = self.run(backend, leaves, case.options)
        dy = tuple(one.bfloat16() for one in upstream(want))
        want_gradients = gradients(want, leaves, tuple(g.to(y.dtype) for g, y in zip(dy, want, strict=True)))
        for name in (one for one in self.batched if one in leaves):
            moved = {**leaves, name: far_rows(leaves[name].detach()).requires_grad_()}
            outputs = self.run(backend, moved, case.options)
            for got, expected in zip(outputs, want, strict=True):
                assert_close(got, expected, f"output, {name} far apart", 1e-6)
            far = tuple(far_rows(g) if g.dtype == y.dtype else g.to(y.dtype) for g, y in zip(dy, outputs, strict=True))
            for other, gradient in gradients(outputs, moved, far).items():
                assert_close(gradient, want_gradients[other], f"gradient of {other}, {name} far apart", 1e-6)

    @pytest.mark.parametrize("batch", [0, 2])
    def test_sizes_of_zero(self, backend: str, batch: int) -> None:
        """Any axis may be of size 0: what remains is what plain torch makes of it."""
        case = self.case(batch, 5, 0)
        for axes in ({}, *self.axes):
            empty = Case({n: one.narrow(axes[n], 0, 0) if n in axes else one for n, one in case.tensors.items()})
            leaves, plain = empty.leaves(torch.float32), empty.leaves(torch.float32)
            outputs, want = self.run(backend, leaves, case.options), self.run("reference", plain, case.options)
            for index, (got, expected) in enumerate(zip(outputs, want, strict=True)):
                assert_close(got, expected, f"output {index}, {axes}", 1e-5)
            found, want_found = gradients(outputs, leaves), gradients(want, plain)
            for name, gradient in found.items():
                assert gradient.isfinite().all(), f"gradient of {name}, {axes}"
                assert_close(gradient, want_found[name], f"gradient of {name}, {axes}", 1e-5)

    @pytest.mark.skipif(not _triton.interpreting(), reason="needs Triton's interpreter")
    def test_kernels_may_be_started_twice(self, backend: str, variant: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tuning starts a kernel many times in one call: one that reads what it writes has to say so."""
        case = self.case(2, 9, variant)
        leaves = case.leaves(torch.float32)
        once = self.run(backend, leaves, case.options)
        once_gradients = gradients(once, leaves)
        start = _triton._interpret

        def start_twice(*launch: Any) -> None:
            repeatable: bool = launch[-1]
            for _ in range(2 if repeatable else 1):
                start(*launch)

        monkeypatch.setattr(_triton, "_interpret", start_twice)
        twice = self.run(backend, leaves, case.options)
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
        twice_gradients = gradients(twice, leaves)
        assert all(torch.equal(once_gradients[name], twice_gradients[name]) for name in leaves)

    def test_repeats_bit_equal_and_leaves_inputs_alone(self, backend: str) -> None:
        case = self.case(2, 17, 0)
        leaves = case.leaves(torch.float32)
        before = {name: one.detach().clone() for name, one in leaves.items()}
        first, second = self.run(backend, leaves, case.options), self.run(backend, leaves, case.options)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        first_gradients, second_gradients = gradients(first, leaves), gradients(second, leaves)
        again = gradients(first, leaves)
        for name, one in leaves.items():
            assert torch.equal(first_gradients[name], second_gradients[name]), name
            assert torch.equal(first_gradients[name], again[name]), f"{name}, second backward"
            assert torch.equal(one, before[name]), f"{name} was modified"

    def test_one_thread_equals_two(self, backend: str) -> None:
        """Bit for bit, but for the reference, whose matrix products are torch's."""
        tolerance = 1e-6 if backend in self.torch_backends else 0.0
        # The interpreter has one thread: two can show in what torch computes around its kernels alone.
        case = self.case(2, 17, 0) if _triton.interpreting() else self.case(4, 65, 0)
        leaves = case.leaves(torch.float32)
        two = self.run(backend, leaves, case.options)
        two_gradients = gradients(two, leaves)
        torch.set_num_threads(1)
        one = self.run(backend, leaves, case.options)
        one_gradients = gradients(one, leaves)
        for index, (got, want) in enumerate(zip(one, two, strict=True)):
            assert_close(got, want, f"output {index}", tolerance)
        for name in leaves:
            assert_close(one_gradients[name], two_gradients[name], f"gradient of {name}", tolerance)

    def test_a_row_alone_equals_the_row_in_a_batch(self, backend: str) -> None:
        case = self.case(3, 17, 0)
        for dtype, tolerance in (
            (torch.float64, 1e-13),
            (torch.float32, 1e-5 if backend in self.torch_backends else 0.0),
        ):
            leaves = case.leaves(dtype)
            whole = self.run(backend, leaves, case.options)
            dy = upstream(whole)
            whole_gradients = gradients(whole, leaves, dy)
            row = slice(1, 2)
            alone = self.run(backend, self.rows_of(leaves, row), self.rows_of(case.options, row))
            for got, want in zip(alone, whole, strict=True):
                assert_close(got, want[row], "row", tolerance)
            found = gradients(alone, leaves, tuple(one[row] for one in dy))
            for name in (one for one in self.batched if one in leaves):
                assert_close(found[name][row], whole_gradients[name][row], f"gradient of {name}", tolerance)

    def test_nan_stays_in_its_row(self, backend: str) -> None:
        """In an input or in the gradient that comes in: no bit of another row changes, forward or backward."""
        case = self.case(3, 9, 0)
        leaves = case.leaves(torch.float32)
        clean = self.run(backend, leaves, case.options)
        dy = upstream(clean)
        clean_gradients = gradients(clean, leaves, dy)

        def check(outputs: Outputs, found: dict[str, Tensor], label: str) -> None:
            for row in (0, 2):
                for index, (got, want) in enumerate(zip(outputs, clean, strict=True)):
                    assert same(got[row], want[row]), f"{label}: row {row} of output {index}"
                for name in (one for one in self.batched if one in leaves):
                    assert same(found[name][row], clean_gradients[name][row]), f"{label}: row {row} of d{name}"

        for name in (one for one in self.batched if one in leaves):
            value = leaves[name].detach().clone()
            value[1] = float("nan")
            poisoned = {**leaves, name: value.requires_grad_()}
            outputs = self.run(backend, poisoned, case.options)
            assert value.numel() == 0 or outputs[0][1].isnan().any(), f"NaN in {name} does not show"
            check(outputs, gradients(outputs, poisoned, dy), f"NaN in {name}")
        for index, gradient in enumerate(dy):
            bad = gradient.clone()
            bad[1] = float("nan")
            check(clean, gradients(clean, leaves, (*dy[:index], bad, *dy[index + 1 :])), f"NaN in gradient {index}")

    def test_nan_stays_in_its_lane(self, backend: str) -> None:
        """In an input or in the gradient that comes in: no other channel, or head, changes by a bit."""
        if not self.lanes:
            return
        case = self.case(2, 9, self.lane_variant)
        leaves = case.leaves(torch.float32)
        clean = self.run(backend, leaves, case.options)
        dy = upstream(clean)
        clean_gradients = gradients(clean, leaves, dy)
        states = [axis for name, axis in self.lanes.items() if "state" in name]
        axes = (next(iter(self.lanes.values())), *states)[: len(clean)]
        present = [name for name in self.lanes if name in leaves and leaves[name].ndim > self.lanes[name]]

        def others(one: Tensor, axis: int) -> Tensor:
            return torch.cat([one.narrow(axis, 0, 1), one.narrow(axis, 2, one.shape[axis] - 2)], dim=axis)

        def check(outputs: Outputs, found: dict[str, Tensor], label: str) -> None:
            for got, want, axis in zip(outputs, clean, axes, strict=True):
                assert same(others(got, axis), others(want, axis)), f"{label}: another lane of the output"
            for name in present:
                axis = self.lanes[name]
                assert same(others(found[name], axis), others(clean_gradients[name], axis)), f"{label}: d{name}"

        for name in present:
            value = leaves[name].detach().clone()
            value.select(self.lanes[name], 1).fill_(float("nan"))
            poisoned = {**leaves, name: value.requires_grad_()}
            outputs = self.run(backend, poisoned, case.options)
            check(outputs, gradients(outputs, poisoned, dy), f"NaN in {name}")
        for index, axis in enumerate(axes):
            bad = [one.clone() for one in dy]
            bad[index].select(axis, 1).fill_(float("nan"))
            check(clean, gradients(clean, leaves, tuple(bad)), f"NaN in gradient {index}")

    def test_autocast_changes_nothing(self, backend: str) -> None:
        case = self.case(2, 9, 0)
        leaves = case.leaves(torch.float32)
        want = self.run(backend, leaves, case.options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = self.run(backend, leaves, case.options)
        for one, expected in zip(got, want, strict=True):
            assert one.dtype == expected.dtype
            assert torch.equal(one, expected)


def assert_bits(got: Tensor, want: Tensor, label: str, exact: bool) -> None:
    """Assert equality: bit for bit, or, where torch's products round otherwise in another layout, up to that."""
    if exact:
        assert same(got, want), f"{label}: not bit-equal, shapes {tuple(got.shape)} and {tuple(want.shape)}"
    else:
        # A gradient of lam is one sum of thousands of numbers, in the order of torch's version: 12 eps apart in 2.11.
        # In half precision products and sums are rounded once, at the end.
        roundings = 8 if want.dtype.itemsize == 2 else 64
        assert_close(got, want, label, roundings * torch.finfo(want.dtype).eps)


def far_rows(x: Tensor) -> Tensor:
    """Return x's values with 2**31 elements from one row to the next."""
    far = torch.empty(2**31 + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (2**31, *x[0].contiguous().stride()))
    return far.copy_(x)
