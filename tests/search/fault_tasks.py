"""Tasks that fail in every way there is, for all workers.

Every process that does one imports this module, which therefore imports no more than doing a task does. A task does
what the first letters of its genome's hash say: in a search, a letter of `FAULTS`; elsewhere, a name.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import parent_process
from pathlib import Path
from unittest.mock import patch

import torch

from search import evaluate
from search.evaluate import Outcome, Task
from search.evaluation import Status
from search.train import Diverged
from tests.search.invented import invented

FAULTS = {"0": "raise", "1": "nan", "2": "hang", "3": "memory", "4": "kill"}
STATUSES = {
    "raise": Status.CRASH,
    "nan": Status.NAN,
    "hang": Status.TIMEOUT,
    "memory": Status.OOM,
    "kill": Status.CRASH,
}

PIDS = "STAR_TEST_PIDS"
"""Names a folder where every task's process leaves its number and that of the one that looks after it."""

ENDS = "STAR_TEST_ENDS"
"""Names a folder where every task that has left its result adds a letter to a file that is named as its result."""


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
        outcome = evaluate.run_task(task, report)
    if folder := os.environ.get(ENDS):
        with Path(folder, task.result_path.name).open("a") as file:
            file.write("x")
    return outcome


def do_fail(task: Task, report: Callable[[int, float], None]) -> Outcome:
    """Do a task that may fail."""
    with patch.object(evaluate, "_train", fail):
        return evaluate.run_task(task, report)
