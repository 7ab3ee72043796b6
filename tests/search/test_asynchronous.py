"""The search without generations: places are kept busy, who goes on, and what a kill in between changes (nothing)."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from search import run
from search.data import load_corpus
from search.evaluate import Outcome, Task, candidate_seed, run_task
from search.evaluation import Evaluation, Status
from search.front import front_of
from search.settings import Settings
from search.store import RunFolderError, Store, read_json, write_json
from search.workers import Line, Progress
from star_core.genome.baselines import transformer_pp
from tests.search.fake_workers import DEPTH, FakeWorkers, fake_search, fake_settings
from tests.search.test_run import PLAIN, rows

PLACES = 3


class Scattered(FakeWorkers):
    """Keeps `PLACES` tasks in flight and ends any of them, as a seed decides; writes its result first, as a real one
    does, and is interrupted at any of these moments after `patience` results."""

    def __init__(self, seed: int = 0, patience: int | None = None) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.left = patience
        self.most = 0
        self.idle = 0
        """How often there was nothing to do for a place while another task ran."""

    def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
        """See `search.workers.Workers`."""
        line, flying = Line(tasks), list[Task]()
        places = 1 if jobs == 1 else PLACES
        while not line.over or flying:
            while len(flying) < places and (task := line.next()) is not None:
                flying.append(task)
            self.most = max(self.most, len(flying))
            self.idle += len(flying) < places and not line.over
            if not flying:
                continue
            task = flying.pop(self.rng.randrange(len(flying)))
            if not task.result_path.exists():
                self.done.append((task.genome_hash, task.stage))
                self.tasks.append(task)
                write_json(task.result_path, self.outcome(task).to_json())
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            yield task, Outcome.from_json(read_json(task.result_path))


def settings_of(**changes: Any) -> Settings:
    return fake_settings(**{"asynchronous": True, "jobs": PLACES} | changes)


def logged(root: Path) -> list[Evaluation]:
    with Store(root) as store:
        return store.evaluations()


def candidates(root: Path) -> list[Evaluation]:
    return [e for e in logged(root) if e.kind == "candidate"]


def events(root: Path) -> list[dict[str, Any]]:
    with Store(root) as store:
        return store.events()


@pytest.mark.parametrize("optimizer", ["nsga2", "random", "ga", "RecMixES"])
@pytest.mark.parametrize("rungs", [1, 3])
def test_as_many_candidates_are_evaluated_as_generations_have(tmp_path: Path, optimizer: str, rungs: int) -> None:
    workers = Scattered()
    fake_search(tmp_path, settings_of(optimizer=optimizer, rungs=rungs, budget=("decode_ms_per_token<=1.5",)), workers)
    evaluations = candidates(tmp_path)
    assert len(evaluations) == len({e.genome_hash for e in evaluations}) == 40
    assert Counter(e.generation for e in evaluations) == dict.fromkeys(range(5), 8)
    assert workers.most == PLACES
    assert not list((tmp_path / "work").glob("*.json"))
    again = Scattered()
    fake_search(tmp_path, settings_of(optimizer=optimizer, rungs=rungs, budget=("decode_ms_per_token<=1.5",)), again)
    assert again.done == []
    assert candidates(tmp_path) == evaluations


def test_no_place_waits_for_a_generation(tmp_path: Path) -> None:
    workers = Scattered()
    fake_search(tmp_path, settings_of(rungs=2, generations=10), workers)
    # At the very end alone: the last trainings, and after them who goes on though a third of the results is not whole.
    assert workers.idle <= 2 * PLACES


def test_one_in_three_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    settings, workers = settings_of(rungs=3, population=9, generations=4), Scattered()
    fake_search(tmp_path, settings, workers)
    evaluations = candidates(tmp_path)
    reached = [sum(len(e.rungs) > rung for e in evaluations) for rung in range(3)]
    started = [Counter(t.genome_hash for t in workers.tasks if t.start == start) for start in (3, 10)]
    for rung, began in enumerate(started):
        assert math.floor(reached[rung] / 3) <= len(began) <= math.ceil(reached[rung] / 3)
        assert set(began.values()) == {1}
    low = {e.genome_hash: e.rungs[0]["perplexity"] for e in evaluations if e.rungs}
    went = set(started[0])
    assert sum(low[h] for h in went) / len(went) < sum(low.values()) / len(low)
    assert {len(e.rungs) for e in front_of(evaluations, settings.ranking)} == {3}
    assert all(e.metrics["perplexity"] == e.rungs[-1]["perplexity"] for e in evaluations if e.status is Status.OK)


def test_those_far_behind_are_given_up_before_the_end(tmp_path: Path) -> None:
    settings = settings_of(rungs=2, population=9, generations=4)
    fake_search(tmp_path, settings, Scattered())
    climbed = {e.genome_hash: len(e.rungs) for e in candidates(tmp_path) if e.rungs}
    order = list(climbed)
    last = [event["genome_hash"] for event in events(tmp_path) if event["event"] == "trained"][-1]
    early = [
        h for h in order[: order.index(last)] if len({e.genome_hash: e for e in candidates(tmp_path)}[h].rungs) == 1
    ]
    assert len(early) >= 9


@pytest.mark.parametrize("timed", [False, True])
def test_an_interrupted_search_loses_nothing_and_trains_nothing_twice(tmp_path: Path, timed: bool) -> None:
    objectives = ("perplexity", "decode_ms_per_token") if timed else ("perplexity", "parameters")
    settings = settings_of(rungs=3, population=6, generations=2, objectives=objectives)
    whole = Scattered()
    fake_search(tmp_path / "whole", settings, whole)
    for patience in range(4, len(whole.tasks), 3):
        root = tmp_path / str(patience)
        parts = [Scattered(1, patience), Scattered(2, patience // 2), Scattered(3)]
        with pytest.raises(KeyboardInterrupt):
            fake_search(root, settings, parts[0])
        with suppress(KeyboardInterrupt):  # it may come to the end
            fake_search(root, settings, parts[1])
        before = logged(root)
        fake_search(root, settings, parts[-1])
        assert logged(root)[: len(before)] == before
        keys = Counter((t.genome_hash, t.stage, t.stop) for part in parts for t in part.tasks)
        assert set(keys.values()) == {1}
        evaluated = {e.genome_hash for e in logged(root)}
        assert {genome_hash for genome_hash, _, _ in keys} == evaluated
        assert len(candidates(root)) == 12
        asked = [event["genome_hash"] for event in events(root) if event["event"] == "asked"]
        assert sorted(asked) == sorted(e.genome_hash for e in candidates(root))


def test_the_same_order_of_results_gives_the_same_search(tmp_path: Path) -> None:
    settings = settings_of(rungs=2)
    genomes = [fake_search(tmp_path / name, settings, Scattered(seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert genomes[0] == genomes[1] != genomes[2]


def test_nothing_trains_while_times_are_taken(tmp_path: Path) -> None:
    class Watchful(Scattered):
        measuring = False

        def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
            assert not self.measuring
            for task, outcome in super().run(tasks, jobs, progress):
                assert task.stage == "train" or jobs == 1
                self.measuring = task.stage == "measure"
                yield task, outcome
                self.measuring = False

    settings = settings_of(rungs=2, objectives=("perplexity", "decode_ms_per_token"))
    workers = Watchful()
    fake_search(tmp_path, settings, workers)
    measured = Counter(genome_hash for genome_hash, stage in workers.done if stage == "measure")
    assert set(measured.values()) == {1}
    assert measured.keys() == {e.genome_hash for e in logged(tmp_path) if e.status is Status.OK}


class Diverging(Scattered):
    """Fails half of what goes on from the lowest rung."""

    def outcome(self, task: Task) -> Outcome:
        """See `FakeWorkers`."""
        if task.start is not None and task.genome_hash[1] in "01234567":
            return Outcome(Status.NAN, {}, 1.0, "the loss is nan at step 9")
        return super().outcome(task)


@pytest.mark.parametrize("optimizer", ["nsga2", "random", "ga", "RecMixES"])
def test_what_fails_on_its_way_up_has_failed(tmp_path: Path, optimizer: str) -> None:
    fake_search(tmp_path, settings_of(rungs=2, population=12, optimizer=optimizer), Diverging())
    failed = [e for e in candidates(tmp_path) if e.status is Status.NAN and e.rungs]
    assert failed
    assert all(not e.metrics and len(e.rungs) == 1 for e in failed)


def test_a_genome_to_start_from_that_is_a_baseline_is_not_trained_again(tmp_path: Path) -> None:
    baseline = transformer_pp(DEPTH)
    workers = Scattered()
    fake_search(tmp_path, settings_of(start=(str(baseline.canonical()),)), workers)
    assert workers.done.count((baseline.hash, "train")) == 1
    assert len(candidates(tmp_path)) == 39


def test_a_budget_of_sizes_is_decided_before_training(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    load_corpus(None).save(tmp_path / "work")
    workers = Scattered()
    settings = settings_of(budget=("parameters<=130000",), generations=2)
    fake_search(tmp_path, settings, workers)
    over = [e for e in candidates(tmp_path) if e.status is Status.OVER_BUDGET]
    assert over
    assert not {e.genome_hash for e in over} & {genome_hash for genome_hash, _ in workers.done}
    again = Scattered()
    fake_search(tmp_path, settings, again)
    assert again.done == []


def test_a_cache_answers_for_trainings(tmp_path: Path) -> None:
    settings = settings_of(rungs=2, cache=str(tmp_path / "cache.db"), optimizer="random")
    for name in ("one", "two"):
        (tmp_path / name / "work").mkdir(parents=True)
        load_corpus(None).save(tmp_path / name / "work")
    first, second = Scattered(), Scattered()
    fake_search(tmp_path / "one", settings, first)
    fake_search(tmp_path / "two", settings, second)
    assert len({h for h, _ in second.done}) < len({h for h, _ in first.done}) / 2
    found = [{e.genome_hash for e in candidates(tmp_path / name)} for name in ("one", "two")]
    assert found[0] == found[1]


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fake_search(tmp_path, settings_of(), Scattered(patience=8))
    with pytest.raises(RunFolderError, match=r"the journal has genome .* where this version of the search asks for"):
        fake_search(tmp_path, settings_of(seed=5), Scattered())


def test_real_trainings_climb_to_the_same_weights_as_in_one_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Fourscore and seven years ago our fathers brought forth a new nation.\n" * 200)
    root, plain = tmp_path / "run", tmp_path / "plain"
    arguments = [*PLAIN, "--workers", "inline", "--data", str(text), "--generations", "1", "--tokens", "2048"]
    assert run.main([*arguments, "--rungs", "2", "--asynchronous", "--out", str(root)]) == 0
    assert "rung 2 of 2" in capsys.readouterr().out
    front = json.loads((root / "front.json").read_text())
    assert front
    settings = Settings.from_json(json.loads((root / "config.json").read_text()))
    assert settings.asynchronous
    load_corpus([str(text)]).save(plain)
    for member in front:
        seed = candidate_seed(settings.seed, member["genome_hash"])
        outcome = run_task(Task(member["genome"], member["genome_hash"], seed, settings, plain, "train"))
        assert outcome.metrics == member["metrics"]
        name = f"{member['genome_hash']}.safetensors"
        ours, theirs = load_file(root / "best" / name), load_file(plain / name)
        assert all((tensor == theirs[key]).all() for key, tensor in ours.items())
    assert not list((root / "work").glob("*.checkpoint"))
    assert len(rows(root, "id")) == 8
