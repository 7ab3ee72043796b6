"""Tasks that fail in every way there is, for all workers; `python -m tests.search.fault_tasks` runs a search on them.

A task does what the first letters of its genome's hash say: in a search, a letter of `FAULTS`; elsewhere, a name.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing import parent_process
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console

from search import evaluate
from search.driver import search
from search.evaluate import Outcome, Task
from search.evaluation import Status
from search.settings import Settings
from search.store import Store
from search.train import Diverged
from search.view import View
from search.workers import Care, make_workers
from tests.search.fake_workers import DEPTH, FakeWorkers, fake_settings, invented

FAULTS = {"0": "raise", "1": "nan", "2": "hang", "3": "memory", "4": "kill"}
STATUSES = {
    "raise": Status.CRASH,
    "nan": Status.NAN,
    "hang": Status.TIMEOUT,
    "memory": Status.OOM,
    "kill": Status.CRASH,
}

CARE = Care(grace_seconds=1.0, memory_bytes=256 * 2**20)
"""With which hangs and real allocations end soon; `do` is filled in by `fault_care`."""

PIDS = "STAR_TEST_PIDS"
"""Names a folder where every task's process leaves its number and that of the one that looks after it."""


def work_for_a_moment(task: Task, started: float, report: Callable[[int, float], None] | None) -> Outcome:
    """Take a tenth of a second or two, as long for the same genome in every run; leave weights of a few bytes."""
    if folder := os.environ.get(PIDS):
        parent = parent_process()
        looks_after = parent.pid if parent else 0
        Path(folder, str(os.getpid())).write_text(f"{task.genome_hash} {looks_after}")
    if report is not None:
        report(1, 3.0)
    time.sleep(0.1 + 0.2 * random.Random(task.genome_hash).random())
    (task.work / f"{task.genome_hash}.safetensors").write_text(task.genome_hash)
    return Outcome(Status.OK, invented(task.genome), 0.0, curve=((1, 5.0), (2, 4.0)))


def fail(task: Task, started: float, report: Callable[[int, float], None] | None) -> Outcome:
    """Fail as the genome's hash says, or do not."""
    fault = task.genome_hash if task.genome_hash in STATUSES else FAULTS.get(task.genome_hash[0])
    with (task.work / f"{task.genome_hash}.tries").open("a") as file:
        file.write("x")
    if fault == "raise":
        raise RuntimeError("the genome is cursed")
    if fault == "nan":
        raise Diverged(3, "loss", float("nan"))
    if fault == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)  # no thread of it runs on, as in a call that never comes back
    if fault == "memory":
        held = []
        while True:
            held.append(torch.ones(2**22))
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return work_for_a_moment(task, started, report)


def do_moment(task: Task, report: Callable[[int, float], None]) -> Outcome:
    """Do a task that never fails."""
    with patch.object(evaluate, "_train", work_for_a_moment):
        return evaluate.run_task(task, report)


def do_fail(task: Task, report: Callable[[int, float], None]) -> Outcome:
    """Do a task that may fail."""
    with patch.object(evaluate, "_train", fail):
        return evaluate.run_task(task, report)


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


if __name__ == "__main__":
    from tests.search import fault_tasks  # by the name under which other processes find its functions

    asked = fault_settings(sys.argv[2], generations=int(sys.argv[3]), timeout_seconds=600.0)
    fault_search(Path(sys.argv[1]), asked, fault_tasks.do_moment)
