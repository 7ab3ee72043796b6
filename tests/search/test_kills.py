"""kill -9 of the driver and of what does its tasks, at random moments: the run ends as one that nothing happened to."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.search.fault_tasks import PIDS
from tests.search.processes import Marked
from tests.search.test_faults import kinds
from tests.search.test_run import RESULTS, rows

PATIENCE = {"processes": 20.0, "ray": 120.0}
"""Seconds in which everything has ended. Of Ray's own processes, agents look for their cluster for 60 s, and those that
were only starting for 25 s; what does a task ends within `TASK_SECONDS`."""

TASK_SECONDS = 20.0


def start(root: Path, kind: str, generations: int, pids: Path) -> Marked:
    for path in pids.iterdir():
        path.unlink()
    return Marked(["-m", "tests.search.fault_tasks", str(root), kind, str(generations)], **{PIDS: str(pids)})


def evaluated(root: Path) -> int:
    try:
        return len(rows(root, "id"))
    except sqlite3.OperationalError:  # the database is made a moment before its table
        return 0


def left_of_tasks(run: Marked, pids: Path) -> set[int]:
    """Return the processes of tasks, and those that look after them, that still run after `TASK_SECONDS`."""
    texts = {int(path.name): path.read_text().split() for path in pids.iterdir()}
    numbers = texts.keys() | {int(text[1]) for text in texts.values() if len(text) == 2}
    deadline = time.monotonic() + TASK_SECONDS
    while (alive := numbers.intersection(run.alive())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def kill_a_worker(pids: Path, killed: set[str], rng: random.Random, kind: str) -> None:
    """Kill the process of a task that has lost none yet in this driver's life, or the one that looks after it."""
    for path in rng.sample(sorted(pids.iterdir()), k=len(list(pids.iterdir()))):
        text = path.read_text().split()
        if len(text) == 2 and text[0] not in killed:
            with suppress(ProcessLookupError):
                os.kill(int(text[1]) if kind == "ray" and rng.random() < 0.5 else int(path.name), signal.SIGKILL)
                killed.add(text[0])
                return


def check_kills(tmp_path: Path, kind: str, moments: int, generations: int) -> None:
    whole, cut, pids = tmp_path / "whole", tmp_path / "cut", tmp_path / "pids"
    pids.mkdir()
    run = start(whole, kind, generations, pids)
    run.finish()
    assert run.left(PATIENCE[kind]) == []

    rng, gone = random.Random(0), list[Marked]()
    run, killed, seen, hits = start(cut, kind, generations, pids), set[str](), 0, 0
    for _ in range(moments):
        # Somewhere between the start, at which nothing runs yet, and the end of the next task or two.
        deadline = time.monotonic() + 60
        while not list(pids.iterdir()) and run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1.5 * rng.random())
        if rng.random() < 0.5:
            kill_a_worker(pids, killed, rng, kind)
            time.sleep(0.2 * rng.random())
        hits += run.process.poll() is None
        run.kill()
        assert left_of_tasks(run, pids) == set()
        gone.append(run)
        assert evaluated(cut) >= seen
        seen = evaluated(cut)
        run, killed = start(cut, kind, generations, pids), set()
    run.finish()
    assert run.left(PATIENCE[kind]) == []
    assert [line for dead in gone for line in dead.left(PATIENCE[kind])] == []
    assert hits > moments / 2
    assert rows(cut, RESULTS) == rows(whole, RESULTS)
    assert (cut / "front.json").read_text() == (whole / "front.json").read_text()
    names = [sorted(path.name for path in (root / "best").iterdir()) for root in (cut, whole)]
    assert names[0] == names[1]


@pytest.mark.slow  # two minutes on a busy machine
@pytest.mark.parametrize("kind", kinds("processes", "ray"))
def test_three_kills_change_nothing(tmp_path: Path, kind: str) -> None:
    check_kills(tmp_path, kind, 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds("processes", "ray"))
def test_twenty_kills_change_nothing(tmp_path: Path, kind: str) -> None:
    # As many tasks as are done between twenty kills: two or three in each life on processes, one or two on Ray.
    check_kills(tmp_path, kind, 20, {"processes": 20, "ray": 5}[kind])
