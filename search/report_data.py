"""Read a run folder, and follow its search: the front, hypervolume by generation, lineage.

Only reads: the driver is the one writer of `run.db`, and a report may be asked for while the search runs.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from search.box import Box
from search.evaluation import Evaluation, Status
from search.front import Front, front_of, is_feasible
from search.nsga2 import FloatArray
from search.ranking import Ranking
from search.settings import at_rung
from search.store import read_curves, read_evaluations

Item = TypeVar("Item")
CURVE_POINTS = 100

# A page that a browser opens at once has about so much in it.
MOST_GENERATIONS = 200
MOST_MEMBERS = 200
MOST_DRAWN = 3000


@dataclass(frozen=True)
class Run:
    """A run folder in memory. `front` is sorted by the first objective; `finals` has the summary of the repetitions of
    its members, by hash, as `search.front.summary_of` makes it, for those that were repeated."""

    directory: Path
    config: Mapping[str, Any]
    objectives: tuple[str, ...]
    candidates: tuple[Evaluation, ...]
    baselines: tuple[Evaluation, ...]
    front: tuple[Evaluation, ...]
    finals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def is_scored(self, evaluation: Evaluation) -> bool:
        """Tell whether the evaluation succeeded and has a number for every objective."""
        return evaluation.status is Status.OK and all(name in evaluation.metrics for name in self.objectives)

    @cached_property
    def ranking(self) -> Ranking:
        """How the run compares its candidates."""
        return Ranking.from_config(self.config)

    @cached_property
    def scored(self) -> tuple[Evaluation, ...]:
        """The candidates with a number for every objective that trained to the end and keep the budget."""
        ranking = self.ranking
        return tuple(c for c in self.candidates if self.is_scored(c) and is_feasible(c, ranking))

    @property
    def stopped(self) -> int:
        """How many candidates stopped at a rung below the last."""
        return sum(c.status is Status.OK and self.ranking.tier(len(c.rungs)) > 0 for c in self.candidates)

    @property
    def over_budget(self) -> int:
        """How many candidates were trained to the end and measured, and break the budget."""
        ranking = self.ranking
        ended = (c for c in self.candidates if c.status is Status.OK and not ranking.tier(len(c.rungs)))
        return sum(ranking.violation(c.metrics) > 0 for c in ended)

    @cached_property
    def scored_baselines(self) -> tuple[Evaluation, ...]:
        """The baselines with a number for every objective."""
        return tuple(baseline for baseline in self.baselines if self.is_scored(baseline))

    @cached_property
    def generations(self) -> tuple[int, ...]:
        """The generations that the log holds, in order."""
        return tuple(sorted({candidate.generation for candidate in self.candidates}))

    @cached_property
    def shown_generations(self) -> tuple[int, ...]:
        """The generations that figures show: all, or `MOST_GENERATIONS` from the first to the last."""
        return tuple(thin(self.generations, MOST_GENERATIONS))

    @cached_property
    def shown_front(self) -> tuple[tuple[int, Evaluation], ...]:
        """The members of the front that are listed and drawn, with their numbers: all, or `MOST_MEMBERS` of them."""
        return tuple(thin([*enumerate(self.front, start=1)], MOST_MEMBERS))

    @cached_property
    def drawn(self) -> tuple[Evaluation, ...]:
        """The candidates that figures draw beside the front: all that are scored, or `MOST_DRAWN` of them."""
        members = {member.genome_hash for member in self.front}
        return tuple(thin([c for c in self.scored if c.genome_hash not in members], MOST_DRAWN))

    @cached_property
    def by_hash(self) -> Mapping[str, Evaluation]:
        """Every candidate and baseline by its genome's hash."""
        return {evaluation.genome_hash: evaluation for evaluation in (*self.baselines, *self.candidates)}


@dataclass(frozen=True)
class Progress:
    """How the search went, generation by generation.

    `hypervolume[i]` is the share of the box between `ideal` and `reference` dominated by all candidates up to
    `generations[i]`; objectives named in `log_scaled` are measured on a log scale. `best` is the best value of each
    objective within a generation, None where no candidate of it succeeded. `by_evaluation` is the same hypervolume
    after so many trained candidates, at `CURVE_POINTS` counts or fewer.
    """

    generations: tuple[int, ...]
    hypervolume: tuple[float, ...]
    baseline_hypervolume: float | None
    ideal: Mapping[str, float]
    reference: Mapping[str, float]
    log_scaled: frozenset[str]
    best: Mapping[str, tuple[float | None, ...]]
    by_evaluation: tuple[tuple[int, float], ...]


def read_run(run_dir: Path) -> Run:
    """Read `config.json`, `run.db` and `front.json` of a run folder.

    Args:
        run_dir: A folder that the search wrote. `front.json` may be missing: the front is then computed from the log.
    Returns:
        The run.
    Raises:
        ValueError: no such folder, a file missing or unreadable, no objectives, a front member that the log lacks.
    """
    run_dir = Path(run_dir)
    config = _read_json(run_dir / "config.json")
    objectives = config.get("objectives") if isinstance(config, dict) else None
    if not isinstance(objectives, list) or len(objectives) < 2:
        raise ValueError(
            f"run_dir: {run_dir / 'config.json'} needs a list of two or more 'objectives', got {objectives}"
        )
    with _opened(run_dir / "run.db") as log:
        rows = [replace(row, metrics=_numbers(row.metrics)) for row in read_evaluations(log, curves=False)]
    run = Run(
        directory=run_dir,
        config=config,
        objectives=tuple(objectives),
        candidates=tuple(row for row in rows if row.kind == "candidate"),
        baselines=tuple(row for row in rows if row.kind == "baseline"),
        front=(),
    )
    with _opened(run_dir / "run.db") as log:
        run = replace(run, baselines=tuple(read_curves(log, run.baselines)))
    front_path = run_dir / "front.json"
    entries = _read_json(front_path) if front_path.exists() else None
    members = front_of(run.scored, run.ranking) if entries is None else _front_from_file(front_path, entries, run)
    first = run.objectives[0]
    members = sorted(members, key=lambda member: (member.metrics[first], member.genome_hash))
    with _opened(run_dir / "run.db") as log:
        members = read_curves(log, members)
    return replace(
        run,
        front=tuple(members),
        finals={entry["genome_hash"]: entry["final"] for entry in entries or () if "final" in entry},
    )


def box_of(runs: Sequence[Run]) -> Box:
    """Span a box by the fronts of all `runs`, their first generations' fronts and their baselines.

    It does not move with outliers that nothing would choose, and the baselines' own hypervolume can be told in the same
    units.

    Raises:
        ValueError: runs of different objectives, or none with a candidate that has succeeded.
    """
    objectives = runs[0].objectives
    corners: list[Evaluation] = []
    for run in runs:
        if run.objectives != objectives:
            raise ValueError(
                f"runs: need the same objectives to be compared, got {', '.join(objectives)} in {runs[0].directory} "
                f"and {', '.join(run.objectives)} in {run.directory}"
            )
        if scored := run.scored:
            first = min(candidate.generation for candidate in scored)
            initial = [member for member in scored if member.generation == first]
            corners += front_of(scored, run.ranking) + front_of(initial, run.ranking)
            corners += run.scored_baselines
    if not corners:
        raise ValueError("runs: no candidate has succeeded yet")
    return Box.around(corners, objectives)


def follow_progress(run: Run) -> Progress | None:
    """Compute hypervolume, in the run's own box, and best values by generation; None while no candidate has
    succeeded."""
    scored, objectives = run.scored, run.objectives
    if not scored:
        return None
    generations = run.shown_generations
    box = box_of([run])
    volume = box.volume
    by_generation: dict[int, list[Evaluation]] = {generation: [] for generation in run.generations}
    for member in scored:
        by_generation[member.generation].append(member)
    front, volumes = Front(run.ranking), []
    for generation in run.generations:
        front.update(by_generation[generation])
        if generation in generations:
            volumes.append(volume(front.members()))
    return Progress(
        generations=generations,
        hypervolume=tuple(volumes),
        baseline_hypervolume=volume(run.scored_baselines) if run.scored_baselines else None,
        ideal=box.ideal,
        reference=box.reference,
        log_scaled=frozenset(name for name, bent in zip(objectives, box.log_scaled, strict=True) if bent),
        best={
            name: tuple(
                min((m.metrics[name] for m in by_generation[generation]), default=None) for generation in generations
            )
            for name in objectives
        },
        by_evaluation=_by_evaluation(run, volume),
    )


def _by_evaluation(run: Run, volume: Callable[[Sequence[Evaluation]], float]) -> tuple[tuple[int, float], ...]:
    """Follow the hypervolume over the candidates that were trained, failures among them, in the order of the log."""
    trained = [candidate for candidate in run.candidates if candidate.status is not Status.OVER_BUDGET]
    scored = {id(candidate) for candidate in run.scored}
    points = min(CURVE_POINTS, len(trained))
    curve, front, done = [], Front(run.ranking), 0
    for count in ((point + 1) * len(trained) // points for point in range(points)):
        front.update(c for c in trained[done:count] if id(c) in scored)
        curve.append((count, volume(front.members())))
        done = count
    return tuple(curve)


@dataclass(frozen=True)
class Rung:
    """One rung of successive halving below the last.

    Attributes:
        steps: Training steps at which it ends.
        candidates: How many were trained so far.
        finished: How many of them were trained to the end.
        correlation: Spearman's rank correlation of the perplexity here with the one at the end, over those; None for
            fewer than three. They are the best of their rung, so that it is lower than over all candidates.
    """

    steps: int
    candidates: int
    finished: int
    correlation: float | None


def compare_rungs(run: Run) -> list[Rung]:
    """Tell how well each rung foretells the end; empty for a run without rungs."""
    config, rungs = run.config, run.ranking.rungs
    steps = config["tokens"] // (config["batch_size"] * config["seq_len"]) if rungs > 1 else 0
    finished = [c for c in run.candidates if c.status is Status.OK and len(c.rungs) == rungs]
    found = []
    for rung in range(rungs - 1):
        pairs = [(c.rungs[rung]["perplexity"], c.rungs[-1]["perplexity"]) for c in finished]
        found.append(
            Rung(
                steps=at_rung(steps, rung, rungs),
                candidates=sum(len(c.rungs) > rung for c in run.candidates),
                finished=len(finished),
                correlation=spearman(*zip(*pairs, strict=True)) if len(pairs) >= 3 else None,
            )
        )
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two equally long sequences; equal values share the mean of their ranks.

    NaN where one of them does not vary.
    """

    def ranks(values: Sequence[float]) -> FloatArray:
        _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        means: FloatArray = np.cumsum(counts) - (counts - 1) / 2
        return means[place]

    first, second = ranks(a), ranks(b)
    if first.std() == 0 or second.std() == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def find_ancestors(run: Run, member: Evaluation, limit: int) -> list[Evaluation]:
    """Follow parents back through the log, nearest first, the member itself first of all; at most `limit` of them."""
    found, queue = {member.genome_hash: member}, [member]
    while queue and len(found) < limit:
        for parent_hash in queue.pop(0).parents:
            parent = run.by_hash.get(parent_hash)
            if parent is not None and parent_hash not in found and len(found) < limit:
                found[parent_hash] = parent
                queue.append(parent)
    return list(found.values())


def count_failures(evaluations: Iterable[Evaluation]) -> list[tuple[str, str, int]]:
    """Group failed evaluations by status and by the first line of their reason, the most frequent first."""
    groups: Counter[tuple[str, str]] = Counter()
    for evaluation in evaluations:
        if evaluation.status is not Status.OK:
            lines = (evaluation.error or "").strip().splitlines() or ["no reason recorded"]
            # Which terms of the budget are broken is the group; by what numbers, is each genome's own.
            reason = re.sub(r": is [^,]+", "", lines[0]) if evaluation.status is Status.OVER_BUDGET else lines[0]
            groups[evaluation.status, reason] += 1
    return [(status, reason, count) for (status, reason), count in groups.most_common()]


def thin(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Return the items, or `most` of them, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"run_dir: cannot read {path}: {error.strerror}; give a folder that the search wrote"
        ) from error
    except ValueError as error:
        raise ValueError(f"run_dir: {path} is not valid JSON: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a log for reading."""
    if not path.is_file():
        raise ValueError(f"run_dir: {path} does not exist; give a folder that the search wrote")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            yield connection
    except sqlite3.DatabaseError as error:
        raise ValueError(f"run_dir: {path} cannot be read as a run's log: {error}") from error


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Keep finite numbers only: a metric that could not be measured is absent, never a magic value."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _front_from_file(path: Path, entries: Sequence[Mapping[str, Any]], run: Run) -> tuple[Evaluation, ...]:
    """Match `front.json` with the log; its metrics win, since the front may have been measured again."""
    by_hash = {candidate.genome_hash: candidate for candidate in run.candidates}
    members = []
    for entry in entries:
        evaluation = by_hash.get(entry["genome_hash"])
        if evaluation is None:
            raise ValueError(f"run_dir: {path} names genome {entry['genome_hash']}, which run.db does not hold")
        member = replace(evaluation, metrics={**evaluation.metrics, **_numbers(entry["metrics"])})
        if not run.is_scored(member):
            raise ValueError(
                f"run_dir: {path} names genome {member.genome_hash}, which lacks a number for an objective"
            )
        members.append(member)
    return tuple(members)
