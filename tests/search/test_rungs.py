"""Successive halving: who goes on, from where, what is logged, and what a kill in between changes (nothing)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from search import nsga2, run
from search.data import load_corpus
from search.evaluate import Outcome, Task, candidate_seed, run_task
from search.evaluation import Evaluation, Status
from search.front import front_of
from search.report import write_report
from search.report_data import compare_rungs, read_run, spearman
from search.settings import Settings
from search.store import Store, write_json
from tests.search.fake_workers import FakeWorkers, fake_search, fake_settings
from tests.search.test_run import PLAIN, check_kills_and_resumes, rows

THREE = {"rungs": 3, "population": 9, "generations": 3}  # 32 steps: 3, 10 and 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Fourscore and seven years ago our fathers brought forth a new nation.\n" * 200)
    return path


def logged(root: Path) -> list[Evaluation]:
    with Store(root) as store:
        return store.evaluations()


def test_the_best_third_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    settings, workers = fake_settings(**THREE), FakeWorkers()
    fake_search(tmp_path, settings, workers)
    evaluations = logged(tmp_path)
    for generation in range(3):
        members = {e.genome_hash: e for e in evaluations if e.kind == "candidate" and e.generation == generation}
        assert len(members) == 9
        alive = [e for e in members.values() if e.status is Status.OK]
        for rung, places in enumerate((3, 1)):
            here = [e for e in alive if len(e.rungs) > rung]
            above = {e.genome_hash for e in here if len(e.rungs) > rung + 1}
            losses = [settings.ranking.losses(e.metrics | e.rungs[rung]) for e in here]
            assert above == {here[i].genome_hash for i in nsga2.survive(losses, places).indices}
        tasks = [(t.genome_hash, t.start, t.stop) for t in workers.tasks if t.genome_hash in members]
        expected = [(h, None, 3) for h in members]
        expected += [(e.genome_hash, 3, 10) for e in alive if len(e.rungs) > 1]
        expected += [(e.genome_hash, 10, None) for e in alive if len(e.rungs) > 2]
        assert sorted(tasks, key=str) == sorted(expected, key=str)
    for evaluation in evaluations:
        if evaluation.rungs:
            assert evaluation.metrics["perplexity"] == evaluation.rungs[-1]["perplexity"]
    assert not [e for e in evaluations if e.kind == "baseline" and e.rungs]
    # What stopped below is on no front, however it looks.
    front = front_of(evaluations, settings.ranking)
    assert {len(e.rungs) for e in front} == {3}
    assert not list((tmp_path / "work").glob("*.json"))


def test_times_are_measured_once_after_the_lowest_rung(tmp_path: Path) -> None:
    settings = fake_settings(**THREE, objectives=("perplexity", "decode_ms_per_token"))
    workers = FakeWorkers()
    fake_search(tmp_path, settings, workers)
    measured = [genome_hash for genome_hash, stage in workers.done if stage == "measure"]
    ended = [e for e in logged(tmp_path) if e.status is Status.OK]
    assert sorted(measured) == sorted(e.genome_hash for e in ended)
    assert all("decode_ms_per_token" in e.metrics for e in ended)


def test_an_interrupted_search_ends_as_one_that_was_not_wherever_it_was(tmp_path: Path) -> None:
    settings = fake_settings(rungs=3, population=6, generations=2, objectives=("perplexity", "decode_ms_per_token"))
    whole = FakeWorkers()
    fake_search(tmp_path / "whole", settings, whole)
    expected = logged(tmp_path / "whole")
    for patience in range(1, len(whole.tasks)):
        root = tmp_path / str(patience)
        first, second = FakeWorkers(patience=patience), FakeWorkers()
        with pytest.raises(KeyboardInterrupt):
            fake_search(root, settings, first)
        fake_search(root, settings, second)
        assert logged(root) == expected
        keys = [(t.genome_hash, t.stage, t.stop) for t in (*first.tasks, *second.tasks)]
        assert len(set(keys)) == len(keys) == len(whole.tasks)


def test_a_winner_that_climbed_is_one_trained_in_one_go_to_the_last_bit(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, plain = tmp_path / "run", tmp_path / "plain"
    arguments = [*PLAIN, "--workers", "inline", "--data", str(text), "--generations", "1", "--tokens", "2048"]
    assert run.main([*arguments, "--rungs", "3", "--out", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "generation 0, rung 1 of 3  " in shown
    assert "generation 0, rung 3 of 3  " in shown
    front = json.loads((root / "front.json").read_text())
    settings = Settings.from_json(json.loads((root / "config.json").read_text()))
    load_corpus([str(text)]).save(plain)
    for member in front:
        seed = candidate_seed(settings.seed, member["genome_hash"])
        whole = Task(member["genome"], member["genome_hash"], seed, settings, plain, "train")
        outcome = run_task(whole)
        assert outcome.metrics == member["metrics"]
        name = f"{member['genome_hash']}.safetensors"
        ours, theirs = load_file(root / "best" / name), load_file(plain / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        [curve] = [json.loads(row[0]) for row in rows(root, "curve, genome_hash") if row[1] == member["genome_hash"]]
        assert tuple(map(tuple, curve)) == outcome.curve
    assert front
    assert not list((root / "work").glob("*.checkpoint"))
    details = [json.loads(row[0]) for row in rows(root, "details")]
    assert sorted(len(d.get("rungs", ())) for d in details) == [0] * 4 + [1] * 2 + [2] * 1 + [3] * 1


def test_a_rung_whose_checkpoint_is_gone_begins_anew_and_ends_the_same(tmp_path: Path, text: Path) -> None:
    load_corpus([str(text)]).save(tmp_path)
    settings = dataclasses.replace(fake_settings(rungs=2), tokens=6 * 64, batch_size=4, seq_len=16, valid_tokens=64)
    low = Task("1.1.1.1.1-9.1.1.1.1", "a", 3, settings, tmp_path, "train", stop=2)
    high = dataclasses.replace(low, start=2, stop=None)
    run_task(low)
    with_checkpoint = run_task(high)
    low.checkpoint_path(2).unlink()
    without = run_task(high)
    assert (with_checkpoint.metrics, with_checkpoint.curve) == (without.metrics, without.curve)


class Diverging(FakeWorkers):
    """Fails half of what goes on from the lowest rung."""

    def outcome(self, task: Task) -> Outcome:
        if task.start is not None and task.genome_hash[1] in "01234567":
            return Outcome(Status.NAN, {}, 1.0, "the loss is nan at step 9")
        return super().outcome(task)


def test_what_fails_on_its_way_up_has_failed(tmp_path: Path) -> None:
    fake_search(tmp_path, fake_settings(rungs=2, population=12), Diverging())
    failed = [e for e in logged(tmp_path) if e.status is Status.NAN and e.rungs]
    assert failed
    assert all(not e.metrics and len(e.rungs) == 1 for e in failed)


@pytest.mark.parametrize("optimizer", ["nsga2", "random", "ga", "RecMixES"])
def test_every_optimizer_takes_rungs_and_budgets_together(tmp_path: Path, optimizer: str) -> None:
    settings = fake_settings(rungs=2, optimizer=optimizer, budget=("decode_ms_per_token<=1.5",))
    genomes = fake_search(tmp_path, settings)
    assert len(set(genomes)) == 40
    again = FakeWorkers()
    assert fake_search(tmp_path, settings, again) == genomes
    assert again.done == []


def test_spearman_is_that_of_the_ranks() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0]) == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)
    assert spearman([1.0, 2.0, 3.0, 4.0], [9.0, 7.0, 5.0, 1.0]) == pytest.approx(-1.0)
    # With ties: ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    assert spearman([0.0, 5.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1.0, 1.0], [1.0, 2.0]))


def test_the_report_says_how_well_a_rung_foretells_the_end(tmp_path: Path) -> None:
    settings = fake_settings(rungs=2, population=12, generations=4)
    fake_search(tmp_path, settings)
    write_json(tmp_path / "config.json", settings.to_json())
    with Store(tmp_path) as store:
        store.keep_front(settings.ranking)
    ended = [e for e in logged(tmp_path) if len(e.rungs) == 2]
    [rung] = compare_rungs(read_run(tmp_path))
    assert (rung.steps, rung.finished) == (10, len(ended))
    assert rung.candidates == sum(bool(e.rungs) for e in logged(tmp_path))
    first, last = zip(*[(e.rungs[0]["perplexity"], e.metrics["perplexity"]) for e in ended], strict=True)
    assert rung.correlation == pytest.approx(spearman(first, last))
    page = write_report(tmp_path).read_text()
    assert "Rank correlation (Spearman)" in page
    assert f"{rung.correlation:.2f}" in page
    assert "of them to a lower rung" in page
    assert "Rank correlation" not in write_report(plain_run(tmp_path / "plain")).read_text()


def plain_run(root: Path) -> Path:
    fake_search(root, fake_settings())
    write_json(root / "config.json", fake_settings().to_json())
    return root


@pytest.mark.slow
def test_a_killed_search_with_rungs_ends_as_an_uninterrupted_one(tmp_path: Path, text: Path) -> None:
    check_kills_and_resumes(tmp_path, text, 4, [*PLAIN, "--rungs", "3", "--population", "9", "--tokens", "8192"])
