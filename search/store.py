"""The run folder: the log of evaluations in SQLite, the settings, the front, and the weights worth keeping.

The driver is the only writer. Whatever is in `run.db` has happened; whatever is not, has not: a search that goes on
after a kill asks for the same genomes in the same order and finds their results here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from search.evaluation import FINAL, Evaluation, Status
from search.front import Front, summary_of
from search.ranking import Ranking


class RunFolderError(Exception):
    """The run folder can't be used as asked; its text is one sentence for the person who asked."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    name TEXT,
    genome TEXT NOT NULL,
    genome_hash TEXT NOT NULL,
    status TEXT NOT NULL,
    seed INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    metrics TEXT NOT NULL,
    seconds REAL NOT NULL,
    error TEXT,
    parents TEXT NOT NULL,
    repaired INTEGER NOT NULL,
    curve TEXT NOT NULL,
    details TEXT NOT NULL DEFAULT '{}',
    UNIQUE (kind, genome_hash)
);
CREATE INDEX IF NOT EXISTS evaluations_by_genome ON evaluations (genome_hash);
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, event TEXT NOT NULL);
"""
_NAMES = ("kind", "name", "genome", "genome_hash", "status", "seed", "generation", "metrics", "seconds", "error")
_COLUMNS = ", ".join((*_NAMES, "parents", "repaired", "curve", "details"))


class Store:
    """One run folder, opened for writing by one driver at a time.

    Raises:
        RunFolderError: Another search is writing to the folder, or its database is not one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._front: Front | None = None
        self._repeated: dict[str, list[Evaluation]] = {}
        self._last_id = 0  # of the rows that the front is of
        self.work = root / "work"
        self.best = root / "best"
        for folder in (root, self.work, self.best):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = (root / "run.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunFolderError(f"{root}: another search is writing to this run folder") from error
        try:
            self._db = sqlite3.connect(root / "run.db")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            if not _has_details(self._db):  # a run from before there were any
                self._db.execute("ALTER TABLE evaluations ADD COLUMN details TEXT NOT NULL DEFAULT '{}'")
        except sqlite3.DatabaseError as error:
            self._lock.close()
            raise _translated(error, root) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database and let another driver in."""
        self._db.close()
        self._lock.close()

    def add(self, *evaluations: Evaluation) -> None:
        """Append evaluations, all of them or, after a kill, none; they are on disk when this returns."""
        rows = [_to_row(evaluation) for evaluation in evaluations]
        marks = ", ".join("?" * len(_COLUMNS.split(",")))
        try:
            with self._db:
                self._db.executemany(f"INSERT INTO evaluations ({_COLUMNS}) VALUES ({marks})", rows)
        except sqlite3.DatabaseError as error:
            raise _translated(error, self.root) from error

    def record(self, event: Mapping[str, Any]) -> None:
        """Append to the journal of an asynchronous search, in which what is asked depends on the order of events."""
        try:
            with self._db:
                self._db.execute("INSERT INTO events (event) VALUES (?)", (json.dumps(event),))
        except sqlite3.DatabaseError as error:
            raise _translated(error, self.root) from error

    def events(self) -> list[dict[str, Any]]:
        """Return the journal."""
        return [json.loads(text) for (text,) in self._db.execute("SELECT event FROM events ORDER BY id")]

    def find(self, genome_hash: str, kind: str | None = None) -> Evaluation | None:
        """Return the evaluation of a genome, of one kind, or as a candidate or baseline."""
        which = "kind IN ('candidate', 'baseline')" if kind is None else "kind = ?"
        values = (genome_hash,) if kind is None else (genome_hash, kind)
        query = f"SELECT {_COLUMNS} FROM evaluations WHERE genome_hash = ? AND {which} ORDER BY id LIMIT 1"
        row = self._db.execute(query, values).fetchone()
        return None if row is None else _from_row(row)

    def evaluations(self) -> list[Evaluation]:
        """Return every evaluation in the order of the log."""
        return read_evaluations(self._db)

    def has_weights(self, evaluation: Evaluation) -> bool:
        """Tell whether the weights of an evaluation are in the run folder."""
        name = f"{evaluation.genome_hash}.safetensors"
        return (self.best / name).exists() or (self.work / name).exists()

    def keep_front(self, ranking: Ranking, *, delete: bool = True) -> list[Evaluation]:
        """Write front.json, move the front's weights to best/, and delete the weights of all others in the log.

        Args:
            ranking: How candidates are compared.
            delete: Whether to do the last; otherwise the weights of who leaves the front go back to work/.
        Returns:
            The front, as `front_of` has it.
        """
        front = self._grown_front(ranking).members()
        rows: list[dict[str, Any]] = [
            {"genome": e.genome, "genome_hash": e.genome_hash, "metrics": dict(e.metrics)} for e in front
        ]
        for row in rows:
            if repeated := self._repeated.get(row["genome_hash"]):
                row["final"] = summary_of(repeated)
        write_json(self.root / "front.json", rows)
        kept = {f"{e.genome_hash}.safetensors" for e in front}
        # What is trained and not logged yet, by a driver that was killed in between, may still enter the front.
        for path in self.work.glob("*.safetensors"):
            if path.name in kept:
                path.replace(self.best / path.name)
            elif delete and self._is_logged(path):
                path.unlink()
        for path in self.work.glob("*.checkpoint"):  # left by a driver that was killed
            if self._is_logged(path):
                path.unlink()
        for path in self.best.glob("*.safetensors"):
            if path.name not in kept and delete:
                path.unlink()
            elif path.name not in kept:
                path.replace(self.work / path.name)
        return front

    def _is_logged(self, path: Path) -> bool:
        found = self._db.execute("SELECT 1 FROM evaluations WHERE genome_hash = ? LIMIT 1", (path.name.split(".")[0],))
        return found.fetchone() is not None

    def _grown_front(self, ranking: Ranking) -> Front:
        """Return the front, with what was logged since the last time; anew where the ranking is another."""
        if self._front is None or self._front.ranking != ranking:
            self._front, self._repeated, self._last_id = Front(ranking), {}, 0
        columns = _COLUMNS.replace("curve", "'[]'")
        query = f"SELECT {columns}, id FROM evaluations WHERE id > ? ORDER BY id"
        rows = self._db.execute(query, (self._last_id,)).fetchall()
        fresh = [_from_row(row[:-1]) for row in rows]
        for evaluation in fresh:
            if evaluation.kind.startswith(FINAL):
                self._repeated.setdefault(evaluation.genome_hash, []).append(evaluation)
        self._front.update(fresh)
        self._last_id = rows[-1][-1] if rows else self._last_id
        return self._front


def read_evaluations(connection: sqlite3.Connection, *, curves: bool = True) -> list[Evaluation]:
    """Return every evaluation of a log, in its order; one from before there were details has none.

    Curves are two thirds of a log, and of the time to read it; without `curves` they are empty.
    """
    columns = _COLUMNS if _has_details(connection) else _COLUMNS.replace("details", "'{}'")
    columns = columns if curves else columns.replace("curve", "'[]'")
    return [_from_row(row) for row in connection.execute(f"SELECT {columns} FROM evaluations ORDER BY id")]


def read_curves(connection: sqlite3.Connection, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations with their curves."""
    found = []
    for evaluation in evaluations:
        query = "SELECT curve FROM evaluations WHERE kind = ? AND genome_hash = ?"
        [(curve,)] = connection.execute(query, (evaluation.kind, evaluation.genome_hash))
        found.append(replace(evaluation, curve=_curve(curve)))
    return found


def _curve(text: str) -> tuple[tuple[int, float], ...]:
    return tuple((int(step), float(loss)) for step, loss in json.loads(text))


def _has_details(connection: sqlite3.Connection) -> bool:
    return any(row[1] == "details" for row in connection.execute("PRAGMA table_info(evaluations)"))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step, so that a reader or a kill never meets half of one."""
    text = json.dumps(value, indent=2) + "\n"
    temporary = path.with_suffix(path.suffix + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunFolderError: It is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(f"{path}: not there, so this is no run folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: not readable as JSON ({error})") from error


def _to_row(evaluation: Evaluation) -> tuple[Any, ...]:
    details: dict[str, Any] = {"cached": True} if evaluation.cached else {}
    if evaluation.inherited:
        details["inherited"] = evaluation.inherited
    if evaluation.rungs:
        details["rungs"] = [dict(metrics) for metrics in evaluation.rungs]
    if evaluation.mutations:
        details["mutations"] = evaluation.mutations
    return (
        evaluation.kind,
        evaluation.name,
        evaluation.genome,
        evaluation.genome_hash,
        evaluation.status.value,
        evaluation.seed,
        evaluation.generation,
        json.dumps(dict(evaluation.metrics)),
        evaluation.seconds,
        evaluation.error,
        json.dumps(evaluation.parents),
        int(evaluation.repaired),
        json.dumps(evaluation.curve),
        json.dumps(details),
    )


def _from_row(row: tuple[Any, ...]) -> Evaluation:
    kind, name, genome, genome_hash, status, seed, generation, metrics, seconds, error, parents, repaired = row[:12]
    curve, details = row[12], json.loads(row[13])
    return Evaluation(
        genome=genome,
        genome_hash=genome_hash,
        status=Status(status),
        seed=seed,
        generation=generation,
        metrics=json.loads(metrics),
        seconds=seconds,
        error=error,
        kind=kind,
        name=name,
        parents=tuple(json.loads(parents)),
        repaired=bool(repaired),
        curve=_curve(curve),
        cached=details.get("cached", False),
        rungs=tuple(details.get("rungs", ())),
        mutations=tuple(details.get("mutations", ())),
        inherited=details.get("inherited", 0),
    )


def _translated(error: sqlite3.DatabaseError, root: Path) -> Exception:
    return full_disk(error, root / "run.db") or RunFolderError(f"{root / 'run.db'}: {error}")


def full_disk(error: sqlite3.DatabaseError, path: Path) -> OSError | None:
    """Tell a full disk, which passes, from a database that is none: None for that."""
    if "disk is full" in str(error) or "disk I/O error" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return None
