"""What a task is on a node of a Ray cluster: a process that looks after the candidate's, as the driver does at home.

This module imports next to nothing, so that the server of `search.server` starts on its own imports while the process
does the same ones.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Delivery:
    """What comes back: the outcome, and files for the run folder, the trained weights among them.

    Attributes:
        outcome: How it ended; None where the node's disk was full.
        files: Contents by name.
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
    """Do a task in a folder of this node; return None if the node can't see the run folder and needs the corpus.

    Args:
        parcel: What to do.
        corpus: The files of `CORPUS`; None where nobody has asked for them yet.
        board: Handle of a `Board`.
    """
    # Or every candidate's process would run the file of Ray's own process again, which imports Ray.
    sys.modules["__main__"].__dict__.pop("__file__", None)
    # A driver that is killed takes the Ray that it has started along at once, but Ray's processes look for it for a
    # minute more, tried with 2.60.
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    start_server()
    task, care = pickle.loads(parcel.job)
    shared = _reads_same(task.work / "corpus.json", parcel.manifest)
    if not shared and corpus is None:
        return None
    with tempfile.TemporaryDirectory(prefix="star-") as name:
        work = Path(name)
        if shared:
            for file in CORPUS:
                (work / file).symlink_to(task.work / file)
        else:
            write_files(work, corpus or {})
        write_files(work, parcel.files)
        return _do(task, care, work, parcel.jobs, board)


def _do(task: Task, care: Care, work: Path, jobs: int, board: Any) -> Delivery:
    import dataclasses
    import errno
    from contextlib import closing

    from search.workers import ProcessWorkers

    def report(task: Task, step: int, loss: float) -> None:
        board.put.remote(task.genome_hash, step, loss)

    here = dataclasses.replace(task, work=work)
    with closing(ProcessWorkers(care)) as workers:
        try:
            [(_, outcome)] = workers.run([here], jobs, report)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return Delivery(None, {})
    return Delivery(outcome, files_of(here))


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


def _end_with(node: int) -> None:
    """Wait until the node's own process is gone, then end this one; the candidate's ends with it."""
    while os.getppid() == node:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _reads_same(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False
