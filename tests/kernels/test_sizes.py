"""Every operator at the lengths and widths that have broken others, in float32 and bfloat16, against plain torch in
float64: outputs and gradients, over the memory layouts, packings and values that the fuzzer draws."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from star_kernels import _native
from tests.fuzz.calls import CALLS
from tests.fuzz.check import check_example, lay_out
from tests.fuzz.draw import Draw

LENGTHS = (1, 2, 3, 63, 64, 65, 129)
LONG = (1026, 4099)
WIDTHS = (1, 7, 60, 100, 130)
TAPS = range(1, 8)
QUADRATIC = ("attention", "differential_attention")
TIMED = (
    *QUADRATIC, "causal_conv1d", "gated_short_conv", "long_conv", "diagonal_scan", "rg_lru", "selective_scan", "ssd",
    "gated_linear_attention", "gated_delta_rule", "rotary",
)  # fmt: skip
BACKEND = _native.BACKEND if _native.available() else "reference"


class Sized(Draw):
    """A source of inputs of one length and width."""

    def __init__(self, seed: int, length: int, width: int, taps: int) -> None:
        super().__init__(seed)
        self.sizes = length, width, taps

    def length(self) -> int:
        return self.sizes[0]

    def width(self, most: int = 130) -> int:
        del most
        return self.sizes[1]

    def taps(self) -> int:
        return self.sizes[2]

    def batch_and_length(self, most_tokens: int = 600) -> tuple[int, int]:
        del most_tokens
        return (2 if self.sizes[0] < 10 else 1), self.sizes[0]


def check(operator: str, seed: int, length: int, width: int, taps: int = 4) -> None:
    torch.set_num_threads(1)  # two that wait for one another on busy cores take ten times as long
    draw = Sized(seed, length, width, taps)
    example = lay_out(CALLS[operator](draw, False), draw)
    check_example(example, BACKEND, compare=True, again=False)


@pytest.mark.parametrize("operator", CALLS)
def test_lengths_and_widths(operator: str) -> None:
    """Every length with one width, every width with one length at least."""
    if operator in TIMED:
        for seed, length in enumerate(LENGTHS):
            check(operator, seed, length, WIDTHS[seed % 5], TAPS[seed])
    else:
        for seed, width in enumerate(WIDTHS):
            check(operator, seed, 3, width, TAPS[seed])


@pytest.mark.parametrize("operator", [one for one in CALLS if one in TIMED])
def test_many_tokens(operator: str) -> None:
    for seed, length in enumerate(LONG[:1] if operator in QUADRATIC else LONG):
        check(operator, seed, length, 7)


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("operator", ["causal_conv1d", "gated_short_conv"])
def test_chunks_shorter_than_the_state(operator: str, taps: int) -> None:
    for seed, (length, width) in enumerate(product((1, 2, 3, 5), (1, 60, 130))):
        check(operator, seed, length, width, taps)
