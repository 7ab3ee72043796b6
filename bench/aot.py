"""Compile every Triton kernel for GPUs that are not here: `python -m bench.aot` writes what each will cost them.

Every operator is called as training and decoding call it, with CPU tensors in place of a GPU's; what its host code
would launch is compiled for each target instead, and the binary is read: registers, spills, shared memory, occupancy,
how many loads are 128 bits wide, which matrix instructions there are. The table of the default configurations is
committed (`bench/results/aot.json`), and the tests hold a new compilation against it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import star_kernels
from bench.binaries import TARGETS, Binary, Target, compile_for, identity
from bench.cards import card_of, least_seconds
from bench.cases import Case, build, cases
from bench.work import Work, differentiated, work_of
from star_kernels import _triton

COMMITTED = Path(__file__).parent / "results" / "aot.json"
DTYPES = ("bfloat16", "float32")

CASES: tuple[Case, ...] = (
    *cases("attention", "B2 T2048 H8 Hk2 D64", "B2 T2048 H8 D128"),
    *cases("attention", "B2 T2048 H8 D64", window=128),
    *cases("attention_step", "B1 S4096 H8 Hk2 D64"),
    *cases("differential_attention", "B2 T2048 H4 D64 Dv128"),
    *cases("causal_conv1d", "B2 T2048 D1024 W4", activation="silu"),
    *cases("causal_conv1d_step", "B1 D1024 W4", activation="silu"),
    *cases("gated_short_conv", "B2 T2048 D1024 W3"),
    *cases("gated_short_conv_step", "B1 D1024 W3"),
    *cases("long_conv", "B2 T2048 D1024"),
    *cases("long_conv_step", "B1 T2048 D1024"),
    *cases("diagonal_scan", "B2 T2048 D1024"),
    *cases("diagonal_scan_step", "B1 D1024"),
    *cases("rg_lru", "B2 T2048 D1024"),
    *cases("rg_lru_step", "B1 D1024"),
    *cases("selective_scan", "B2 T2048 D1024 N16"),
    *cases("selective_scan_step", "B1 D1024 N16"),
    *cases("ssd", "B2 T2048 H16 P64 N128"),
    *cases("ssd_step", "B1 H16 P64 N128"),
    *cases("gated_linear_attention", "B2 T2048 H8 K64 V128"),
    *cases("gated_linear_attention_step", "B1 H8 K64 V128"),
    *cases("gated_delta_rule", "B2 T2048 H8 K64 V128"),
    *cases("gated_delta_rule_step", "B1 H8 K64 V128"),
    *cases("swiglu", "B2 T2048 D4096"),
    *cases("geglu", "B2 T2048 D4096"),
    *cases("reglu", "B2 T2048 D4096"),
    *cases("channel_mix", "B2 T2048 D1024", form="diagonal"),
    *cases("rms_norm", "B2 T2048 D1024", "B2 T256 D16384"),
    *cases("add_rms_norm", "B2 T2048 D1024"),
    *cases("rotary", "B2 T2048 H16 D64"),
    *cases("linear_cross_entropy", "B2 T2048 D1024 V32768"),
)
"""The default configurations: every operator at a size that GPUs run."""

EXTREMES: tuple[Case, ...] = (
    *cases("attention", "B1 T512 H2 D16", "B1 T512 H2 D32", "B1 T512 H2 D256", "B1 T512 H2 D96 Dv192"),
    *cases("attention", "B1 T512 H2 D64", softcap=30.0),
    *cases("differential_attention", "B1 T512 H2 D128 Dv256", "B1 T512 H2 D32 Dv64"),
    *cases("causal_conv1d", "B1 T512 D96 W2", "B1 T512 D96 W7"),
    *cases("selective_scan", "B1 T512 D96 N2 G2", "B1 T512 D256 N64"),
    *cases("ssd", "B1 T512 H2 P32 N16", "B1 T512 H4 P128 N256 G2"),
    *cases("gated_linear_attention", "B1 T512 H2 K16 V16", "B1 T512 H2 K128 V256"),
    *cases("gated_delta_rule", "B1 T512 H2 K16 V16", "B1 T512 H2 K128 V256"),
    *cases("rms_norm", "B1 T512 D100", "B1 T512 D8192"),
    *cases("rotary", "B1 T512 H2 D256"),
)
"""Sizes whose configurations differ most from the defaults."""

_ALL = (*CASES, *EXTREMES)
_COLUMNS = (
    "operator", "case", "kernel", "target", "warps", "registers", "spills", "shared", "occupancy", "loads", "bytes",
    "bound", "matrix",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One kernel on one target.

    Attributes:
        operator: The public operator that starts it.
        case: Its sizes.
        dtype: Of the activations.
        kernel: The kernel's name.
        target: The GPU's name.
        num_warps: Warps of a program.
        num_stages: Stages of pipelining.
        programs: Programs that the case starts.
        traffic: Bytes of the tensors it is given, over the bytes that the whole operator has to move.
        bound: What bounds the whole operator at this size by the card's data sheet: "memory", "matrix" or "vector".
        binary: What was read off the binary.
    """

    operator: str
    case: str
    dtype: str
    kernel: str
    target: str
    num_warps: int
    num_stages: int
    programs: int
    traffic: float
    bound: str
    binary: Binary


def launches_of(case: Case, target: Target) -> tuple[list[tuple[_triton.Launch, float]], Work]:
    """Return a case's work, and what it launches on a target, forward and backward: each kernel once, and traffic."""
    launches, work = _record(case, target.gpu)
    distinct = {identity(one): one for one in launches}
    return [(one, _bytes(one) / work.bytes) for one in distinct.values()], work


def launch_count(case: Case) -> tuple[int, Work]:
    """Return how many kernels of ours a case starts, forward and backward, and what it has to do."""
    launches, work = _record(case, TARGETS[1].gpu)
    return len(launches), work


def _record(case: Case, gpu: _triton.Gpu) -> tuple[list[_triton.Launch], Work]:
    inputs = build(case)
    step = case.operator.endswith("_step")
    with _triton.recording(gpu) as launches, torch.set_grad_enabled(not step):
        if not step:
            for name in inputs.leaves:
                inputs.args[name].requires_grad_()
        made = getattr(star_kernels, case.operator)(**inputs.args, **inputs.options, backend="triton")
        outputs = list(made) if isinstance(made, tuple) else [made]
        if not step:
            wanted = differentiated(case.operator, outputs)
            torch.autograd.grad(wanted, [inputs.args[name] for name in inputs.leaves], [one.detach() for one in wanted])
    return launches, work_of(case, "step" if step else "full", inputs, [one.detach() for one in outputs])


def _bytes(launch: _triton.Launch) -> int:
    tensors = {one.data_ptr(): one for one in launch.arguments.values() if isinstance(one, torch.Tensor)}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def compile_case(case: Case, targets: Sequence[Target]) -> list[Row]:
    """Compile every kernel of a case for every target."""
    dtype = str(case.dtype).removeprefix("torch.")
    rows = []
    for target in targets:
        launches, work = launches_of(case, target)
        card = card_of(target.card)
        assert card is not None
        _, bound = least_seconds(work, case.dtype, card, launches=0)
        rows += [
            Row(
                operator=case.operator,
                case=case.name,
                dtype=dtype,
                kernel=launch.kernel.__name__,
                target=target.name,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                programs=math.prod(launch.grid),
                traffic=round(traffic, 3),
                bound=bound,
                binary=compile_for(launch, target),
            )
            for launch, traffic in launches
        ]
    return rows


def grid_of(chosen: Iterable[Case], dtypes: Iterable[str] = DTYPES) -> list[tuple[int, str]]:
    """Return the cases whose operator has Triton kernels, in each dtype: their numbers, and the dtypes."""
    served = _triton.served()
    numbers = [number for number, case in enumerate(_ALL) if case in chosen and case.operator in served]
    return [(number, dtype) for number in numbers for dtype in dtypes]


def compile_all(grid: Sequence[tuple[int, str]], targets: Sequence[Target], jobs: int) -> Iterator[list[Row]]:
    """Compile cases, some at a time, in their order."""
    work = partial(_compile_number, targets=targets)
    if jobs == 1:
        yield from map(work, grid)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(work, grid)


def _compile_number(place: tuple[int, str], targets: Sequence[Target]) -> list[Row]:
    """Compile one case; a case itself has no form that goes from process to process."""
    case = _ALL[place[0]]
    return compile_case(Case(case.operator, case.sizes, case.options, getattr(torch, place[1])), targets)


def read(path: Path) -> list[Row]:
    """Read a table that `write` wrote."""
    return [Row(**{**row, "binary": Binary(**row["binary"])}) for row in json.loads(path.read_text())["rows"]]


def version(path: Path) -> str:
    """Return the version of Triton that a table was made with."""
    made: str = json.loads(path.read_text())["triton"]
    return made


def write(rows: Sequence[Row], path: Path) -> None:
    """Write a table, a row a line, so that a change shows as the rows that changed."""
    import triton

    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


def merged(new: Sequence[Row], old: Sequence[Row]) -> list[Row]:
    """Return the old table with the new rows in the places of those of their case, dtype and target; others last."""

    def group(row: Row) -> tuple[str, ...]:
        return row.operator, row.case, row.dtype, row.target

    groups: dict[tuple[str, ...], list[Row]] = {group(row): [] for row in (*old, *new)}
    renewed = {group(row) for row in new}
    for row in (*(row for row in old if group(row) not in renewed), *new):
        groups[group(row)].append(row)
    return [row for rows in groups.values() for row in rows]


def regressions(new: Iterable[Row], old: Iterable[Row]) -> list[str]:
    """Say what became worse: spills, a tenth more registers or shared memory, lost wide loads, other instructions."""
    # A kernel may be compiled more than once for a case, such as forward and backward in time: in the same order.
    known: dict[tuple[Any, ...], list[Binary]] = {}
    for row in old:
        known.setdefault(_key(row), []).append(row.binary)
    found = []
    for row in new:
        same = known.get(_key(row))
        before, now = same.pop(0) if same else None, row.binary
        label = f"{row.kernel} of {row.operator} {row.case} on {row.target}"
        if now.spill_bytes > (before.spill_bytes if before else 0):
            found.append(f"{label}: spills {now.spill_bytes} bytes")
        if before is None:
            continue
        for name in ("registers", "shared_bytes"):
            if getattr(now, name) > 1.1 * getattr(before, name) + 8:
                found.append(f"{label}: {name} {getattr(before, name)} to {getattr(now, name)}")
        if is_wide(before) and not is_wide(now):
            found.append(f"{label}: {now.wide_bytes} of {now.load_bytes} bytes by loads of 128 bits, a smaller part")
        if now.matrix != before.matrix:
            found.append(f"{label}: matrix instructions {before.matrix or 'none'} to {now.matrix or 'none'}")
    return found


def is_wide(binary: Binary) -> bool:
    """Return whether a kernel loads the greater part of its bytes 128 bits a thread at a time."""
    return 2 * binary.wide_bytes > binary.load_bytes


def _key(row: Row) -> tuple[Any, ...]:
    return row.operator, row.case, row.kernel, row.target, row.num_warps, row.num_stages


def _show(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="Triton kernels, compiled ahead of time")
    for name in _COLUMNS:
        table.add_column(name)
    for row in rows:
        one = row.binary
        numbers = row.num_warps, one.registers, one.spill_bytes, one.shared_bytes, f"{one.occupancy} %"
        loads = f"{one.wide_loads} of {one.loads} wide"
        share = f"{100 * one.wide_bytes // max(one.load_bytes, 1)} % wide"
        table.add_row(
            row.operator, row.case, row.kernel, row.target, *map(str, numbers), loads, share, row.bound, one.matrix
        )  # fmt: skip
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and write the table; return 1 where something became worse than the committed one."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=main.__doc__)
    parser.add_argument("--extremes", action="store_true", help="the unusual sizes too, which are not written")
    parser.add_argument("--operator", action="append", help="this operator alone (may be repeated)")
    parser.add_argument("--target", action="append", choices=[one.name for one in TARGETS], help="this GPU alone")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="this dtype alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--write", action="store_true", help=f"replace what was compiled in {COMMITTED.name}")
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if not options.operator or case.operator in options.operator]
    extremes = [case for case in EXTREMES if not options.operator or case.operator in options.operator]
    targets = [one for one in TARGETS if not options.target or one.name in options.target]
    dtypes = options.dtype or DTYPES
    rows, others = (
        [row for found in compile_all(grid_of(some, dtypes), targets, options.jobs) for row in found]
        for some in (chosen, extremes if options.extremes else [])
    )
    console = Console(width=None if sys.stdout.isatty() else 200)
    _show(rows + others, console)
    worse = regressions(rows, read(COMMITTED) if COMMITTED.exists() and not options.write else ())
    for line in worse:
        console.print(line)
    if options.write:
        whole = not (options.operator or options.target or options.dtype)
        write(rows if whole else merged(rows, read(COMMITTED)), COMMITTED)
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
