"""RMS normalisation and rotary positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import star_kernels
from tests.kernels.checks import Case, assert_close, call
from tests.kernels.conformance import OperatorConformance
from tests.kernels.samples import normal


class TestRMSNorm(OperatorConformance):
    operator = "rms_norm"
    timed = ("x",)
    axes = ({"x": 2, "weight": 0},)
    variants = 4
    mixes_time = False

    def case(self, batch: int, length: int, variant: int) -> Case:
        width = (60, 1, 7, 130)[variant]
        return Case(
            {"x": normal("x", batch, length, width), "weight": normal("weight", width)},
            {"eps": (1e-6, 0.5)[variant % 2]},  # with D = 1 and a small eps the gradient is all cancellation
        )

    def test_matches_torch(self, backend: str) -> None:
        x, weight = normal("x", 3, 5, 48).float(), normal("weight", 48).float()
        (y,) = call("rms_norm", backend, {"x": x, "weight": weight}, {})
        assert_close(y, torch.nn.functional.rms_norm(x, (48,), weight, 1e-6), "y", 1e-6)

    def test_zero_row_gives_zeros_and_a_finite_gradient(self, backend: str) -> None:
        x = torch.zeros(2, 16, requires_grad=True)
        (y,) = call("rms_norm", backend, {"x": x, "weight": torch.ones(16)}, {})
        y.sum().backward()
        assert torch.equal(y, torch.zeros(2, 16))
        assert_close(x.grad, torch.full((2, 16), 1e3), "dx", 1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_squares_of_300_do_not_overflow(self, backend: str, dtype: torch.dtype) -> None:
        x = torch.full((2, 64), 300.0, dtype=dtype, requires_grad=True)
        (y,) = call("rms_norm", backend, {"x": x, "weight": torch.ones(64, dtype=dtype)}, {})
        assert torch.equal(y, torch.ones(2, 64, dtype=dtype))
        (dx,) = torch.autograd.grad(y[:, 0].sum(), x)
        want = torch.full((2, 64), -1 / 300 / 64)
        want[:, 0] += 1 / 300
        assert_close(dx * 300, want * 300, "dx", torch.finfo(dtype).eps)

    @pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 4, 5, 16)])
    def test_any_number_of_leading_axes(self, backend: str, shape: tuple[int, ...]) -> None:
        x, weight = normal("x", *shape), normal("weight", 16)
        (y,) = call("rms_norm", backend, {"x": x, "weight": weight}, {})
        (flat,) = call("rms_norm", backend, {"x": x.reshape(-1, 16), "weight": weight}, {})
        assert_close(y, flat.view(shape), "y", 1e-14)

    def test_float32_weight_on_bfloat16_rows(self, backend: str) -> None:
        x, weight = normal("x", 4, 32).bfloat16(), (1 + normal("weight", 32) / 100).float()
        (y,) = call("rms_norm", backend, {"x": x, "weight": weight}, {})
        (want,) = call("rms_norm", backend, {"x": x.float(), "weight": weight}, {})
        assert torch.equal(y, want.bfloat16())


class TestAddRMSNorm(OperatorConformance):
    operator = "add_rms_norm"
    timed = ("x", "residual")
    axes = ({"x": 2, "residual": 2, "weight": 0},)
    mixes_time = False

    def case(self, batch: int, length: int, variant: int) -> Case:
        del variant
        return Case(
            {
                "x": normal("x", batch, length, 36),
                "residual": normal("residual", batch, length, 36),
                "weight": normal("weight", 36),
            }
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_zero_and_huge_rows(self, backend: str, dtype: torch.dtype) -> None:
        """A row whose sum is zero gives zeros and the gradient 1 / sqrt(eps), for both; 300s are squared in float32."""
        x = torch.stack([torch.full((16,), 4.0), torch.full((16,), 200.0)]).to(dtype).requires_grad_()
        residual = torch.stack([torch.full((16,), -4.0), torch.full((16,), 100.0)]).to(dtype).requires_grad_()
        weight = torch.ones(16, dtype=dtype)
        y, total = call("add_rms_norm", backend, {"x": x, "residual": residual, "weight": weight}, {})
        assert torch.equal(y, torch.tensor([[0.0], [1.0]]).expand(2, 16).to(dtype))
        assert torch.equal(total, torch.tensor([[0.0], [300.0]]).expand(2, 16).to(dtype))
        for gradient in torch.autograd.grad(y.sum(), (x, residual)):
            assert_close(gradient, torch.tensor([[1e3], [0.0]]).expand(2, 16), "gradient", torch.finfo(dtype).eps)

    def test_residual_keeps_its_wider_dtype(self, backend: str) -> None:
        x, residual = normal("x", 2, 3, 8).bfloat16(), normal("residual", 2, 3, 8).float()
        weight = normal("weight", 8).float()
        y, total = call("add_rms_norm", backend, {"x": x, "residual": residual, "weight": weight}, {})
        assert y.dtype == torch.bfloat16
        assert torch.equal(total, x.float() + residual)
        (want,) = call("rms_norm", backend, {"x": total, "weight": weight}, {})
        assert torch.equal(y, want.bfloat16())


class TestRotary(OperatorConformance):
    operator = "rotary"
    timed = ("x",)
    axes = ({"x": 2}, {"x": 3})
    lanes = axes[0]
    variants = 3
    mixes_time = False

    def case(self, batch: int, length: int, variant: int) -> Case:
        heads, width = ((3, 8), (1, 2), (5, 30))[variant]
        positions = torch.arange(length) + 11
        if variant == 1:
            positions = torch.stack([positions + 100 * row for row in range(batch)]) if batch else positions[None][:0]
        options = {"positions": positions, "interleaved": variant == 2, "base": (10000.0, 500.0, 10000.0)[variant]}
        return Case({"x": normal("x", batch, length, heads, width)}, options)

    def test_a_row_alone_equals_the_row_in_a_batch(self, backend: str) -> None:
        case = self.case(3, 17, 1)
        (whole,) = self.run(backend, case.tensors, case.options)
        alone = {"x": case.tensors["x"][1:2]}
        (row,) = self.run(backend, alone, {**case.options, "positions": case.options["positions"][1]})
        assert torch.equal(row, whole[1:2])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_angles_are_float32_whatever_the_dtype(self, backend: str, dtype: torch.dtype) -> None:
        """At position 5,000 an angle in bfloat16 would be off by whole turns."""
        x = normal("x", 1, 2, 1, 16).to(dtype)
        positions = torch.tensor([5000, 5001])
        (y,) = call("rotary", backend, {"x": x}, {"positions": positions})
        (want,) = call("rotary", backend, {"x": x.double()}, {"positions": positions})
        assert_close(y, want, "y", 2 * torch.finfo(dtype).eps + 1e-3 * (dtype == torch.float32))

    def test_scores_depend_on_distance_alone(self, backend: str) -> None:
        q, k = normal("q", 1, 1, 1, 16), normal("k", 1, 1, 1, 16)

        def score(at_q: int, at_k: int) -> Tensor:
            (turned_q,) = call("rotary", backend, {"x": q}, {"positions": torch.tensor([at_q])})
            (turned_k,) = call("rotary", backend, {"x": k}, {"positions": torch.tensor([at_k])})
            return (turned_q * turned_k).sum()

        assert_close(score(9, 4), score(109, 104), "score", 1e-12)

    def test_fractional_positions(self, backend: str) -> None:
        x = normal("x", 1, 1, 1, 2)
        (y,) = call("rotary", backend, {"x": x}, {"positions": torch.tensor([0.5])})
        turn = torch.tensor([[0.5]]).double()
        want = torch.cat(
            [x[0, 0] @ torch.cat([turn.cos(), -turn.sin()]), x[0, 0] @ torch.cat([turn.sin(), turn.cos()])], dim=-1
        )
        assert_close(y[0, 0, 0], want[0], "y", 1e-12)


def test_bad_arguments_are_named() -> None:
    x, weight = torch.zeros(2, 3, 8), torch.zeros(8)
    with pytest.raises(TypeError, match=r"x is list, needs a torch\.Tensor"):
        star_kernels.rms_norm([1.0], weight)
    with pytest.raises(TypeError, match=r"x is torch\.int64, needs float16"):
        star_kernels.rms_norm(torch.zeros(8, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match=r"x has shape \(\), needs 1 axes"):
        star_kernels.rms_norm(torch.zeros(()), weight)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), needs \(D,\) = \(8,\)"):
        star_kernels.rms_norm(x, torch.zeros(7))
    with pytest.raises(ValueError, match=r"weight is on meta, needs cpu"):
        star_kernels.rms_norm(x, torch.zeros(8, device="meta"))
    with pytest.raises(ValueError, match=r"eps is -1\.0, needs a number >= 0"):
        star_kernels.rms_norm(x, weight, eps=-1.0)
    with pytest.raises(ValueError, match=r"residual has shape \(2, 3, 9\), needs .* = \(2, 3, 8\)"):
        star_kernels.add_rms_norm(x, torch.zeros(2, 3, 9), weight)
    with pytest.raises(ValueError, match=r"x has shape \(\), needs 1 axes"):
        star_kernels.add_rms_norm(torch.zeros(()), x, weight)


def test_bad_rotary_arguments_are_named() -> None:
    x = torch.zeros(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 8\), needs 4 axes \(B, T, H, D\)"):
        star_kernels.rotary(x[0], torch.arange(3))
    with pytest.raises(ValueError, match="x has D == 7, needs an even D"):
        star_kernels.rotary(x[..., :7], torch.arange(3))
    with pytest.raises(TypeError, match=r"positions is list, needs a torch\.Tensor"):
        star_kernels.rotary(x, [0, 1, 2])
    with pytest.raises(TypeError, match=r"positions is torch\.complex64"):
        star_kernels.rotary(x, torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"positions has shape \(4,\), needs \(T,\) = \(3,\) or \(B, T\) = \(2, 3\)"):
        star_kernels.rotary(x, torch.arange(4))
    with pytest.raises(ValueError, match="positions is on meta, needs cpu"):
        star_kernels.rotary(x, torch.arange(3, device="meta"))
    with pytest.raises(ValueError, match="base is 0, needs a number > 0"):
        star_kernels.rotary(x, torch.arange(3), base=0)
