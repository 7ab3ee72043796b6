"""RMS normalisation, alone and with the residual add, and rotary positions."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

CASES = (
    *cases(
        "rms_norm",
        "B8 T128 D64 quick",
        "B3 T63 D100",
        "B8 T512 D256 bar",
        "B2 T2048 D2048 bar quick compiled",
        "B8 T512 D1024 bfloat16",
    ),
    *cases(
        "add_rms_norm",
        "B8 T128 D64",
        "B3 T63 D100",
        "B8 T512 D256 bar quick",
        "B2 T2048 D2048 bar compiled",
        "B8 T512 D1024 bfloat16",
    ),
    *cases("rotary", "B8 T128 H2 D32", "B3 T63 H3 D60", "B8 T512 H8 D64 bar quick compiled", "B8 T512 H8 D64 bfloat16"),
    *cases("rotary", "B8 T512 H8 D64", interleaved=True),
)


def test_norm(record: Record, case: Case, mode: str) -> None:
    """Measure one norm or rotation."""
    record(case, mode)
