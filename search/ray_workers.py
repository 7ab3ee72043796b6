"""Candidates on a Ray cluster, or on a Ray that is started on this machine for the search.

Every candidate is a plain task in a Ray process of its own, which looks after one more process: deadline, memory limit
and a second try after death by a signal are those of `search.workers.ProcessWorkers`. Nodes that see the run folder
leave result and weights there; the others send them back as the task's return value.
"""

from __future__ import annotations

import errno
import os
import pickle
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from search.evaluate import Outcome, Task
from search.evaluation import Status
from search.ray_task import CORPUS, Board, Delivery, Parcel, do_task, files_of, write_files
from search.settings import Settings, SettingsError
from search.store import write_json
from search.workers import Care, Line, Progress, at_once, finished

RETRIES = 2
"""How often Ray begins a task anew whose node or process was lost."""

POLL_SECONDS = 1.0

CONNECT_SECONDS = 10.0
"""How long an address may take to answer."""


@dataclass(frozen=True)
class _Running:
    task: Task
    parcel: Parcel
    started: float
    tries: int


class RayWorkers:
    """Does tasks on a Ray cluster; trainings beside one another, a measurement alone on its node.

    Args:
        settings: `ray_address`, `gpus_per_task` and `jobs` are read.
        care: How a task is done on its node.
    Raises:
        SettingsError: Ray is not installed, no cluster answers, or no node of it has what a task asks for.
    """

    def __init__(self, settings: Settings, care: Care) -> None:
        try:
            import ray
        except ImportError as error:
            raise SettingsError("workers: ray needs the package ray: pip install 'star-arch[ray]'") from error
        self._ray = ray
        self._care, self._gpus, self._jobs = care, settings.gpus_per_task, settings.jobs
        self._running: dict[Any, _Running] = {}
        self._corpus: Any = None
        self._start(settings.ray_address)
        try:
            self._nodes = self._fitting_nodes()
        except SettingsError:
            self.close()
            raise
        # A process that has done a task does the next one without the imports; but the GPUs that its candidates see are
        # those of its first task.
        self._remote = ray.remote(max_calls=1 if self._gpus else 0, max_retries=RETRIES)(do_task)
        self._board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()

    def _start(self, address: str | None) -> None:
        _check(address)
        # Ray tells its makers how it is used, unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local: dict[str, Any] = {} if address else {"include_dashboard": False, "num_cpus": self._jobs or None}
        try:
            self._ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            reason = _first_line(error)
            if "InvalidAuthToken" in str(error.__cause__):  # Ray itself says that it could not connect
                reason = "it wants its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN if Ray has not kept it here"
            raise SettingsError(
                f"ray_address: no Ray cluster can be used at {address or 'this machine'}: {reason}"
            ) from error

    def _fitting_nodes(self) -> dict[str, dict[str, float]]:
        """Return the resources of every node that a task fits on, by its id."""
        alive = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        if self._gpus:
            most = max((resources.get("GPU", 0.0) for resources in alive.values()), default=0.0)
            if self._gpus > most:
                raise SettingsError(
                    f"gpus_per_task: no node of the Ray cluster has {self._gpus:g} GPUs; the most is {most:g}"
                )
        fitting = {
            node: resources
            for node, resources in alive.items()
            if resources.get("CPU", 0.0) >= 1 and resources.get("GPU", 0.0) >= self._gpus
        }
        if not fitting:
            raise SettingsError("workers: no node of the Ray cluster has a CPU for a task")
        return fitting

    def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
        """See `search.workers.Workers`; without `Settings.jobs`, as many at once as `search.workers.at_once` says."""
        most = jobs if self._jobs else at_once(tasks, jobs, sum(map(self._room, self._nodes.values())))
        line = Line(tasks)
        while not line.over or self._running:
            while len(self._running) < most and (task := line.next()) is not None:
                if (outcome := finished(task)) is not None:
                    yield task, outcome
                else:
                    self._submit(_Running(task, self._parcel(task), time.monotonic(), 0))
            if self._running:
                yield from self._step(progress)

    def _parcel(self, task: Task) -> Parcel:
        manifest = (task.work / "corpus.json").read_bytes()
        return Parcel(pickle.dumps((task, self._care)), manifest, self._beside(task), files_of(task))

    def _beside(self, task: Task) -> int:
        """Return how many tasks can meet on one node, and share its memory."""
        if task.stage == "measure":
            return 1
        room = max(map(self._room, self._nodes.values()))
        return max(1, min(room, self._jobs or room))

    def _room(self, node: dict[str, float]) -> int:
        """Return how many trainings a node has room for."""
        return int(min(node["CPU"], node["GPU"] / self._gpus if self._gpus else node["CPU"]))

    def _submit(self, running: _Running) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": self._gpus}
        if running.task.stage == "measure":
            # All of the node's CPUs, so that nothing of Ray's runs there meanwhile; always the same node, so that times
            # compare: this one, if it can be.
            here = self._ray.get_runtime_context().get_node_id()
            node = here if here in self._nodes else min(self._nodes)
            pinned = NodeAffinitySchedulingStrategy(node, soft=False)
            options |= {"num_cpus": self._nodes[node]["CPU"], "scheduling_strategy": pinned}
        reference = self._remote.options(**options).remote(running.parcel, self._corpus, self._board)
        self._running[reference] = running

    def _step(self, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
        """Wait a moment for news; pass progress on, and yield what is done."""
        done, _ = self._ray.wait(list(self._running), timeout=POLL_SECONDS)
        self._pass_on(progress)
        for reference in done:
            running = self._running.pop(reference)
            if (outcome := self._outcome(reference, running)) is not None:
                yield running.task, outcome

    def _pass_on(self, progress: Progress) -> None:
        tasks = {running.task.genome_hash: running.task for running in self._running.values()}
        try:
            news = self._ray.get(self._board.take.remote(), timeout=POLL_SECONDS)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError):
            news = {}  # its node is gone, and it starts again on another
        for genome_hash, (step, loss) in news.items():
            if genome_hash in tasks:
                progress(tasks[genome_hash], step, loss)

    def _outcome(self, reference: Any, running: _Running) -> Outcome | None:
        """Return how a task ended, with everything in the run folder; None if it was submitted again."""
        task, seconds = running.task, time.monotonic() - running.started
        errors = self._ray.exceptions
        try:
            delivery: Delivery | None = self._ray.get(reference)
        except errors.OutOfMemoryError as error:
            return Outcome(Status.OOM, {}, seconds, _first_line(error))
        except errors.RayTaskError as error:
            raise SettingsError(f"workers: a node of the Ray cluster can't do tasks: {error.cause!r}") from error
        except errors.RayError as error:
            if task.stage == "measure" and running.tries < RETRIES:
                # It was bound to a node that is gone.
                self._nodes = self._fitting_nodes()
                self._submit(replace(running, tries=running.tries + 1))
                return None
            return Outcome(Status.CRASH, {}, seconds, f"lost by Ray {RETRIES + 1} times: {_first_line(error)}")
        if delivery is None:
            self._corpus = self._corpus or self._ray.put(
                {name: np.fromfile(task.work / name, dtype=np.uint8) for name in CORPUS}
            )
            self._submit(running)
            return None
        if delivery.outcome is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(task.work))
        write_files(task.work, delivery.files)
        write_json(task.result_path, delivery.outcome.to_json())
        return delivery.outcome

    def close(self) -> None:
        """See `search.workers.Workers`; a Ray that was started for the search ends with it."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()


def _check(address: str | None) -> None:
    """Refuse an address at once that nothing answers at: Ray itself looks for two minutes."""
    if address in (None, "auto"):
        return
    host, _, port = str(address).rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise SettingsError(f"ray_address: needs HOST:PORT or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise SettingsError(f"ray_address: nothing answers at {address}: {error.strerror or error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
