"""Short causal convolutions, plain and gated."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

CASES = (
    *cases("causal_conv1d", "B8 T128 D64 W4", "B3 T63 D100 W7", "B1 T4099 D130 W2", "B8 T512 D512 W4 bar compiled"),
    *cases(
        "causal_conv1d",
        "B8 T128 D128 W4 quick",
        "B8 T256 D1024 W4 bar quick compiled",
        "B8 T512 D1024 W4 bar compiled",
        "B8 T512 D1024 W4 bfloat16",
        activation="silu",
    ),
    *cases(
        "gated_short_conv",
        "B8 T128 D64 W3 quick",
        "B3 T63 D100 W7",
        "B1 T4099 D130 W3",
        "B8 T512 D256 W3 bar compiled",
        "B8 T512 D512 W3 bar quick compiled",
        "B8 T512 D1024 W3",
        "B8 T512 D1024 W3 bfloat16",
    ),
)


def test_short_conv(record: Record, case: Case, mode: str) -> None:
    """Measure one short convolution."""
    record(case, mode)
