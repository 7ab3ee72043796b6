"""Searches within a budget: what is not trained, what wins, and what a person reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from search import proposals, run
from search.data import load_corpus
from search.evaluate import count_metrics
from search.evaluation import Status
from search.front import front_of
from search.report import write_report
from search.settings import PRESETS
from search.store import Store, write_json
from star_core import Genome, LanguageModel
from star_core.genome import BASELINES
from tests.search.fake_workers import FakeWorkers, fake_search, fake_settings
from tests.search.test_run import PLAIN, rows

WITHIN = "parameters<=100000"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Fourscore and seven years ago our fathers brought forth a new nation.\n" * 200)
    return path


def counted(root: Path, **changes: object) -> tuple[list[str], FakeWorkers]:
    """Search on made-up results; what sizes decide is counted for real."""
    (root / "work").mkdir(parents=True, exist_ok=True)
    (root / "text").write_text("to be or not to be " * 200)
    load_corpus([str(root / "text")]).save(root / "work")
    workers = FakeWorkers()
    return fake_search(root, fake_settings(**changes), workers), workers


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, "1e35a12c6ec3b5376474b6deed13c3f291ca911f5416cbe3d4d486cf226ecb95"),
        (
            {"seed": 3, "population": 12, "generations": 8},
            "fa621c04b11abc366cd2dae7ba5838138e3415171e7fffe2f79daeab2a59b9d0",
        ),
    ],
)
def test_without_new_options_the_same_genomes_are_asked_for_as_ever(
    tmp_path: Path, changes: dict[str, int], digest: str
) -> None:
    genomes = fake_search(tmp_path, fake_settings(**changes))
    assert hashlib.sha256("\n".join(genomes).encode()).hexdigest() == digest


def test_counting_is_that_of_the_trained_model() -> None:
    settings = PRESETS["smoke"]
    for text in ("1.1.1.1.1-9.1.1.1.1", "5.1.1.1.1-9.1.1.1.1", "13.1.1.1.1-9.1.1.1.1"):
        genome = Genome.parse(text)
        model = LanguageModel(genome, settings.model_config(256), seed=0)
        expected = {"parameters": model.num_parameters(), "cache_bytes": model.cache_bytes(1, settings.seq_len)}
        assert count_metrics(genome, settings, 256) == expected
    assert torch.empty(0).device.type == "cpu"


def test_what_is_over_the_budget_by_its_sizes_is_not_trained(tmp_path: Path) -> None:
    _, workers = counted(tmp_path, budget=("parameters<=150000",))
    trained = {genome_hash for genome_hash, _ in workers.done}
    with Store(tmp_path) as store:
        evaluations = store.evaluations()
    over = [e for e in evaluations if e.status is Status.OVER_BUDGET]
    assert over
    assert not trained.intersection(e.genome_hash for e in over)
    for evaluation in over:
        assert evaluation.metrics["parameters"] > 150_000
        assert set(evaluation.metrics) == {"parameters", "cache_bytes"}
        assert evaluation.error == f"needs parameters<=150000: is {evaluation.metrics['parameters']:.0f}"
    # Every place of a generation goes to a genome that is trained.
    for generation in range(5):
        assert sum(e.generation == generation and e.genome_hash in trained for e in evaluations) == 8
    # The baselines stand beside the front, whatever they weigh.
    assert trained.issuperset(make(6).hash for make in BASELINES.values())


def test_a_budget_on_measurements_decides_who_survives(tmp_path: Path) -> None:
    settings = fake_settings(budget=("decode_ms_per_token<=1.1",), generations=8)
    fake_search(tmp_path, settings)
    with Store(tmp_path) as store:
        evaluations = store.evaluations()
        front = store.keep_front(settings.ranking)
    assert not any(e.status is Status.OVER_BUDGET for e in evaluations)
    assert any(e.metrics["decode_ms_per_token"] > 1.1 for e in evaluations if e.metrics)
    assert front
    assert all(e.metrics["decode_ms_per_token"] <= 1.1 for e in front)
    assert front != front_of(evaluations, fake_settings().ranking)


def test_a_search_within_a_budget_that_is_run_again_finds_everything_in_its_log(tmp_path: Path) -> None:
    budget = ("parameters<=150000", "decode_ms_per_token<=1.5")
    whole, _ = counted(tmp_path / "whole", budget=budget)
    cut = tmp_path / "cut"
    assert counted(cut, budget=budget, generations=2)[0] == whole[: len(counted(cut, budget=budget, generations=2)[0])]
    again, workers = counted(cut, budget=budget)
    assert again == whole
    with Store(tmp_path / "whole") as one, Store(cut) as other:
        assert one.evaluations() == other.evaluations()
        late = {e.genome_hash for e in one.evaluations() if e.generation >= 2}
    assert {genome_hash for genome_hash, _ in workers.done} <= late


def test_a_budget_that_nothing_keeps_ends_in_one_sentence(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "REJECTIONS_PER_PLACE", 5)  # 16 ms each
    root = tmp_path / "run"
    arguments = [*PLAIN, "--workers", "inline", "--data", str(text), "--out", str(root)]
    assert run.main([*arguments, "--budget", "parameters<=10"]) == 0
    shown = capsys.readouterr().out
    assert "No candidate keeps the budget, so there is no front to show; the nearest, " in shown
    assert "needs parameters<=10: is " in shown
    assert json.loads((root / "front.json").read_text()) == []
    assert list((root / "best").iterdir()) == []
    assert [row[0] for row in rows(root, "status, kind") if row[1] == "candidate"] == ["OVER_BUDGET"] * 48
    page = (root / "report.html").read_text()
    assert "No candidate keeps the budget" in page
    assert "over the budget and not trained" in page


def test_terms_are_repeatable_and_comma_separated_and_hold_on_resume(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    terms = ["--budget", "parameters<=1e6,perplexity<=1e9", "--budget", "cache_bytes>=1"]
    arguments = [*PLAIN, "--workers", "inline", "--generations", "1", "--data", str(text), "--out", str(root)]
    assert run.main([*arguments, *terms]) == 0
    assert "within parameters<=1000000, perplexity<=1000000000, cache_bytes>=1" in capsys.readouterr().out
    assert json.loads((root / "config.json").read_text())["budget"][0] == "parameters<=1000000"
    assert json.loads((root / "front.json").read_text())
    assert run.main(["--resume", "--out", str(root), *terms]) == 0
    capsys.readouterr()
    assert run.main(["--resume", "--out", str(root), "--budget", "parameters<=2e6"]) == 2
    assert "began with --budget parameters<=1000000,perplexity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("parameters", "--budget: needs METRIC<=NUMBER or METRIC>=NUMBER, got 'parameters'"),
        ("decode_ms<=2", "budget: unknown 'decode_ms'; did you mean decode_ms_per_token?"),
    ],
)
def test_a_bad_budget_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str, message: str
) -> None:
    assert run.main([*PLAIN, "--out", str(tmp_path / "run"), "--budget", budget]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_report_tells_what_breaks_the_budget(tmp_path: Path) -> None:
    settings = fake_settings(budget=("decode_ms_per_token<=1.2",))
    fake_search(tmp_path, settings)
    write_json(tmp_path / "config.json", settings.to_json())
    with Store(tmp_path) as store:
        store.keep_front(settings.ranking)
    page = write_report(tmp_path).read_text()
    assert "Only candidates that keep the budget count: <code>decode_ms_per_token&lt;=1.2</code>" in page
    assert "more ended OK and break the budget; they stand in no figure" in page
