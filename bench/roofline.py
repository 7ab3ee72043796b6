"""What a card's data sheet allows: `python -m bench.roofline` prints the least time of every Triton operator.

The time of an operator is bounded by its bytes over the memory's bandwidth, by its operations over the peak of the
units that do them, and by what it costs to start its kernels. A measured time is judged as a share of the largest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from bench.aot import CASES, launch_count
from bench.cards import CARDS, least_seconds
from bench.cases import Case
from star_kernels import _triton


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
