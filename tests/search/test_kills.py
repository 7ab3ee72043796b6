"""kill -9 of the driver and of what does its tasks, at random moments: the run ends as one that nothing happened to."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import pytest

from search.evaluation import Status
from search.store import Store
from tests.search.fault_tasks import ENDS, PIDS
from tests.search.processes import Marked
from tests.search.ray_cluster import answers, cluster
from tests.search.test_faults import kinds
from tests.search.test_run import RESULTS, rows

PATIENCE = {"processes": 20.0, "ray": 120.0}
"""Seconds in which everything has ended. Of Ray's own processes, agents look for their cluster for 60 s, and those that
were only starting for 25 s; what does a task ends within `TASK_SECONDS`."""

TASK_SECONDS = 20.0

START_SECONDS = 300.0
"""In which a driver's first task has begun, on a busy machine too."""

SEARCH = "import sys; from tests.search.fault_search import main; main(*sys.argv[1:])"
"""The driver. No file of its own, which every process that does a task would run again."""


def start(root: Path, kind: str, generations: int, pids: Path, mode: str = "generations", *address: str) -> Marked:
    for path in pids.iterdir():
        path.unlink()
    ends = ends_of(root)
    ends.mkdir(exist_ok=True)
    command = ["-c", SEARCH, str(root), kind, str(generations), mode, *address]
    return Marked(command, **{PIDS: str(pids), ENDS: str(ends)})


def ends_of(root: Path) -> Path:
    return root.with_name(f"{root.name}-ends")


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


def check_ends(root: Path, kills: int) -> None:
    """Assert that no task was done to its end twice, and each once, but for those killed as they said so."""
    times = {path.name: len(path.read_text()) for path in ends_of(root).iterdir()}
    assert {name: count for name, count in times.items() if count != 1} == {}
    logged = {genome_hash for (genome_hash,) in rows(root, "genome_hash")}
    trained = {name.split(".")[0] for name in times}
    assert trained <= logged
    assert len(logged - trained) <= kills


def check_kills(tmp_path: Path, kind: str, moments: int, generations: int) -> None:
    whole, cut, pids = tmp_path / "whole", tmp_path / "cut", tmp_path / "pids"
    pids.mkdir()
    # What a task gives does not depend on who does it, and a fresh process takes seconds less than a task of Ray's.
    run = start(whole, "processes", generations, pids)
    run.finish()
    assert run.left(PATIENCE["processes"]) == []
    kill_and_resume(cut, kind, moments, generations, pids, "generations")
    check_ends(whole, 0)
    check_ends(cut, moments)
    assert rows(cut, RESULTS) == rows(whole, RESULTS)
    assert (cut / "front.json").read_text() == (whole / "front.json").read_text()
    names = [sorted(path.name for path in (root / "best").iterdir()) for root in (cut, whole)]
    assert names[0] == names[1]


def kill_and_resume(cut: Path, kind: str, moments: int, generations: int, pids: Path, mode: str) -> None:
    """Kill a search so many times, and let it come to its end; no process is left."""
    rng, gone = random.Random(0), list[Marked]()
    run, killed, seen, hits = start(cut, kind, generations, pids, mode), set[str](), 0, 0
    for _ in range(moments):
        # Four times of five between the start of a task and the end of the next; once before there is one.
        early = rng.random() < 0.2
        deadline = time.monotonic() + (10.0 * rng.random() if early else START_SECONDS)
        while not list(pids.iterdir()) and run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.0 if early else 1.5 * rng.random())
        if rng.random() < 0.5:
            kill_a_worker(pids, killed, rng, kind)
            time.sleep(0.2 * rng.random())
        hits += run.process.poll() is None and bool(list(pids.iterdir()))
        run.kill()
        assert left_of_tasks(run, pids) == set()
        gone.append(run)
        assert evaluated(cut) >= seen
        seen = evaluated(cut)
        run, killed = start(cut, kind, generations, pids, mode), set()
    run.finish()
    assert run.left(PATIENCE[kind]) == []
    assert [line for dead in gone for line in dead.left(PATIENCE[kind])] == []
    assert hits > moments / 2


def check_asynchronous_kills(tmp_path: Path, kind: str, moments: int, generations: int) -> None:
    """What is asked depends on which training ends first, so that no uninterrupted search is there to compare with."""
    cut, pids = tmp_path / "cut", tmp_path / "pids"
    pids.mkdir()
    kill_and_resume(cut, kind, moments, generations, pids, "asynchronous")
    check_ends(cut, moments)
    with Store(cut) as store:
        asked = [event["genome_hash"] for event in store.events() if event["event"] == "asked"]
        candidates = [e for e in store.evaluations() if e.kind == "candidate"]
    assert len(asked) == 4 * generations
    assert sorted(e.genome_hash for e in candidates) == sorted(asked)
    assert all(e.status is Status.OK for e in candidates)
    assert {len(e.rungs) for e in candidates} == {1, 2}
    front = {member["genome_hash"] for member in json.loads((cut / "front.json").read_text())}
    assert front
    assert {path.stem for path in (cut / "best").iterdir()} == front
    assert not list((cut / "work").glob("*.json"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", kinds("processes", "ray"))
def test_twenty_kills_lose_nothing_of_an_asynchronous_search(tmp_path: Path, kind: str) -> None:
    check_asynchronous_kills(tmp_path, kind, 20, {"processes": 20, "ray": 6}[kind])


@pytest.mark.slow  # two minutes on a busy machine
@pytest.mark.parametrize("kind", kinds("processes", "ray"))
def test_three_kills_change_nothing(tmp_path: Path, kind: str) -> None:
    check_kills(tmp_path, kind, 3, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # ten minutes on an idle machine, by the time that twenty drivers take to start
@pytest.mark.parametrize("kind", kinds("processes", "ray"))
def test_twenty_kills_change_nothing(tmp_path: Path, kind: str) -> None:
    # As many tasks as are done between twenty kills: two or three in each life on processes, one or two on Ray.
    check_kills(tmp_path, kind, 20, {"processes": 20, "ray": 6}[kind])


def at_work(mark: str) -> list[str]:
    """Return the command lines of a cluster's tasks, and of what they have started."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if mark.encode() in (folder / "environ").read_bytes() and ("do_task" in line or "forkserver" in line):
                lines.append(line)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds("ray"))
def test_a_cluster_outlives_a_killed_driver_and_its_tasks_do_not(tmp_path: Path, kind: str) -> None:
    whole, cut, pids = tmp_path / "whole", tmp_path / "cut", tmp_path / "pids"
    pids.mkdir()
    start(whole, "processes", 1, pids).finish()
    for root in (whole, cut):
        ends_of(root).mkdir(exist_ok=True)
    mark = f"{ENDS}={ends_of(cut)}"
    with cluster(**{PIDS: str(pids), ENDS: str(ends_of(cut))}) as address:
        for _ in range(2):
            run = start(cut, kind, 1, pids, "generations", address)
            deadline = time.monotonic() + START_SECONDS
            while not list(pids.iterdir()) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert at_work(mark), "no task has begun"
            run.kill()
            deadline = time.monotonic() + TASK_SECONDS
            while (left := at_work(mark)) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert left == []
            assert run.left(PATIENCE[kind]) == []
            assert answers(address)
        start(cut, kind, 1, pids, "generations", address).finish()
        assert answers(address)
    check_ends(cut, 2)
    assert rows(cut, RESULTS) == rows(whole, RESULTS)
