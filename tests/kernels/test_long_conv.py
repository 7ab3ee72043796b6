"""Long causal convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import star_kernels
from tests.kernels.checks import Case, assert_close, call, gradients, upstream
from tests.kernels.conformance import PackedConformance
from tests.kernels.samples import normal


class TestLongConv(PackedConformance):
    operator = "long_conv"
    timed = ("x", "gate_in", "gate_out")
    axes = ({"x": 2, "gate_in": 2, "gate_out": 2, "filter": 0, "skip": 0},)
    lanes = axes[0]
    variants = 4

    def case(self, batch: int, length: int, variant: int) -> Case:
        channels, reach = (6, 1, 7, 10)[variant], (20, 5, 300, 1)[variant]
        tensors = {
            "x": normal("x", batch, length, channels),
            "filter": normal("filter", channels, reach) / reach**0.5,
        }
        if variant != 1:
            tensors["gate_in"] = normal("gate_in", batch, length, channels)
            tensors["skip"] = normal("skip", channels)
        if variant != 2:
            tensors["gate_out"] = normal("gate_out", batch, length, channels)
        return Case(tensors)

    def test_nan_stays_behind_its_token(self, backend: str) -> None:
        """As for every operator, but a Fourier form may round the earlier tokens of the NaN's own channel otherwise."""
        tensors = {name: one.float() for name, one in self.case(3, 9, 0).tensors.items()}
        (clean,) = self.run(backend, tensors, {})
        for name in self.timed:
            value = tensors[name].clone()
            value[1, 4, 2] = float("nan")
            (y,) = self.run(backend, {**tensors, name: value}, {})
            assert y[1, 4:, 2].isnan().any()
            assert_close(y[1, :4, 2], clean[1, :4, 2], f"earlier tokens, NaN in {name}", 1e-5)
            others = torch.ones(3, 9, 6, dtype=torch.bool)
            others[1, :, 2] = False
            assert torch.equal(y[others], clean[others]), f"NaN in {name} left its row and channel"

    def test_nan_gradient_stays_before_its_token(self, backend: str) -> None:
        """As for inputs: the channel's own later tokens may be rounded otherwise."""
        case = self.case(2, 9, 0)
        leaves = case.leaves(torch.float64)
        (y,) = self.run(backend, leaves, {})
        dy = upstream((y,))[0]
        poisoned = dy.clone()
        poisoned[1, 4, 2] = float("nan")
        want, found = gradients((y,), leaves, (dy,)), gradients((y,), leaves, (poisoned,))
        others = torch.ones(2, 9, 6, dtype=torch.bool)
        others[1, :, 2] = False
        assert torch.equal(found["x"][others], want["x"][others])

    def test_taps_beyond_the_sequence_are_not_read(self, backend: str) -> None:
        x, taps = normal("x", 1, 5, 3), normal("filter", 3, 9)
        (want,) = call("long_conv", backend, {"x": x, "filter": taps[:, :5]}, {})
        taps[:, 5:] = float("nan")
        (y,) = call("long_conv", backend, {"x": x, "filter": taps}, {})
        assert torch.equal(y, want)

    @pytest.mark.parametrize("variant_", range(4))
    def test_steps_equal_one_call(self, backend: str, variant_: int) -> None:
        case = self.case(2, 9, variant_)
        (y,) = self.run(backend, case.tensors, {})
        constants = {name: one for name, one in case.tensors.items() if name not in self.timed}
        gated = case.tensors["x"] * case.tensors.get("gate_in", torch.ones(()))
        reach = constants["filter"].shape[1] - 1
        state = torch.zeros(2, 0, case.tensors["x"].shape[2])
        for t in range(9):
            token = {name: one[:, t] for name, one in case.tensors.items() if name in self.timed}
            y_t, state = call("long_conv_step", backend, {"state": state, **token, **constants}, {})
            assert_close(y_t, y[:, t], f"token {t}")
            history = gated[:, : t + 1]
            assert_close(state, history[:, max(0, t + 1 - reach) :], f"state after token {t}")

    def test_step_state_is_float32(self, backend: str) -> None:
        tensors = {"state": torch.zeros(2, 0, 3), "x": normal("x", 2, 3).bfloat16(), "filter": torch.ones(3, 4)}
        y, state = call("long_conv_step", backend, tensors, {})
        assert y.dtype == torch.bfloat16
        assert state.dtype == torch.float32

    def test_step_gradients(self, backend: str) -> None:
        def step(state: Tensor, x: Tensor, taps: Tensor, skip: Tensor) -> tuple[Tensor, ...]:
            return call("long_conv_step", backend, {"state": state, "x": x, "filter": taps, "skip": skip}, {})

        shapes = {"state": (2, 3, 4), "x": (2, 4), "filter": (4, 4), "skip": (4,)}
        inputs = [normal(name, *shape).requires_grad_() for name, shape in shapes.items()]
        assert torch.autograd.gradcheck(step, inputs)


X, FILTER = torch.zeros(2, 5, 3), torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"x has shape \(5, 3\), needs 3 axes \(B, T, D\)", {"x": X[0]}),
        (ValueError, r"filter has shape \(4, 8\), needs \(D, L\) = \(3, 8\)", {"filter": torch.zeros(4, 8)}),
        (ValueError, r"filter has shape \(3, 0\), needs \(D, L\) with L >= 1", {"filter": torch.zeros(3, 0)}),
        (TypeError, "filter is NoneType", {"filter": None}),
        (ValueError, r"gate_in has shape \(2, 4, 3\)", {"gate_in": X[:, :4]}),
        (TypeError, r"gate_out is torch\.float64, needs torch\.float32", {"gate_out": X.double()}),
        (ValueError, r"skip has shape \(2,\), needs \(D,\) = \(3,\)", {"skip": torch.zeros(2)}),
        (ValueError, r"cu_seqlens needs packed", {"cu_seqlens": torch.tensor([0, 5])}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        star_kernels.long_conv(**{"x": X, "filter": FILTER, **arguments})


def test_bad_step_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="state holds P == 8 tokens, needs at most L - 1 == 7"):
        star_kernels.long_conv_step(torch.zeros(2, 8, 3), X[:, 0], FILTER)
    with pytest.raises(ValueError, match=r"state has shape \(1, 2, 3\), needs \(B, P, D\) = \(2, 2, 3\)"):
        star_kernels.long_conv_step(torch.zeros(1, 2, 3), X[:, 0], FILTER)
    with pytest.raises(ValueError, match=r"state has shape \(2, 3\), needs 3 axes"):
        star_kernels.long_conv_step(torch.zeros(2, 3), X[:, 0], FILTER)
