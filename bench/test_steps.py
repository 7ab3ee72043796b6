"""One token of every operator with a state, at batch 1 and at the smallest size, where the call itself is the cost."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

CASES = (
    *cases(
        "attention_step",
        "B1 S2 H1 D16 overhead quick",
        "B1 S512 H8 D32 bar quick",
        "B1 S4096 H8 Hk2 D64 bar",
        "B8 S127 H3 D60",
    ),
    *cases("attention_step", "B1 S4096 H8 D64", window=128),
    *cases("causal_conv1d_step", "B1 D16 W4 overhead quick", "B1 D512 W4 bar quick", "B8 D100 W7", activation="silu"),
    *cases("gated_short_conv_step", "B1 D16 W3 overhead quick", "B1 D256 W3 bar quick", "B8 D100 W7"),
    *cases("long_conv_step", "B1 T4 D16 overhead quick", "B1 T512 D256 bar quick", "B1 T4096 D256 bar", "B8 T127 D100"),
    *cases("diagonal_scan_step", "B1 D16 overhead quick", "B1 D512 bar quick", "B8 D100"),
    *cases("rg_lru_step", "B1 D16 overhead quick", "B1 D512 bar quick", "B8 D100"),
    *cases(
        "selective_scan_step",
        "B1 D16 N2 overhead quick",
        "B1 D512 N16 bar quick",
        "B1 D1536 N16 bar compiled",
        "B8 D100 N16 G2",
    ),
    *cases("ssd_step", "B1 H1 P16 N4 overhead quick", "B1 H16 P64 N128 bar quick", "B8 H6 P60 N20 G2"),
    *cases(
        "gated_linear_attention_step",
        "B1 H1 K8 V8 overhead quick",
        "B1 H8 K64 V128 bar quick",
        "B8 H3 K60 V36",
    ),
    *cases("gated_delta_rule_step", "B1 H1 K8 V8 overhead quick", "B1 H8 K64 V128 bar quick", "B8 H3 K60 V36"),
)


def test_steps(record: Record, case: Case, mode: str) -> None:
    """Measure one step."""
    record(case, mode)
