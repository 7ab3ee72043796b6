"""Gated linear attention and the gated delta rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import star_kernels
from tests.kernels import oracles
from tests.kernels.checks import Case, assert_close, call, gradients
from tests.kernels.conformance import RecurrentConformance
from tests.kernels.samples import normal, uniform

SIZES = ((3, 4, 5), (1, 1, 1), (2, 7, 3))


class TestGatedLinearAttention(RecurrentConformance):
    operator = "gated_linear_attention"
    masks_products = True
    timed = ("q", "k", "v", "log_decay")
    axes = (
        {"q": 2, "k": 2, "v": 2, "log_decay": 2, "initial_state": 1},
        {"q": 3, "k": 3, "log_decay": 3, "initial_state": 2},
        {"v": 3, "initial_state": 3},
    )
    lanes = axes[0]
    variants = 3
    long_lengths = (1026,)
    lengths = (1, 2, 3, 15, 16, 17, 65)

    def case(self, batch: int, length: int, variant: int) -> Case:
        heads, keys, values = SIZES[variant]
        return Case(
            {
                "q": normal("q", batch, length, heads, keys),
                "k": normal("k", batch, length, heads, keys),
                "v": normal("v", batch, length, heads, values),
                "log_decay": -uniform("log_decay", batch, length, heads, keys, high=2.0),
                "initial_state": normal("state", batch, heads, keys, values),
            },
            {"scale": (None, 1.0, 0.3)[variant]},
        )

    def test_without_decay_it_is_causal_linear_attention(self, backend: str) -> None:
        case = self.case(2, 21, 0)
        q, k, v = (case.tensors[name] for name in "qkv")
        tensors = {"q": q, "k": k, "v": v, "log_decay": torch.zeros_like(k)}
        o, _ = call("gated_linear_attention", backend, tensors, {"scale": 1.0})
        scores = torch.einsum("bihk,bjhk->bhij", q, k).tril()
        assert_close(o, torch.einsum("bhij,bjhv->bihv", scores, v), "o", 1e-12)


class TestGatedDeltaRule(RecurrentConformance):
    operator = "gated_delta_rule"
    masks_products = True
    timed = ("q", "k", "v", "log_decay", "beta")
    axes = (
        {"q": 2, "k": 2, "v": 2, "log_decay": 2, "beta": 2, "initial_state": 1},
        {"q": 3, "k": 3, "initial_state": 2},
        {"v": 3, "initial_state": 3},
    )
    lanes = axes[0]
    variants = 3
    long_lengths = (1026,)
    lengths = (1, 2, 3, 17, 63, 64, 65, 129)

    def case(self, batch: int, length: int, variant: int) -> Case:
        heads, keys, values = SIZES[variant]
        k = normal("k", batch, length, heads, keys)
        return Case(
            {
                "q": normal("q", batch, length, heads, keys),
                "k": k / k.norm(dim=-1, keepdim=True),
                "v": normal("v", batch, length, heads, values),
                "log_decay": -uniform("log_decay", batch, length, heads, high=0.5),
                "beta": uniform("beta", batch, length, heads, high=(1.5, 0.5, 1.0)[variant]),
                "initial_state": normal("state", batch, heads, keys, values),
            },
            {"scale": (None, 1.0, 0.3)[variant]},
        )

    def test_a_stored_value_is_replaced_and_read_back(self, backend: str) -> None:
        """With beta = 1 and no decay the memory holds the last value of each key exactly."""
        k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).view(1, 3, 1, 2)
        v = torch.tensor([[1.0], [2.0], [5.0]]).view(1, 3, 1, 1)
        gates = {"log_decay": torch.zeros(1, 3, 1), "beta": torch.ones(1, 3, 1)}
        o, state = call("gated_delta_rule", backend, {"q": k, "k": k, "v": v, **gates}, {"scale": 1.0})
        assert torch.equal(o.flatten(), torch.tensor([1.0, 2.0, 5.0]))
        assert torch.equal(state.flatten(), torch.tensor([5.0, 2.0]))


@pytest.mark.parametrize("suite", [TestGatedLinearAttention(), TestGatedDeltaRule()], ids=lambda suite: suite.operator)
class TestExtremeDecays:
    """Log decays of -8 a token, of -3e4, of -inf and of 0, anywhere in a chunk."""

    @pytest.mark.parametrize("logs", [(-8.0, -8.0), (-0.1, -3e4), (-0.1, -math.inf), (0.0, 0.0), (0.0, -math.inf)])
    def test_matches_the_token_loop(self, backend: str, suite: RecurrentConformance, logs: tuple[float, float]) -> None:
        case = suite.case(2, 70, 0)
        usual, rare = logs
        log_decay = torch.full_like(case.tensors["log_decay"], usual)
        log_decay[:, 20] = rare
        log_decay[0, 63:65] = rare
        tensors = {**case.tensors, "log_decay": log_decay}
        leaves = Case(tensors).leaves(torch.float32)
        exact = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
        outputs = suite.run(backend, leaves, case.options)
        want = getattr(oracles, suite.operator)(**exact, **case.options)
        for got, expected in zip(outputs, want, strict=True):
            assert_close(got, expected, "output", 2e-5)
        found, want_found = gradients(outputs, leaves), gradients(want, exact)
        for name in leaves:
            assert_close(found[name], want_found[name], f"gradient of {name}", 1e-4)

    def test_reset_forgets_everything(self, backend: str, suite: RecurrentConformance) -> None:
        case = suite.case(1, 40, 0)
        tensors = {name: one.clone() for name, one in case.tensors.items()}
        tensors["log_decay"][:, 25] = -math.inf
        o, state = suite.run(backend, tensors, case.options)
        after = {name: one[:, 25:] for name, one in tensors.items() if name != "initial_state"}
        o_after, state_after = suite.run(backend, after, case.options)
        assert_close(o[:, 25:], o_after, "o", 1e-13)
        assert_close(state, state_after, "state", 1e-13)

    def test_other_heads_do_not_see_a_nan(self, backend: str, suite: RecurrentConformance) -> None:
        case = suite.case(1, 40, 0)
        tensors = {name: one.float() for name, one in case.tensors.items()}
        clean, clean_state = suite.run(backend, tensors, case.options)
        for name in suite.timed:
            value = tensors[name].clone()
            value[:, 20, 1] = float("nan")
            o, state = suite.run(backend, {**tensors, name: value}, case.options)
            assert torch.equal(o[:, :20], clean[:, :20]), name
            assert torch.equal(o[:, :, [0, 2]], clean[:, :, [0, 2]]), name
            assert torch.equal(state[:, [0, 2]], clean_state[:, [0, 2]]), name


Q, V, LOG = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 6), torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"q has shape \(5, 3, 4\), needs 4 axes \(B, T, H, K\)", {"q": Q[0]}),
        (ValueError, r"k has shape \(2, 5, 3, 3\), needs .*the shape of q = \(2, 5, 3, 4\)", {"k": Q[..., :3]}),
        (ValueError, r"v has shape \(2, 5, 2, 6\), needs \(B, T, H, V\) = \(2, 5, 3, 6\)", {"v": V[:, :, :2]}),
        (TypeError, r"v is torch\.float64, needs torch\.float32, the dtype of q", {"v": V.double()}),
        (TypeError, r"k is torch\.float64, needs torch\.float32, the dtype of q", {"k": Q.double()}),
        (ValueError, r"initial_state has shape \(2, 3, 6, 4\), needs \(S, H, K, V\)", {"initial_state": 1}),
    ],
)
@pytest.mark.parametrize("operator", ["gated_linear_attention", "gated_delta_rule"])
def test_bad_arguments_are_named(
    operator: str, error: type[Exception], message: str, arguments: dict[str, Tensor]
) -> None:
    if "initial_state" in arguments:
        arguments = {"initial_state": torch.zeros(2, 3, 6, 4)}
    gates = {"log_decay": Q} if operator == "gated_linear_attention" else {"log_decay": LOG, "beta": LOG}
    with pytest.raises(error, match=message):
        getattr(star_kernels, operator)(**{"q": Q, "k": Q, "v": V, **gates, **arguments})


def test_bad_gates_and_states_are_named() -> None:
    with pytest.raises(ValueError, match=r"log_decay has shape \(2, 5, 3\), needs \(B, T, H, K\)"):
        star_kernels.gated_linear_attention(Q, Q, V, LOG)
    with pytest.raises(ValueError, match=r"log_decay has shape \(2, 5, 3, 4\), needs \(B, T, H\)"):
        star_kernels.gated_delta_rule(Q, Q, V, Q, LOG)
    with pytest.raises(ValueError, match=r"beta has shape \(2, 5, 3, 4\), needs \(B, T, H\)"):
        star_kernels.gated_delta_rule(Q, Q, V, LOG, Q)
    with pytest.raises(ValueError, match=r"state has shape \(2, 3, 6, 4\), needs \(B, H, K, V\) = \(2, 3, 4, 6\)"):
        star_kernels.gated_linear_attention_step(torch.zeros(2, 3, 6, 4), Q[:, 0], Q[:, 0], V[:, 0], Q[:, 0])
    with pytest.raises(ValueError, match=r"state has shape \(2, 3, 6, 4\), needs \(B, H, K, V\) = \(2, 3, 4, 6\)"):
        star_kernels.gated_delta_rule_step(torch.zeros(2, 3, 6, 4), Q[:, 0], Q[:, 0], V[:, 0], LOG[:, 0], LOG[:, 0])
