"""What a card's data sheet allows: `python -m bench.roofline` prints the least time of every Triton operator.

The time of an operator is bounded by its bytes over the memory's bandwidth, by its operations over the peak of the
units that do them, and by what it costs to start its kernels. A measured time is judged as a share of the largest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from bench.aot import CASES, launch_count
from bench.cases import Case
from bench.work import Work
from star_kernels import _triton

_LAUNCH_S = 2.5e-6


@dataclass(frozen=True)
class Card:
    """A GPU's data sheet.

    Attributes:
        name: As `torch.cuda.get_device_name` has it, or a part of that.
        bandwidth: Bytes a second.
        matrix: Operations a second of dense matrix products, by dtype.
        vector: Operations a second of the float32 vector units.
    """

    name: str
    bandwidth: float
    matrix: dict[torch.dtype, float]
    vector: float

    @property
    def special(self) -> float:
        """Exponentials a second: a quarter of the lanes of a multiply-add do one."""
        return self.vector / 8


def _matrix(half: float, single: float) -> dict[torch.dtype, float]:
    return {torch.bfloat16: half, torch.float16: half, torch.float32: single}


# NVIDIA's and AMD's data sheets: dense, without sparsity; float32 products in float32, not in TF32.
CARDS = (
    Card("A100", 2.04e12, _matrix(312e12, 19.5e12), 19.5e12),
    Card("H100", 3.35e12, _matrix(989e12, 66.9e12), 66.9e12),
    Card("H200", 4.80e12, _matrix(989e12, 66.9e12), 66.9e12),
    Card("B200", 8.00e12, _matrix(2250e12, 80.0e12), 80.0e12),
    Card("MI300X", 5.30e12, _matrix(1307e12, 163.4e12), 163.4e12),
)


def card_of(device_name: str) -> Card | None:
    """Return the data sheet of a device by the name that torch gives it; None if it is not known."""
    return next((card for card in CARDS if card.name in device_name), None)


def least_seconds(work: Work, dtype: torch.dtype, card: Card, launches: int = 1) -> tuple[float, str]:
    """Return the least time of a call, and what bounds it: "memory", "matrix", "vector" or "launch"."""
    bounds = {
        "memory": work.bytes / card.bandwidth,
        "matrix": work.flops / card.matrix.get(dtype, card.vector),
        "vector": 2 * work.fmas / card.vector + work.exps / card.special,
        "launch": launches * _LAUNCH_S,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return bounds[bound], bound


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the least time of every Triton operator on every card."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=main.__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="(%(default)s)")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    served = _triton.served()
    table = Table(title=f"Least time in microseconds, {options.dtype}, forward and backward (steps: one token)")
    for name in ("operator", "case", "launches", "MB", "GFLOP", *(card.name for card in CARDS)):
        table.add_column(name)
    for case in CASES:
        if case.operator not in served:
            continue
        launches, work = launch_count(Case(case.operator, case.sizes, case.options, dtype))
        times = [least_seconds(work, dtype, card, launches) for card in CARDS]
        cells = (f"{seconds * 1e6:.1f} ({bound})" for seconds, bound in times)
        numbers = str(launches), f"{work.bytes / 1e6:.2f}", f"{work.flops / 1e9:.2f}"
        table.add_row(case.operator, case.name, *numbers, *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
