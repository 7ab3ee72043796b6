"""Searches on the tasks of `tests.search.fault_tasks`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from rich.console import Console

from search.driver import search
from search.evaluate import Outcome, Task
from search.evaluation import Status
from search.settings import Settings
from search.store import Store
from search.view import View
from search.workers import Care, make_workers
from tests.search.fake_workers import DEPTH, FakeWorkers, fake_settings
from tests.search.fault_tasks import FAULTS, STATUSES, do_moment

CARE = Care(grace_seconds=1.0, memory_bytes=256 * 2**20)
"""With which hangs and real allocations end soon; `do` is filled in by `fault_search`."""


class FakeFaults(FakeWorkers):
    """Makes up at once what becomes of the tasks of `do_fail`."""

    def outcome(self, task: Task) -> Outcome:
        """See `FakeWorkers`."""
        if (fault := FAULTS.get(task.genome_hash[0])) is not None:
            return Outcome(STATUSES[fault], {}, 0.0)
        return Outcome(Status.OK, self.results(task.genome), 0.0)


def fault_settings(workers: str, **changes: object) -> Settings:
    """Return settings of a search of a dozen genomes."""
    cluster = {"slurm": ("cluster=local",)} if workers == "slurm" else {}
    base = {"workers": workers, "generations": 2, "population": 4, "timeout_seconds": 60.0, "jobs": 2}
    return fake_settings(**base | cluster | {"depth": DEPTH} | changes)


def fault_search(root: Path, settings: Settings, do: Callable[[Task, Callable[[int, float], None]], Outcome]) -> None:
    """Search with the workers of the settings, on tasks that `do` does."""
    care = dataclasses.replace(CARE, do=do)
    with closing(make_workers(settings, care)) as workers, Store(root) as store:

        def keep() -> None:
            store.keep_front(settings.ranking)

        (store.work / "corpus.json").write_text("{}")
        (store.work / "tokens.bin").write_text("none")
        with View(settings, Console(quiet=True)) as view:
            search(settings, store, workers, view, keep)


def main(root: str, workers: str, generations: str, mode: str, address: str | None = None) -> None:
    """Search so many generations on tasks that never fail, with workers of a kind; "asynchronous" has rungs."""
    free = {"asynchronous": True, "rungs": 2} if mode == "asynchronous" else {}
    settings = fault_settings(workers, generations=int(generations), timeout_seconds=600.0, ray_address=address, **free)
    fault_search(Path(root), settings, do_moment)
