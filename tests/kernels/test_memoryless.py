"""Gated memoryless units and channel mixing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import star_kernels
from tests.kernels.checks import Case, assert_close, call
from tests.kernels.conformance import OperatorConformance
from tests.kernels.samples import normal


class _GatedUnit(OperatorConformance):
    timed = ("gate", "up")
    axes = ({"gate": 2, "up": 2},)
    lanes = axes[0]
    mixes_time = False

    def case(self, batch: int, length: int, variant: int) -> Case:
        del variant
        return Case({name: normal(name, batch, length, 13) for name in self.timed})

    def test_extreme_gates_stay_finite(self, backend: str) -> None:
        gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
        up = torch.ones(5, requires_grad=True)
        (y,) = call(self.operator, backend, {"gate": gate, "up": up}, {})
        y.sum().backward()
        assert_close(y, gate.clamp_min(0), "y", 1e-6)
        assert_close(up.grad, gate.clamp_min(0), "dup", 1e-6)
        middle = 0.0 if self.operator == "reglu" else 0.5
        assert_close(gate.grad, torch.tensor([0.0, 0.0, middle, 1.0, 1.0]), "dgate", 1e-6)

    def test_any_shape(self, backend: str) -> None:
        gate, up = normal("gate", 12), normal("up", 12)
        (want,) = call(self.operator, backend, {"gate": gate, "up": up}, {})
        for shape in ((12,), (3, 4), (1, 2, 3, 2, 1)):
            (y,) = call(self.operator, backend, {"gate": gate.view(shape), "up": up.view(shape)}, {})
            assert torch.equal(y, want.view(shape))


class TestSwiGLU(_GatedUnit):
    operator = "swiglu"

    def test_matches_torch(self, backend: str) -> None:
        gate, up = normal("gate", 3, 50), normal("up", 3, 50)
        (y,) = call("swiglu", backend, {"gate": gate, "up": up}, {})
        assert_close(y, functional.silu(gate) * up, "y", 1e-12)


class TestGEGLU(_GatedUnit):
    operator = "geglu"

    def test_matches_torch(self, backend: str) -> None:
        gate, up = normal("gate", 3, 50), normal("up", 3, 50)
        (y,) = call("geglu", backend, {"gate": gate, "up": up}, {})
        assert_close(y, functional.gelu(gate) * up, "y", 1e-12)


class TestReGLU(_GatedUnit):
    operator = "reglu"

    def test_matches_torch(self, backend: str) -> None:
        gate, up = normal("gate", 3, 50), normal("up", 3, 50)
        (y,) = call("reglu", backend, {"gate": gate, "up": up}, {})
        assert torch.equal(y, functional.relu(gate) * up)


def test_units_save_their_inputs_alone() -> None:
    """Backward needs no tensor beside the two inputs."""
    gate, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (saved.append(one.data_ptr()), one)[1], lambda one: one):
        star_kernels.swiglu(gate, up, backend="reference")
    assert sorted(saved) == sorted([gate.data_ptr(), up.data_ptr()])


class TestChannelMix(OperatorConformance):
    operator = "channel_mix"
    torch_backends = ("reference", "triton")
    timed = ("x",)
    variants = 4
    torch_variants = (2,)
    mixes_time = False

    def case(self, batch: int, length: int, variant: int) -> Case:
        shape = ((3, 4, 4), (12,), (12, 12), (1, 12, 12))[variant]
        return Case({"x": normal("x", batch, length, 12), "weight": normal("weight", *shape)})

    def test_dense_is_a_linear_layer(self, backend: str) -> None:
        x, weight = normal("x", 5, 7), normal("weight", 7, 7)
        (y,) = call("channel_mix", backend, {"x": x, "weight": weight}, {})
        assert_close(y, functional.linear(x, weight), "y", 1e-12)

    def test_grouped_is_a_block_diagonal_matrix(self, backend: str) -> None:
        x, weight = normal("x", 5, 12), normal("weight", 3, 4, 4)
        (y,) = call("channel_mix", backend, {"x": x, "weight": weight}, {})
        assert_close(y, functional.linear(x, torch.block_diag(*weight)), "y", 1e-12)

    @pytest.mark.parametrize("shape", [(0,), (0, 0), (3, 0, 0)], ids=str)
    def test_no_channel_at_all(self, backend: str, shape: tuple[int, ...]) -> None:
        x, weight = torch.zeros(2, 5, 0, requires_grad=True), torch.zeros(shape, requires_grad=True)
        (y,) = call("channel_mix", backend, {"x": x, "weight": weight}, {})
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
        assert y.shape == dx.shape == (2, 5, 0)
        assert dweight.shape == shape

    def test_one_row_and_many_leading_axes(self, backend: str) -> None:
        x, weight = normal("x", 24), normal("weight", 2, 2, 2)
        (y,) = call("channel_mix", backend, {"x": x.view(1, 2, 3, 4), "weight": weight}, {})
        (rows,) = call("channel_mix", backend, {"x": x.view(6, 4), "weight": weight}, {})
        assert torch.equal(y.view(6, 4), rows)
        (single,) = call("channel_mix", backend, {"x": x[:4], "weight": weight}, {})
        assert_close(single, rows[0], "one row", 1e-13)


@pytest.mark.parametrize("operator", ["swiglu", "geglu", "reglu"])
def test_bad_units_are_named(operator: str) -> None:
    unit, gate = getattr(star_kernels, operator), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="gate is int"):
        unit(1, gate)
    with pytest.raises(TypeError, match=r"gate is torch\.int64"):
        unit(gate.long(), gate)
    with pytest.raises(ValueError, match=r"up has shape \(3, 2\), needs .*the shape of gate = \(2, 3\)"):
        unit(gate, torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"up is torch\.float64, needs torch\.float32, the dtype of gate"):
        unit(gate, gate.double())


@pytest.mark.parametrize(
    ("error", "message", "weight"),
    [
        (TypeError, "weight is list", [1.0]),
        (ValueError, r"weight has shape \(5,\), needs \(D,\) = \(6,\)", torch.zeros(5)),
        (ValueError, r"weight has shape \(6, 5\), needs \(D, D\) = \(6, 6\)", torch.zeros(6, 5)),
        (ValueError, r"weight has shape \(2, 2, 3\), needs \(G, D/G, D/G\) = \(2, 3, 3\)", torch.zeros(2, 2, 3)),
        (ValueError, r"weight has shape \(4, 2, 2\), needs \(D,\), \(G, D/G, D/G\) or \(D, D\)", torch.zeros(4, 2, 2)),
        (ValueError, r"weight has shape \(0, 2, 2\), needs", torch.zeros(0, 2, 2)),
        (ValueError, r"weight has shape \(1, 1, 1, 1\), needs", torch.zeros(1, 1, 1, 1)),
    ],
)
def test_bad_mixes_are_named(error: type[Exception], message: str, weight: object) -> None:
    with pytest.raises(error, match=message):
        star_kernels.channel_mix(torch.zeros(2, 6), weight)


def test_channel_mix_needs_an_axis() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(\), needs 1 axes"):
        star_kernels.channel_mix(torch.zeros(()), torch.zeros(1))
