"""The report of made-up runs: what it says, what it draws, and that it stays one safe file whatever is in the log."""

from __future__ import annotations

import io
import json
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from search.evaluation import Status
from search.report import front_table, print_front, write_front_image, write_report
from search.report_data import follow_progress, read_run
from search.report_metrics import order_metrics
from star_core.genome import BASELINES, POOL
from tests.search.parsed_page import Page
from tests.search.synthetic_run import OBJECTIVES, write_synthetic_run

TEMPLATES = Path(__file__).parents[2] / "search" / "templates"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "three")


@pytest.fixture(scope="module")
def page_text(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(page_text: str) -> Page:
    return Page(page_text)


def report_of(run_dir: Path) -> Page:
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert page.errors == []
    return page


def dominated(point: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    return any(all(a <= b for a, b in zip(o, point, strict=True)) and tuple(o) != tuple(point) for o in others)


# The page as a file


def test_page_is_well_formed_and_asks_nobody_for_anything(page_text: str, page: Page) -> None:
    assert page.errors == []
    attributes = {key: value for _, a in page.elements for key, value in a.items()}
    assert not {"src", "srcset", "action", "poster"} & attributes.keys()
    assert all(a["href"].startswith("#") for _, a in page.elements if "href" in a)
    own = page_text.replace(get_plotlyjs(), "")
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg)", own)
    policies = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none';")
    assert "http" not in policies[0]


def test_page_holds_plotly_once(page_text: str) -> None:
    assert page_text.count(get_plotlyjs()) == 1
    assert len(page_text) - len(get_plotlyjs()) < 1_000_000


def test_links_inside_the_page_lead_somewhere_and_ids_are_unique(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in page.elements if "href" in a} <= set(ids)


def test_text_from_the_log_cannot_become_markup(tmp_path: Path) -> None:
    text = write_report(write_synthetic_run(tmp_path / "all <b>failed</b>", failing=1.0, baselines=False)).read_text()
    page = Page(text)
    assert page.errors == []
    assert "<script>alert" not in text
    assert "<b>failed" not in text
    assert "expected <Tensor[2, 64] & float32>, got \"None\" </script><script>alert('x')</script>" in page.text
    assert "made up <for tests & nothing else>" in page.text


def test_pictures_and_figures_have_texts_for_those_who_cannot_see_them(page: Page) -> None:
    for name, attributes in page.elements:
        if attributes.get("role") == "img" and name != "svg":
            assert attributes.get("aria-label")
    drawn = [attributes for name, attributes in page.elements if name == "svg" and attributes.get("role") == "img"]
    titles = sum(name == "title" for name, _ in page.elements)
    assert len(drawn) > 20
    assert titles > len(drawn)


def test_every_colour_used_is_in_both_palettes(page_text: str) -> None:
    palette = (TEMPLATES / "palette.css").read_text()
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in palette.split("@media"))
    used = set(re.findall(r"var\((--[\w-]+)\)", page_text.replace(get_plotlyjs(), ""))) - {
        "--fill",
        "--series",
        "--share",
    }
    assert used <= light
    # The rest is meant for both themes.
    assert light - dark == {"--liv-ink", "--hatch"}


# What the page says


def test_header_tells_outcomes_machine_and_reasons(run_dir: Path, page: Page) -> None:
    run = read_run(run_dir)
    failed = [candidate for candidate in run.candidates if candidate.status is not Status.OK]
    assert 0 < len(failed) < len(run.candidates) == 80
    assert f"80 candidates in 5 generations: {80 - len(failed)} trained and measured, {len(failed)} failed" in page.text
    for status in Status:
        assert f"{status.value} {sum(c.status is status for c in run.candidates)}" in page.text
    for candidate in failed:
        assert candidate.error is not None
        assert candidate.error.splitlines()[0] in page.text
    assert "a long tail that nobody reads" not in page.text
    for fact in ("Imaginary CPU @ 2.0 GHz", "16.00 GiB", "262,144", "Sequence length (tokens) 256", "avx2, fma"):
        assert fact in page.text


def test_unfinished_run_says_how_far_it_is(run_dir: Path, tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, generations=2, population=4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "generations": 7}))
    assert "8 candidates in 2 generations of 7 planned" in report_of(tmp_path).text


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_every_pair_of_objectives_can_be_seen(tmp_path: Path, number: int) -> None:
    write_synthetic_run(tmp_path, objectives=OBJECTIVES[:number], generations=2, population=8, depth=6)
    page = report_of(tmp_path)
    pairs = number * (number - 1) // 2
    assert page.count("button", "pair") == (pairs if number > 2 else 0)
    figures = page.figures()
    assert {f"best-{name}-figure" for name in OBJECTIVES[:number]} < figures.keys()
    axes = json.loads(next(text for a, text in page.scripts if a.get("id") == "axes"))
    options = sum(name == "option" for name, _ in page.elements)
    assert options == 2 * len(axes)
    for trace in figures["front-figure"]["data"]:
        assert all(len(row) == len(axes) for row in trace.get("customdata", []))


def test_axis_titles_hold_units(page: Page) -> None:
    titles = {
        axis["title"]["text"]
        for figure in page.figures().values()
        for key, axis in figure["layout"].items()
        if key in ("xaxis", "yaxis")
    }
    assert titles == {
        "Perplexity (per token)",
        "Decode time (× reference)",
        "Cache (KiB)",
        "Hypervolume (share of the box)",
        "Generation",
        "Share of all LIVs (%)",
        "Training step",
        "Training loss (nats per token)",
    }


def test_front_figure_shows_everyone_once_with_genome_and_metrics(run_dir: Path, page: Page) -> None:
    run = read_run(run_dir)
    traces = {trace["name"]: trace for trace in page.figures()["front-figure"]["data"]}
    assert len(traces["front"]["x"]) == len(run.front)
    assert len(traces["candidates"]["x"]) + len(run.front) == len(run.scored)
    assert set(BASELINES) < traces.keys()
    for number, member in enumerate(run.front):
        hover = traces["front"]["hovertext"][number]
        assert hover.replace("<br>", "-").endswith(member.genome)
        assert member.genome_hash in hover
        assert f"Perplexity {member.metrics['perplexity']:.3f} per token" in hover
        assert traces["front"]["y"][number] == pytest.approx(member.metrics["perplexity"], rel=1e-5)


def test_population_shares_add_up_and_differential_classes_are_hatched(page: Page) -> None:
    bars = page.figures()["population-figure"]["data"]
    groups = bars[0]["x"]
    assert groups == ["0", "1", "2", "3", "4", "front"]
    for place in range(len(groups)):
        assert sum(bar["y"][place] for bar in bars) == pytest.approx(100)
    names = {POOL[number].name: POOL[number] for number in POOL}
    for bar in bars:
        assert bool(bar["marker"]["pattern"]["shape"]) == names[bar["name"]].differential


def test_table_has_every_metric_and_marks_the_best_of_front_and_baselines(run_dir: Path, page: Page) -> None:
    rows = front_table(run_dir)
    metrics = order_metrics((key for row in rows for key in row.metrics), OBJECTIVES[:3])
    assert page.count("tr", "candidate") == len(read_run(run_dir).front)
    assert page.count("tr", "baseline") == 4
    cells = [a for name, a in page.elements if name == "td" and "number" in (a.get("class") or "").split()]
    values = [a for a in cells if "data-value" in a]
    assert len(values) == len(rows) * len(metrics)
    best = [float(a["data-value"]) for a in values if "best" in a["class"].split()]
    assert set(best) == {min(row.metrics[key] for row in rows) for key in metrics}


def test_winner_and_how_to_use_it_are_named(run_dir: Path, page: Page) -> None:
    best = read_run(run_dir).front[0]
    assert f'LanguageModel.load("{run_dir}/best/{best.genome_hash}.safetensors")' in page.text
    assert f"python -m search.run --resume --out {run_dir}" in page.text
    assert best.genome in page.text


def test_many_winners_are_folded(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, objectives=OBJECTIVES, population=20, generations=2, depth=5)
    page = report_of(tmp_path)
    front = len(read_run(tmp_path).front)
    assert front > 8
    assert page.count("article", "winner") == front
    assert f"The other {front - 8} members of the front" in page.text


# Young, failed and strange runs


def test_front_is_computed_while_front_json_is_missing(run_dir: Path, tmp_path: Path) -> None:
    write_synthetic_run(tmp_path)
    (tmp_path / "front.json").unlink()
    run = read_run(tmp_path)
    assert run.front == read_run(run_dir).front
    points = [[c.metrics[name] for name in run.objectives] for c in run.scored]
    expected = {c.genome_hash for c, point in zip(run.scored, points, strict=True) if not dominated(point, points)}
    assert {member.genome_hash for member in run.front} == expected
    report_of(tmp_path)


def test_metrics_measured_again_for_the_front_win(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, generations=1)
    entries = json.loads((tmp_path / "front.json").read_text())
    entries[0]["metrics"]["perplexity"] = 1.25
    (tmp_path / "front.json").write_text(json.dumps(entries))
    assert front_table(tmp_path)[0].metrics["perplexity"] == 1.25


@pytest.mark.parametrize(
    "shape",
    [
        {"failing": 1.0},
        {"failing": 1.0, "baselines": False},
        {"population": 0, "generations": 0},
        {"population": 1, "generations": 1, "failing": 0.0},
        {"generations": 1, "baselines": False},
        {"depth": 2, "population": 4},
    ],
    ids=["all-failed", "nothing-at-all", "baselines-only", "one-candidate", "one-generation", "shallow"],
)
def test_report_of_a_strange_run(tmp_path: Path, shape: dict) -> None:
    write_synthetic_run(tmp_path, **shape)
    page = report_of(tmp_path)
    run = read_run(tmp_path)
    assert f"{len(run.front)} on the front" in page.text
    assert ("front-figure" in page.figures()) == bool(run.front)
    assert page.count("article", "winner") == len(run.front)
    console = Console(file=io.StringIO(), width=60)
    print_front(tmp_path, console)
    assert ("No candidate has succeeded yet" in console.file.getvalue()) == (not run.front)


def test_huge_and_tiny_values_stay_readable(tmp_path: Path) -> None:
    scale = {"perplexity": 1e12, "cache_bytes": 1e9, "decode_ms_per_token_ratio": 1e-7}

    def change(metrics: dict[str, float]) -> dict[str, float]:
        return {key: value * scale.get(key, 1.0) for key, value in metrics.items()}

    write_synthetic_run(tmp_path, change=change, depth=6, population=8)
    page = report_of(tmp_path)
    assert "GiB" in page.text
    assert re.search(r"\d\.\d+e\+12", page.text)
    write_front_image(tmp_path, tmp_path / "front.svg")
    texts = [element.text or "" for element in ElementTree.parse(tmp_path / "front.svg").iter()]
    assert any(re.fullmatch(r"[\d.]+T", text) for text in texts)


def test_values_over_several_powers_of_ten_get_log_axes(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, change=lambda m: {**m, "cache_bytes": m["cache_bytes"] ** 4}, failing=0.0)
    page = report_of(tmp_path)
    axes = json.loads(next(text for a, text in page.scripts if a.get("id") == "axes"))
    assert {axis["title"].split(" (")[0] for axis in axes if axis["type"] == "log"} == {"Cache"}
    progress = follow_progress(read_run(tmp_path))
    assert progress is not None
    assert progress.log_scaled == {"cache_bytes"}


def test_failed_baseline_stands_in_the_table_with_its_status(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, generations=1)
    with sqlite3.connect(tmp_path / "run.db") as db:
        db.execute("UPDATE evaluations SET status='OOM', metrics='{}', error='too <big>' WHERE name='StripedMamba'")
    db.close()
    page = report_of(tmp_path)
    assert "OOM: too <big>" in page.text
    row = next(row for row in front_table(tmp_path) if row.name == "StripedMamba")
    assert (row.status, row.metrics) == (Status.OOM, {})
    console = Console(file=io.StringIO(), width=160)
    print_front(tmp_path, console)
    assert "StripedMamba (OOM)" in console.file.getvalue()


def test_candidates_without_an_objective_are_counted_and_left_out(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, generations=1, failing=0.0)
    (tmp_path / "front.json").unlink()
    with sqlite3.connect(tmp_path / "run.db") as db:
        db.execute("UPDATE evaluations SET metrics='{\"perplexity\": NaN}' WHERE id IN (6, 7)")
    db.close()
    assert len(read_run(tmp_path).scored) == 14
    assert "2 more ended OK without a number for every objective" in report_of(tmp_path).text


def test_report_can_be_written_while_the_search_holds_the_log(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, generations=1)
    before = len(read_run(tmp_path).candidates)
    writer = sqlite3.connect(tmp_path / "run.db")
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM evaluations")
    assert len(read_run(tmp_path).candidates) == before
    report_of(tmp_path)
    writer.close()
    assert not list(tmp_path.glob("*.new"))


# Bad input


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run_dir: cannot read .*config\.json: No such file"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text('{"objectives": ["perplexity"]}')
    with pytest.raises(ValueError, match="needs a list of two or more 'objectives'"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text('{"objectives": ["perplexity", "cache_bytes"]}')
    with pytest.raises(ValueError, match=r"run\.db does not exist"):
        write_report(tmp_path)
    (tmp_path / "run.db").write_text("this is no database" * 100)
    with pytest.raises(ValueError, match=r"run\.db cannot be read as a run's log"):
        write_report(tmp_path)


def test_a_front_that_contradicts_the_log_is_refused_and_the_old_page_stays(tmp_path: Path) -> None:
    path = write_report(write_synthetic_run(tmp_path, generations=1, population=4, failing=0.0))
    before = path.read_bytes()
    entries = json.loads((tmp_path / "front.json").read_text())
    (tmp_path / "front.json").write_text(json.dumps([{**entries[0], "genome_hash": "0123456789abcdef"}]))
    with pytest.raises(ValueError, match=r"front\.json names genome 0123456789abcdef, which run\.db does not hold"):
        write_report(tmp_path)
    with sqlite3.connect(tmp_path / "run.db") as db:
        db.execute("UPDATE evaluations SET metrics='{}' WHERE genome_hash=?", (entries[0]["genome_hash"],))
    db.close()
    (tmp_path / "front.json").write_text(json.dumps([{**entries[0], "metrics": {}}]))
    with pytest.raises(ValueError, match="lacks a number for an objective"):
        write_report(tmp_path)
    assert path.read_bytes() == before


def test_a_front_image_needs_a_front(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, failing=1.0, generations=1, population=4)
    with pytest.raises(ValueError, match="holds no successful candidate"):
        write_front_image(tmp_path, tmp_path / "front.svg")
    assert not (tmp_path / "front.svg").exists()
