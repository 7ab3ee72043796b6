"""What a task is on a node of a Ray cluster: a process that looks after the candidate's, as the driver does at home.

This module imports next to nothing, so that the server of `search.server` starts on its own imports while the process
does the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.server import start_server

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from search.evaluate import Outcome, Task
    from search.workers import Care

    Files = Mapping[str, NDArray[np.uint8]]
    """Contents by name. Arrays, which Ray hands on without copying them."""

CORPUS = ("tokens.bin", "corpus.json")
REFERENCE = "reference.json"
"""What `search.evaluate` counts once a run, and takes from the run folder afterwards."""

WATCH_SECONDS = 0.5
"""Time between two looks for the node's own process."""


@dataclasses.dataclass(frozen=True)
class Parcel:
    """What a task needs on its node.

    Attributes:
        job: Pickled `Task` and `Care`: unpickling them takes the imports.
        manifest: Contents of the run folder's corpus.json: the text is taken from there where the node sees the same.
        jobs: Most tasks at once on one node.
        files: Of the run folder: those of this candidate, and `REFERENCE`.
    """

    job: bytes
    manifest: bytes
    jobs: int
    files: Files


@dataclasses.dataclass(frozen=True)
class Delivery:
    """What comes back: the outcome, and files for the run folder, the trained weights among them.

    Attributes:
        outcome: How it ended; None where the disk was full.
        files: Contents by name; none where the task was done in the run folder.
    """

    outcome: Outcome | None
    files: Files


class Board:
    """An actor that holds how far the trainings are, until the driver reads it."""

    def __init__(self) -> None:
        self._news: dict[str, tuple[int, float]] = {}

    def put(self, genome_hash: str, step: int, loss: float) -> None:
        """Note the step of a candidate's training, and its loss."""
        self._news[genome_hash] = step, loss

    def take(self) -> dict[str, tuple[int, float]]:
        """Return what is new."""
        news, self._news = self._news, {}
        return news


def do_task(parcel: Parcel, corpus: Files | None, board: Any) -> Delivery | None:
    """Do a task; return None if the node can't see the run folder and needs the corpus.

    Where the node sees the run folder, the task is done there: its result is safe as soon as it is there, and a task
    that is begun anew, after the driver or this process was killed, finds it. Elsewhere it is done in a folder of the
    node's, and everything comes back with the delivery.

    Args:
        parcel: What to do.
        corpus: The files of `CORPUS`; None where nobody has asked for them yet.
        board: Handle of a `Board`.
    """
    # Or every candidate's process would run the file of Ray's own process again, which imports Ray.
    sys.modules["__main__"].__dict__.pop("__file__", None)
    _end_with_node()
    start_server()
    task, care = pickle.loads(parcel.job)
    if _reads_same(task.work / "corpus.json", parcel.manifest) and os.access(task.work, os.W_OK):
        return Delivery(_do(task, care, parcel.jobs, board), {})
    if corpus is None:
        return None
    with tempfile.TemporaryDirectory(prefix="star-") as name:
        here = dataclasses.replace(task, work=Path(name))
        write_files(here.work, corpus)
        write_files(here.work, parcel.files)
        return Delivery(_do(here, care, parcel.jobs, board), files_of(here))


def _do(task: Task, care: Care, jobs: int, board: Any) -> Outcome | None:
    """Return how a task ended, None for a full disk."""
    import errno
    from contextlib import closing

    from search.workers import ProcessWorkers

    def report(task: Task, step: int, loss: float) -> None:
        board.put.remote(task.genome_hash, step, loss)

    with closing(ProcessWorkers(care)) as workers:
        try:
            [(_, outcome)] = workers.run([task], jobs, report)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return None
    return outcome


def files_of(task: Task) -> Files:
    """Read what a candidate has in its work folder, and what all candidates of a run have in common."""
    import numpy as np

    # A measurement takes weights of its own.
    paths = [] if task.stage == "measure" else list(task.work.glob(f"{task.genome_hash}.*"))
    paths = [path for path in paths if path.suffix not in (".log", ".new", ".json")]
    if (reference := task.work / REFERENCE).exists():
        paths.append(reference)
    return {path.name: np.fromfile(path, dtype=np.uint8) for path in paths}


def write_files(folder: Path, files: Files) -> None:
    """Write files, each of which appears once it is whole."""
    for name, content in files.items():
        temporary = folder / f"{name}.new"
        content.tofile(temporary)
        temporary.replace(folder / name)


@functools.cache
def _end_with_node() -> None:
    """See to it, once in a process, that it ends when the node's own process is gone; the candidate's ends with it.

    A driver that is killed takes the Ray that it has started along at once, but Ray's processes look for it for a
    minute more, tried with 2.60.
    """
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(node: int) -> None:
    while os.getppid() == node:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _reads_same(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False
