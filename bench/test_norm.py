"""RMS normalisation, alone and with the residual add, and rotary positions."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

# Bars are read off tensors below 32 MiB. From there glibc maps fresh pages for every call, and a copy into those takes
# 4 to 6 times as long as one into warm memory (33 MB, one thread), whoever computes: no bar is read off such a case.
CASES = (
    *cases(
        "rms_norm",
        "B8 T128 D64 quick",
        "B3 T63 D100",
        "B8 T512 D256 bar compiled",
        "B2 T2048 D1024 bar quick compiled",
        "B2 T2048 D2048",
        "B8 T512 D1024 bfloat16",
    ),
    *cases(
        "add_rms_norm",
        "B8 T128 D64",
        "B3 T63 D100",
        "B8 T512 D256 bar quick compiled",
        "B2 T2048 D1024 bar compiled",
        "B8 T512 D1024 bfloat16",
    ),
    *cases("rotary", "B8 T128 H2 D32", "B3 T63 H3 D60", "B8 T512 H8 D64 bar quick compiled", "B8 T512 H8 D64 bfloat16"),
    *cases("rotary", "B8 T512 H8 D64", interleaved=True),
)


def test_norm(record: Record, case: Case, mode: str) -> None:
    """Measure one norm or rotation."""
    record(case, mode)
