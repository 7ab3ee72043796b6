"""Several runs side by side: how far each came, in one and the same box of objectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import plotly.graph_objects as go
from rich.table import Table

from search.evaluation import Evaluation, Status
from search.front import Front
from search.report_data import CURVE_POINTS, Run, box_of
from search.report_metrics import Column, column_for, format_seconds
from search.settings import at_rung

_COLOURS = ("#1f6fd6", "#c2410c", "#15803d", "#7a3fb5", "#b3902a", "#a63a4f", "#0f8b8d", "#66758f")


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
        curve: Hypervolume after so many training tokens, ascending.
        best: Best value of each objective on the front; empty without a front.
    """

    name: str
    group: str
    trained: int
    failed: dict[str, int]
    tokens: int
    seconds: float
    hypervolume: float
    curve: tuple[tuple[int, float], ...]
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
            curve.append((tokens, box.volume(front.members())))
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


def terminal_comparison(standings: Sequence[Standing]) -> Table:
    """Build the table that a terminal shows, and where a group has several runs, its mean and deviation."""
    names = list(standings[0].best or next((s.best for s in standings if s.best), {}))
    columns = {name: column_for(name, [s.best[name] for s in standings if name in s.best]) for name in names}
    table = Table(title="Runs side by side", title_justify="left", caption_justify="left")
    table.caption = "Hypervolume of the final front, in one box for all; best value of each objective on the front."
    table.add_column("Run", no_wrap=True)
    table.add_column("Optimizer")
    for title in ("Trained", "Failed", "Tokens", "Time", "Hypervolume"):
        table.add_column(title, justify="right")
    for column in columns.values():
        table.add_column(f"{column.label}\n({column.unit})" if column.unit else column.label, justify="right")
    for standing in standings:
        table.add_row(
            standing.name,
            standing.group,
            str(standing.trained),
            ", ".join(f"{count} {status}" for status, count in standing.failed.items()) or "0",
            f"{standing.tokens:,}",
            format_seconds(standing.seconds),
            f"{standing.hypervolume:.4f}",
            *(column.format(standing.best.get(name)) for name, column in columns.items()),
        )
    for group, members in groups_of(standings).items():
        if len(members) > 1:
            table.add_section()
            table.add_row(f"mean of {len(members)}", group, *_means(members, columns))
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


def comparison_figure(standings: Sequence[Standing]) -> go.Figure:
    """Draw hypervolume over training tokens, a line for each run, a colour for each group."""
    figure = go.Figure()
    for index, (group, members) in enumerate(groups_of(standings).items()):
        for number, member in enumerate(members):
            figure.add_trace(
                go.Scatter(
                    x=[0, *(tokens for tokens, _ in member.curve)],
                    y=[0.0, *(volume for _, volume in member.curve)],
                    name=group,
                    legendgroup=group,
                    showlegend=number == 0,
                    mode="lines",
                    line={"color": _COLOURS[index % len(_COLOURS)], "width": 1.5, "shape": "hv"},
                    hovertemplate=f"{member.name}<br>%{{x:,}} tokens: %{{y:.4f}}<extra>{group}</extra>",
                )
            )
    figure.update_layout(
        template="plotly_white",
        title="Hypervolume over training tokens",
        xaxis={"title": "Training tokens, all candidates together", "rangemode": "tozero"},
        yaxis={"title": "Hypervolume, share of the box", "rangemode": "tozero"},
        legend={"orientation": "h", "y": -0.2},
    )
    return figure
