"""A run's numbers as they are stored: one row for each provider of each case, and what they were measured with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.hardware import machine

STAR = "star"
"""The provider that is ours: the public operator with the backend that serves it by default."""

REFERENCE = "reference"
"""Ours in plain torch. It is compared with, but is no rival."""

FORMAT = 2


@dataclass(frozen=True)
class Row:
    """One provider at one case.

    Attributes:
        operator: Public name.
        case: `Case.name`.
        mode: "fwd", "full" (forward and backward) or "step".
        provider: "star", "reference" or a rival.
        backend: What served ours: "cpp", "triton", "reference"; empty for a rival.
        dtype: Such as "float32".
        shape: Axis lengths and options.
        flags: The case's.
        threads: torch's.
        median_s: Seconds a call.
        p20_s: 20th percentile.
        p80_s: 80th percentile.
        samples: How many.
        calls_per_sample: Calls that a sample averages over.
        bytes: Read and written by the counting rules (`bench.work`).
        flops: Operations of matrix products, by them.
        exps: Exponentials, by them.
        fmas: Other multiply-adds, by them.
        percents: Percent of the rate of every ceiling that the counting rules touch, measured in the same rounds:
            "copy", "matmul", "exp+fma".
        ceiling: The one that binds: of which the percentage is largest.
        percent_of_ceiling: That percentage.
        ratio: This provider's time / ours in the same round, the median; above 1, ours is faster.
        ratio_p20: 20th percentile of it.
        ratio_p80: 80th percentile of it.
        best_peer: On our row, the fastest rival; empty without one.
        ratio_to_best_peer: On our row, its `ratio`.
        peak_bytes: Largest sum of live tensors that one call made.
        others_percent: Percent of the usable processors' time that others took while the case was measured; None where
            the system does not tell.
        device: Processor or GPU.
        versions: torch's and ours.
        date: UTC, to the second.
    """

    operator: str
    case: str
    mode: str
    provider: str
    backend: str
    dtype: str
    shape: dict[str, Any]
    flags: list[str]
    threads: int
    median_s: float
    p20_s: float
    p80_s: float
    samples: int
    calls_per_sample: int
    bytes: int
    flops: int
    exps: int
    fmas: int
    percents: dict[str, float]
    ceiling: str
    percent_of_ceiling: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    best_peer: str
    ratio_to_best_peer: float | None
    peak_bytes: int
    others_percent: float | None
    device: str
    versions: str
    date: str


@dataclass(frozen=True)
class Absent:
    """A rival that applies to a case and gave no number, with the reason."""

    operator: str
    case: str
    mode: str
    provider: str
    reason: str


@dataclass(frozen=True)
class Results:
    """A run.

    Attributes:
        machine: `bench.hardware.machine`.
        date: UTC, when it was stored.
        quick: Whether it was a quick run.
        load: The system's load average before it started: processes that ran beside it.
        rows: What was measured.
        absent: What was not.
    """

    machine: dict[str, Any]
    date: str
    quick: bool
    load: float
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]


def now() -> str:
    """Return the date and time as stored."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> str:
    """Name what was measured with what."""
    try:
        own = version("star-arch")
    except PackageNotFoundError:
        own = "from source"
    return f"torch {torch.__version__}, star-arch {own}"


def write_results(path: Path, rows: Iterable[Row], absent: Iterable[Absent], *, quick: bool, load: float) -> None:
    """Store a run as JSON, whole or not at all; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "machine": machine(),
        "date": now(),
        "quick": quick,
        "load": load,
        "rows": [asdict(row) for row in rows],
        "absent": [asdict(one) for one in absent],
    }
    whole = path.with_name(f"{path.name}.new")
    whole.write_text(json.dumps(content, indent=1) + "\n")
    whole.replace(path)


def read_results(path: Path) -> Results:
    """Read a stored run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one that `write_results` of this version wrote.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"path: {path} is not JSON: {error}") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise ValueError(f"path: {path} is no result file of format {FORMAT}; make one with `pytest bench/`")
    names = {field.name for field in fields(Row)}
    for row in content["rows"]:
        if set(row) != names:
            raise ValueError(f"path: {path} has a row with other fields: {', '.join(sorted(names ^ set(row)))}")
    rows = tuple(Row(**row) for row in content["rows"])
    absent = tuple(Absent(**one) for one in content["absent"])
    return Results(dict(content["machine"]), content["date"], content["quick"], content["load"], rows, absent)
