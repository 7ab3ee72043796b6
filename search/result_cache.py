"""Results of trainings and measurements that runs share: one SQLite file, which several drivers may write to.

A result is found by all that decides it: the canonical genome, the text, the sizes, the training's settings, the seed
and torch's version; a time also by the machine, since no other machine's clock says anything about this one. Weights
are not kept: 100 kB to gigabytes for every candidate ever trained, of which one in ten enters a front. What enters a
front from here is trained again when the search ends, to the last bit as before on a machine of the same kind.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine
from search.evaluate import Outcome, Task
from search.evaluation import Status
from search.settings import SettingsError
from search.store import full_disk

SHARED = (Status.OK, Status.NAN, Status.FLAT, Status.INVALID)
"""Ends that are the genome's own doing; time and memory that ran out are another machine's."""

_FORMAT = 1  # goes up when equal settings start to give other results
_BUSY_SECONDS = 60.0  # how long one driver waits for another's writing, which takes milliseconds

_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY,
    genome TEXT NOT NULL,
    stage TEXT NOT NULL,
    status TEXT NOT NULL,
    outcome TEXT NOT NULL
) WITHOUT ROWID;
"""


class ResultCache:
    """The file at `path`, made where there is none.

    Args:
        path: Of the SQLite file.
        fingerprint: Of the corpus that the results are for.
    Raises:
        SettingsError: The file is no cache, or its folder is not there.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._machine = {**machine(), "node": platform.node()}
        try:
            # Not in WAL mode, which needs memory that all its users share: a cache may lie on a network's disk.
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS)
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise SettingsError(f"cache: {path}: {error}; needs an earlier run's cache, or a new file") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def find(self, task: Task) -> Outcome | None:
        """Return the outcome of the same task in an earlier run, with no seconds of this run's; None for a new one."""
        row = self._db.execute("SELECT outcome FROM results WHERE key = ?", (self._key(task),)).fetchone()
        return None if row is None else replace(Outcome.from_json(json.loads(row[0])), seconds=0.0, cached=True)

    def add(self, task: Task, outcome: Outcome) -> None:
        """Keep an outcome that holds for other runs too; it is on disk when this returns.

        Raises:
            OSError: The disk is full.
        """
        if outcome.status not in SHARED or outcome.cached:
            return
        row = (self._key(task), task.genome, task.stage, outcome.status.value, json.dumps(outcome.to_json()))
        try:
            with self._db:
                self._db.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.DatabaseError as error:
            raise full_disk(error, self.path) or SettingsError(f"cache: {self.path}: {error}") from error

    def _key(self, task: Task) -> str:
        settings = task.settings
        decides: dict[str, Any] = {
            "format": _FORMAT,
            "torch": torch.__version__,
            "data": self._fingerprint,
            "genome": task.genome,
            "stage": task.stage,
            "steps": task.stop or settings.steps,  # where a training began does not change where it ends
            "seed": task.seed,
            "model": asdict(settings.model_config(256)),  # of the vocabulary, the fingerprint tells
            "training": asdict(settings.train_config()),
            "probe_steps": settings.probe_steps,
            "memory": settings.timed,
            "device": settings.device,
        }
        if task.stage == "measure":
            decides |= {
                "machine": self._machine,
                "workers": settings.workers,  # a cluster's machines are others
                "threads": settings.measure_threads,
                "seconds": settings.measure_seconds,
            }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
