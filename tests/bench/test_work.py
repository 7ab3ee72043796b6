"""The counting rules, by hand at small sizes."""

from __future__ import annotations

import pytest

import star_kernels
from bench.cases import build, cases
from bench.work import Work, work_of


def count(operator: str, line: str, mode: str, **options: object) -> Work:
    (case,) = cases(operator, line, **options)
    inputs = build(case)
    outputs = getattr(star_kernels, operator)(**inputs.args, **inputs.options, backend="reference")
    return work_of(case, mode, inputs, outputs if isinstance(outputs, tuple) else (outputs,))


def test_a_gated_unit_moves_three_tensors_forward_and_five_backward() -> None:
    size = 4 * 2 * 3 * 5
    assert count("swiglu", "B2 T3 D5", "fwd") == Work(3 * size, 3 * size, exps=30)
    assert count("swiglu", "B2 T3 D5", "full") == Work(8 * size, 6 * size, exps=60)
    assert count("reglu", "B2 T3 D5", "fwd").exps == 0
    assert count("swiglu", "B2 T3 D5 bfloat16", "fwd").bytes == 3 * size // 2


def test_a_sum_is_read_once_in_the_norms_backward() -> None:
    size, weight = 4 * 2 * 3 * 5, 4 * 5
    assert count("add_rms_norm", "B2 T3 D5", "fwd").bytes == 4 * size + weight
    # sum, weight and two gradients read; one gradient for both terms and the weight's written
    assert count("add_rms_norm", "B2 T3 D5", "full").bytes == 4 * size + weight + 4 * size + 2 * weight


def test_a_rotation_back_reads_the_gradient_alone() -> None:
    size, positions = 4 * 2 * 3 * 1 * 6, 8 * 3
    assert count("rotary", "B2 T3 H1 D6", "full").bytes == 4 * size + 2 * positions


def test_a_state_is_an_output_without_a_gradient() -> None:
    size, state = 4 * 2 * 3 * 5, 4 * 2 * 5
    assert count("diagonal_scan", "B2 T3 D5", "fwd") == Work(3 * size + state, 3 * size + state, fmas=30)
    assert count("diagonal_scan", "B2 T3 D5", "full").bytes == 3 * size + state + 5 * size


def test_attention_is_counted_as_causal() -> None:
    fwd = count("attention", "B2 T8 H3 D4", "fwd").flops
    assert fwd == 4 * 2 * 3 * 8**2 * 4 / 2
    assert count("attention", "B2 T8 H3 D4", "full").flops == 3.5 * fwd
    assert count("attention", "B2 T8 H3 D4 Dv12", "fwd").flops == 2 * fwd
    assert count("differential_attention", "B2 T8 H3 D4 Dv4", "fwd").flops == 2 * fwd


@pytest.mark.parametrize("window, pairs", [(1, 7.5), (2, 14), (8, 32), (100, 32)])
def test_a_window_bounds_the_pairs(window: int, pairs: float) -> None:
    assert count("attention", "B1 T8 H1 D4", "fwd", window=window).flops == round(16 * pairs)


def test_products_with_weights() -> None:
    assert count("channel_mix", "B2 T3 D8", "full", form="dense").flops == 3 * 2 * 6 * 64
    assert count("channel_mix", "B2 T3 D8 G4", "fwd", form="grouped").flops == 2 * 6 * 4 * 4
    assert count("channel_mix", "B2 T3 D8", "fwd", form="diagonal").flops == 0
    assert count("linear_cross_entropy", "B2 T3 D8 V11", "full").flops == 3 * 2 * 6 * 8 * 11


def test_recurrences() -> None:
    selective = count("selective_scan", "B2 T3 D4 N5", "full")
    assert (selective.exps, selective.fmas) == (2 * 120, 16 * 120)
    token = 4 * 2 * 3 * 5 + 64 * 2 * (3 + 5)
    assert count("gated_linear_attention", "B2 T7 H2 K3 V5", "fwd").flops == 14 * token
    # the groups' scores are made once for all of their heads
    assert count("ssd", "B1 T7 H4 P3 N5 G2", "fwd").flops == 7 * (4 * 4 * 15 + 64 * (4 * 3 + 2 * 5))
    assert count("gated_delta_rule", "B1 T7 H1 K3 V5", "full").flops == 3.5 * 7 * (6 * 15 + 64 * 19)
    assert count("gated_delta_rule_step", "B2 H1 K3 V5", "step").flops == 2 * 6 * 15


def test_convolutions() -> None:
    assert count("causal_conv1d", "B2 T3 D4 W5", "full").fmas == 3 * 5 * 24
    silu = count("causal_conv1d", "B2 T3 D4 W5", "full", activation="silu")
    assert (silu.fmas, silu.exps) == (4 * 5 * 24, 48)
    assert count("long_conv", "B1 T8 D2", "fwd").fmas == 2 * 3 * 2.5 * 16 * 4 / 2
    step = count("long_conv_step", "B1 T8 D2", "step")
    assert step.fmas == 16
    assert step.bytes == 4 * (7 * 2 + 2 + 2 * 8 + 2 + 2 + 2 + 2 + 7 * 2)


def test_a_cache_is_read_once() -> None:
    work = count("attention_step", "B1 S9 H2 D4", "step")
    assert work.bytes == 4 * (2 * 8 + 2 * 9 * 8)
    assert work.flops == 2 * 2 * 9 * 8
