"""The comparison of optimizers: equal tokens, one box for all, and a real run of it in small."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import search_optimizers
from bench.search_optimizers import METHODS, Trace, box_of, curve_of, draw, settings_of, summarise, trace_of
from search.evaluation import Evaluation, Status
from search.settings import Settings

PER_STEP = 8 * 64  # tokens in a step of the smoke preset, which has 32


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_as_many_tokens(method: str) -> None:
    settings = settings_of(method, seed=3, depth=4, generations=12, population=12, rungs=3)
    assert settings.seed == 3
    steps = 12 * 32 if settings.rungs == 1 else 12 * 3 + 4 * (10 - 3) + 2 * (32 - 10)
    assert settings.generations * steps == pytest.approx(12 * 12 * 32, rel=0.02)


def candidate(number: int, status: Status = Status.OK, rungs: int = 0) -> Evaluation:
    metrics = {"perplexity": 8.0 - number, "parameters": 1e6 + number, "cache_bytes": 1e4}
    reached = tuple({"perplexity": 9.0} for _ in range(rungs))
    return Evaluation("1", str(number), status, 0, 0, metrics if status is Status.OK else {}, 2.0, rungs=reached)


def test_a_trace_counts_the_tokens_of_the_rungs_that_were_reached() -> None:
    settings = settings_of("nsga2 with rungs", 0, 4, 12, 12, 3)
    candidates = [
        candidate(0, rungs=1),
        candidate(1, rungs=3),
        candidate(2, Status.NAN, rungs=1),
        candidate(3, rungs=2),
    ]
    trace = trace_of(candidates, settings, "nsga2 with rungs")
    assert [tokens // PER_STEP for tokens in trace.tokens] == [3, 35, 45, 55]
    assert [losses is not None for losses in trace.losses] == [False, True, False, False]
    assert trace.losses[1] == (math.log(7.0), math.log(1e6 + 1), math.log(1e4))
    whole = trace_of([candidate(0), candidate(1, Status.OOM)], settings_of("ga", 0, 4, 12, 12, 3), "ga")
    assert [tokens // PER_STEP for tokens in whole.tokens] == [32, 64]
    no_cache = dataclasses.replace(candidate(0), metrics=candidate(0).metrics | {"cache_bytes": 0.0})
    losses = trace_of([no_cache], settings_of("ga", 0, 4, 12, 12, 3), "ga").losses[0]
    assert losses == (math.log(8.0), math.log(1e6), math.log(1024.0))
    assert [losses is not None for losses in whole.losses] == [True, False]


def traces() -> list[Trace]:
    first = Trace("nsga2", 0, (10, 20, 30), ((0.0, 1.0, 1.0), None, (1.0, 0.0, 0.5)), 3.0)
    second = Trace("random", 0, (10, 20, 40), ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), None), 3.0)
    return [first, second]


def test_hypervolume_is_measured_in_one_box_over_tokens() -> None:
    low, high = box_of(traces())
    assert (low.tolist(), high.tolist()) == ([0.0, 0.0, 0.5], [1.0, 1.0, 1.0])
    curve = curve_of(traces()[0], [5, 10, 29, 30], low, high)
    # In units of the box to 1.1: 1.1 x 0.1 x 0.1, and then 0.1 x 1.1 x 1.1 more, less what both dominate.
    first, both = 1.1 * 0.1 * 0.1, 1.1 * 0.1 * 0.1 + 0.1 * 1.1 * 1.1 - 0.1 * 0.1 * 0.1
    assert curve == pytest.approx([0.0, first / 1.331, first / 1.331, both / 1.331])


def test_a_summary_ends_where_every_method_still_has_tokens() -> None:
    result = summarise(traces(), {"seeds": 1})
    assert result["tokens"][-1] == 30
    assert result["methods"]["nsga2"]["runs"] == 1
    assert result["methods"]["nsga2"]["hypervolume_deviation"] is None
    ElementTree.fromstring(draw(result))


def test_a_run_is_read_back_as_it_was_and_not_into_other_settings() -> None:
    sizes = {"depth": 4, "rungs": 3}
    for trace in traces():
        assert Trace.from_line(trace.to_line(sizes), sizes) == trace
    with pytest.raises(ValueError, match=r"needs runs of the settings .*'depth': 8.* got one of .*'depth': 4"):
        Trace.from_line(traces()[0].to_line(sizes), sizes | {"depth": 8})


@pytest.mark.slow
def test_the_comparison_runs_and_writes_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(search_optimizers.PRESETS, "smoke", _tiny())  # type: ignore[index]
    out = tmp_path / "small.json"
    options = ["--seeds", "1", "--depth", "2", "--generations", "2", "--population", "4", "--rungs", "2", "--jobs", "1"]
    search_optimizers.main([*options, "--methods", "random", "nsga2 with rungs", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [run["method"] for run in result["runs"]] == ["random", "nsga2 with rungs"]
    assert all(0 < volume <= 1 for run in result["runs"] for volume in run["hypervolume"][-1:])
    picture = (tmp_path / "small.svg").read_text()
    assert "nsga2 with rungs" in picture
    ElementTree.fromstring(picture)
    # What has its line is taken from there; a method more is all that is run.
    lines = (tmp_path / "small.jsonl").read_text()
    search_optimizers.main([*options, "--methods", "random", "ga", "--out", str(out)])
    assert (tmp_path / "small.jsonl").read_text().splitlines()[:2] == lines.splitlines()
    assert [run["method"] for run in json.loads(out.read_text())["runs"]] == ["random", "nsga2 with rungs", "ga"]
    with pytest.raises(SystemExit):
        search_optimizers.main([*options, "--depth", "3", "--out", str(out)])


def _tiny() -> Settings:
    smoke = search_optimizers.PRESETS["smoke"]
    return dataclasses.replace(
        smoke, width=32, head_dim=8, tokens=512, seq_len=16, batch_size=4, valid_tokens=256, workers="inline"
    )
