"""Gated memoryless units and channel mixing."""

from __future__ import annotations

from bench.cases import Case, cases
from bench.suite import Record

# Bars are read off tensors below 32 MiB. From there glibc maps fresh pages for every call, and a copy into those takes
# 4 to 6 times as long as one into warm memory (33 MB, one thread), whoever computes: no bar is read off such a case.
CASES = (
    *cases(
        "swiglu",
        "B8 T128 D128 quick",
        "B3 T63 D130",
        "B8 T512 D512 bar compiled",
        "B8 T512 D1024 bar quick compiled",
        "B8 T512 D2048",
        "B8 T512 D2048 bfloat16",
    ),
    *cases("geglu", "B8 T128 D128 quick", "B3 T63 D130", "B8 T512 D1024 bar compiled", "B8 T512 D2048 bfloat16"),
    *cases("reglu", "B8 T128 D128 quick", "B3 T63 D130", "B8 T512 D1024 bar compiled", "B8 T512 D2048 bfloat16"),
    *cases("channel_mix", "B8 T128 D64", "B8 T512 D1024 quick", form="diagonal"),
    *cases("channel_mix", "B8 T128 D64 G4", "B3 T63 D130 G10", "B8 T512 D1024 G16 quick", form="grouped"),
    *cases("channel_mix", "B8 T128 D64", "B3 T63 D130", "B8 T512 D512", form="dense"),
)


def test_memoryless(record: Record, case: Case, mode: str) -> None:
    """Measure one gated unit or channel mixing."""
    record(case, mode)
