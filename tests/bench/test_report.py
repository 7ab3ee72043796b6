"""Bars, tables and the figure, from rows written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.bars import BARS, judge
from bench.figure import Dot, draw
from bench.report import as_figure, as_markdown, doubts, main
from bench.results import Absent, Row, read_results, write_results
from bench.suite import PEERS


def row(operator: str, provider: str, ratio: float = 1.0, **changes: Any) -> Row:
    """Return a row of a call that takes us 2 ms."""
    fields: dict[str, Any] = {
        "operator": operator,
        "case": "B8-T512-D256",
        "mode": "full",
        "provider": provider,
        "backend": "cpp" if provider == "star" else "",
        "dtype": "float32",
        "shape": {"B": 8, "T": 512, "D": 256},
        "flags": ["bar"],
        "threads": 2,
        "median_s": 0.002 * ratio,
        "p20_s": 0.0019 * ratio,
        "p80_s": 0.0025 * ratio,
        "samples": 9,
        "calls_per_sample": 1,
        "bytes": 10**7,
        "flops": 0,
        "exps": 0,
        "fmas": 0,
        "percents": {"copy": 80.0 / ratio},
        "ceiling": "copy",
        "percent_of_ceiling": 80.0 / ratio,
        "ratio": ratio,
        "ratio_p20": ratio,
        "ratio_p80": ratio,
        "best_peer": "",
        "ratio_to_best_peer": None,
        "peak_bytes": 10**6,
        "others_percent": 0.0,
        "device": "a processor",
        "versions": "torch 2.13.0, star-arch 0.1.0",
        "date": "2026-01-02T03:04:05Z",
    }
    return Row(**{**fields, **changes})


NORM = (
    row("rms_norm", "star", best_peer="compile", ratio_to_best_peer=0.8),
    row("rms_norm", "eager", 2.5),
    row("rms_norm", "compile", 0.8),
)


def verdicts(*rows: Row) -> dict[str, tuple[float | None, bool | None]]:
    return {verdict.bar.text: (verdict.figure, verdict.met) for verdict in judge(rows)}


def test_a_bar_is_met_not_met_or_not_measured() -> None:
    assert verdicts(*NORM) == {
        "2 x eager (decomposed)": (2.5, True),
        "torch.compile": (0.8, False),
        "70 % of copy bandwidth": (80.0, True),
    }
    assert verdicts(*NORM[:2])["torch.compile"] == (None, None)


@pytest.mark.parametrize("change", [{"flags": []}, {"dtype": "bfloat16"}, {"mode": "fwd"}])
def test_a_bar_is_read_off_its_cases_alone(change: dict[str, Any]) -> None:
    assert verdicts(row("rms_norm", "star", **change), row("rms_norm", "eager", 9.0, **change)) == {}


def test_the_fastest_writing_of_a_form_counts() -> None:
    conv = [row("causal_conv1d", "star"), row("causal_conv1d", "eager", 9.0), row("causal_conv1d", "conv1d", 2.0)]
    assert verdicts(*conv)["3 x eager"] == (2.0, False)


def test_windows_have_bars_of_their_own() -> None:
    window = {"shape": {"B": 1, "T": 4096, "H": 4, "D": 64, "window": 128}}
    found = verdicts(row("attention", "star", **window), row("attention", "sdpa", 12.0, **window))
    assert found == {"10 x SDPA with a mask (window 128, T 4096)": (12.0, True)}
    full = verdicts(row("attention", "star", percents={"matmul": 71.0}), row("attention", "sdpa", 1.1))
    assert full == {"1.2 x SDPA": (1.1, False), "70 % of matrix throughput": (71.0, True)}


def test_the_losss_bars_are_upper_ones() -> None:
    shape = {"B": 1, "T": 10, "D": 8, "V": 1000}
    rows = [
        row("linear_cross_entropy", "star", shape=shape, peak_bytes=6000),
        row("linear_cross_entropy", "eager", 0.9, shape=shape),
    ]
    found = verdicts(*rows)
    assert found["1/8 of the logits' memory"] == (0.15, False)
    assert found["1.05 x the time of eager"] == (pytest.approx(1 / 0.9), False)


def test_a_calls_overhead_is_read_off_the_smallest_steps() -> None:
    step = {"mode": "step", "flags": ["overhead"], "median_s": 9e-6}
    assert verdicts(row("ssd_step", "star", **step)) == {"10 us a call": (pytest.approx(9.0), True)}


def test_every_bar_is_of_a_measured_operator_and_provider() -> None:
    assert {operator for bar in BARS for operator in bar.operators} <= set(PEERS)
    assert set(PEERS) - {operator for bar in BARS for operator in bar.operators} == {"channel_mix"}


def stored(folder: Path, *rows: Row, absent: tuple[Absent, ...] = (), load: float = 0.1) -> Path:
    path = folder / "results" / "run.json"
    write_results(path, rows, absent, quick=False, load=load)
    return path


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    missing = Absent("rms_norm", "B8-T512-D256", "full", "fla", "ImportError: no")
    results = read_results(stored(tmp_path, *NORM, absent=(missing,)))
    assert results.rows == NORM
    assert results.absent == (missing,)
    assert not results.quick
    assert results.machine["processor"]


def test_a_busy_machine_and_impossible_speeds_are_said(tmp_path: Path) -> None:
    assert doubts(read_results(stored(tmp_path, *NORM))) == ""
    fast = row("swiglu", "star", percent_of_ceiling=126.0)
    disturbed = row("geglu", "star", others_percent=15.1)
    untold = row("reglu", "star", others_percent=None)
    results = read_results(stored(tmp_path, *NORM, fast, disturbed, untold, load=3.0))
    load = "the load average was 3.0 before it began"
    above = "1 of our rows exceed their ceiling by more than 25 %"
    expected = f"Not to be trusted: {load}; {above}; in 1 cases others took more than 15 % of the processors."
    assert doubts(results) == expected
    assert expected in as_markdown(results)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("no json")
    with pytest.raises(ValueError, match="is not JSON"):
        read_results(path)
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is no result file of format 2; make one with `pytest bench/`"):
        read_results(path)
    content = json.loads(stored(tmp_path, *NORM).read_text())
    del content["rows"][0]["ratio"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has a row with other fields: ratio"):
        read_results(path)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Absent("rms_norm", "B8-T512-D256", "full", "fla", "ImportError: no")
    path = stored(tmp_path, *NORM, absent=(missing,))
    assert main([str(path), "--rows", "--figure", str(tmp_path / "docs" / "kernels.svg")]) == 0
    printed = capsys.readouterr().out
    assert "Bars: 2 of 3 met" in printed
    assert "ImportError: no" in printed
    assert (tmp_path / "docs" / "kernels.svg").read_text().startswith("<svg")
    written = path.with_suffix(".md").read_text()
    assert "| rms_norm | full | cpp | 1 | 1 | 0.8 x | 0.8 x | 0.8 x | B8-T512-D256 (compile) |" in written
    assert "| rms_norm | B8-T512-D256 | at least torch.compile | 0.8 x | not met |" in written
    assert "2 ms (1.9 ms, 2.5 ms) | compile 0.8 x, eager 2.5 x | 5 GB/s | 80 % copy | 1 MB / 1 MB |" in written


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, rate",
    [
        ({"ceiling": "matmul", "flops": 4 * 10**9}, "2e+03 GFLOP/s"),
        ({"ceiling": "exp+fma", "exps": 4 * 10**6, "fmas": 1}, "2 Gexp/s"),
        ({"ceiling": "exp+fma", "fmas": 6 * 10**6}, "3 GFMA/s"),
    ],
)
def test_the_rate_is_of_what_binds(tmp_path: Path, change: dict[str, Any], rate: str) -> None:
    results = read_results(stored(tmp_path, row("rms_norm", "star", **change), row("rms_norm", "eager", 2.0)))
    assert f"| {rate} |" in as_markdown(results)


def test_the_figure_shows_every_case_and_what_is_slower(tmp_path: Path) -> None:
    step = row("ssd_step", "star", mode="step", best_peer="eager", ratio_to_best_peer=3.0)
    forward = row("ssd", "star", mode="fwd", best_peer="eager", ratio_to_best_peer=6.0)
    picture = as_figure(read_results(stored(tmp_path, *NORM, step, forward)))
    root = ElementTree.fromstring(picture)
    marks = [
        (element.tag.rpartition("}")[2], element.get("class"), note.text)
        for element in root.iter()
        if (note := element.find("{http://www.w3.org/2000/svg}title")) is not None and element is not root
    ]
    assert marks == [
        ("circle", "mark slower", "B8-T512-D256: compile, full: 0.8 x"),
        ("polygon", "mark faster", "B8-T512-D256: eager, step: 3 x"),
        ("circle", "mark faster hollow", "B8-T512-D256: eager, fwd: 6 x"),
    ]
    x = {
        kind: float(re.search(rf'<line class="{kind}" x1="([0-9.]+)"', picture)[1])  # type: ignore[index]
        for kind in ("one", "grid")
    }
    slow, fast = (float(re.search(rf'mark {kind}" cx="([0-9.]+)"', picture)[1]) for kind in ("slower", "faster hollow"))  # type: ignore[index]
    assert slow < x["one"] < fast


def test_a_figure_needs_ratios_above_zero() -> None:
    with pytest.raises(ValueError, match=r"dots: ssd has the ratio 0\.0, needs one above 0"):
        draw([Dot("ssd", "fwd", 0.0, "")], "title", "subtitle")
    assert draw([], "title", "subtitle").count("<circle") == 2
