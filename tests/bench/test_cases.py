"""Grids of cases, and the inputs that they stand for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bench
import star_kernels
from bench.cases import Case, build, cases


def every_case() -> Iterator[Case]:
    for path in sorted(Path(bench.__file__).parent.glob("test_*.py")):
        yield from importlib.import_module(f"bench.{path.stem}").CASES


def test_a_line_holds_sizes_flags_and_a_dtype() -> None:
    (case,) = cases("attention", "B2 T8 bar H4 quick bfloat16 Hk2 D16", window=3)
    assert dict(case.sizes) == {"B": 2, "T": 8, "H": 4, "Hk": 2, "D": 16}
    assert case.flags == {"bar", "quick"}
    assert case.dtype == torch.bfloat16
    assert case.name == "B2-T8-H4-Hk2-D16-window=3-bfloat16"
    assert case.modes == ("fwd", "full")
    assert cases("ssd_step", "B1 H1 P4 N4")[0].modes == ("step",)


@pytest.mark.parametrize("line", ["B2 T8 quik", "B2 B3", "B2 7", "B T2"])
def test_a_word_that_means_nothing_is_named(line: str) -> None:
    with pytest.raises(ValueError, match=f"lines: '{line}' of ssd has .*needs an axis and its length"):
        cases("ssd", line)


def test_an_operator_without_inputs_is_named() -> None:
    with pytest.raises(ValueError, match="operator: 'softmax' has no inputs, needs one of add_rms_norm, attention"):
        build(cases("softmax", "B2")[0])


def test_inputs_are_the_same_each_time_and_states_stay_wide() -> None:
    case = cases("ssd_step", "B2 H2 P4 N3 bfloat16")[0]
    one, other = build(case), build(case)
    assert all(torch.equal(one.args[name], other.args[name]) for name in one.args)
    assert one.args["state"].dtype == torch.float32
    assert one.args["state"].shape == (2, 2, 4, 3)
    assert one.args["x"].dtype == torch.bfloat16
    assert one.first is one.args["x"]
    assert "state" not in one.leaves


def test_the_grids_hold_every_operator_with_small_odd_and_large_sizes() -> None:
    found = list(every_case())
    assert {case.operator for case in found} == set(star_kernels.__all__) - {"backends", "which"}
    for operator in {case.operator for case in found}:
        own = [case for case in found if case.operator == operator]
        assert any("quick" in case.flags for case in own), operator
        elements = [build(case).first.numel() for case in own if case.dtype == torch.float32]
        assert max(elements) >= 8 * min(elements), operator
        assert len({case.name for case in own}) == len(own), operator
    assert all(case.dtype == torch.float32 for case in found if case.flags & {"bar", "overhead"})
