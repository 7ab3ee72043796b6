"""Workers that make their results up at once from the genome, and a search that runs on them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from search.driver import search
from search.evaluate import Outcome, Task
from search.evaluation import Status
from search.settings import PRESETS, Settings
from search.store import Store, read_json, write_json
from search.view import View
from search.workers import Line, Progress
from tests.search.invented import invented

DEPTH = 6
UNTIMED = ("perplexity", "cache_bytes", "parameters")


class FakeWorkers:
    """Does every task at once, fails one genome in 16, and writes what it did to `done`, [(hash, stage)].

    A training that stops early has a higher loss, by its share of the steps and some noise. After `patience` tasks the
    driver is interrupted, as by a key.
    """

    def __init__(self, results: Callable[[str], dict[str, float]] = invented, patience: int | None = None) -> None:
        self.results = results
        self.patience = patience
        self.done: list[tuple[str, str]] = []
        self.tasks: list[Task] = []

    def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
        """See `search.workers.Workers`."""
        line = Line(tasks)
        while (task := line.next()) is not None:
            if task.result_path.exists():
                yield task, Outcome.from_json(read_json(task.result_path))
                continue
            if len(self.tasks) == self.patience:
                raise KeyboardInterrupt
            self.done.append((task.genome_hash, task.stage))
            self.tasks.append(task)
            outcome = self.outcome(task)
            write_json(task.result_path, outcome.to_json())
            yield task, outcome

    def outcome(self, task: Task) -> Outcome:
        """Return what becomes of a task."""
        if task.genome_hash.startswith("0"):
            return Outcome(Status.NAN, {}, 0.0, "the loss is nan at step 3")
        metrics = self.results(task.genome)
        if task.stage == "train" and task.stop is not None:
            noise = int(hashlib.sha256(f"{task.stop} {task.genome}".encode()).hexdigest()[:4], 16) / 2**16
            metrics["perplexity"] += (3 + noise) * (1 - task.stop / task.settings.steps)
        if task.replica:
            metrics = {name: value * (1 + task.seed % 1000 / 1e4) for name, value in metrics.items()}
        return Outcome(Status.OK, metrics, 0.0, curve=((1, 5.0), (2, 4.0)))

    def close(self) -> None:
        """See `search.workers.Workers`."""


def fake_settings(**changes: Any) -> Settings:
    """Return settings of a search of 8 genomes and 5 generations."""
    base: dict[str, Any] = {"population": 8, "generations": 5, "depth": DEPTH, "objectives": UNTIMED}
    return dataclasses.replace(PRESETS["smoke"], **base | changes)


def fake_search(root: Path, settings: Settings, workers: FakeWorkers | None = None) -> list[str]:
    """Run a search on made-up results; return the genomes of its candidates in the order of the log."""
    with Store(root) as store, View(settings, Console(quiet=True)) as view:
        search(settings, store, workers or FakeWorkers(), view, lambda: None)
        return [e.genome for e in store.evaluations() if e.kind == "candidate"]
