"""What variation did in a run: how candidates came about, which changes were asked for, and which of them paid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.evaluation import Evaluation, Status
from search.front import Front
from search.report_data import Run

_ORIGINS = ("sampled afresh", "bred from one parent", "bred from two parents")


@dataclass(frozen=True)
class Tally:
    """What came of the candidates that were made in one way.

    Attributes:
        name: Of the way: an origin, or one of `star_core.genome.MUTATIONS`.
        candidates: How many were made, trained or not.
        repaired: Those of them that crossover left invalid, so that genes were drawn anew.
        failed: Those that ended in another status than OK, what was over the budget aside.
        paid: Those on the front when their generation ended.
        lasting: Those on the front now.
    """

    name: str
    candidates: int
    repaired: int
    failed: int
    paid: int
    lasting: int

    @property
    def share(self) -> float:
        """Part of the candidates that paid, 0 to 1."""
        return self.paid / self.candidates


@dataclass(frozen=True)
class Variation:
    """All tallies of a run: `origins` are disjoint, `changes` are not, and empty at backbone level."""

    summary: str
    origins: tuple[Tally, ...]
    changes: tuple[Tally, ...]


def sum_up_variation(run: Run) -> Variation:
    """Count what came of each origin and of each change, the most frequent change first."""
    paid, lasting = _paid(run), {member.genome_hash for member in run.front}

    def tally(name: str, members: Sequence[Evaluation]) -> Tally:
        return Tally(
            name=name,
            candidates=len(members),
            repaired=sum(member.repaired for member in members),
            failed=sum(member.status not in (Status.OK, Status.OVER_BUDGET) for member in members),
            paid=sum(member.genome_hash in paid for member in members),
            lasting=sum(member.genome_hash in lasting for member in members),
        )

    by_origin: dict[str, list[Evaluation]] = {name: [] for name in _ORIGINS}
    by_change: dict[str, list[Evaluation]] = {}
    for candidate in run.candidates:
        by_origin[_ORIGINS[min(2, len(candidate.parents))]].append(candidate)
        for name in sorted(set(candidate.mutations)):
            by_change.setdefault(name, []).append(candidate)
    changes = [tally(name, members) for name, members in by_change.items()]
    return Variation(
        summary=_summary(run.candidates),
        origins=tuple(tally(name, members) for name, members in by_origin.items() if members),
        changes=tuple(sorted(changes, key=lambda change: (-change.candidates, change.name))),
    )


def _paid(run: Run) -> set[str]:
    """Return the hashes of those who were on the front as their generation ended."""
    by_generation: dict[int, list[Evaluation]] = {}
    for candidate in run.scored:
        by_generation.setdefault(candidate.generation, []).append(candidate)
    front, paid = Front(run.ranking), set()
    for generation, members in sorted(by_generation.items()):
        front.update(members)
        paid |= {member.genome_hash for member in front.members() if member.generation == generation}
    return paid


def _summary(candidates: Sequence[Evaluation]) -> str:
    bred = [candidate for candidate in candidates if candidate.parents]
    repaired, invalid = sum(c.repaired for c in bred), sum(c.status is Status.INVALID for c in candidates)
    return (
        f"Of {len(bred):,} candidates that were bred, crossover left {_of(repaired, len(bred))} invalid, which were "
        f"repaired. Of all {len(candidates):,}, {_of(invalid, len(candidates))} ended as INVALID."
    )


def _of(part: int, whole: int) -> str:
    """Write a part of a whole as a number and in per cent."""
    return f"{part:,} ({100 * part / whole:.1f}\N{NO-BREAK SPACE}%)" if whole else f"{part:,}"
