"""Mamba-1's selective scan and Mamba-2's scan."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels
from star_kernels.recurrence.reference import selective
from tests.kernels import oracles
from tests.kernels.checks import Case, assert_close, call, gradients
from tests.kernels.conformance import RecurrentConformance
from tests.kernels.samples import normal, uniform


class TestSelectiveScan(RecurrentConformance):
    operator = "selective_scan"
    timed = ("x", "dt", "B", "C", "z")
    axes = (
        {"x": 2, "dt": 2, "A": 0, "D": 0, "z": 2, "dt_bias": 0, "initial_state": 1},
        {"A": 1, "B": 3, "C": 3, "initial_state": 2},
    )
    lanes = axes[0]
    variants = 4
    long_lengths = (1026,)

    def case(self, batch: int, length: int, variant: int) -> Case:
        channels, size, groups = ((6, 5, 2), (1, 1, 1), (12, 2, 4), (7, 16, 1))[variant]
        tensors = {
            "x": normal("x", batch, length, channels),
            "dt": normal("dt", batch, length, channels),
            "A": -uniform("A", channels, size, high=2.0),
            "B": normal("B", batch, length, groups, size),
            "C": normal("C", batch, length, groups, size),
            "D": normal("D", channels),
            "z": normal("z", batch, length, channels),
            "dt_bias": normal("dt_bias", channels),
            "initial_state": normal("state", batch, channels, size),
        }
        options: dict[str, Any] = {"dt_softplus": True}
        if variant == 3:
            tensors = {name: one for name, one in tensors.items() if name not in ("D", "z", "dt_bias")}
            tensors["dt"] = tensors["dt"].abs()
            options = {}
        return Case(tensors, options)

    @pytest.mark.parametrize("held", [1, 100, 10**9])
    def test_result_does_not_depend_on_the_chunk(self, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
        case = self.case(2, 9, 0)
        want_leaves, leaves = case.leaves(torch.float64), case.leaves(torch.float64)
        want = self.run("reference", want_leaves, case.options)
        monkeypatch.setattr(selective, "CHUNK_ELEMENTS", held)
        outputs = self.run("reference", leaves, case.options)
        for got, expected in zip(outputs, want, strict=True):
            assert_close(got, expected, "output", 1e-13)
        found, want_found = gradients(outputs, leaves), gradients(want, want_leaves)
        for name in leaves:
            assert_close(found[name], want_found[name], f"gradient of {name}", 1e-12)

    def test_packed_sequences_longer_than_a_chunk_equal_separate(self, backend: str) -> None:
        """Of 67, 65 and fewer tokens, none of them at a multiple of a chunk of 64, and empty ones between."""
        ends = [0, 0, 3, 70, 70, 135]
        states = self.case(len(ends) - 1, 1, 1).tensors["initial_state"]
        tensors = self.case(1, ends[-1], 1).tensors | {"initial_state": states}
        leaves, separate = Case(tensors).leaves(torch.float64), Case(tensors).leaves(torch.float64)
        options = self.case(1, 1, 1).options
        outputs = self.run(backend, leaves, {**options, "cu_seqlens": torch.tensor(ends)})
        parts = []
        for index, (start, stop) in enumerate(pairwise(ends)):
            part = {name: one[:, start:stop] if name in self.timed else one for name, one in separate.items()}
            part["initial_state"] = separate["initial_state"][index : index + 1]
            parts.append(self.oracle(part, options))
        want = torch.cat([y for y, _ in parts], dim=1), torch.cat([state for _, state in parts])
        for index, (got, expected) in enumerate(zip(outputs, want, strict=True)):
            assert_close(got, expected, f"output {index}")
        found, want_found = gradients(outputs, leaves), gradients(want, separate)
        for name in leaves:
            assert_close(found[name], want_found[name], f"gradient of {name}", 1e-9)

    def test_a_decay_that_overflows_over_a_chunk_does_not_over_a_state(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Over 64 tokens the state 1e-30 grows by e^96: to 5e11, though e^96 itself is infinite in float32."""
        if backend == "triton":  # with the chunks of a GPU, in the interpreter too
            from star_kernels.recurrence.triton import selective as kernels

            monkeypatch.setattr(kernels, "_SPAN", 64)
        ones = torch.ones(1, 70, 1)
        tensors = {"x": 0 * ones, "dt": 1.5 * ones, "A": torch.ones(1, 1), "B": ones[..., None], "C": ones[..., None]}
        state = torch.full((1, 1, 1), 1e-30)
        y, final = call("selective_scan", backend, {**tensors, "initial_state": state}, {})
        want = 1e-30 * (1.5 * torch.arange(1, 71, dtype=torch.float64)).exp()
        assert ((y.flatten().double() - want) / want).abs().max() < 2e-5
        assert (final.double() / want[-1] - 1).abs().item() < 2e-5

    def test_rates_of_minus_infinity_reset_the_state(self, backend: str) -> None:
        """Each token then stands alone, over chunks too."""
        tensors = {name: one.float() for name, one in self.case(1, 70, 3).tensors.items()}
        tensors["A"] = torch.full_like(tensors["A"], float("-inf"))
        tensors["dt"] += 0.01
        y, final = call("selective_scan", backend, tensors, {})
        steps = tensors["dt"] * tensors["x"]
        assert_close(y, steps * (tensors["B"] * tensors["C"]).sum(-1), "y", 1e-6)
        assert_close(final, steps[:, -1, :, None] * tensors["B"][:, -1], "final state", 1e-6)

    def test_channels_read_their_group(self, backend: str) -> None:
        """G = 2 over 4 channels means groups 0, 0, 1, 1."""
        ones = torch.ones(1, 1, 4)
        B = torch.tensor([[[[2.0], [3.0]]]])
        y, _ = call("selective_scan", backend, {"x": ones, "dt": ones, "A": -ones[0, 0, :, None], "B": B, "C": B}, {})
        assert torch.equal(y.flatten(), torch.tensor([4.0, 4.0, 9.0, 9.0]))


class TestSSD(RecurrentConformance):
    operator = "ssd"
    masks_products = True
    timed = ("x", "dt", "B", "C", "z")
    axes = (
        {"x": 2, "dt": 2, "A": 0, "D": 0, "z": 2, "dt_bias": 0, "initial_state": 1},
        {"x": 3, "z": 3, "initial_state": 2},
        {"B": 3, "C": 3, "initial_state": 3},
    )
    lanes = axes[0]
    variants = 4
    long_lengths = (1026,)
    lengths = (1, 2, 3, 17, 63, 64, 65, 129)

    def case(self, batch: int, length: int, variant: int) -> Case:
        heads, width, size, groups = ((4, 3, 5, 2), (1, 1, 1, 1), (3, 7, 2, 3), (5, 4, 6, 1))[variant]
        tensors = {
            "x": normal("x", batch, length, heads, width),
            "dt": normal("dt", batch, length, heads),
            "A": -uniform("A", heads, high=2.0),
            "B": normal("B", batch, length, groups, size),
            "C": normal("C", batch, length, groups, size),
            "D": normal("D", heads),
            "z": normal("z", batch, length, heads, width),
            "dt_bias": normal("dt_bias", heads),
            "initial_state": normal("state", batch, heads, width, size),
        }
        options: dict[str, Any] = {"dt_softplus": True}
        if variant == 3:
            tensors = {name: one for name, one in tensors.items() if name not in ("D", "z", "dt_bias")}
            tensors["dt"] = tensors["dt"].abs()
            options = {}
        return Case(tensors, options)

    def test_heads_read_their_group(self, backend: str) -> None:
        """G = 2 over 4 heads means groups 0, 0, 1, 1."""
        x, dt = torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4)
        B = torch.tensor([[[[2.0], [3.0]]]])
        y, _ = call("ssd", backend, {"x": x, "dt": dt, "A": -dt[0, 0], "B": B, "C": B}, {})
        assert torch.equal(y.flatten(), torch.tensor([4.0, 4.0, 9.0, 9.0]))

    def test_other_heads_do_not_see_a_nan(self, backend: str) -> None:
        case = self.case(1, 9, 0)
        tensors = {name: one.float() for name, one in case.tensors.items()}
        clean, clean_state = self.run(backend, tensors, case.options)
        for name, axis in (("x", 2), ("dt", 2), ("z", 2)):
            value = tensors[name].clone()
            value.select(axis, 1)[:, 4] = float("nan")
            y, state = self.run(backend, {**tensors, name: value}, case.options)
            kept = [0, 2, 3]
            assert torch.equal(y[:, :, kept], clean[:, :, kept]), name
            assert torch.equal(state[:, kept], clean_state[:, kept]), name


@pytest.mark.parametrize("operator", ["selective_scan", "ssd"])
class TestExtremeSteps:
    """Step sizes at the ends of what softplus and exp can take, for both scans."""

    def tensors(self, operator: str, dt: Tensor) -> dict[str, Tensor]:
        """Build two channels (or heads of one channel) with A = -1 and B = C = 1."""
        batch, length = dt.shape
        head = (1,) if operator == "ssd" else ()
        return {
            "x": torch.ones(batch, length, 2, *head, dtype=dt.dtype),
            "dt": dt[..., None].repeat(1, 1, 2),
            "A": torch.full((2,) if head else (2, 1), -1.0, dtype=dt.dtype),
            "B": torch.ones(batch, length, 1, 1, dtype=dt.dtype),
            "C": torch.ones(batch, length, 1, 1, dtype=dt.dtype),
        }

    def test_softplus_of_100_is_100_with_slope_1(self, backend: str, operator: str) -> None:
        leaves = self.tensors(operator, torch.full((1, 1), 100.0))
        leaves["dt"].requires_grad_()
        y, _ = call(operator, backend, leaves, {"dt_softplus": True})
        y.sum().backward()
        assert_close(y, torch.full_like(y, 100.0), "y", 1e-7)
        assert_close(leaves["dt"].grad, torch.ones(1, 1, 2), "slope", 1e-7)

    def test_softplus_is_exact_in_float64(self, backend: str, operator: str) -> None:
        """Taking softplus(21) for 21 loses 8e-10."""
        tensors = self.tensors(operator, torch.full((1, 1), 21.0, dtype=torch.float64))
        y, _ = call(operator, backend, tensors, {"dt_softplus": True})
        assert_close(y, torch.full_like(y, 21.0).exp().log1p(), "y", 1e-12)

    @pytest.mark.parametrize("jump", [8.0, 3e4])
    def test_a_huge_step_resets_the_state(self, backend: str, operator: str, jump: float) -> None:
        """Decays of exp(-8) a token, and exp(-3e4) once: what comes after is as exact as what comes before."""
        dt = torch.full((1, 70), 8.0 if jump == 8.0 else 0.25)
        dt[0, 35] = jump
        leaves = {name: one.requires_grad_() for name, one in self.tensors(operator, dt).items()}
        exact = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
        outputs, want = call(operator, backend, leaves, {}), getattr(oracles, operator)(**exact)
        for got, expected in zip(outputs, want, strict=True):
            assert_close(got, expected, "output", 1e-6)
        found, expected_found = gradients(outputs, leaves), gradients(want, exact)
        for name in leaves:
            assert_close(found[name], expected_found[name], f"gradient of {name}", 1e-5)


X, DT, A, B = torch.zeros(2, 5, 6), torch.zeros(2, 5, 6), torch.zeros(6, 4), torch.zeros(2, 5, 3, 4)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"x has shape \(5, 6\), needs 3 axes \(B, T, D\)", {"x": X[0]}),
        (r"dt has shape \(2, 5, 5\), needs \(B, T, D\) = \(2, 5, 6\)", {"dt": DT[..., :5]}),
        (r"A has shape \(5, 4\), needs \(D, N\) = \(6, 4\)", {"A": A[:5]}),
        (r"A has shape \(6,\), needs 2 axes \(D, N\)", {"A": A[:, 0]}),
        (r"B has shape \(2, 5, 3\), needs 4 axes \(B, T, G, N\)", {"B": B[..., 0]}),
        (r"B has shape \(2, 5, 3, 3\), needs \(B, T, G, N\) = \(2, 5, 3, 4\)", {"B": B[..., :3]}),
        (r"B has 4 heads or groups, needs a divisor of 6", {"B": torch.zeros(2, 5, 4, 4)}),
        (r"C has shape \(2, 5, 1, 4\), needs .*the shape of B = \(2, 5, 3, 4\)", {"C": B[:, :, :1]}),
        (r"D has shape \(5,\), needs \(D,\) = \(6,\)", {"D": torch.zeros(5)}),
        (r"z has shape \(2, 5, 5\)", {"z": X[..., :5]}),
        (r"dt_bias has shape \(5,\)", {"dt_bias": torch.zeros(5)}),
        (r"initial_state has shape \(2, 6, 3\), needs \(S, D, N\)", {"initial_state": torch.zeros(2, 6, 3)}),
    ],
)
def test_bad_selective_scan_arguments_are_named(message: str, arguments: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        star_kernels.selective_scan(**{"x": X, "dt": DT, "A": A, "B": B, "C": B, **arguments})


HEADS, HEAD_DT = torch.zeros(2, 5, 6, 3), torch.zeros(2, 5, 6)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"x has shape \(2, 5, 6\), needs 4 axes \(B, T, H, P\)", {"x": HEAD_DT}),
        (r"dt has shape \(2, 5, 6, 3\), needs \(B, T, H\) = \(2, 5, 6\)", {"dt": HEADS}),
        (r"A has shape \(6, 4\), needs \(H,\) = \(6,\)", {"A": A}),
        (r"B has shape \(1, 5, 3, 4\), needs \(B, T, G, N\) = \(2, 5, 3, 4\)", {"B": B[:1]}),
        (r"B has 4 heads or groups, needs a divisor of 6", {"B": torch.zeros(2, 5, 4, 4)}),
        (r"C has shape \(2, 5, 3, 3\)", {"C": B[..., :3]}),
        (r"D has shape \(6, 3\), needs \(H,\) = \(6,\)", {"D": torch.zeros(6, 3)}),
        (r"z has shape \(2, 5, 6\), needs \(B, T, H, P\)", {"z": HEAD_DT}),
        (r"dt_bias has shape \(3,\), needs \(H,\)", {"dt_bias": torch.zeros(3)}),
        (r"initial_state has shape \(2, 6, 4, 3\), needs \(S, H, P, N\)", {"initial_state": torch.zeros(2, 6, 4, 3)}),
    ],
)
def test_bad_ssd_arguments_are_named(message: str, arguments: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        star_kernels.ssd(**{"x": HEADS, "dt": HEAD_DT, "A": A[:, 0], "B": B, "C": B, **arguments})


def test_bad_steps_are_named() -> None:
    with pytest.raises(ValueError, match=r"state has shape \(2, 6, 3\), needs \(B, D, N\) = \(2, 6, 4\)"):
        star_kernels.selective_scan_step(torch.zeros(2, 6, 3), X[:, 0], DT[:, 0], A, B[:, 0], B[:, 0])
    with pytest.raises(ValueError, match=r"B has shape \(2, 5, 3, 4\), needs 3 axes \(B, G, N\)"):
        star_kernels.selective_scan_step(torch.zeros(2, 6, 4), X[:, 0], DT[:, 0], A, B, B)
    with pytest.raises(ValueError, match=r"state has shape \(2, 6, 4, 3\), needs \(B, H, P, N\) = \(2, 6, 3, 4\)"):
        star_kernels.ssd_step(torch.zeros(2, 6, 4, 3), HEADS[:, 0], HEAD_DT[:, 0], A[:, 0], B[:, 0], B[:, 0])
