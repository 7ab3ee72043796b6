"""Fuzz the compiled operators: random shapes, strides, packings and values against plain torch in float64.

    python -m tests.fuzz --seconds 600                                  the libraries that are installed
    python -m tests.fuzz --seconds 600 --libraries build/sanitize/lib   another build, such as one with sanitizers

Each instruction set that the processor runs gets its share of the time, in a process of its own. A build with
AddressSanitizer gets the runtime that it needs loaded first; `make fuzz` makes one and fuzzes it. The first failure or
crash ends the run with its seed and with the command that repeats it. The last line says how much was called.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("avx512", "avx2", "neon", "plain")


def runnable(folder: Path) -> list[str]:
    """List the libraries of the folder that this processor runs."""
    capability = torch.backends.cpu.get_cpu_capability()
    wide = {"avx512": "AVX512" in capability, "avx2": "AVX2" in capability or "AVX512" in capability}
    return [isa for isa in ISAS if wide.get(isa, True) and (folder / f"star_{isa}.so").exists()]


def environment(library: Path) -> dict[str, str]:
    """Return the environment of a worker on this library."""
    paths = [str(ROOT / "kernels"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "STAR_KERNELS_LIBRARIES": str(library.parent),
        "STAR_KERNELS_ISA": library.stem.removeprefix("star_"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
        # Python itself leaks; what the operators may leak are tensors, which the allocator frees with their handles.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    if b"__asan_init" in library.read_bytes():
        compiler = os.environ.get("CXX", "c++")
        found = [
            subprocess.run(
                [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")
        ]
        variables["LD_PRELOAD"] = " ".join(found)
    return {**os.environ, **variables}


def fuzz(library: Path, seconds: float, first: int, operator: str | None) -> tuple[int, set[str]] | None:
    """Run a worker; return how many calls it made and of which operators, or None when it failed or crashed."""
    command = [sys.executable, "-m", "tests.fuzz.worker", f"--seconds={seconds}", f"--first={first}"]
    if operator:
        command.append(f"--operator={operator}")
    last, seed = "", first
    with subprocess.Popen(command, env=environment(library), cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            last = line.strip()
            seed = int(last.removeprefix("seed ")) if last.startswith("seed ") else seed
    if worker.returncode == 0:
        _, calls, *operators = last.split()
        return int(calls), set(operators)
    only = f" --operator {operator}" if operator else ""
    isa = library.stem.removeprefix("star_")
    print(
        f"FAILED: seed {seed} on {isa} (exit status {worker.returncode}); again:\n"
        f"  python -m tests.fuzz --libraries {library.parent} --isa {isa} --seed {seed} --seconds 0{only}"
    )
    return None


def main() -> int:
    """Fuzz every instruction set; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="time for all; 0 runs one call each")
    parser.add_argument(
        "--libraries", type=Path, default=ROOT / "kernels" / "star_kernels" / "_lib", help="folder of the libraries"
    )
    parser.add_argument("--isa", choices=ISAS, help="this instruction set alone")
    parser.add_argument("--operator", help="this operator alone")
    parser.add_argument("--seed", type=int, help="first seed; the time of day otherwise")
    arguments = parser.parse_args()
    folder = arguments.libraries.resolve()
    isas = [arguments.isa] if arguments.isa else runnable(folder)
    if not isas or not (folder / f"star_{isas[0]}.so").exists():
        print(f"{folder} holds no library that this processor runs")
        return 2
    first = int(time.time()) * 1000 if arguments.seed is None else arguments.seed
    start, calls, operators = time.monotonic(), 0, set[str]()
    for isa in isas:
        print(f"{isa}: {arguments.seconds / len(isas):.0f} s from seed {first}", flush=True)
        ended = fuzz(folder / f"star_{isa}.so", arguments.seconds / len(isas), first, arguments.operator)
        if ended is None:
            return 1
        calls, operators = calls + ended[0], operators | ended[1]
    seconds = time.monotonic() - start
    print(f"{calls} calls of {len(operators)} operators in {seconds:.0f} s on {', '.join(isas)}: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
