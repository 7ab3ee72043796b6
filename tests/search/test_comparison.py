"""Runs side by side, and runs as Optuna studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from search.comparison import compare_runs, groups_of, terminal_comparison
from search.comparison_page import comparison_figure, render_comparison
from search.evaluation import Status
from search.optuna_export import export_study
from search.report import main
from search.report_data import follow_progress, read_run
from search.settings import SettingsError
from star_core.genome import Genome
from tests.search.synthetic_run import write_synthetic_run

OBJECTIVES = ("perplexity", "cache_bytes")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return tuple(
        write_synthetic_run(folder / name, objectives=OBJECTIVES, generations=3, population=8, depth=4, seed=seed)
        for name, seed in (("a", 1), ("b", 2), ("c", 3))
    )  # type: ignore[return-value]


def test_one_box_for_all(runs: tuple[Path, ...]) -> None:
    read = [read_run(path) for path in runs]
    standings = compare_runs(read)
    assert [standing.name for standing in standings] == ["a", "b", "c"]
    for run, standing in zip(read, standings, strict=True):
        assert standing.trained == len(run.candidates) == 24
        assert standing.tokens == 24 * 262_144
        assert sum(standing.failed.values()) == sum(c.status is not Status.OK for c in run.candidates)
        counts, tokens, volumes = zip(*standing.curve, strict=True)
        assert [count * 262_144 for count in counts] == list(tokens)
        assert list(tokens) == sorted(tokens)
        assert list(volumes) == sorted(volumes)
        assert (tokens[-1], volumes[-1]) == (standing.tokens, pytest.approx(standing.hypervolume))
        assert 0 < standing.hypervolume <= 1
        assert standing.best["perplexity"] == min(member.metrics["perplexity"] for member in run.front)
    alone = compare_runs(read[:1])[0]
    progress = follow_progress(read[0])
    assert progress is not None
    assert alone.hypervolume == pytest.approx(progress.hypervolume[-1])
    # A run that finds all that two others found is as good as both.
    both = replace(read[0], candidates=read[0].candidates + read[1].candidates, front=read[0].front + read[1].front)
    joined, first, second = compare_runs([both, *read[:2]])
    assert joined.hypervolume >= max(first.hypervolume, second.hypervolume)


def test_a_group_has_its_mean(runs: tuple[Path, ...]) -> None:
    read = [read_run(path) for path in runs]
    other = replace(read[2], config={**read[2].config, "optimizer": "random"})
    standings = compare_runs([*read[:2], other])
    assert {group: [m.name for m in members] for group, members in groups_of(standings).items()} == {
        "nsga2": ["a", "b"],
        "random": ["c"],
    }
    console = Console(width=200, record=True)
    console.print(terminal_comparison(standings))
    text = console.export_text()
    mean = (standings[0].hypervolume + standings[1].hypervolume) / 2
    assert f"{mean:.4f} ±" in text
    assert "mean of 2" in text
    assert "mean of 1" not in text
    for over, most in (("tokens", 24 * 262_144), ("trained", 24)):
        figure = comparison_figure(standings, over)
        assert [(trace.name, trace.line.color) for trace in figure.data] == [
            ("nsga2", "var(--series-0)"),
            ("nsga2", "var(--series-0)"),
            ("random", "var(--series-1)"),
        ]
        assert (figure.data[0].x[-1], figure.data[0].y[-1]) == (most, pytest.approx(standings[0].hypervolume))
    page = render_comparison(standings)
    assert "nsga2, 2 runs</li>" in page
    assert f"{mean:.4f} ±" in page


def test_the_command_compares(runs: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "comparison.html"
    assert main([*map(str, runs), "--html", str(page)]) == 0
    assert "Runs side by side" in capsys.readouterr().out
    assert "Over training tokens" in page.read_text()


def test_the_command_writes_the_page_of_one_run(runs: tuple[Path, ...], capsys: pytest.CaptureFixture[str]) -> None:
    (runs[0] / "report.html").unlink(missing_ok=True)
    assert main([str(runs[0])]) == 0
    assert "The front beside the baselines" in capsys.readouterr().out
    assert (runs[0] / "report.html").exists()


def test_what_cannot_be_compared_is_said(
    runs: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_synthetic_run(tmp_path / "d", objectives=("perplexity", "parameters"), generations=1, depth=4)
    assert main([str(runs[0]), str(other)]) == 2
    error = capsys.readouterr().err
    assert "need the same objectives to be compared, got perplexity, cache_bytes in" in error
    assert main([str(tmp_path / "nothing")]) == 2
    assert "give a folder that the search wrote" in capsys.readouterr().err
    failed = replace(read_run(runs[0]), candidates=(), front=())
    with pytest.raises(ValueError, match="no candidate has succeeded yet"):
        compare_runs([failed])


def test_without_optuna_one_sentence(runs: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(SettingsError, match="needs the package optuna"):
        export_study(read_run(runs[0]), "sqlite://")


def test_a_run_becomes_a_study(runs: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    assert main([str(runs[0]), "--optuna", storage]) == 0
    assert "28 trials of a in" in capsys.readouterr().out
    run = read_run(runs[0])
    study = optuna.load_study(study_name="a", storage=storage)
    assert study.metric_names == list(OBJECTIVES)
    trials = study.get_trials(deepcopy=False)
    assert len(trials) == len(run.baselines) + len(run.candidates)
    by_hash = {trial.user_attrs["genome_hash"]: trial for trial in trials}
    for candidate in run.candidates:
        trial = by_hash[candidate.genome_hash]
        assert trial.user_attrs["genome"] == candidate.genome
        complete = candidate.status is Status.OK
        assert trial.state is (optuna.trial.TrialState.COMPLETE if complete else optuna.trial.TrialState.FAIL)
        if complete:
            assert trial.values == [candidate.metrics[name] for name in OBJECTIVES]
        first = Genome.parse(candidate.genome).livs[0]
        assert trial.params["liv_00_liv_class"] == first.liv_class
        assert trial.params["liv_00_feature_strategy"] == first.feature_strategy
    best = {trial.user_attrs["genome_hash"] for trial in study.best_trials if trial.user_attrs["kind"] == "candidate"}
    assert best <= {member.genome_hash for member in run.front}
    assert main([str(runs[0]), "--optuna", storage]) == 2
    assert "holds a study a already" in capsys.readouterr().err


def test_what_stopped_at_a_rung_is_pruned(runs: tuple[Path, ...], tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    run = read_run(runs[1])
    succeeded = [c for c in run.candidates if c.status is Status.OK][:2]
    rung = {"perplexity": 9.0}
    stopped, ended = replace(succeeded[0], rungs=(rung,)), replace(succeeded[1], rungs=(rung, rung))
    halved = replace(run, config={**run.config, "rungs": 2}, candidates=(stopped, ended), baselines=(), front=(ended,))
    assert compare_runs([halved])[0].tokens == 262_144 // 3 + 262_144
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    assert export_study(halved, storage, "halved") == 2
    states = [trial.state for trial in optuna.load_study(study_name="halved", storage=storage).trials]
    assert states == [optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.COMPLETE]
