"""The table of a run's front beside the baselines: its rows, columns and best values, and how a terminal shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from search.evaluation import Evaluation, Status
from search.report_data import Run
from search.report_drawing import family_of, liv_classes
from search.report_metrics import Column, column_for, lower_is_better, order_metrics
from star_core.genome import POOL

# Shown in a terminal even where they are not objectives, since every reader asks for them.
_ALWAYS = ("perplexity", "parameters")
_LETTERS = {"attention": "A", "recurrence": "R", "short_conv": "C", "long_conv": "L", "memoryless": "M"}
_COLOURS = {
    "attention": "bright_blue",
    "recurrence": "green",
    "short_conv": "yellow",
    "long_conv": "magenta",
    "memoryless": "bright_black",
}


@dataclass(frozen=True)
class FrontRow:
    """A line of the table: a front member, numbered from 1 by the first objective, or a baseline (number None).

    `metrics` are in the units of their names, by metric; empty where the evaluation failed.
    """

    number: int | None
    name: str
    kind: str
    status: Status
    genome: str
    genome_hash: str
    generation: int
    metrics: Mapping[str, float]


def rows_of(run: Run) -> list[FrontRow]:
    """List the front, then the baselines in the order of the log."""
    shown: list[tuple[int | None, Evaluation]] = [*run.shown_front]
    shown += [(None, baseline) for baseline in run.baselines]
    return [
        FrontRow(number, e.name or e.genome_hash, e.kind, e.status, e.genome, e.genome_hash, e.generation, e.metrics)
        for number, e in shown
    ]


def columns_of_rows(rows: Sequence[FrontRow], objectives: Sequence[str]) -> list[Column]:
    """Choose a column for every metric that a row has, objectives first."""
    keys = order_metrics((key for row in rows for key in row.metrics), objectives)
    return [column_for(key, [row.metrics[key] for row in rows if key in row.metrics]) for key in keys]


def best_value(rows: Iterable[FrontRow], key: str) -> float | None:
    """Find the smallest value of a metric that is better when smaller; None for other metrics or without a value."""
    if not lower_is_better(key):
        return None
    return min((row.metrics[key] for row in rows if key in row.metrics), default=None)


def terminal_table(run: Run) -> Table:
    """Build the table that a terminal shows: objectives, perplexity, parameters, and each layout in letters."""
    rows = rows_of(run)
    keys = {*run.objectives, *_ALWAYS}
    columns = [column for column in columns_of_rows(rows, run.objectives) if column.key in keys]
    table = Table(
        title="The front beside the baselines",
        caption="* best of its column. Layout, input first: A attention, R recurrence, C short convolution, "
        "L long convolution, M memoryless; lower case: differential.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("Model", no_wrap=True)
    for column in columns:
        table.add_column(f"{column.label}\n({column.unit})" if column.unit else column.label, justify="right")
    table.add_column("Layout", overflow="fold")
    best = {column.key: best_value(rows, column.key) for column in columns}
    for position, row in enumerate(rows):
        name = f"{row.number} {row.genome_hash[:8]}" if row.number else row.name
        if row.status is not Status.OK:
            name += f" ({row.status})"
        cells = [_cell(column, row.metrics.get(column.key), best[column.key]) for column in columns]
        last_of_kind = position + 1 < len(rows) and rows[position + 1].kind != row.kind
        table.add_row(Text(name), *cells, _letters(row.genome), end_section=last_of_kind)
    return table


def _cell(column: Column, value: float | None, best: float | None) -> Text:
    wins = value is not None and value == best
    return Text(column.format(value) + ("*" if wins else " "), style="bold green" if wins else "")


def _letters(genome: str) -> Text:
    text = Text()
    for liv_class in liv_classes(genome):
        letter, family = _LETTERS[family_of(liv_class)], family_of(liv_class)
        text.append(letter.lower() if POOL[liv_class].differential else letter, style=_COLOURS[family])
    return text
