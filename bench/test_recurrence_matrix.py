"""Recurrences whose state is a matrix: Mamba-2, gated linear attention, the gated delta rule."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

CASES = (
    *cases(
        "ssd",
        "B8 T128 H2 P64 N16 quick",
        "B2 T129 H6 P60 N20 G2",
        "B8 T512 H8 P64 N64",
        "B1 T2048 H8 P64 N64 bar quick compiled",
        "B1 T2048 H16 P64 N128 bar compiled",
        "B1 T2048 H16 P64 N128 bfloat16",
    ),
    *cases(
        "gated_linear_attention",
        "B8 T128 H2 K32 V32 quick",
        "B2 T129 H3 K60 V36",
        "B8 T512 H4 K64 V64",
        "B1 T2048 H8 K64 V128 bar compiled",
        "B1 T2048 H8 K64 V128 bfloat16",
    ),
    *cases(
        "gated_delta_rule",
        "B8 T128 H2 K32 V32 quick",
        "B2 T129 H3 K60 V36",
        "B8 T512 H4 K64 V64",
        "B1 T2048 H8 K64 V128 bar compiled",
        "B1 T2048 H8 K64 V128 bfloat16",
    ),
)


def test_recurrence_matrix(record: Record, case: Case, mode: str) -> None:
    """Measure one recurrence with a matrix for its state."""
    record(case, mode)
