"""The promises that every operator keeps, as one suite of tests that each operator's test file subclasses.

A subclass names the operator, builds its cases in float64 and adds what is its own. Every test runs on every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import star_kernels
from tests.kernels import oracles

Outputs = tuple[Tensor, ...]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call: float64 tensors that are differentiated, by argument name, and the arguments that are not."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors as fresh leaves, rounded to `dtype`; states stay at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        return {
            name: one.to(wide if "state" in name else dtype).clone().requires_grad_()
            for name, one in self.tensors.items()
        }


def call(operator: str, backend: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> Outputs:
    """Call a public operator and return its outputs as a tuple; skip where the backend does not serve it."""
    try:
        result = getattr(star_kernels, operator)(**tensors, **options, backend=backend)
    except ValueError as error:
        if str(error).startswith(f"backend={backend!r} does not"):
            pytest.skip(str(error))
        raise
    return result if isinstance(result, tuple) else (result,)


def upstream(outputs: Outputs, seed: int = 7) -> Outputs:
    """Return random gradients for the outputs, the same for each dtype up to rounding."""
    generator = torch.Generator("cpu").manual_seed(seed)
    made = (torch.randn(one.shape, generator=generator, dtype=torch.float64, device="cpu") for one in outputs)
    return tuple(grad.to(one) for grad, one in zip(made, outputs, strict=True))


def gradients(outputs: Outputs, leaves: dict[str, Tensor], dy: Outputs | None = None) -> dict[str, Tensor]:
    """Return the gradient of every leaf (zeros where nothing depends on it)."""
    names = list(leaves)
    chosen = dy or upstream(outputs)
    live = [(one, grad) for one, grad in zip(outputs, chosen, strict=True) if one.requires_grad]
    if not live:
        return {name: torch.zeros_like(leaves[name]) for name in names}
    found = torch.autograd.grad(
        [one for one, _ in live],
        [leaves[name] for name in names],
        [grad for _, grad in live],
        retain_graph=True,
        allow_unused=True,
    )
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(names, found, strict=True)}


def assert_close(got: Tensor, want: Tensor, label: str, tolerance: float = 1e-10) -> None:
    """Assert shapes equal and errors within `tolerance` of the wanted tensor's largest value."""
    assert got.shape == want.shape, f"{label}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if want.numel():
        bound = tolerance * max(1.0, want.double().abs().max().item())
        error = (got.double() - want.double()).abs().max().item()
        assert error <= bound, f"{label}: error {error:.3e}, bound {bound:.3e}"


def assert_rule(got: Tensor, exact: Tensor, plain: Tensor, label: str, factor: float, roundings: float) -> None:
    """Assert the kernel contract's rule, for the whole tensor and row by row.

    The largest error is at most `factor` times that of the plain formula at the same dtype, plus a floor: one rounding
    of the row's largest value, one step between subnormal numbers, and some `roundings` of the largest value of all in
    float32.
    """
    assert got.shape == exact.shape, f"{label}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    if not exact.numel():
        return
    epsilon = torch.finfo(got.dtype).eps
    error, plain_error = ((one.double() - exact).abs() for one in (got, plain))
    step = epsilon * torch.finfo(got.dtype).smallest_normal
    step += roundings * torch.finfo(torch.float32).eps * exact.abs().max()
    whole = factor * plain_error.max() + epsilon * exact.abs().max() / 2 + step
    assert error.max() <= whole, f"{label}: error {error.max():.3e}, bound {whole:.3e}"
    if exact.ndim:
        floor = epsilon * exact.abs().amax(-1) + step
        bound = factor * plain_error.amax(-1) + floor
        worst = (error.amax(-1) - bound).max()
        assert worst <= 0, f"{label}: a row's error is {worst:.3e} above its bound"


class OperatorConformance:
    """The suite. `timed` names the tensors (B, T, ...); `variants` counts the sets of options that `case` knows."""

    operator: ClassVar[str]
    timed: ClassVar[tuple[str, ...]]
    variants: ClassVar[int] = 1
    lengths: ClassVar[tuple[int, ...]] = (1, 2, 3, 17, 65)
    long_lengths: ClassVar[tuple[int, ...]] = (1026, 4099)
    mixes_time: ClassVar[bool] = True
    roundings: ClassVar[float] = 16.0

    def case(self, batch: int, length: int, variant: int) -> Case:
        """Build a case in float64, the same one for the same arguments."""
        raise NotImplementedError

    def oracle(self, tensors: dict[str, Tensor], options: dict[str, Any]) -> Outputs:
        """Run the slow definition."""
        function: Callable[..., Any] = getattr(oracles, self.operator)
        result = function(**tensors, **options)
        return result if isinstance(result, tuple) else (result,)

    def run(self, backend: str, leaves: dict[str, Tensor], options: dict[str, Any]) -> Outputs:
        """Call the operator."""
        return call(self.operator, backend, leaves, options)

    def test_matches_the_token_loop(self, backend: str, length: int, variant: int) -> None:
        case = self.case(2, length, variant)
        leaves, exact_leaves = case.leaves(torch.float64), case.leaves(torch.float64)
        outputs, exact = self.run(backend, leaves, case.options), self.oracle(exact_leaves, case.options)
        assert len(outputs) == len(exact)
        for index, (got, want) in enumerate(zip(outputs, exact, strict=True)):
            assert_close(got, want, f"output {index}")
        got_gradients, want_gradients = gradients(outputs, leaves), gradients(exact, exact_leaves)
        for name in leaves:
            assert_close(got_gradients[name], want_gradients[name], f"gradient of {name}", 1e-9)

    def test_matches_the_token_loop_over_many_tokens(self, backend: str, long_length: int) -> None:
        case = self.case(1, long_length, 0)
        want = self.oracle(case.tensors, case.options)
        for index, (got, expected) in enumerate(zip(self.run(backend, case.tensors, case.options), want, strict=True)):
            assert_close(got, expected, f"output {index}", 1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["f32", "bf16", "f16"])
    def test_error_is_at_most_twice_plain_torch(self, backend: str, dtype: torch.dtype, variant: int) -> None:
        case = self.case(2, 33, variant)
        leaves = case.leaves(dtype)
        outputs = self.run(backend, leaves, case.options)
        exact_leaves = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
        plain_leaves = {name: one.detach().float().requires_grad_() for name, one in leaves.items()}
        exact = self.oracle(exact_leaves, case.options)
        plain = tuple(
            one.to(got.dtype) for one, got in zip(self.oracle(plain_leaves, case.options), outputs, strict=True)
        )
        assert outputs[0].dtype == dtype
        assert all(one.dtype in (dtype, torch.float32) for one in outputs)
        for index, (got, want, rough) in enumerate(zip(outputs, exact, plain, strict=True)):
            assert_rule(got, want, rough, f"output {index}", 2.0, self.roundings)
        dy = upstream(outputs)
        found = gradients(outputs, leaves, dy)
        want_found = gradients(exact, exact_leaves, tuple(one.double() for one in dy))
        rough_found = gradients(plain, plain_leaves, dy)
        for name, leaf in leaves.items():
            assert found[name].dtype == leaf.dtype
            rough = rough_found[name].to(leaf.dtype)
            assert_rule(found[name], want_found[name], rough, f"gradient of {name}", 3.0, self.roundings)

    def test_gradcheck(self, backend: str, variant: int) -> None:
        case = self.case(2, 3, variant)
        names = list(case.tensors)

        def function(*values: Tensor) -> Outputs:
            return self.run(backend, dict(zip(names, values, strict=True)), case.options)

        leaves = case.leaves(torch.float64)
        assert torch.autograd.gradcheck(function, [leaves[name] for name in names], fast_mode=True)

    def test_strides_do_not_matter(self, backend: str) -> None:
        case = self.case(2, 9, 0)
        want_leaves = case.leaves(torch.float64)
        want = self.run(backend, want_leaves, case.options)
        want_gradients = gradients(want, want_leaves)
        for lay_out in (reversed_axes, offset_slices):
            leaves = {name: lay_out(one.detach()).requires_grad_() for name, one in want_leaves.items()}
            outputs = self.run(backend, leaves, case.options)
            found = gradients(outputs, leaves)
            for index, (got, expected) in enumerate(zip(outputs, want, strict=True)):
                assert_close(got, expected, f"output {index}, {lay_out.__name__}", 1e-12)
            for name in leaves:
                assert_close(found[name], want_gradients[name], f"gradient of {name}, {lay_out.__name__}", 1e-12)

    def test_gradient_strides_do_not_matter(self, backend: str) -> None:
        """`y.sum().backward()` sends a gradient whose strides are all zero."""
        case = self.case(2, 9, 0)
        leaves = case.leaves(torch.float64)
        outputs = self.run(backend, leaves, case.options)
        dense = gradients(outputs, leaves, tuple(torch.ones_like(one) for one in outputs))
        flat = gradients(outputs, leaves, tuple(torch.ones((), dtype=one.dtype).expand_as(one) for one in outputs))
        turned = gradients(outputs, leaves, tuple(reversed_axes(torch.ones_like(one)) for one in outputs))
        for name in leaves:
            assert_close(flat[name], dense[name], f"gradient of {name}", 1e-12)
            assert_close(turned[name], dense[name], f"gradient of {name}", 1e-12)

    @pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 0)])
    def test_empty_axes(self, backend: str, batch: int, tokens: int) -> None:
        case = self.case(batch, tokens, 0)
        leaves = case.leaves(torch.float32)
        outputs = self.run(backend, leaves, case.options)
        full = self.run(backend, self.case(2, 5, 0).leaves(torch.float32), self.case(2, 5, 0).options)
        assert outputs[0].shape == (batch, tokens, *full[0].shape[2:])
        for one, whole in zip(outputs[1:], full[1:], strict=True):
            assert one.shape[0] == batch
            assert one.ndim == whole.ndim
        if "initial_state" in leaves:
            assert torch.equal(outputs[1], leaves["initial_state"])
        for name, gradient in gradients(outputs, leaves).items():
            assert gradient.isfinite().all(), name

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
        tolerance = 1e-6 if backend == "reference" else 0.0
        case = self.case(4, 65, 0)
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
        leaves = case.leaves(torch.float64)
        whole = self.run(backend, leaves, case.options)
        batched = {*self.timed, "initial_state"}
        alone = {name: one[1:2] if name in batched else one for name, one in leaves.items()}
        for got, want in zip(self.run(backend, alone, case.options), whole, strict=True):
            assert_close(got, want[1:2], "row", 1e-13)

    def test_nan_stays_behind_its_token(self, backend: str) -> None:
        """NaN at token t changes no earlier token, no other row and no gradient of another row, and shows at t."""
        case = self.case(3, 9, 0)
        leaves = case.leaves(torch.float32)
        clean = self.run(backend, leaves, case.options)
        clean_gradients = gradients(clean, leaves)
        for name in self.timed:
            for at in (0, 4, 8):
                poisoned = dict(leaves)
                value = leaves[name].detach().clone()
                value[1, at] = float("nan")
                poisoned[name] = value.requires_grad_()
                outputs = self.run(backend, poisoned, case.options)
                y, y_clean = outputs[0], clean[0]
                assert same(y[1, :at], y_clean[1, :at]), f"{name} at {at}: an earlier token changed"
                assert y[1, at].isnan().any() or y[1, at:].isnan().any(), f"{name} at {at}: no NaN in the output"
                if not self.mixes_time:
                    assert same(y[1, at + 1 :], y_clean[1, at + 1 :]), f"{name} at {at}: a later token changed"
                found = gradients(outputs, poisoned)
                for row in (0, 2):
                    assert same(y[row], y_clean[row]), f"{name} at {at}: another row changed"
                    for other in self.timed:
                        assert same(found[other][row], clean_gradients[other][row]), f"{name} at {at}: d{other}"

    def test_autocast_changes_nothing(self, backend: str) -> None:
        case = self.case(2, 9, 0)
        leaves = case.leaves(torch.float32)
        want = self.run(backend, leaves, case.options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = self.run(backend, leaves, case.options)
        for one, expected in zip(got, want, strict=True):
            assert one.dtype == expected.dtype
            assert torch.equal(one, expected)

    def test_offsets_above_two_to_the_31(self, backend: str) -> None:
        """A stride of 2**31 elements; the memory between the rows is never touched, so it costs nothing."""
        case = self.case(2, 3, 0)
        leaves = {name: one.detach() for name, one in case.leaves(torch.bfloat16).items()}
        want = self.run(backend, leaves, case.options)
        name = self.timed[0]
        torch.utils.deterministic.fill_uninitialized_memory = False
        row = leaves[name][0]
        far = torch.empty(2**31 + row.numel(), dtype=row.dtype).as_strided(
            leaves[name].shape, (2**31, *row.contiguous().stride())
        )
        far.copy_(leaves[name])
        for got, expected in zip(self.run(backend, {**leaves, name: far}, case.options), want, strict=True):
            assert_close(got, expected, "output", 1e-6)


class PackedConformance(OperatorConformance):
    """The suite for operators that mix tokens along time, and take packed sequences."""

    def packing(self, cu_seqlens: Tensor) -> dict[str, Any]:
        """Return the arguments that say where packed sequences begin and end."""
        return {"cu_seqlens": cu_seqlens}

    def test_packed_equals_separate(self, backend: str) -> None:
        """Empty sequences first, in the middle and last, and one of one token; a state for each, never shared."""
        ends = [0, 0, 1, 4, 4, 12, 12]
        count = len(ends) - 1
        case = self.case(1, ends[-1], 0)
        tensors = dict(case.tensors)
        if "initial_state" in case.tensors:
            tensors["initial_state"] = self.case(count, 3, 0).tensors["initial_state"]
        packed = Case(tensors, case.options)
        leaves, separate = packed.leaves(torch.float64), packed.leaves(torch.float64)
        for kind in (torch.int32, torch.int64):
            outputs = self.run(backend, leaves, {**case.options, **self.packing(torch.tensor(ends, dtype=kind))})
        parts = []
        for index in range(count):
            part = {n: one[:, ends[index] : ends[index + 1]] if n in self.timed else one for n, one in separate.items()}
            if "initial_state" in case.tensors:
                part["initial_state"] = separate["initial_state"][index : index + 1]
            parts.append(self.oracle(part, case.options))
        want = (
            torch.cat([part[0] for part in parts], dim=1),
            *(torch.cat(rest) for rest in list(zip(*parts, strict=True))[1:]),
        )
        for index, (got, expected) in enumerate(zip(outputs, want, strict=True)):
            assert_close(got, expected, f"output {index}")
        found, want_found = gradients(outputs, leaves), gradients(want, separate)
        for name in leaves:
            assert_close(found[name], want_found[name], f"gradient of {name}", 1e-9)

    def test_no_sequence_at_all(self, backend: str) -> None:
        case = self.case(1, 0, 0)
        tensors = {name: one for name, one in case.leaves(torch.float32).items() if name != "initial_state"}
        outputs = self.run(backend, tensors, {**case.options, **self.packing(torch.zeros(1, dtype=torch.int32))})
        assert outputs[0].shape[:2] == (1, 0)
        assert all(one.shape[0] == 0 for one in outputs[1:])


class RecurrentConformance(PackedConformance):
    """The suite for operators that carry a state, and have a one-token step."""

    def test_single_steps_equal_one_call(self, backend: str, variant: int) -> None:
        case = self.case(2, 9, variant)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.bfloat16, 0.02)):
            leaves = {name: one.detach() for name, one in case.leaves(dtype).items()}
            y, final_state = self.run(backend, leaves, case.options)
            state = leaves["initial_state"]
            for t in range(9):
                token = {n: one[:, t] if n in self.timed else one for n, one in leaves.items() if n != "initial_state"}
                before = state.clone()
                y_t, new_state = call(f"{self.operator}_step", backend, {"state": state, **token}, case.options)
                assert torch.equal(state, before), "the step modified its state"
                assert y_t.dtype == dtype
                assert_close(y_t, y[:, t], f"token {t}", tolerance)
                state = new_state
            assert state.dtype == final_state.dtype == torch.promote_types(dtype, torch.float32)
            assert_close(state, final_state, "final state", min(tolerance, 1e-5))

    def test_step_gradients(self, backend: str, variant: int) -> None:
        case = self.case(2, 1, variant)
        leaves, step_leaves = case.leaves(torch.float64), case.leaves(torch.float64)
        y, final_state = self.run(backend, leaves, case.options)
        token = {n: one[:, 0] if n in self.timed else one for n, one in step_leaves.items() if n != "initial_state"}
        y_0, new_state = call(
            f"{self.operator}_step", backend, {"state": step_leaves["initial_state"], **token}, case.options
        )
        dy = upstream((y, final_state))
        want = gradients((y, final_state), leaves, dy)
        found = gradients((y_0, new_state), step_leaves, (dy[0][:, 0], dy[1]))
        for name in leaves:
            assert_close(found[name], want[name], f"gradient of {name}", 1e-9)

    def test_split_sequence_equals_whole(self, backend: str) -> None:
        """A state carries a sequence over any cut, and its gradient with it; a chunk may be of one token or none."""
        case = self.case(2, 7, 0)
        whole, cut = case.leaves(torch.float64), case.leaves(torch.float64)
        want = self.run(backend, whole, case.options)
        bounds = [0, 1, 1, 2, 6, 7]
        state, parts = cut["initial_state"], []
        for start, stop in pairwise(bounds):
            part = {name: one[:, start:stop] if name in self.timed else one for name, one in cut.items()}
            y, state = self.run(backend, {**part, "initial_state": state}, case.options)
            parts.append(y)
        outputs = (torch.cat(parts, dim=1), state)
        for index, (got, expected) in enumerate(zip(outputs, want, strict=True)):
            assert_close(got, expected, f"output {index}")
        found, want_found = gradients(outputs, cut), gradients(want, whole)
        for name in cut:
            assert_close(found[name], want_found[name], f"gradient of {name}", 1e-9)

    def test_state_defaults_to_zeros(self, backend: str) -> None:
        case = self.case(2, 5, 0)
        leaves = case.leaves(torch.float64)
        zeroed = {**leaves, "initial_state": torch.zeros_like(leaves["initial_state"])}
        absent = {name: one for name, one in leaves.items() if name != "initial_state"}
        for got, want in zip(
            self.run(backend, absent, case.options), self.run(backend, zeroed, case.options), strict=True
        ):
            assert_close(got, want, "output", 1e-13)


def same(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors are bit-identical."""
    return torch.equal(got, want)


def reversed_axes(x: Tensor) -> Tensor:
    """Return x's values laid out with the axes in reverse order."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def offset_slices(x: Tensor) -> Tensor:
    """Return x's values cut out of a larger buffer at storage offset 1, with NaN all around."""
    if x.ndim == 0:
        return torch.stack([torch.full_like(x, float("nan")), x])[1]
    buffer = torch.full((*(size + 2 for size in x.shape[:-1]), 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    view = buffer[(*(slice(1, size + 1) for size in x.shape[:-1]), slice(1, 2 * x.shape[-1] + 1, 2))]
    view.copy_(x)
    return view
