"""The benchmark of the driver runs, and a page of a long log is thinned and says so."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bench import search_driver
from search import report, report_data
from search.report import LiveReport, write_report
from search.report_data import follow_progress, read_run, thin
from search.store import Store, write_json
from tests.search.fake_workers import fake_search, fake_settings


def test_the_benchmark_measures_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    search_driver.main(["--evaluations", "100", "--rows", "300"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["driver"]["evaluations"] == 104
    assert printed["driver"]["driver_cpu_ms_per_evaluation"] > 0
    assert printed["log"]["rows"] == 300
    assert 0 < printed["log"]["front"] < 300
    assert printed["log"]["report_bytes"] > 1e6


def test_thinning_keeps_the_ends() -> None:
    assert thin([1, 2, 3], 3) == [1, 2, 3]
    assert thin(list(range(101)), 5) == [0, 25, 50, 75, 100]
    assert len(set(thin(list(range(1000)), 333))) == 333


def test_a_long_run_is_thinned_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = fake_settings(generations=12)
    fake_search(tmp_path, settings)
    write_json(tmp_path / "config.json", settings.to_json())
    with Store(tmp_path) as store:
        front = store.keep_front(settings.ranking)
    whole = follow_progress(read_run(tmp_path))
    assert "evenly spaced" not in write_report(tmp_path).read_text()
    monkeypatch.setattr(report_data, "MOST_MEMBERS", 3)
    monkeypatch.setattr(report_data, "MOST_DRAWN", 7)
    monkeypatch.setattr(report_data, "MOST_GENERATIONS", 5)
    run = read_run(tmp_path)
    assert [number for number, _ in run.shown_front] == [1, round((len(front) - 1) / 2) + 1, len(front)]
    assert len(run.front) == len(front)
    assert len(run.drawn) == 7
    thinned = follow_progress(run)
    assert whole is not None
    assert thinned is not None
    assert thinned.generations == (0, 3, 6, 8, 11)
    assert thinned.hypervolume == tuple(whole.hypervolume[generation] for generation in thinned.generations)
    page = write_report(tmp_path).read_text()
    assert f"This page lists and draws 3 of the {len(front)} members of the front, 7 of the" in page
    assert "5 of the 12 generations, evenly spaced" in page
    assert page.count('class="winner"') == 3


def test_a_report_of_a_running_search_takes_its_share_of_the_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    written: list[float] = []

    def write(_: Path) -> None:
        written.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(report, "write_report", write)
    live = LiveReport(tmp_path, share=0.1)
    for _ in range(100):
        live.update()
        now[0] += 1.0
    assert written == [100.0, 122.0, 144.0, 166.0, 188.0]
    live.write()
    assert written[-1] == now[0] - 2.0
