"""What a person sees while a search runs: a live panel in a terminal, a line for each evaluation elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from search.evaluate import Outcome, Task
from search.evaluation import Evaluation, Status
from search.front import Front
from search.report_metrics import column_for, format_seconds
from search.settings import Settings

NUM_BASELINES = 4


class View:
    """Shows a search. Use as a context; call `training`, `measuring` and `done` as things happen.

    Args:
        settings: Of the search.
        console: Where to show it.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.total = settings.population * settings.generations + NUM_BASELINES
        self.evaluations: list[Evaluation] = []
        self._ranking = settings.ranking
        self._rejected: list[Evaluation] = []
        self._told_rejected = 0
        self._front = Front(settings.ranking)
        self._best: dict[tuple[str, str], float] = {}
        self._failures: Counter[str] = Counter()
        self._generation = -1
        self._fresh = 0
        self._started = time.monotonic()
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def training(self, task: Task, step: int, loss: float) -> None:
        """Show how far a candidate's training is."""
        bar = self._bar(task, "train", self.settings.steps)
        self._progress.update(bar, completed=step, loss=f"loss {loss:.3f} nats")

    def measuring(self, task: Task) -> None:
        """Show that a candidate is being measured."""
        self._bar(task, "measure", None)

    def trained(self, task: Task) -> None:
        """Take a candidate's bar away: it waits for the others of its generation."""
        self._drop(task.genome_hash)

    def rejected(self, evaluation: Evaluation) -> None:
        """Count a genome that breaks the budget and is not trained."""
        self._rejected.append(evaluation)
        self._failures[evaluation.status.value] += 1

    def retrained(self, evaluation: Evaluation, outcome: Outcome) -> None:
        """Tell that a winner whose result came from the cache has its weights now, and what else they give."""
        was = evaluation.metrics["perplexity"]
        if outcome.status is not Status.OK:
            now = f"could not be trained again for its weights: {outcome.status}: {outcome.error}"
        elif outcome.metrics["perplexity"] == was:
            now = f"trained again for its weights, with the same perplexity {was:.6g}"
        else:
            now = (
                f"trained again for its weights: perplexity {outcome.metrics['perplexity']:.6g} on this machine, "
                f"{was:.6g} where the cache's result is from"
            )
        self.console.print(f"{evaluation.genome_hash[:8]}  {now}", soft_wrap=True, highlight=False, markup=False)

    def repeated(self, evaluation: Evaluation) -> None:
        """Show a repetition of a winner's evaluation."""
        self._drop(evaluation.genome_hash)
        if not self.console.is_terminal:
            text = f"{evaluation.kind}  {evaluation.genome_hash[:8]}  {self._result(evaluation)}"
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def done(self, evaluation: Evaluation, fresh: bool) -> None:
        """Count an evaluation; `fresh` is false where it was read from the log."""
        self._drop(evaluation.genome_hash)
        self.evaluations.append(evaluation)
        self._fresh += fresh
        self._generation = max(self._generation, evaluation.generation)
        self._front.update([evaluation])
        if evaluation.status is Status.OK:
            groups = ("candidate", "initial") if evaluation.generation == 0 else (evaluation.kind,)
            for key in ((group, name) for group in groups for name in self.settings.objectives):
                value = evaluation.metrics[key[1]]
                self._best[key] = min(value, self._best.get(key, value))
        else:
            self._failures[evaluation.status.value] += 1
        if not self.console.is_terminal and fresh:
            if rejected := len(self._rejected) - self._told_rejected:
                last = self._rejected[-1].error
                self.console.print(f"{rejected} genomes over the budget, not trained; the last {last}", soft_wrap=True)
                self._told_rejected = len(self._rejected)
            self.console.print(self._line(evaluation), soft_wrap=True, highlight=False, markup=False)

    def _bar(self, task: Task, verb: str, total: int | None) -> TaskID:
        key = task.genome_hash
        if key not in self._bars:
            self._bars[key] = self._progress.add_task(f"{verb:<7} {key[:8]}", total=total, loss="")
        return self._bars[key]

    def _drop(self, key: str) -> None:
        if (bar := self._bars.pop(key, None)) is not None:
            self._progress.remove_task(bar)

    def _line(self, evaluation: Evaluation) -> str:
        where = evaluation.name or f"generation {evaluation.generation}"
        where += " (cached)" if evaluation.cached else ""
        if evaluation.rungs and self._ranking.rungs > 1:
            where += f", rung {len(evaluation.rungs)} of {self._ranking.rungs}"
        shown = self._result(evaluation)
        return f"[{len(self.evaluations)}/{self.total}] {where}  {evaluation.genome_hash[:8]}  {shown}"

    def _result(self, evaluation: Evaluation) -> str:
        if evaluation.status is not Status.OK:
            return f"{evaluation.status}: {evaluation.error}"
        shown = "  ".join(f"{name} {_shown(name, evaluation.metrics[name])}" for name in self.settings.objectives)
        broken = self._ranking.reason(evaluation.metrics)
        return f"{shown}  {broken}" if broken else shown

    def _left(self) -> str:
        remaining = self.total - len(self.evaluations)
        if not self._fresh or not remaining:
            return ""
        seconds = (time.monotonic() - self._started) / self._fresh * remaining
        return f"about {format_seconds(seconds)} left"

    def _render(self) -> Panel:
        settings, done = self.settings, len(self.evaluations)
        title = f"generation {self._generation + 1} of {settings.generations}" if self._generation >= 0 else "baselines"
        front = len(self._front)
        head = Text(f"{title}   {done} of {self.total} evaluated   front {front}   {self._left()}")
        table = Table("minimised", "best so far", "initial population", "best baseline", box=None, pad_edge=False)
        for name in settings.objectives:
            best = (self._best.get((group, name)) for group in ("candidate", "initial", "baseline"))
            table.add_row(name, *("-" if value is None else _shown(name, value) for value in best))
        failed = ", ".join(f"{count} {status}" for status, count in self._failures.items())
        return Panel(
            Group(head, table, self._progress, Text(f"failed: {failed}" if failed else "")),
            title=f"star search, {settings.preset}",
        )


def _shown(name: str, value: float) -> str:
    """Write a value; its unit is in its name, unless it is scaled."""
    column = column_for(name, [value])
    scaled = column.factor != 1 or name.endswith("_ratio")
    return column.format_with_unit(value) if scaled else column.format(value)
