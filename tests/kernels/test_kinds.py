"""The kinds of inputs for what does not run over time, the one-token steps and the loss; and extreme gates, whole and
step by step."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.kernels import test_attention, test_diagonal, test_long_conv, test_matrix_memory, test_short_conv
from tests.kernels import test_state_space as state_space
from tests.kernels.checks import Case, assert_close, call, gradients
from tests.kernels.conformance import OperatorConformance
from tests.kernels.kinds import Kinds
from tests.kernels.samples import integers, normal


class _Step(Kinds):
    """A step, from the suite of the operator that it is a token of."""

    whole: ClassVar[OperatorConformance]

    def __init_subclass__(cls) -> None:
        whole = cls.whole
        cls.operator, cls.variants = f"{whole.operator}_step", whole.variants
        cls.batched = ("state", *whole.timed)
        if "axes" not in vars(cls):
            cls.axes = tuple(
                {"state" if "state" in n else n: at - 1 if n in whole.timed else at for n, at in sizes.items()}
                for sizes in whole.axes
            )
        cls.lanes = cls.axes[0]

    def case(self, batch: int, length: int, variant: int) -> Case:
        del length
        case = self.whole.case(batch, 1, variant)
        return Case(one_token(self.whole, case.tensors, 0), case.options)


def one_token(whole: OperatorConformance, tensors: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    """Return the step's arguments for token t, and the initial state."""
    return {
        "state" if name == "initial_state" else name: one[:, t] if name in whole.timed else one
        for name, one in tensors.items()
    }


class TestCausalConv1dStep(_Step):
    whole = test_short_conv.TestCausalConv1d()


class TestGatedShortConvStep(_Step):
    whole = test_short_conv.TestGatedShortConv()


class TestDiagonalScanStep(_Step):
    whole = test_diagonal.TestDiagonalScan()


class TestRGLRUStep(_Step):
    whole = test_diagonal.TestRGLRU()


class TestSelectiveScanStep(_Step):
    whole = state_space.TestSelectiveScan()


class TestSSDStep(_Step):
    whole = state_space.TestSSD()


class TestGatedLinearAttentionStep(_Step):
    whole = test_matrix_memory.TestGatedLinearAttention()


class TestGatedDeltaRuleStep(_Step):
    whole = test_matrix_memory.TestGatedDeltaRule()


class TestLongConvStep(_Step):
    whole = test_long_conv.TestLongConv()
    axes = ({"x": 1, "state": 2, "gate_in": 1, "gate_out": 1, "filter": 0, "skip": 0},)

    def case(self, batch: int, length: int, variant: int) -> Case:
        """Hold 3 tokens, and 0 under a filter of one tap."""
        case = super().case(batch, length, variant)
        width, reach = case.tensors["filter"].shape
        return Case({"state": normal("state", batch, min(3, reach - 1), width), **case.tensors})


class TestAttentionStep(Kinds):
    operator = "attention_step"
    batched = ("q", "k", "v", "length")
    variants = 3
    axes = ({"q": 2, "k": 3}, {"v": 3})
    lanes: ClassVar[dict[str, int]] = {"q": 1, "k": 2, "v": 2, "sinks": 0}
    lane_variant = 1  # a head of keys for each of queries

    def case(self, batch: int, length: int, variant: int) -> Case:
        del length
        tensors = test_attention.projections(batch, 1, 11, ((4, 2, 8, 6), (3, 3, 7, 5), (5, 1, 20, 33))[variant])
        tensors["q"] = tensors["q"][:, 0]
        if variant == 1:
            tensors["sinks"] = normal("sinks", 3)
        lengths = torch.tensor([11, 7, 1, 4])[:batch]
        return Case(tensors, ({"length": lengths}, {"softcap": 2.0}, {"length": 9, "window": 4})[variant])


class TestLinearCrossEntropy(Kinds):
    operator = "linear_cross_entropy"
    batched = ("hidden", "targets")
    variants = 3
    torch_backends = ("reference", "triton")
    axes = ({"hidden": 2, "weight": 1},)

    def case(self, batch: int, length: int, variant: int) -> Case:
        vocabulary, width = ((7, 12), (50, 33), (130, 1))[variant]
        targets = integers("targets", batch, length, high=vocabulary)
        targets[:, 1::4] = -100
        tensors = {"hidden": normal("hidden", batch, length, width), "weight": normal("weight", vocabulary, width)}
        if variant:
            tensors["bias"] = normal("bias", vocabulary)
        options: tuple[dict[str, Any], ...] = ({}, {"label_smoothing": 0.1}, {"softcap": 3.0})
        return Case(tensors, {"targets": targets, "reduction": "none", **options[variant]})


STEPS = (0.0, 100.0, -100.0, 8.0, 3e4, 0.5)
LOGS = (-0.1, -8.0, -3e4, -math.inf, 0.0, -0.1)
SIGNALS = (1e4, -1e4, 100.0, -100.0, 0.0, 1.0)
EXTREMES: dict[str, tuple[OperatorConformance, int, dict[str, tuple[float, ...]]]] = {
    "silu of a convolution": (test_short_conv.TestCausalConv1d(), 1, {"x": SIGNALS}),
    "gates of a convolution": (test_short_conv.TestGatedShortConv(), 0, {"gate_in": SIGNALS, "gate_out": SIGNALS}),
    "decays of 0, 1 and below": (test_diagonal.TestDiagonalScan(), 0, {"decay": (1.0, 0.0, -1.0, -0.0, 1e-38, 0.5)}),
    "gates of the RG-LRU": (
        test_diagonal.TestRGLRU(),
        0,
        {"recurrence_gate": (1e4, 20.0, -20.0, 100.0, -10.0, 0.0), "input_gate": SIGNALS},
    ),
    "step sizes of selective_scan": (state_space.TestSelectiveScan(), 0, {"dt": STEPS}),
    "gate of selective_scan": (state_space.TestSelectiveScan(), 0, {"z": SIGNALS}),
    "step sizes of ssd": (state_space.TestSSD(), 0, {"dt": STEPS}),
    "gate of ssd": (state_space.TestSSD(), 0, {"z": SIGNALS}),
    "decays of gated_linear_attention": (test_matrix_memory.TestGatedLinearAttention(), 0, {"log_decay": LOGS}),
    "decays of gated_delta_rule": (test_matrix_memory.TestGatedDeltaRule(), 0, {"log_decay": LOGS}),
}


@pytest.mark.parametrize("by_step", [False, True], ids=["whole", "steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_gates(backend: str, name: str, dtype: torch.dtype, by_step: bool) -> None:
    """Outputs and gradients of six tokens with a gate at the end of its range each, in one call and in six steps."""
    suite, variant, extremes = EXTREMES[name]
    case = suite.case(2, 6, variant)
    tensors = {key: one.clone() for key, one in case.tensors.items()}
    for key, values in extremes.items():
        for t, value in enumerate(values):
            tensors[key][:, t] = value
    leaves = Case(tensors).leaves(dtype)
    exact = {key: one.detach().double().requires_grad_() for key, one in leaves.items()}
    if by_step:
        state, parts = leaves["initial_state"], []
        for t in range(6):
            token = {**one_token(suite, leaves, t), "state": state}
            y, state = call(f"{suite.operator}_step", backend, token, case.options)
            parts.append(y)
        outputs = (torch.stack(parts, dim=1), state)
    else:
        outputs = suite.run(backend, leaves, case.options)
    want = suite.oracle(exact, case.options)
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    for index, (got, expected) in enumerate(zip(outputs, want, strict=True)):
        assert_close(got, expected, f"output {index}", tolerance)
    found, want_found = gradients(outputs, leaves), gradients(want, exact)
    for key in leaves:
        assert_close(found[key], want_found[key], f"gradient of {key}", 2 * tolerance)
