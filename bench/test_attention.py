"""Softmax attention: full, grouped, windowed, capped, with sinks, differential."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

CASES = (
    *cases(
        "attention",
        "B8 T128 H2 D32 quick",
        "B3 T63 H3 D60",
        "B2 T1026 H4 D64",
        "B4 T512 H8 Hk2 D64",
        "B2 T512 H4 D64 Dv128",
        "B1 T2048 H8 D64 bar quick",
        "B1 T2048 H8 D128 bar compiled",
        "B1 T2048 H8 D64 bfloat16",
    ),
    *cases("attention", "B8 T512 H4 D64", "B1 T2048 H4 D64 compiled", "B1 T4096 H4 D64 bar quick", window=128),
    *cases("attention", "B2 T512 H4 D64", softcap=50.0),
    *cases("attention", "B2 T512 H4 D64", with_sinks=True),
    *cases(
        "differential_attention",
        "B8 T128 H2 D32 Dv64 quick",
        "B2 T129 H3 D60 Dv120",
        "B1 T1024 H4 D64 Dv128 bar quick",
        "B1 T2048 H4 D64 Dv128 bar",
        "B1 T1024 H4 D64 Dv128 bfloat16",
    ),
)


def test_attention(record: Record, case: Case, mode: str) -> None:
    """Measure one attention."""
    record(case, mode)
