"""Long causal convolutions with a filter as long as the sequence."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

CASES = (
    *cases(
        "long_conv",
        "B8 T128 D64 quick",
        "B3 T63 D60",
        "B2 T1026 D100",
        "B8 T512 D256 bar quick",
        "B1 T4096 D256 bar compiled",
        "B8 T512 D256 bfloat16",
    ),
)


def test_long_conv(record: Record, case: Case, mode: str) -> None:
    """Measure one long convolution."""
    record(case, mode)
