"""The box of objectives that hypervolume is measured in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from search.evaluation import Evaluation
from search.nsga2 import FloatArray, hypervolume
from search.report_metrics import needs_log_axis

BoolArray = npt.NDArray[np.bool_]

# The reference point lies a tenth of the box outside it, so that the extreme members of a front count too.
REFERENCE_MARGIN = 1.1


@dataclass(frozen=True)
class Box:
    """What hypervolume is measured in: `low` and `high`, [objectives], each linear or a logarithm.

    The reference point lies a tenth of the box beyond `high`.
    """

    objectives: tuple[str, ...]
    log_scaled: BoolArray
    low: FloatArray
    high: FloatArray

    @classmethod
    def around(cls, corners: Sequence[Evaluation], objectives: tuple[str, ...]) -> Self:
        """Return the smallest box that holds all `corners`; an objective that spans powers of ten gets a logarithm."""
        points = _matrix(corners, objectives)
        log_scaled = np.array([needs_log_axis(column.tolist()) for column in points.T])
        bent = _bend(points, log_scaled)
        return cls(objectives, log_scaled, bent.min(axis=0), bent.max(axis=0))

    @property
    def _span(self) -> FloatArray:
        return np.where(self.high > self.low, self.high - self.low, 1.0)

    @property
    def ideal(self) -> dict[str, float]:
        """The best value of each objective."""
        return dict(zip(self.objectives, _unbend(self.low[None], self.log_scaled)[0].tolist(), strict=True))

    @property
    def reference(self) -> dict[str, float]:
        """The reference point."""
        point = _unbend((self.low + REFERENCE_MARGIN * self._span)[None], self.log_scaled)[0]
        return dict(zip(self.objectives, point.tolist(), strict=True))

    def volume(self, members: Sequence[Evaluation]) -> float:
        """Return the share of the space up to the reference point that the members dominate."""
        if not members:
            return 0.0
        # Only points inside the box count, and clipping below cannot happen: `low` is the best value there is.
        points = (_bend(_matrix(members, self.objectives), self.log_scaled) - self.low) / self._span
        return dominated_share(points)


def dominated_share(points: FloatArray) -> float:
    """Return the share of the space up to the reference point that points, [points, objectives], dominate, in a box
    from 0 to 1."""
    reference = np.full(points.shape[1], REFERENCE_MARGIN)
    whole: float = REFERENCE_MARGIN ** points.shape[1]
    return hypervolume(points, reference) / whole


def _matrix(evaluations: Sequence[Evaluation], objectives: Sequence[str]) -> FloatArray:
    return np.array([[e.metrics[name] for name in objectives] for e in evaluations], dtype=np.float64)


def _bend(points: FloatArray, log_scaled: BoolArray) -> FloatArray:
    """Take logarithms of the columns that need them."""
    return np.where(log_scaled, np.log(np.where(log_scaled, points, 1.0)), points)


def _unbend(points: FloatArray, log_scaled: BoolArray) -> FloatArray:
    return np.where(log_scaled, np.exp(np.where(log_scaled, points, 0.0)), points)
