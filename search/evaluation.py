"""One row of a search's log: a candidate, a baseline or a winner's repetition, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Status(StrEnum):
    """How an evaluation ended."""

    OK = "OK"
    INVALID = "INVALID"
    OVER_BUDGET = "OVER_BUDGET"
    NAN = "NAN"
    FLAT = "FLAT"
    OOM = "OOM"
    TIMEOUT = "TIMEOUT"
    CRASH = "CRASH"


FINAL = "final"
"""First word of the kind of an evaluation that repeats a winner's with another seed; its number is the second."""


@dataclass(frozen=True)
class Evaluation:
    """One row of the log.

    Attributes:
        genome: Canonical text.
        genome_hash: Its hash.
        status: How it ended.
        seed: Seed of its training.
        generation: From 0; -1 for a baseline.
        metrics: Objective name to value; empty unless the status is OK, or OVER_BUDGET: then what can be counted.
        seconds: Time taken, training and measurement.
        error: Why it failed, or None.
        kind: "candidate" or "baseline", or "final 1" and so on for a winner's repetitions.
        name: A baseline's name.
        parents: Hashes of the parents.
        repaired: Whether the genome came out of variation invalid and was repaired.
        curve: Training loss in nats by step.
        cached: Whether the training's result is an earlier run's.
        rungs: With successive halving, what the training gave at each rung that it reached, lowest first; empty for a
            training in one go.
        mutations: Names of the changes that made it of its parents; empty at backbone level.
        inherited: LIVs that began with a parent's weights.
    """

    genome: str
    genome_hash: str
    status: Status
    seed: int
    generation: int
    metrics: Mapping[str, float]
    seconds: float
    error: str | None = None
    kind: str = "candidate"
    name: str | None = None
    parents: tuple[str, ...] = ()
    repaired: bool = False
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    cached: bool = False
    rungs: tuple[Mapping[str, float], ...] = ()
    mutations: tuple[str, ...] = ()
    inherited: int = 0
