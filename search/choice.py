"""Which of several mutations to apply, learned from what came of them.

Probability matching: Goldberg, "Probability matching, the magnitude of reinforcement, and classifier system bidding",
Machine Learning 5, 1990; with a least probability, Thierens, "An adaptive pursuit strategy for allocating operator
probabilities", GECCO 2005, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from search.nsga2 import non_dominated

RATE = 0.1
"""Weight of a new reward in a mutation's quality: the last twenty or so count."""

LEAST_SHARE = 0.3
"""Part of the probability that is spread evenly, so that no mutation dies out."""


@dataclass(frozen=True)
class Tally:
    """What came of one mutation.

    Attributes:
        applied: Candidates that it was applied to and that were told or failed.
        reward: Mean of their rewards, 0 to 1; 0 where there are none.
        probability: With which it is drawn now.
    """

    applied: int
    reward: float
    probability: float


@dataclass
class MutationChoice:
    """Probabilities of mutations by name.

    A candidate's reward is 1 if nothing that was told dominates its losses, and else 0; all mutations that made it
    share it. Rewards count from the next draw on, in an order that does not depend on the one they came in, so that a
    search is the same whatever order results arrive in between two draws.

    Tried at level featurizer on three losses made up of classes, sizes and sharing, depth 8, 400 evaluations,
    population 16, 12 seeds (standard error 0.003): hypervolume is 0.617 for equal chances, 0.615 with rewards by
    dominance over the parents, of which most candidates get the same 1/2, 0.626 for this one, 0.624 for adaptive
    pursuit of it, and 0.618 at a rate of 0.2 and a least share of 0.15. Over 24 other seeds equal chances give 0.618
    and this one 0.620: in a search so short it gains little more than the tallies.

    Attributes:
        names: Of the mutations, at least one.
    """

    names: Sequence[str]
    _quality: dict[str, float] = field(init=False)
    _rewards: dict[str, list[float]] = field(init=False)
    _front: list[tuple[float, ...]] = field(default_factory=list)
    _pending: dict[str, tuple[tuple[str, ...], tuple[float, ...] | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._quality = dict.fromkeys(self.names, 0.5)
        self._rewards = {name: [] for name in self.names}

    def learn(self, key: str, losses: Sequence[float] | None, mutations: Sequence[str] = ()) -> None:
        """Take in what came of a candidate.

        Args:
            key: What tells it from all others.
            losses: Its losses, all minimised; None if it failed.
            mutations: What made it of its parents, each one of `names`; none for what was sampled.
        """
        self._pending[key] = (tuple(mutations), None if losses is None else tuple(losses))

    def probabilities(self) -> Mapping[str, float]:
        """Return the probability of each mutation, with all that was learned taken in."""
        told = [losses for _, losses in self._pending.values() if losses is not None]
        if told:
            known = np.array(sorted({*self._front, *told}))
            self._front = [tuple(row) for row in known[non_dominated(known)].tolist()]
        best = set(self._front)
        for key in sorted(self._pending):
            mutations, losses = self._pending[key]
            reward = float(losses in best)
            for name in sorted(set(mutations)):
                self._quality[name] += RATE * (reward - self._quality[name])
                self._rewards[name].append(reward)
        self._pending.clear()
        total = sum(self._quality.values())
        even = 1.0 / len(self.names)
        return {
            name: LEAST_SHARE * even + (1 - LEAST_SHARE) * (self._quality[name] / total if total > 0 else even)
            for name in self.names
        }

    def tallies(self) -> Mapping[str, Tally]:
        """Return what came of each mutation so far."""
        probabilities = self.probabilities()
        return {
            name: Tally(len(rewards), float(np.mean(rewards)) if rewards else 0.0, probabilities[name])
            for name, rewards in self._rewards.items()
        }
