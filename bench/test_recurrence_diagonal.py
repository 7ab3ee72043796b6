"""Recurrences with a decay for each channel or state: plain, RG-LRU, Mamba-1."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

CASES = (
    *cases(
        "diagonal_scan",
        "B8 T128 D64 quick",
        "B3 T63 D100",
        "B8 T512 D256 bar quick compiled",
        "B1 T2048 D256 bar compiled",
        "B1 T4096 D512",
        "B8 T512 D256 bfloat16",
    ),
    *cases(
        "rg_lru",
        "B8 T128 D64 quick",
        "B3 T63 D100",
        "B8 T512 D256 bar compiled",
        "B1 T2048 D256 bar compiled",
        "B1 T4096 D512",
        "B8 T512 D256 bfloat16",
    ),
    *cases(
        "selective_scan",
        "B8 T128 D128 N16 quick",
        "B8 T128 D128 N2",
        "B2 T63 D100 N16 G2",
        "B4 T512 D128 N16 bar quick compiled",
        "B8 T512 D256 N16 bar compiled",
        "B1 T1024 D1536 N16 bar compiled",
        "B8 T512 D256 N16 bfloat16",
    ),
)


def test_recurrence_diagonal(record: Record, case: Case, mode: str) -> None:
    """Measure one diagonal recurrence."""
    record(case, mode)
