"""Several runs side by side: how far each came, in one and the same box of objectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import NamedTuple

from rich.table import Table

from search.evaluation import Evaluation, Status
from search.front import Front
from search.report_data import CURVE_POINTS, Run, box_of
from search.report_metrics import Column, column_for, format_seconds
from search.settings import at_rung


class Point(NamedTuple):
    """How far a run was at one moment: `hypervolume` is the share of the box of all runs, 0 to 1."""

    trained: int
    tokens: int
    hypervolume: float


@dataclass(frozen=True)
class Standing:
    """What one run came to.

    Attributes:
        name: Of the run's folder.
        group: Its optimizer and, beside full training, its rungs: runs of one group differ by their seeds, or should.
        trained: Candidates that training was begun for.
        failed: Those of them that ended in another status than OK, by status.
        tokens: Training tokens of all of them together; what failed counts as trained to its last rung.
        seconds: Processor seconds of all evaluations, as the log has them.
        hypervolume: Of the final front, in the box of all runs.
        curve: Hypervolume after so many trained candidates and training tokens, ascending.
        best: Best value of each objective on the front; empty without a front.
    """

    name: str
    group: str
    trained: int
    failed: dict[str, int]
    tokens: int
    seconds: float
    hypervolume: float
    curve: tuple[Point, ...]
    best: dict[str, float]


def compare_runs(runs: Sequence[Run]) -> list[Standing]:
    """Say what each run came to, in the order given.

    Raises:
        ValueError: runs of different objectives, or none with a candidate that has succeeded.
    """
    box = box_of(runs)
    found = []
    for run in runs:
        trained = [c for c in run.candidates if c.status is not Status.OVER_BUDGET]
        scored = {id(c) for c in run.scored}
        points = min(CURVE_POINTS, len(trained))
        curve, front, tokens, done = [], Front(run.ranking), 0, 0
        for count in ((point + 1) * len(trained) // points for point in range(points)):
            tokens += sum(_tokens(run, candidate) for candidate in trained[done:count])
            front.update(c for c in trained[done:count] if id(c) in scored)
            curve.append(Point(count, tokens, box.volume(front.members())))
            done = count
        found.append(
            Standing(
                name=run.directory.name,
                group=_group(run),
                trained=len(trained),
                failed=dict(Counter(str(c.status) for c in trained if c.status is not Status.OK)),
                tokens=tokens,
                seconds=sum(e.seconds for e in (*run.candidates, *run.baselines)),
                hypervolume=box.volume(run.front),
                curve=tuple(curve),
                best={name: min(m.metrics[name] for m in run.front) for name in run.objectives} if run.front else {},
            )
        )
    return found


def _group(run: Run) -> str:
    optimizer = str(run.config.get("optimizer", "nsga2"))
    return f"{optimizer}, {run.ranking.rungs} rungs" if run.ranking.rungs > 1 else optimizer


def _tokens(run: Run, candidate: Evaluation) -> int:
    """Return the tokens that a candidate was trained on."""
    return at_rung(int(run.config["tokens"]), max(1, len(candidate.rungs)) - 1, run.ranking.rungs)


@dataclass(frozen=True)
class ComparisonTable:
    """Runs side by side as finished text: `titles` are names with units, the first two columns words, the rest numbers;
    `means` has a row for each group of several runs."""

    titles: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]
    means: tuple[tuple[str, ...], ...]


NOTE = "Hypervolume of the final front, in one box for all; best value of each objective on the front."


def tabulate(standings: Sequence[Standing]) -> ComparisonTable:
    """Write what each run came to and, where a group has several, its mean and standard deviation."""
    names = list(standings[0].best or next((s.best for s in standings if s.best), {}))
    columns = {name: column_for(name, [s.best[name] for s in standings if name in s.best]) for name in names}
    words = ("Run", "Optimizer", "Trained", "Failed", "Tokens", "Time", "Hypervolume")
    rows = [
        (
            standing.name,
            standing.group,
            f"{standing.trained:,}",
            f"{sum(standing.failed.values()):,}",
            f"{standing.tokens:,}",
            format_seconds(standing.seconds),
            f"{standing.hypervolume:.4f}",
            *(column.format(standing.best.get(name)) for name, column in columns.items()),
        )
        for standing in standings
    ]
    groups = {group: members for group, members in groups_of(standings).items() if len(members) > 1}
    return ComparisonTable(
        titles=(*((word, "") for word in words), *((column.label, column.unit) for column in columns.values())),
        rows=tuple(rows),
        means=tuple((f"mean of {len(each)}", group, *_means(each, columns)) for group, each in groups.items()),
    )


def terminal_comparison(standings: Sequence[Standing]) -> Table:
    """Build the table that a terminal shows."""
    content = tabulate(standings)
    table = Table(title="Runs side by side", title_justify="left", caption=NOTE, caption_justify="left")
    for place, (name, unit) in enumerate(content.titles):
        title = f"{name}\n({unit})" if unit else name
        table.add_column(title, justify="left" if place < 2 else "right", overflow="fold")
    for row in content.rows:
        table.add_row(*row)
    for row in content.means:
        table.add_section()
        table.add_row(*row)
    return table


def groups_of(standings: Sequence[Standing]) -> dict[str, list[Standing]]:
    """Return the standings by group, in the order of their first run."""
    groups: dict[str, list[Standing]] = {}
    for standing in standings:
        groups.setdefault(standing.group, []).append(standing)
    return groups


def _means(members: Sequence[Standing], columns: dict[str, Column]) -> list[str]:
    volumes = [member.hypervolume for member in members]
    cells = [f"{mean(m.trained for m in members):.0f}", "", f"{mean(m.tokens for m in members):,.0f}"]
    cells += [format_seconds(mean(m.seconds for m in members)), f"{mean(volumes):.4f} ± {stdev(volumes):.4f}"]
    for name, column in columns.items():
        values = [member.best[name] for member in members if name in member.best]
        spread = f" ± {column.format(stdev(values))}" if len(values) > 1 else ""
        cells.append(column.format(mean(values)) + spread if values else column.format(None))
    return cells
