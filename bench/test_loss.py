"""The cross entropy of a linear layer, whose logits are never held."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

CASES = (
    *cases(
        "linear_cross_entropy",
        "B8 T128 D64 V256 quick",
        "B3 T63 D100 V7",
        "B8 T512 D128 V8192 bar quick compiled",
        "B4 T1024 D256 V50257 bar",
        "B8 T512 D128 V8192 bfloat16",
    ),
)


def test_loss(record: Record, case: Case, mode: str) -> None:
    """Measure one loss."""
    record(case, mode)
