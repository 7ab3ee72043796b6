"""The fuzzing itself, for moments: every public operator can be drawn, and a planted error is found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import _native, dispatch
from tests.fuzz import check
from tests.fuzz.calls import CALLS
from tests.fuzz.check import check_seed
from tests.fuzz.draw import Draw

BACKEND = _native.BACKEND if _native.available() else "reference"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Examples choose their own number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_public_operator_is_drawn() -> None:
    assert set(CALLS) == set(dispatch._operators)


@pytest.mark.parametrize("operator", CALLS)
def test_some_calls(operator: str) -> None:
    for seed in range(8):
        check_seed(seed, [operator], BACKEND)


def test_the_same_seed_draws_the_same_example() -> None:
    first, second = (check.lay_out(CALLS["ssd"](draw, False), draw) for draw in (Draw(5), Draw(5)))
    assert str(first) == str(second)
    assert all(torch.equal(one, second.leaves[name]) for name, one in first.leaves.items())


@pytest.mark.parametrize("wrong", ["value", "nan", "input"])
def test_a_planted_error_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.run

    def run(operator: str, tensors: dict[str, Tensor], options: dict[str, Any], backend: str = "reference") -> Any:
        outputs = real(operator, tensors, options)
        if backend == "planted":
            victim = tensors["gate"] if wrong == "input" else outputs[0]
            victim[2, 4] = float("nan") if wrong == "nan" else 1e3
        return outputs

    monkeypatch.setattr(check, "run", run)
    leaves = {name: torch.linspace(-1, 1, 15).view(3, 5) for name in ("gate", "up")}
    message = "the buffer of gate was written to" if wrong == "input" else "output 0: error"
    with pytest.raises(AssertionError, match=message):
        check.check_example(check.Example("swiglu", leaves, {}, [None]), "planted", compare=True, again=False)
