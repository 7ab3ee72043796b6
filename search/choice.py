"""Which of several mutations to apply, learned from what came of them.

Probability matching: Goldberg, "Probability matching, the magnitude of reinforcement, and classifier system bidding",
Machine Learning 5, 1990; with a least probability, Thierens, "An adaptive pursuit strategy for allocating operator
probabilities", GECCO 2005, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

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

    A candidate's reward is 1 if its losses dominate a parent's, 1/2 if no parent's dominate its, and else 0; all
    mutations that made it share it. Rewards count from the next draw on, in an order that does not depend on the one
    they came in, so that a search is the same whatever order results arrive in between two draws.

    Attributes:
        names: Of the mutations, at least one.
    """

    names: Sequence[str]
    _quality: dict[str, float] = field(init=False)
    _rewards: dict[str, list[float]] = field(init=False)
    _losses: dict[str, tuple[float, ...]] = field(default_factory=dict)
    _pending: dict[str, tuple[tuple[str, ...], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._quality = dict.fromkeys(self.names, 0.5)
        self._rewards = {name: [] for name in self.names}

    def learn(
        self, key: str, losses: Sequence[float] | None, parents: Sequence[str] = (), mutations: Sequence[str] = ()
    ) -> None:
        """Take in what came of a candidate.

        Args:
            key: What tells it from all others.
            losses: Its losses, all minimised; None if it failed.
            parents: Keys of its parents; those that were never told count for nothing.
            mutations: What made it of them, each one of `names`; none for what was sampled.
        """
        if losses is not None:
            self._losses[key] = tuple(losses)
        if mutations:
            known = [self._losses[parent] for parent in parents if parent in self._losses]
            self._pending[key] = (tuple(mutations), 0.0 if losses is None else _reward(losses, known))

    def probabilities(self) -> Mapping[str, float]:
        """Return the probability of each mutation, with all that was learned taken in."""
        for key in sorted(self._pending):
            mutations, reward = self._pending[key]
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


def _reward(losses: Sequence[float], parents: Sequence[Sequence[float]]) -> float:
    if any(_dominates(losses, parent) for parent in parents):
        return 1.0
    return 0.0 if any(_dominates(parent, losses) for parent in parents) else 0.5


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))
