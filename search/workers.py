"""Where candidates are evaluated: in this process, or each in a fresh one.

A fresh process is forked from the server of `search.server`. It leads a process group of its own, writes its output to
a log in the run folder, and ends itself when the driver is gone, however the driver went. On other machines the same is
done by whoever does a task there: `search.ray_workers`, `search.slurm_workers`.
"""

from __future__ import annotations

import errno
import functools
import gc
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Protocol

import torch

from search.evaluate import Outcome, Task, run_task
from search.evaluation import Status
from search.server import fork_context
from search.settings import Settings
from search.store import read_json

REPORT_SECONDS = 0.25
"""Least time between two reports of a training's progress."""

_DISK_FULL = 77  # exit code of a process that met a full disk

Progress = Callable[[Task, int, float], None]
"""Called with a task, its training step and the loss."""

Report = Callable[[int, float], None]
"""Called in the process of a task with its training step and the loss."""


@dataclass(frozen=True)
class Care:
    """How processes do their tasks, and what becomes of those that end without a result.

    Attributes:
        do: Does a task, writes its outcome to `Task.result_path` and returns it. A function of a module, so that other
            processes find it.
        grace_seconds: What a process gets beyond its deadline, which it watches itself, before its group is killed.
        retries: How often a task whose process died of a signal is begun anew. More than one such death is the
            candidate's own.
        memory_bytes: Most private memory of a process beyond its imports. None: an equal share of the machine's.
    """

    do: Callable[[Task, Report], Outcome] = run_task
    grace_seconds: float = 30.0
    retries: int = 1
    memory_bytes: int | None = None


class Workers(Protocol):
    """Does tasks; yields each with its outcome once it is done, in any order."""

    def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
        """Do `tasks`, at most `jobs` at a time. A task whose result file is there already is not done again.

        An iterator is asked for a task when there is a place for it, so that it may depend on what was yielded until
        then. It gives None where there is none now, but may be one when the next of those that run has ended.

        Raises:
            OSError: The disk is full.
        """
        ...

    def close(self) -> None:
        """End whatever still runs."""
        ...


class Line:
    """Tasks as `Workers.run` takes them, one after the other."""

    def __init__(self, tasks: Iterable[Task | None]) -> None:
        self._tasks = iter(tasks)
        self.over = False
        """Whether there will never be one again."""

    def next(self) -> Task | None:
        """Return the next task; None where there is none now, or never again."""
        try:
            return next(self._tasks)
        except StopIteration:
            self.over = True
            return None


def at_once(tasks: Iterable[Task | None], jobs: int, room: int) -> int:
    """Return how many tasks a cluster gets at once where the user sets no limit; 1 or more.

    Trainings of a sequence wait for the cluster together, and an iterator is asked for `room` of them. A measurement
    keeps to `jobs`.
    """
    if not isinstance(tasks, Sequence):
        return max(1, room)
    return jobs if any(task and task.stage == "measure" for task in tasks) else max(1, len(tasks))


def make_workers(settings: Settings, care: Care | None = None) -> Workers:
    """Return the workers of `Settings.workers`.

    Raises:
        SettingsError: They can't be had here: a package is not installed, a cluster does not answer or has too little.
    """
    care = care or Care()
    if settings.workers == "ray":
        from search.ray_workers import RayWorkers

        return RayWorkers(settings, care)
    if settings.workers == "slurm":
        from search.slurm_workers import SlurmWorkers

        return SlurmWorkers(settings, care)
    return InlineWorkers(care) if settings.workers == "inline" else ProcessWorkers(care)


class InlineWorkers:
    """Does every task in this process, one after the other: for debuggers, and where processes can't be started."""

    def __init__(self, care: Care | None = None) -> None:
        self._care = care or Care()

    def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
        """See `Workers`."""
        line = Line(tasks)
        while (task := line.next()) is not None:
            yield task, finished(task) or self._care.do(task, functools.partial(progress, task))

    def close(self) -> None:
        """See `Workers`; nothing is left to end."""


@dataclass
class _Running:
    task: Task
    process: ForkServerProcess
    connection: Connection
    started: float
    retries: int

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class ProcessWorkers:
    """Does each task in a fresh process, and tells how those ended that could not tell themselves."""

    def __init__(self, care: Care | None = None) -> None:
        self._care = care or Care()
        self._context = fork_context()
        self._running: list[_Running] = []

    def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
        """See `Workers`."""
        line = Line(tasks)
        while not line.over or self._running:
            while len(self._running) < jobs and (task := line.next()) is not None:
                if (outcome := finished(task)) is not None:
                    yield task, outcome
                else:
                    self._running.append(self._start(task, jobs, self._care.retries))
            for running in self._step(progress):
                outcome = self._outcome(running)
                if outcome is None:
                    self._running.append(self._start(running.task, jobs, running.retries - 1))
                else:
                    yield running.task, outcome

    def _start(self, task: Task, jobs: int, retries: int) -> _Running:
        ours, theirs = self._context.Pipe(duplex=False)
        limit = self._care.memory_bytes or physical_memory() // max(1, jobs)
        process = self._context.Process(target=_main, args=(self._care.do, task, theirs, limit), daemon=True)
        process.start()
        theirs.close()
        return _Running(task, process, ours, time.monotonic(), retries)

    def _overdue(self, running: _Running) -> bool:
        return running.seconds > running.task.settings.timeout_seconds + self._care.grace_seconds

    def _step(self, progress: Progress) -> list[_Running]:
        """Wait a moment for news; pass progress on, and return those that ended."""
        if not self._running:
            return []
        wait(
            [item for running in self._running for item in (running.process.sentinel, running.connection)], timeout=1.0
        )
        ended = []
        for running in list(self._running):
            _drain(running, progress)
            if running.process.exitcode is None and self._overdue(running):
                _kill_group(running.process)
            if running.process.exitcode is not None:
                running.process.join()
                # The leader's end does not end what it started.
                _kill_group(running.process)
                running.connection.close()
                self._running.remove(running)
                ended.append(running)
        return ended

    def close(self) -> None:
        """See `Workers`."""
        for running in self._running:
            _kill_group(running.process)
            running.process.join()
            running.connection.close()
        self._running.clear()

    def _outcome(self, running: _Running) -> Outcome | None:
        """Return what the process wrote or, where it could not write, what its end says; None for one more try."""
        task, code = running.task, running.process.exitcode
        if code == _DISK_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(task.work))
        if (outcome := finished(task)) is not None:
            return outcome
        if self._overdue(running):
            error = f"no result {self._care.grace_seconds:g} s past its deadline; killed"
            return Outcome(Status.TIMEOUT, {}, running.seconds, error)
        end = f"ended with exit code {code} and no result"
        if code is not None and code < 0:
            if running.retries:
                return None
            end = f"killed by {signal.Signals(-code).name}" + (", as on its first try" if self._care.retries else "")
        log = _log_path(task)
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return Outcome(Status.CRASH, {}, running.seconds, f"{end}: {lines[-1]}" if lines else end)


def finished(task: Task) -> Outcome | None:
    """Return the outcome that an earlier driver's process left, if it did."""
    return Outcome.from_json(read_json(task.result_path)) if task.result_path.exists() else None


def _drain(running: _Running, progress: Progress) -> None:
    try:
        while running.connection.poll():
            step, loss = running.connection.recv()
            progress(running.task, step, loss)
    except (EOFError, ConnectionResetError):
        # The process has closed its end: it is ending, and its exit code tells how.
        return


def _log_path(task: Task) -> Path:
    return task.result_path.with_suffix(".log")


def _kill_group(process: ForkServerProcess) -> None:
    """Kill the process and all that it started. Before it leads its own group, it has started nothing."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        if process.exitcode is None:
            process.kill()


def physical_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _private_memory() -> int:
    """Return the bytes that RLIMIT_DATA counts of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmData"].split()[0]) * 1024


def _main(do: Callable[[Task, Report], Outcome], task: Task, connection: Connection, memory_bytes: int) -> None:
    """Run in the fresh process."""
    os.setsid()
    # What the server imported is never garbage: a full collection of it takes 0.13 s, and copies its pages.
    gc.freeze()
    threading.Thread(target=_end_with_driver, daemon=True).start()
    log = os.open(_log_path(task), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    if sys.platform == "linux":
        # Counts private memory alone, and that of the imports comes on top; elsewhere the limit also counts mapped
        # files, or is not kept at all.
        limit = _private_memory() + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    threads = 1 if task.stage == "train" else task.settings.measure_threads
    if threads:
        torch.set_num_threads(threads)
    last = 0.0

    def report(step: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            connection.send((step, loss))

    try:
        do(task, report)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os._exit(_DISK_FULL)
    _log_path(task).unlink()


def _end_with_driver() -> None:
    """Wait until the driver is gone, then end this process and all that it started."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    wait([driver.sentinel])
    os.killpg(0, signal.SIGKILL)
