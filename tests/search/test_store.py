"""The run folder: what is added is found again, the front is right, and a second driver is kept out."""

import dataclasses
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from search.evaluation import Evaluation, Status
from search.front import front_of, sentence_without_front
from search.ranking import Ranking, Term
from search.store import RunFolderError, Store, read_json, write_json

RANKING = Ranking(("perplexity", "cache_bytes"))


def evaluation(genome_hash: str, **changes: object) -> Evaluation:
    base = Evaluation(
        genome="11111-91111",
        genome_hash=genome_hash,
        status=Status.OK,
        seed=3,
        generation=0,
        metrics={"perplexity": 5.25, "cache_bytes": 128.0},
        seconds=1.5,
        parents=("aa", "bb"),
        repaired=True,
        curve=((1, 5.5), (2, 5.25)),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_what_is_added_is_found_again(tmp_path: Path) -> None:
    rows = [
        evaluation("a"),
        evaluation("b", status=Status.NAN, metrics={}, error="the loss is nan"),
        evaluation("c", kind="baseline", name="Transformer++", generation=-1),
    ]
    with Store(tmp_path) as store:
        for row in rows:
            store.add(row)
    with Store(tmp_path) as store:
        assert store.evaluations() == rows
        assert store.find("b") == rows[1]
        assert store.find("nothing") is None


def test_an_evaluation_is_logged_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(evaluation("a"))
        with pytest.raises(RunFolderError, match="UNIQUE"):
            store.add(evaluation("a"))


def test_a_second_driver_is_kept_out(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(RunFolderError, match="another search is writing"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_a_database_that_is_none_fails_clearly(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_text("this is no database, and long enough to be looked at as one " * 100)
    with pytest.raises(RunFolderError, match=r"run\.db: file is not a database"):
        Store(tmp_path)


def test_front_leaves_out_the_dominated_the_failed_and_the_baselines() -> None:
    rows = [
        evaluation("a", metrics={"perplexity": 5.0, "cache_bytes": 100.0}),
        evaluation("b", metrics={"perplexity": 4.0, "cache_bytes": 200.0}),
        evaluation("c", metrics={"perplexity": 5.5, "cache_bytes": 100.0}),
        evaluation("d", metrics={}, status=Status.OOM),
        evaluation("e", metrics={"perplexity": 1.0, "cache_bytes": 1.0}, kind="baseline", name="x"),
    ]
    assert [row.genome_hash for row in front_of(rows, RANKING)] == ["b", "a"]
    assert front_of(rows[3:], RANKING) == []


def test_front_leaves_out_what_breaks_the_budget() -> None:
    rows = [
        evaluation("a", metrics={"perplexity": 5.0, "cache_bytes": 100.0}),
        evaluation("b", metrics={"perplexity": 4.0, "cache_bytes": 201.0}),
        evaluation("c", metrics={"perplexity": 5.5, "cache_bytes": 200.0}),
        evaluation("d", metrics={"cache_bytes": 210.0}, status=Status.OVER_BUDGET),
    ]
    within = dataclasses.replace(RANKING, budget=(Term.parse("cache_bytes<=200"),))
    assert [row.genome_hash for row in front_of(rows, within)] == ["a"]
    nowhere = dataclasses.replace(RANKING, budget=(Term.parse("cache_bytes<=50"),))
    assert front_of(rows, nowhere) == []
    sentence = sentence_without_front(rows, nowhere)
    assert sentence == (
        "No candidate keeps the budget, so there is no front to show; the nearest, a, needs cache_bytes<=50: is 100."
    )
    assert "No candidate has succeeded" in sentence_without_front(rows[:0], nowhere)


def test_several_evaluations_are_added_whole_or_not_at_all(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(evaluation("a"))
        with pytest.raises(RunFolderError, match="UNIQUE"):
            store.add(evaluation("b"), evaluation("a"))
        assert [row.genome_hash for row in store.evaluations()] == ["a"]
        store.add(evaluation("b"), evaluation("c"))
        assert [row.genome_hash for row in store.evaluations()] == ["a", "b", "c"]


def test_keep_front_keeps_the_fronts_weights_alone(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(evaluation("a", metrics={"perplexity": 5.0, "cache_bytes": 100.0}))
        store.add(evaluation("c", metrics={"perplexity": 5.5, "cache_bytes": 100.0}))
        for name in "acu":
            (store.work / f"{name}.safetensors").write_text(name)
        store.keep_front(RANKING)
        assert [path.name for path in store.best.iterdir()] == ["a.safetensors"]
        # "u" is trained and not logged yet.
        assert [path.name for path in store.work.glob("*.safetensors")] == ["u.safetensors"]
        front = json.loads((tmp_path / "front.json").read_text())
        assert front == [
            {"genome": "11111-91111", "genome_hash": "a", "metrics": {"perplexity": 5.0, "cache_bytes": 100.0}}
        ]
        store.add(evaluation("b", metrics={"perplexity": 4.0, "cache_bytes": 50.0}))
        (store.work / "b.safetensors").write_text("b")
        store.keep_front(RANKING)
        assert [path.name for path in store.best.iterdir()] == ["b.safetensors"]


def test_the_front_grows_with_the_log_and_is_that_of_a_new_driver(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = [
        evaluation(
            f"{number:03}",
            status=Status.NAN if number % 9 == 8 else Status.OK,
            metrics={"perplexity": float(rng.integers(1, 30)), "cache_bytes": float(rng.integers(1, 30))},
        )
        for number in range(120)
    ]
    other = dataclasses.replace(RANKING, budget=(Term.parse("perplexity>=4"),))
    with Store(tmp_path) as store:
        assert store.keep_front(RANKING) == []
        for start in range(0, 120, 40):
            store.add(*made[start : start + 40])
            kept = [row.genome_hash for row in store.keep_front(RANKING)]
            assert kept == [row.genome_hash for row in front_of(made[: start + 40], RANKING)]
        within = [row.genome_hash for row in store.keep_front(other)]
        assert within == [row.genome_hash for row in front_of(made, other)] != kept
    with Store(tmp_path) as store:
        assert [row.genome_hash for row in store.keep_front(RANKING)] == kept


def test_genomes_are_found_by_an_index(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "run.db") as db:
        db.execute("DROP INDEX evaluations_by_genome")  # as in a log from before there was one
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "run.db") as db:
        query = "SELECT * FROM evaluations WHERE genome_hash = 'a' AND kind IN ('candidate', 'baseline') ORDER BY id"
        plan = str(db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall())
    assert "SEARCH evaluations USING INDEX" in plan
    assert "SCAN" not in plan


def test_the_table_has_the_documented_columns(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "run.db") as db:
        columns = {row[1] for row in db.execute("PRAGMA table_info(evaluations)")}
    assert columns >= {"genome", "genome_hash", "status", "seed", "generation", "metrics", "seconds", "error"}


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": 2})
    assert read_json(path) == {"x": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_unreadable_json_fails_clearly(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not there, so this is no run folder"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="not readable as JSON"):
        read_json(tmp_path / "config.json")
