"""Searches above backbone level, from asking to the log: what is recorded, and what a budget and rungs make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.data import load_corpus
from search.evaluation import Status
from search.store import Store
from star_core import Genome
from star_core.genome import MUTATIONS, validate
from tests.search.fake_workers import FakeWorkers, fake_search, fake_settings


def searched(root: Path, workers: FakeWorkers | None = None, **changes: object) -> list[str]:
    (root / "work").mkdir(parents=True, exist_ok=True)
    (root / "text").write_text("to be or not to be " * 200)
    load_corpus([str(root / "text")]).save(root / "work")
    return fake_search(root, fake_settings(**changes), workers)


@pytest.mark.parametrize("changes", [{}, {"budget": ("parameters<=120000",)}, {"rungs": 3}, {"optimizer": "ga"}])
def test_the_log_says_which_changes_made_a_genome(tmp_path: Path, changes: dict[str, object]) -> None:
    options: dict[str, object] = {"level": "featurizer", "generations": 5, **changes}
    searched(tmp_path / "a", **options)
    with Store(tmp_path / "a") as store:
        evaluations = [e for e in store.evaluations() if e.kind == "candidate"]
    bred = [e for e in evaluations if e.parents]
    assert bred
    for evaluation in evaluations:
        assert bool(evaluation.mutations) == bool(evaluation.parents)
        assert set(evaluation.mutations) <= set(MUTATIONS["featurizer"])
        assert not validate(Genome.parse(evaluation.genome))
    assert any("[" in e.genome for e in evaluations)
    assert ("budget" in changes) == any(e.status is Status.OVER_BUDGET for e in evaluations)


def test_a_search_that_was_killed_learns_the_same(tmp_path: Path) -> None:
    options: dict[str, object] = {"level": "operator", "generations": 5, "rungs": 2}
    whole = searched(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "cut", FakeWorkers(patience=20), **options)
    assert searched(tmp_path / "cut", **options) == whole
