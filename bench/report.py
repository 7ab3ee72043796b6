"""Read a run of `pytest bench/`: print its tables, write them as Markdown, and draw the summary figure.

    python -m bench.report bench/results/latest.json [--rows] [--markdown PATH] [--figure PATH]

Ratios are the other's time over ours: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from rich.console import Console
from rich.table import Table

from bench.bars import Verdict, by_case, judge
from bench.figure import Dot, draw
from bench.results import REFERENCE, STAR, Results, Row, read_results

# Half a core's worth of other work, and what sampling alone does not explain.
_BUSY_LOAD = 0.5
_IMPOSSIBLE_PERCENT = 125

# Three times what makes the suite measure a case again, and so kept only where three tries were no calmer.
_DISTURBED_PERCENT = 15


@dataclass(frozen=True)
class Grid:
    """A table of text, however it is shown.

    Attributes:
        title: Above it.
        head: Names of the columns; one that ends in ">" holds numbers.
        lines: Cells.
    """

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n", 1)[0])
    parser.add_argument("results", type=Path, help="what `pytest bench/` stored")
    parser.add_argument("--rows", action="store_true", help="print every case too")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="default: beside the results")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="default: beside the results")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    markdown: Path = options.markdown or options.results.with_suffix(".md")
    figure: Path = options.figure or options.results.with_suffix(".svg")
    console = Console()
    console.print(describe(results), highlight=False, markup=False)
    if doubts(results):
        console.print(doubts(results), style="yellow", highlight=False, markup=False)
    for grid in [summary(results), bars(results), *([all_rows(results)] if options.rows else []), absent(results)]:
        if grid.lines:
            console.print(as_rich(grid))
    for path in (markdown, figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    markdown.write_text(as_markdown(results))
    figure.write_text(as_figure(results))
    console.print(f"{markdown}\n{figure}", highlight=False, markup=False)
    return 0


def describe(results: Results) -> str:
    """Say what the numbers were measured with."""
    first = results.rows[0] if results.rows else None
    threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}" if first else ""
    kind = "quick run" if results.quick else "full run"
    machine = results.machine
    return (
        f"{machine['processor']} ({machine['torch_capability']}), {threads}, {first.versions if first else ''}, "
        f"{kind} of {results.date}"
    )


def doubts(results: Results) -> str:
    """Say what speaks against the numbers: other work on the machine, or calls faster than their ceilings; or nothing.

    On a busy machine the shortest calls suffer most, ceilings included: two threads wait for one another on one core.
    """
    found = []
    if results.load >= _BUSY_LOAD:
        found.append(f"the load average was {results.load:.1f} before it began")
    above = sum(row.provider == STAR and row.percent_of_ceiling > _IMPOSSIBLE_PERCENT for row in results.rows)
    if above:
        found.append(f"{above} of our rows exceed their ceiling by more than {_IMPOSSIBLE_PERCENT - 100} %")
    disturbed = sum(row.provider == STAR and (row.others_percent or 0.0) > _DISTURBED_PERCENT for row in results.rows)
    if disturbed:
        found.append(f"in {disturbed} cases others took more than {_DISTURBED_PERCENT} % of the processors")
    return f"Not to be trusted: {'; '.join(found)}." if found else ""


def summary(results: Results) -> Grid:
    """Give one line for each operator and mode: how it compares over all cases."""
    grouped: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in results.rows:
        if row.provider == STAR and row.ratio_to_best_peer is not None:
            grouped[row.operator, row.mode].append(row)
    lines = []
    for (operator, mode), rows in grouped.items():
        ratios = {row.case: row.ratio_to_best_peer or 0.0 for row in rows}
        worst = min(ratios, key=lambda case: ratios[case])
        lines.append(
            (
                operator,
                mode,
                ", ".join(sorted({row.backend for row in rows})),
                f"{len(ratios)}",
                f"{sum(ratio < 1 for ratio in ratios.values())}",
                _times(geometric_mean(ratios.values())),
                _times(max(ratios.values())),
                _times(ratios[worst]),
                f"{worst} ({next(row.best_peer for row in rows if row.case == worst)})",
            )
        )
    head = ("operator", "mode", "served by", "cases>", "slower>", "geomean>", "best>", "worst>", "worst case (rival)")
    return Grid("Against the best other implementation: its time / ours", head, tuple(lines))


def bars(results: Results) -> Grid:
    """Hold the run against the kernel contract's bars."""
    lines = [
        (
            verdict.operator,
            verdict.case,
            ("at least " if verdict.bar.at_least else "at most ") + verdict.bar.text,
            _figure(verdict),
            {True: "met", False: "not met", None: "not measured"}[verdict.met],
        )
        for verdict in judge(results.rows)
    ]
    lines.sort(key=lambda line: [row.operator for row in results.rows].index(line[0]))
    met = sum(line[-1] == "met" for line in lines)
    title = f"Bars: {met} of {len(lines)} met"
    return Grid(title, ("operator", "case", "bar", "measured>", "verdict"), tuple(lines))


def _figure(verdict: Verdict) -> str:
    if verdict.figure is None:
        return "-"
    unit = verdict.bar.unit
    digits = f"{verdict.figure:.1f}" if unit in ("%", "us") else f"{verdict.figure:.3g}"
    return f"{digits} {unit}"


def all_rows(results: Results) -> Grid:
    """Give one line for each case and mode."""
    lines = []
    for (operator, case, mode), rows in by_case(results.rows).items():
        ours = rows[STAR]
        others = sorted((row for row in rows.values() if row.provider != STAR), key=lambda row: row.ratio)
        least = min((row.peak_bytes for row in others if row.provider != REFERENCE), default=0)
        lines.append(
            (
                operator,
                case,
                mode,
                ours.backend,
                f"{_time(ours.median_s)} ({_time(ours.p20_s)}, {_time(ours.p80_s)})",
                ", ".join(f"{row.provider} {_times(row.ratio)}" for row in others),
                _rate(ours),
                f"{ours.percent_of_ceiling:.0f} % {ours.ceiling}",
                f"{_bytes(ours.peak_bytes)} / {_bytes(least)}",
            )
        )
    head = (
        "operator",
        "case",
        "mode",
        "served by",
        "ours (p20, p80)>",
        "others / ours",
        "rate>",
        "ceiling>",
        "peak ours / least other>",
    )
    return Grid("Every case", head, tuple(lines))


def absent(results: Results) -> Grid:
    """List the rivals that gave no number."""
    lines = tuple((one.operator, one.case, one.mode, one.provider, one.reason) for one in results.absent)
    return Grid("Not measured", ("operator", "case", "mode", "provider", "reason"), lines)


def _times(ratio: float) -> str:
    return f"{ratio:.3g} x"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"


def _rate(row: Row) -> str:
    """Give what binds a second."""
    if row.ceiling == "copy":
        return f"{row.bytes / row.median_s / 1e9:.3g} GB/s"
    if row.ceiling == "matmul":
        return f"{row.flops / row.median_s / 1e9:.3g} GFLOP/s"
    if row.exps:
        return f"{row.exps / row.median_s / 1e9:.3g} Gexp/s"
    return f"{row.fmas / row.median_s / 1e9:.3g} GFMA/s"


def as_rich(grid: Grid) -> Table:
    """Show a table in a terminal."""
    table = Table(title=grid.title, title_justify="left", header_style="bold")
    for name in grid.head:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    colours = {"met": "green", "not met": "red", "not measured": "yellow"}
    for line in grid.lines:
        table.add_row(*line, style=colours.get(line[-1]))
    return table


def as_markdown(results: Results) -> str:
    """Write every table."""
    meaning = "Ratios are the other's time over ours, from interleaved samples: above 1, ours is faster."
    parts = [f"{one}\n" for one in (f"{describe(results)}.", doubts(results), meaning) if one]
    for grid in (summary(results), bars(results), all_rows(results), absent(results)):
        if grid.lines:
            head = [name.rstrip(">") for name in grid.head]
            rule = ["---:" if name.endswith(">") else "---" for name in grid.head]
            lines = [
                head,
                rule,
                *([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in grid.lines),
            ]
            parts.append(f"## {grid.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def as_figure(results: Results) -> str:
    """Draw the ratio to the best other implementation of every case, operator by operator."""
    dots = [
        Dot(row.operator.removesuffix("_step"), row.mode, row.ratio_to_best_peer, f"{row.case}: {row.best_peer}")
        for row in results.rows
        if row.provider == STAR and row.ratio_to_best_peer is not None
    ]
    return draw(dots, "Time of the best other implementation / ours", describe(results))


if __name__ == "__main__":
    sys.exit(main())
