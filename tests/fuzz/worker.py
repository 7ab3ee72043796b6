"""Run random calls until the time is up, naming each seed before it runs: a crash leaves the last name behind."""

from __future__ import annotations

import argparse
import time

import torch

import star_kernels
from star_kernels import _native
from tests.fuzz.calls import CALLS
from tests.fuzz.check import check_seed


def served(backend: str) -> list[str]:
    """List the operators that the backend implements."""
    names = []
    for name in CALLS:
        try:
            star_kernels.dispatch._operators[name].resolve("cpu", torch.float32, backend)
        except ValueError:
            continue
        names.append(name)
    return names


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, required=True, help="the first seed; the next ones follow")
    parser.add_argument("--seconds", type=float, required=True, help="time to go on for; 0 runs the first seed alone")
    parser.add_argument("--operator", help="this one alone")
    arguments = parser.parse_args()
    if not _native.available():
        raise SystemExit(f"no compiled operators: {_native.reason()}")
    _native.set_nan_fill(True)
    operators = [arguments.operator] if arguments.operator else served(_native.BACKEND)
    print("operators", _native.isa(), *operators, flush=True)
    end, seed, called = time.monotonic() + arguments.seconds, arguments.first, set[str]()
    while True:
        print("seed", seed, flush=True)
        called.add(check_seed(seed, operators, _native.BACKEND))
        seed += 1
        if time.monotonic() >= end:
            break
    print("done", seed - arguments.first, *sorted(called), flush=True)


if __name__ == "__main__":
    main()
