"""Results that runs share: taken over where everything that decides them is the same, and nowhere else."""

from __future__ import annotations

import dataclasses
import json
import platform
import sqlite3
from pathlib import Path

import pytest

import star_core
from search import run
from search.data import load_corpus
from search.evaluate import Outcome, Task, candidate_seed
from search.evaluation import Evaluation, Status
from search.result_cache import ResultCache
from search.settings import SettingsError
from search.store import Store, read_evaluations
from star_core import Genome
from tests.search.fake_workers import FakeWorkers, fake_search, fake_settings
from tests.search.test_run import PLAIN, RESULTS, rows

GENOME = Genome.parse("1.1.1.1.1-9.1.1.1.1")
DONE = Outcome(Status.OK, {"perplexity": 5.25}, 12.0, curve=((1, 5.5), (2, 1.25)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Fourscore and seven years ago our fathers brought forth a new nation.\n" * 200)
    return path


def task(stage: str = "train", genome: Genome = GENOME, **changes: object) -> Task:
    settings = fake_settings(**changes)
    return Task(str(genome), genome.hash, candidate_seed(settings.seed, genome.hash), settings, Path("work"), stage)


def test_what_is_added_is_found_in_another_run(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "cache.db", "f")
    assert cache.find(task()) is None
    cache.add(task(), DONE)
    cache.add(task(), dataclasses.replace(DONE, metrics={}))  # the first stays
    cache.close()
    again = ResultCache(tmp_path / "cache.db", "f")
    # Neither the run's length nor its population, its workers or its budget decide what a training gives.
    found = again.find(task(generations=9, population=12, workers="inline", jobs=3, budget=("parameters<=5",)))
    assert found == dataclasses.replace(DONE, seconds=0.0, cached=True)
    again.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"tokens": 8192},
        {"width": 128},
        {"learning_rate": 0.1},
        {"valid_tokens": 64},
        {"probe_steps": 8},
        {"objectives": ("perplexity", "prefill_ms")},  # counts the peak of memory too
        {"genome": Genome.parse("5.1.1.1.1-9.1.1.1.1")},
        {"stage": "measure"},
    ],
    ids=str,
)
def test_what_decides_a_result_is_part_of_its_key(tmp_path: Path, changes: dict[str, object]) -> None:
    cache = ResultCache(tmp_path / "cache.db", "f")
    cache.add(task(), DONE)
    assert cache.find(task(**changes)) is None  # type: ignore[arg-type]
    other = ResultCache(tmp_path / "cache.db", "another text")
    assert other.find(task()) is None
    cache.close()
    other.close()


def test_a_time_is_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ResultCache(tmp_path / "cache.db", "f")
    here.add(task(), DONE)
    here.add(task("measure"), DONE)
    assert here.find(task("measure")) is not None
    assert here.find(task("measure", measure_seconds=9.0)) is None
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    there = ResultCache(tmp_path / "cache.db", "f")
    assert there.find(task("measure")) is None
    assert there.find(task()) is not None
    here.close()
    there.close()


@pytest.mark.parametrize("status", list(Status))
def test_what_is_not_the_genomes_doing_is_not_shared(tmp_path: Path, status: Status) -> None:
    cache = ResultCache(tmp_path / "cache.db", "f")
    cache.add(task(), Outcome(status, {}, 1.0, "why"))
    shared = status in (Status.OK, Status.NAN, Status.FLAT, Status.INVALID)
    assert (cache.find(task()) is not None) == shared
    cache.close()


def test_a_file_that_is_no_cache_fails_clearly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("this is no database, and long enough to be looked at as one " * 100)
    with pytest.raises(SettingsError, match=r"cache: .*text: file is not a database; needs an earlier run's cache"):
        ResultCache(tmp_path / "text", "f")
    cache = str(tmp_path / "no" / "cache.db")
    arguments = [*PLAIN, "--workers", "inline", "--data", str(tmp_path / "text"), "--out", str(tmp_path / "run")]
    assert run.main([*arguments, "--cache", cache]) == 2
    assert "unable to open database file; needs an earlier run's cache, or a new file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_second_run_trains_nothing_again(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*PLAIN, "--workers", "inline", "--data", str(text), "--cache", "cache.db"]
    assert run.main([*arguments, "--generations", "1", "--out", "first"]) == 0
    with sqlite3.connect(tmp_path / "cache.db") as db:
        assert db.execute("SELECT COUNT(*) FROM results").fetchone() == (8,)
    capsys.readouterr()
    assert run.main([*arguments, "--out", "second"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("(cached)") == 8
    first, second = (rows(tmp_path / name, RESULTS) for name in ("first", "second"))
    assert second[:8] == first
    assert [json.loads(row[0]) for row in rows(tmp_path / "second", "details")] == [{"cached": True}] * 8 + [{}] * 4
    assert {row[0] for row in rows(tmp_path / "second", "seconds")[:8]} == {0.0}
    # Every winner has its weights, those from the cache by a training at the end.
    front = json.loads((tmp_path / "second" / "front.json").read_text())
    for member in front:
        model = star_core.load(tmp_path / "second" / "best" / f"{member['genome_hash']}.safetensors")
        assert model.genome.hash == member["genome_hash"]
    cached = {row[0] for row in rows(tmp_path / "second", "genome_hash")[:8]}
    again = sum(member["genome_hash"] in cached for member in front)
    assert shown.count("trained again for its weights, with the same perplexity") == again
    # And a third has nothing to do but that.
    assert run.main([*arguments, "--out", "third"]) == 0
    assert rows(tmp_path / "third", RESULTS) == rows(tmp_path / "second", RESULTS)


def test_a_search_with_a_cache_ends_as_one_without(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("to be or not to be " * 200)
    for folder in ("filling", "filled"):
        load_corpus([str(tmp_path / "text")]).save(tmp_path / folder / "work")
    cache = str(tmp_path / "cache.db")
    expected = fake_search(tmp_path / "plain", fake_settings())
    filling, filled = FakeWorkers(), FakeWorkers()
    assert fake_search(tmp_path / "filling", fake_settings(cache=cache), filling) == expected
    assert fake_search(tmp_path / "filled", fake_settings(cache=cache), filled) == expected
    with Store(tmp_path / "filled") as store:
        front = {e.genome_hash for e in store.keep_front(fake_settings().ranking)}
    assert {genome_hash for genome_hash, _ in filled.done} == front  # for their weights
    assert len(filling.done) > len(expected)


def test_a_log_from_before_there_were_details_opens(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(Evaluation("1", "a", Status.OK, 0, 0, {"perplexity": 5.0}, 1.0))
    with sqlite3.connect(tmp_path / "run.db") as db:
        db.execute("ALTER TABLE evaluations DROP COLUMN details")
    with sqlite3.connect(f"{(tmp_path / 'run.db').as_uri()}?mode=ro", uri=True) as db:
        old = read_evaluations(db)
    assert [e.cached for e in old] == [False]
    with Store(tmp_path) as store:
        store.add(Evaluation("2", "b", Status.OK, 0, 0, {"perplexity": 5.0}, 1.0, cached=True))
        assert [e.cached for e in store.evaluations()] == [False, True]
        assert store.evaluations()[:1] == old
