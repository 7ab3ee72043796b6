"""Short causal convolutions, plain and gated."""

from __future__ import annotations

import pytest
import torch

import star_kernels
from tests.kernels.checks import Case, assert_close, call
from tests.kernels.conformance import RecurrentConformance
from tests.kernels.samples import normal

WIDTHS = (4, 1, 2, 3, 7)


class TestCausalConv1d(RecurrentConformance):
    operator = "causal_conv1d"
    timed = ("x",)
    axes = ({"x": 2, "weight": 0, "bias": 0, "initial_state": 1},)
    lanes = axes[0]
    variants = 5

    def case(self, batch: int, length: int, variant: int) -> Case:
        channels, width = (6, 1, 7, 60, 10)[variant], WIDTHS[variant]
        tensors = {
            "x": normal("x", batch, length, channels),
            "weight": normal("weight", channels, width),
            "initial_state": normal("state", batch, channels, width - 1),
        }
        if variant % 2 == 0:
            tensors["bias"] = normal("bias", channels)
        return Case(tensors, {"activation": (None, "silu", "swish")[variant % 3]})

    @pytest.mark.parametrize("width", WIDTHS)
    def test_matches_torch(self, backend: str, width: int) -> None:
        x, weight, bias = normal("x", 2, 11, 5), normal("weight", 5, width), normal("bias", 5)
        y, _ = call("causal_conv1d", backend, {"x": x, "weight": weight, "bias": bias}, {})
        padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
        want = torch.nn.functional.conv1d(padded, weight.unsqueeze(1), bias, groups=5).transpose(1, 2)
        assert_close(y, want, "y", 1e-12)

    @pytest.mark.parametrize("tokens", [0, 1, 2])
    def test_chunk_shorter_than_the_state_shifts_it(self, backend: str, tokens: int) -> None:
        x = normal("x", 1, tokens, 3).requires_grad_()
        state = normal("state", 1, 3, 3).requires_grad_()
        tensors = {"x": x, "weight": normal("weight", 3, 4), "initial_state": state}
        _, final = call("causal_conv1d", backend, tensors, {})
        assert torch.equal(final, torch.cat([state[..., tokens:], x.transpose(1, 2)], dim=-1))
        final.backward(torch.ones_like(final))
        kept = torch.arange(3) >= tokens
        assert torch.equal(state.grad, kept.double().expand(1, 3, 3))
        assert x.grad is not None
        assert torch.equal(x.grad, torch.ones_like(x))

    def test_state_is_float32_and_holds_exact_inputs(self, backend: str) -> None:
        x = normal("x", 2, 5, 3).bfloat16()
        _, final = call("causal_conv1d", backend, {"x": x, "weight": normal("weight", 3, 3).float()}, {})
        assert final.dtype == torch.float32
        assert torch.equal(final, x[:, 3:].transpose(1, 2).float())


class TestGatedShortConv(RecurrentConformance):
    operator = "gated_short_conv"
    timed = ("x", "gate_in", "gate_out")
    axes = ({"x": 2, "gate_in": 2, "gate_out": 2, "weight": 0, "bias": 0, "initial_state": 1},)
    lanes = axes[0]
    variants = 3

    def case(self, batch: int, length: int, variant: int) -> Case:
        channels, width = (6, 1, 10)[variant], (3, 1, 4)[variant]
        tensors = {name: normal(name, batch, length, channels) for name in self.timed}
        tensors["weight"] = normal("weight", channels, width)
        tensors["initial_state"] = normal("state", batch, channels, width - 1)
        if variant:
            tensors["bias"] = normal("bias", channels)
        return Case(tensors)

    def test_state_holds_gated_inputs_in_float32(self, backend: str) -> None:
        """A product of two bfloat16 numbers fits float32 exactly, and is not rounded to bfloat16 first."""
        tensors = {name: normal(name, 1, 5, 4).bfloat16() for name in self.timed}
        _, final = call("gated_short_conv", backend, {**tensors, "weight": normal("weight", 4, 3).float()}, {})
        want = tensors["gate_in"].float() * tensors["x"].float()
        assert torch.equal(final, want[:, 3:].transpose(1, 2))


X, WEIGHT = torch.zeros(2, 5, 3), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"x has shape \(5, 3\), needs 3 axes \(B, T, D\)", {"x": X[0]}),
        (TypeError, r"x is torch\.int64, needs float16", {"x": X.long()}),
        (TypeError, r"weight is NoneType, needs a torch\.Tensor", {"weight": None}),
        (ValueError, r"weight has shape \(4, 4\), needs \(D, W\) = \(3, 4\)", {"weight": torch.zeros(4, 4)}),
        (ValueError, r"weight has shape \(3, 0\), needs \(D, W\) with W >= 1", {"weight": torch.zeros(3, 0)}),
        (ValueError, r"weight has shape \(3,\), needs 2 axes", {"weight": torch.zeros(3)}),
        (ValueError, r"bias has shape \(4,\), needs \(D,\) = \(3,\)", {"bias": torch.zeros(4)}),
        (ValueError, r"activation is 'relu', needs one of None, 'silu', 'swish'", {"activation": "relu"}),
        (
            ValueError,
            r"initial_state has shape \(2, 3, 4\), needs \(S, D, W - 1\) = \(2, 3, 3\)",
            {"initial_state": torch.zeros(2, 3, 4)},
        ),
        (
            ValueError,
            "cu_seqlens needs packed sequences with B == 1, got B == 2",
            {"cu_seqlens": torch.tensor([0, 5])},
        ),
        (
            ValueError,
            r"cu_seqlens is \[0, 4\], needs boundaries that rise from 0 to T == 5",
            {"x": X[:1], "cu_seqlens": torch.tensor([0, 4])},
        ),
        (
            ValueError,
            r"cu_seqlens is \[0, 6, 5\], needs boundaries",
            {"x": X[:1], "cu_seqlens": torch.tensor([0, 6, 5])},
        ),
        (
            ValueError,
            r"cu_seqlens has shape \(0,\), needs \(N \+ 1,\)",
            {"x": X[:1], "cu_seqlens": torch.zeros(0, dtype=torch.int32)},
        ),
        (
            TypeError,
            r"cu_seqlens is torch\.float32, needs torch\.int32 or torch\.int64",
            {"x": X[:1], "cu_seqlens": torch.zeros(2)},
        ),
        (TypeError, r"cu_seqlens is list, needs a torch\.Tensor", {"x": X[:1], "cu_seqlens": [0, 5]}),
        (
            ValueError,
            "cu_seqlens is on meta, needs cpu",
            {"x": X[:1], "cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")},
        ),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        star_kernels.causal_conv1d(**{"x": X, "weight": WEIGHT, **arguments})


def test_bad_gates_and_states_are_named() -> None:
    with pytest.raises(ValueError, match=r"gate_in has shape \(2, 5, 4\), needs \(B, T, D\) = \(2, 5, 3\)"):
        star_kernels.gated_short_conv(X, torch.zeros(2, 5, 4), X, WEIGHT)
    with pytest.raises(TypeError, match=r"gate_out is torch\.float64, needs torch\.float32, the dtype of x"):
        star_kernels.gated_short_conv(X, X, X.double(), WEIGHT)
    with pytest.raises(ValueError, match=r"state has shape \(2, 3, 4\), needs \(B, D, W - 1\) = \(2, 3, 3\)"):
        star_kernels.causal_conv1d_step(torch.zeros(2, 3, 4), X[:, 0], WEIGHT)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 3\), needs 2 axes \(B, D\)"):
        star_kernels.gated_short_conv_step(torch.zeros(2, 3, 3), X, X, X, WEIGHT)
    with pytest.raises(ValueError, match=r"state has shape \(1, 3, 3\), needs \(B, D, W - 1\) = \(2, 3, 3\)"):
        star_kernels.gated_short_conv_step(torch.zeros(1, 3, 3), X[:, 0], X[:, 0], X[:, 0], WEIGHT)
