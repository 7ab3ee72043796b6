"""Candidates as jobs of SLURM, through submitit: one job a task, in a run folder that all nodes see.

In its job, a task is done as at home by `search.workers.ProcessWorkers`, with its deadline, its memory limit and a
second try after death by a signal. Jobs outlive a driver that was killed: a search that goes on waits for those that
are queued or running, and takes the results of those that are done.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.evaluate import Outcome, Task
from search.evaluation import Status
from search.settings import Settings, SettingsError
from search.workers import Care, Line, ProcessWorkers, Progress, at_once, finished

RETRIES = 2
"""How often a task whose job was lost is submitted anew."""

POLL_SECONDS = 0.5

START_MINUTES = 5
"""Part of a job's time for what is no task's: starting Python on a cold node, and reading the text."""


@dataclass
class _Running:
    task: Task
    job: Any
    started: float
    tries: int


class SlurmWorkers:
    """Does tasks as jobs, trainings beside one another, a measurement alone and with a node of its own.

    Args:
        settings: `slurm` and `jobs` are read, `gpus_per_task` and `timeout_seconds`. What `slurm` names are options of
            sbatch without their dashes, such as "partition=gpu" or "time=120". "cluster=local" runs the jobs on this
            machine, for trying out; they end with the driver.
        care: How a task is done in its job.
    Raises:
        SettingsError: submitit is not installed, SLURM's commands are not here, or an option is not KEY=VALUE.
    """

    def __init__(self, settings: Settings, care: Care) -> None:
        try:
            import submitit
        except ImportError as error:
            raise SettingsError("workers: slurm needs the package submitit: pip install 'star-arch[slurm]'") from error
        self._submitit = submitit
        self._settings, self._care = settings, care
        self._options = _options(settings.slurm)
        self._cluster = self._options.pop("cluster", "slurm")
        if self._cluster not in ("slurm", "local"):
            raise SettingsError(f"slurm: cluster needs slurm or local, got {self._cluster!r}")
        if self._cluster == "local" and self._options:
            raise SettingsError(f"slurm: cluster=local takes no other option, got {next(iter(self._options))}")
        if self._cluster == "slurm" and shutil.which("srun") is None:
            raise SettingsError("workers: slurm needs SLURM's commands, and there is no srun on this machine")
        if settings.gpus_per_task % 1:
            raise SettingsError(f"gpus_per_task: SLURM takes whole GPUs, got {settings.gpus_per_task:g}")
        self._running: list[_Running] = []

    def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
        """See `search.workers.Workers`; without `Settings.jobs`, as many at once as `search.workers.at_once` says, with
        a generation for the room of SLURM's queue."""
        limited = self._settings.jobs or self._cluster == "local"
        most = jobs if limited else at_once(tasks, jobs, self._settings.population)
        line = Line(tasks)
        while not line.over or self._running:
            while len(self._running) < most and (task := line.next()) is not None:
                if (outcome := finished(task)) is not None:
                    _note(task).unlink(missing_ok=True)
                    yield task, outcome
                else:
                    job = self._adopted(task) or self._submit(task)
                    self._running.append(_Running(task, job, time.monotonic(), 0))
            for running in [running for running in self._running if running.job.done()]:
                if (outcome := self._outcome(running)) is not None:
                    self._running.remove(running)
                    _note(running.task).unlink(missing_ok=True)
                    yield running.task, outcome
            if self._running:
                time.sleep(POLL_SECONDS)

    def _submit(self, task: Task) -> Any:
        executor = self._submitit.AutoExecutor(folder=_folder(task), cluster=self._cluster)
        seconds = (self._settings.timeout_seconds + self._care.grace_seconds) * (1 + self._care.retries)
        options: dict[str, Any] = {"exclusive": True, **self._options} if task.stage == "measure" else self._options
        executor.update_parameters(
            name=f"star-{task.stage}-{task.genome_hash[:8]}",
            timeout_min=math.ceil(seconds / 60) + START_MINUTES,
            gpus_per_node=int(self._settings.gpus_per_task),
            **({"slurm_additional_parameters": options} if self._cluster == "slurm" else {}),
        )
        job = executor.submit(do_task, task, self._care, os.getpid() if self._cluster == "local" else None)
        _note(task).write_text(job.job_id)
        return job

    def _adopted(self, task: Task) -> Any:
        """Return the job that an earlier driver submitted for a task; None where SLURM knows of none."""
        note = _note(task)
        if self._cluster == "local" or not note.exists() or not (job_id := note.read_text()):
            return None
        job = self._submitit.SlurmJob(folder=_folder(task), job_id=job_id)
        return None if job.state == "UNKNOWN" else job

    def _outcome(self, running: _Running) -> Outcome | None:
        """Return how a task ended; None if it was submitted again."""
        task = running.task
        try:
            outcome: Outcome | None = running.job.result()
        except self._submitit.core.utils.FailedJobError as error:
            last = str(error).strip().splitlines()
            raise SettingsError(f"workers: a job of SLURM can't do its task: {_raised(last)}") from error
        except self._submitit.core.utils.UncompletedJobError as error:
            if (left := finished(task)) is not None:
                return left
            if running.tries < RETRIES:
                running.job, running.tries = self._submit(task), running.tries + 1
                return None
            what = f"job {running.job.job_id} lost, as were {RETRIES} before it: {' '.join(str(error).split())[:200]}"
            return Outcome(Status.CRASH, {}, time.monotonic() - running.started, what)
        if outcome is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(task.work))
        return outcome

    def close(self) -> None:
        """See `search.workers.Workers`; cancels the jobs."""
        for running in self._running:
            running.job.cancel(check=False)
            _note(running.task).unlink(missing_ok=True)
        self._running.clear()


def do_task(task: Task, care: Care, driver: int | None) -> Outcome | None:
    """Do a task in its job, and return the outcome; None where the disk is full.

    Args:
        task: What to do.
        care: How.
        driver: Process on this machine with which the job ends; None for a job that goes on without it.
    """
    if driver is not None:
        threading.Thread(target=_end_with, args=(driver,), daemon=True).start()
    if "SLURM_MEM_PER_NODE" in os.environ and care.memory_bytes is None:
        care = dataclasses.replace(care, memory_bytes=int(os.environ["SLURM_MEM_PER_NODE"]) * 2**20)
    with closing(ProcessWorkers(care)) as workers:
        try:
            [(_, outcome)] = workers.run([task], 1, lambda *_: None)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return None
    return outcome


def _end_with(driver: int) -> None:
    """Wait until a process is gone, then end this one; the candidate's ends with it."""
    with suppress(ProcessLookupError):
        while True:
            os.kill(driver, 0)
            time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _options(texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if not all(part.strip() for part in text.partition("=")):
            raise SettingsError(f"slurm: needs KEY=VALUE, such as partition=gpu, got {text!r}")
    pairs = (text.split("=", 1) for text in texts)
    return {key.strip().lstrip("-").replace("-", "_"): value.strip() for key, value in pairs}


def _folder(task: Task) -> Path:
    return task.work / "slurm"


def _note(task: Task) -> Path:
    """Where the number of a task's job is kept, for a driver that goes on."""
    return _folder(task) / f"{task.genome_hash}.{task.stage}.job"


def _raised(lines: Sequence[str]) -> str:
    """Return the last line of a traceback that submitit has put between rulers."""
    inner = [line for line in lines if line.strip() and not line.startswith(("-", "You can check", "  -"))]
    return inner[-1] if inner else "no reason is known"
