"""The diagonal scan and the RG-LRU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import star_kernels
from tests.kernels import oracles
from tests.kernels.checks import Case, assert_close, call, gradients
from tests.kernels.conformance import RecurrentConformance
from tests.kernels.samples import normal, uniform


class TestDiagonalScan(RecurrentConformance):
    operator = "diagonal_scan"
    timed = ("decay", "x")
    axes = ({"decay": 2, "x": 2, "initial_state": 1},)
    lanes = axes[0]
    variants = 3
    long_lengths = (1026,)

    def case(self, batch: int, length: int, variant: int) -> Case:
        channels = (6, 1, 67)[variant]
        decay = uniform("decay", batch, length, channels, low=-1.0)
        decay[decay.abs() < 0.2] = 0.0
        return Case(
            {
                "decay": decay,
                "x": normal("x", batch, length, channels),
                "initial_state": normal("state", batch, channels),
            }
        )

    def test_zero_decay_resets_even_a_huge_state(self, backend: str) -> None:
        decay = torch.tensor([[[1.0], [0.0], [1.0]]], requires_grad=True)
        x = torch.tensor([[[1e30], [2.0], [3.0]]], requires_grad=True)
        h, _ = call("diagonal_scan", backend, {"decay": decay, "x": x}, {})
        assert torch.equal(h, torch.tensor([[[1e30], [2.0], [5.0]]]))
        h.sum().backward()
        assert torch.equal(x.grad, torch.tensor([[[1.0], [2.0], [1.0]]]))
        assert torch.equal(decay.grad, torch.tensor([[[0.0], [2e30], [2.0]]]))

    def test_long_scan_of_vanishing_decays(self, backend: str) -> None:
        """The product of 1,026 decays of 1e-3 underflows; the scan does not care."""
        tensors = {"decay": torch.full((1, 1026, 2), 1e-3), "x": torch.ones(1, 1026, 2)}
        h, final = call("diagonal_scan", backend, tensors, {})
        assert_close(h[:, 5:], torch.full((1, 1021, 2), 1 / (1 - 1e-3)), "h", 1e-6)
        assert torch.equal(final, h[:, -1])

    def test_decays_up_to_two_grow_as_token_by_token(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Products of 126 decays of 2, and resets behind them; powers of two are exact in whatever order."""
        if backend == "triton":  # with the segments of a GPU, in the interpreter too
            from star_kernels.recurrence.triton import diagonal

            monkeypatch.setattr(diagonal, "_SEGMENTS", 64)
            monkeypatch.setattr(diagonal, "_TOKENS", 2)
        decay = torch.full((1, 300, 4), 2.0)
        decay[:, 130:, 0] = 0.0
        decay[:, 200:, 1] = 0.5
        decay[:, 1::2, 2], decay[:, 1::2, 3] = 0.5, -0.5
        state = torch.tensor([[2.0**-10, 2.0**-100, 1.0, 1.0]])
        tensors = {"decay": decay, "x": torch.zeros(1, 300, 4), "initial_state": state}
        h, final = call("diagonal_scan", backend, tensors, {})
        want = state[:, None].double() * decay.double().cumprod(1)
        assert torch.equal(h.double(), want)
        assert torch.equal(final, h[:, -1])
        leaves = {"decay": decay.requires_grad_(), "x": torch.zeros(1, 300, 4).requires_grad_()}
        late = call("diagonal_scan", backend, leaves, {})[0][:, 126]
        pull = gradients((late,), leaves, (torch.ones_like(late),))["x"]
        assert torch.equal(pull[0, :127, 0], 2.0 ** torch.arange(126, -1, -1))

    def test_half_precision_keeps_a_float32_state(self, backend: str) -> None:
        """Adding 1 to 256 is lost in bfloat16: only a float32 state counts to 300."""
        ones = torch.ones(1, 300, 1, dtype=torch.bfloat16)
        _, final = call("diagonal_scan", backend, {"decay": ones, "x": ones}, {})
        assert final.item() == 300.0


class TestRGLRU(RecurrentConformance):
    operator = "rg_lru"
    timed = ("x", "recurrence_gate", "input_gate")
    axes = ({"x": 2, "recurrence_gate": 2, "input_gate": 2, "log_lambda": 0, "initial_state": 1},)
    lanes = axes[0]
    variants = 2
    long_lengths = (1026,)

    def case(self, batch: int, length: int, variant: int) -> Case:
        channels = (6, 13)[variant]
        return Case(
            {
                **{name: normal(name, batch, length, channels) for name in self.timed},
                "log_lambda": uniform("log_lambda", channels, low=-0.7, high=-0.01),
                "initial_state": normal("state", batch, channels),
            },
            {"c": (8.0, 2.5)[variant]},
        )

    @pytest.mark.parametrize("log_a", [-1e-9, -1e-5, -1e-3])
    def test_near_one_keeps_its_digits(self, backend: str, log_a: float) -> None:
        """1 - a^2 in float32 would be 0 at log a = -1e-9; an open gate and c = 1 make log a the parameter itself."""
        tensors = {
            "x": torch.full((1, 2, 1), 3.0),
            "recurrence_gate": torch.full((1, 2, 1), 100.0),
            "input_gate": torch.full((1, 2, 1), 100.0),
            "log_lambda": torch.full((1,), log_a),
        }
        leaves = {name: one.requires_grad_() for name, one in tensors.items()}
        exact = {name: one.detach().double().requires_grad_() for name, one in tensors.items()}
        want = oracles.rg_lru(**exact, c=1.0)
        expected = gradients(want, exact)
        for outputs in (call("rg_lru", backend, leaves, {"c": 1.0}), by_steps(backend, leaves, {"c": 1.0})):
            found = gradients(outputs, leaves)
            for got, one in zip(outputs, want, strict=True):
                assert ((got.double() - one) / one).abs().max() < 1e-5
            for name in ("x", "log_lambda"):
                assert ((found[name].double() - expected[name]) / expected[name]).abs().max() < 1e-4, name

    def test_gradient_is_finite_where_nothing_decays(self, backend: str) -> None:
        leaves = {
            "x": torch.ones(1, 3, 2),
            "recurrence_gate": torch.zeros(1, 3, 2),
            "input_gate": torch.zeros(1, 3, 2),
            "log_lambda": torch.zeros(2),
            "initial_state": torch.full((1, 2), 5.0),
        }
        leaves = {name: one.requires_grad_() for name, one in leaves.items()}
        for h, final in (call("rg_lru", backend, leaves, {}), by_steps(backend, leaves, {})):
            assert torch.equal(h, torch.full((1, 3, 2), 5.0))
            for name, gradient in gradients((h, final), leaves).items():
                assert gradient.isfinite().all(), name

    def test_extreme_gates(self, backend: str) -> None:
        """A closed recurrence gate keeps the state; a decay of exp(-8e3) drops it."""
        gate = torch.tensor([[[-1e4]], [[1e4]]])
        tensors = {
            "x": torch.ones(2, 1, 1),
            "recurrence_gate": gate,
            "input_gate": torch.full((2, 1, 1), 1e4),
            "log_lambda": torch.tensor([-1e3]),
            "initial_state": torch.full((2, 1), 7.0),
        }
        h, _ = call("rg_lru", backend, tensors, {})
        assert torch.equal(h.flatten(), torch.tensor([7.0, 1.0]))


def by_steps(backend: str, tensors: dict[str, Tensor], options: dict[str, float]) -> tuple[Tensor, Tensor]:
    """Run the RG-LRU a token at a time; return what one call returns."""
    timed = TestRGLRU.timed
    state = tensors.get("initial_state", torch.zeros_like(tensors["x"][:, 0]))
    outputs = []
    for t in range(tensors["x"].shape[1]):
        token = {name: tensors[name][:, t] for name in timed}
        given = {"state": state, **token, "log_lambda": tensors["log_lambda"]}
        h, state = call("rg_lru_step", backend, given, options)
        outputs.append(h)
    return torch.stack(outputs, dim=1), state


def take_gpu_sizes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Triton's kernels, in the interpreter too, the segments that they have on a GPU."""
    if backend == "triton":
        from star_kernels.recurrence.triton import diagonal

        monkeypatch.setattr(diagonal, "_SEGMENTS", 64)
        monkeypatch.setattr(diagonal, "_TOKENS", 2)


X, STATE = torch.zeros(2, 5, 3), torch.zeros(2, 3)


def test_bad_scan_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(5, 3\), needs 3 axes"):
        star_kernels.diagonal_scan(X, X[0])
    with pytest.raises(ValueError, match=r"decay has shape \(2, 5, 4\), needs .* = \(2, 5, 3\)"):
        star_kernels.diagonal_scan(torch.zeros(2, 5, 4), X)
    with pytest.raises(TypeError, match=r"decay is torch\.float64, needs torch\.float32, the dtype of x"):
        star_kernels.diagonal_scan(X.double(), X)
    with pytest.raises(ValueError, match=r"initial_state has shape \(1, 3\), needs \(S, D\) = \(2, 3\)"):
        star_kernels.diagonal_scan(X, X, initial_state=STATE[:1])
    with pytest.raises(ValueError, match=r"initial_state has shape \(1, 3\), needs \(S, D\) = \(2, 3\)"):
        star_kernels.diagonal_scan(X[:1], X[:1], initial_state=STATE[:1], cu_seqlens=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match=r"state has shape \(3,\), needs \(B, D\) = \(2, 3\)"):
        star_kernels.diagonal_scan_step(STATE[0], X[:, 0], X[:, 0])


def test_bad_rg_lru_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"recurrence_gate has shape \(2, 5\)"):
        star_kernels.rg_lru(X, X[..., 0], X, torch.zeros(3))
    with pytest.raises(TypeError, match=r"input_gate is torch\.float64"):
        star_kernels.rg_lru(X, X, X.double(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"log_lambda has shape \(4,\), needs \(D,\) = \(3,\)"):
        star_kernels.rg_lru(X, X, X, torch.zeros(4))
    with pytest.raises(ValueError, match=r"c is -8\.0, needs a number > 0"):
        star_kernels.rg_lru(X, X, X, torch.zeros(3), c=-8.0)
    with pytest.raises(ValueError, match=r"state has shape \(3, 3\), needs \(B, D\) = \(2, 3\)"):
        star_kernels.rg_lru_step(torch.zeros(3, 3), X[:, 0], X[:, 0], X[:, 0], torch.zeros(3))
