"""The promises that every operator keeps, as one suite of tests that each operator's test file subclasses.

A subclass names the operator, builds its cases in float64 and adds what is its own. Every test runs on every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.kernels import oracles
from tests.kernels.checks import HALF, Case, Outputs, assert_close, assert_rule, call, gradients, same, upstream
from tests.kernels.kinds import Kinds


class OperatorConformance(Kinds):
    """The suite. `timed` names the tensors (B, T, ...)."""

    timed: ClassVar[tuple[str, ...]]
    masks_products: ClassVar[bool] = False
    """Whether plain torch multiplies the gradients that a mask excludes by zero."""

    lengths: ClassVar[tuple[int, ...]] = (1, 2, 3, 17, 65)
    long_lengths: ClassVar[tuple[int, ...]] = (1026, 4099)
    mixes_time: ClassVar[bool] = True
    roundings: ClassVar[float] = 16.0

    @property
    def batched(self) -> tuple[str, ...]:  # type: ignore[override]
        """Name the tensors with a batch axis first."""
        return (*self.timed, "initial_state")

    def oracle(self, tensors: dict[str, Tensor], options: dict[str, Any]) -> Outputs:
        """Run the slow definition."""
        function: Callable[..., Any] = getattr(oracles, self.operator)
        result = function(**tensors, **options)
        return result if isinstance(result, tuple) else (result,)

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

    def test_nan_gradient_stays_before_its_token(self, backend: str) -> None:
        """NaN in the gradient of token t changes no gradient of a later token, bit for bit."""
        if backend == "reference" and self.masks_products:
            return
        case = self.case(2, 9, 0)
        leaves = case.leaves(torch.float32)
        outputs = self.run(backend, leaves, case.options)
        dy, *rest = upstream(outputs)
        clean = gradients(outputs, leaves, (dy, *rest))
        for at in (0, 4, 7):
            bad = dy.clone()
            bad[1, at] = float("nan")
            found = gradients(outputs, leaves, (bad, *rest))
            assert any(found[name].isnan().any() for name in self.timed), f"no NaN in a gradient, from token {at}"
            for name in self.timed:
                assert same(found[name][1, at + 1 :], clean[name][1, at + 1 :]), f"d{name} after token {at}"
                if not self.mixes_time:
                    assert same(found[name][1, :at], clean[name][1, :at]), f"d{name} before token {at}"


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

    def test_nan_stays_in_its_sequence(self, backend: str) -> None:
        """In an input, a state or a gradient that comes in: no bit of the packed sequences beside it changes."""
        ends = [0, 2, 2, 6, 9]
        first, last, number = ends[2], ends[3], 2
        case = self.case(1, ends[-1], 0)
        tensors = dict(case.tensors)
        if "initial_state" in tensors:
            tensors["initial_state"] = self.case(len(ends) - 1, 3, 0).tensors["initial_state"]
        leaves = Case(tensors).leaves(torch.float32)
        options = {**case.options, **self.packing(torch.tensor(ends))}
        clean = self.run(backend, leaves, options)
        dy = upstream(clean)
        clean_gradients = gradients(clean, leaves, dy)
        tokens, states = torch.ones(ends[-1], dtype=torch.bool), torch.ones(len(ends) - 1, dtype=torch.bool)
        tokens[first:last] = False
        states[number] = False

        def check(outputs: Outputs, found: dict[str, Tensor], label: str) -> None:
            assert same(outputs[0][:, tokens], clean[0][:, tokens]), f"{label}: another sequence's output"
            for got, want in zip(outputs[1:], clean[1:], strict=True):
                assert same(got[states], want[states]), f"{label}: another sequence's state"
            for name in (one for one in self.batched if one in leaves):
                kept = states if name == "initial_state" else (slice(None), tokens)
                assert same(found[name][kept], clean_gradients[name][kept]), f"{label}: d{name}"

        for name in (one for one in self.batched if one in leaves):
            value = leaves[name].detach().clone()
            value[(number,) if name == "initial_state" else (0, slice(first, last))] = float("nan")
            poisoned = {**leaves, name: value.requires_grad_()}
            outputs = self.run(backend, poisoned, options)
            check(outputs, gradients(outputs, poisoned, dy), f"NaN in {name}")
        for index in range(len(dy)):
            bad = [one.clone() for one in dy]
            bad[index][(0, slice(first, last)) if index == 0 else (number,)] = float("nan")
            check(clean, gradients(clean, leaves, tuple(bad)), f"NaN in gradient {index}")

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
