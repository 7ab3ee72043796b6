"""What a person sees while a search runs, in a terminal and elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from search.data import load_corpus
from search.driver import search
from search.store import Store
from search.view import View
from tests.search.fake_workers import FakeWorkers, fake_settings


def test_the_panel_counts_what_was_evaluated(tmp_path: Path) -> None:
    settings = fake_settings()
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Store(tmp_path) as store, View(settings, console) as view:
        search(settings, store, FakeWorkers(), view, lambda: None)
        evaluations = store.evaluations()
        front = store.keep_front(settings.ranking)
    shown = io.StringIO()
    Console(file=shown, width=120).print(view._render())
    panel = shown.getvalue()
    assert f"generation 5 of 5   44 of 44 evaluated   front {len(front)}" in panel
    failed = sum(e.status == "NAN" for e in evaluations)
    assert f"failed: {failed} NAN" in panel
    groups = (
        [e for e in evaluations if e.kind == "candidate"],
        [e for e in evaluations if e.generation == 0],
        [e for e in evaluations if e.kind == "baseline"],
    )
    best = [min(e.metrics["perplexity"] for e in group if e.metrics) for group in groups]
    [line] = [line for line in panel.splitlines() if "perplexity" in line]
    assert line.strip("│ ").split() == ["perplexity", *(f"{value:.3f}" for value in best)]


def test_genomes_over_the_budget_get_one_line_for_many(tmp_path: Path) -> None:
    settings = fake_settings(budget=("parameters<=150000",), generations=1)
    (tmp_path / "text").write_text("to be or not to be " * 200)
    written = io.StringIO()
    with Store(tmp_path / "run") as store, View(settings, Console(file=written, width=200)) as view:
        load_corpus([str(tmp_path / "text")]).save(store.work)
        search(settings, store, FakeWorkers(), view, lambda: None)
        rejected = sum(e.status == "OVER_BUDGET" for e in store.evaluations())
    lines = [line for line in written.getvalue().splitlines() if "over the budget, not trained" in line]
    assert rejected > 1
    assert len(lines) == 1
    assert lines[0].startswith(
        f"{rejected} genomes over the budget, not trained; the last needs parameters<=150000: is "
    )
