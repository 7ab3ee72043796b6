"""What the report is made of: progress, lineage, drawings, pictures and tables of made-up runs."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from search.evaluation import Status
from search.front import front_of
from search.report import front_table, print_front, write_front_image
from search.report_data import find_ancestors, follow_progress, read_run
from search.report_drawing import (
    Rail,
    assign_lanes,
    describe_genome,
    draw_genome,
    draw_lineage,
    liv_classes,
    tensor_rails,
    weight_rails,
)
from search.report_metrics import column_for, format_seconds, list_facts
from search.report_scatter import lower_left
from search.report_variation import Tally, sum_up_variation
from search.store import Store
from star_core.genome import BASELINES, POOL, Genome, random_genome
from tests.search.synthetic_run import CHANGES, OBJECTIVES, write_synthetic_run

TEMPLATES = Path(__file__).parents[2] / "search" / "templates"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "three")


def test_runs_are_read_as_written(run_dir: Path) -> None:
    run = read_run(run_dir)
    with Store(run_dir) as store:
        written = store.evaluations()
    # Curves are read of what is shown with them: the baselines and the front.
    shown = {e.genome_hash for e in (*run.baselines, *run.front)}
    assert list(run.baselines) == written[:4]
    assert list(run.candidates) == [replace(e, curve=()) for e in written[4:]]
    assert {e.genome_hash: e.curve for e in run.front} == {
        e.genome_hash: e.curve for e in written[4:] if e.genome_hash in shown
    }


# Progress and lineage


def test_hypervolume_grows_and_equals_the_staircase_of_two_objectives(tmp_path: Path) -> None:
    run = read_run(write_synthetic_run(tmp_path, objectives=OBJECTIVES[:2]))
    progress = follow_progress(run)
    assert progress is not None
    assert list(progress.hypervolume) == sorted(progress.hypervolume)
    assert 0 < progress.hypervolume[0] <= progress.hypervolume[-1] < 1
    low = np.array([progress.ideal[name] for name in run.objectives])
    high = np.array([progress.reference[name] for name in run.objectives])
    points = np.array([[c.metrics[name] for name in run.objectives] for c in run.scored])
    area, ceiling = 0.0, high[1]
    for x, y in lower_left([tuple(point) for point in points.tolist()]):
        if x < high[0] and y < ceiling:
            area += (high[0] - x) * (ceiling - y)
            ceiling = y
    assert progress.hypervolume[-1] == pytest.approx(area / np.prod(high - low))


def test_reference_point_lies_beyond_front_and_baselines(run_dir: Path) -> None:
    run = read_run(run_dir)
    progress = follow_progress(run)
    assert progress is not None
    for name in run.objectives:
        shown = [e.metrics[name] for e in (*run.front, *run.scored_baselines)]
        assert progress.ideal[name] <= min(shown)
        assert max(shown) < progress.reference[name]
        for value, generation in zip(progress.best[name], progress.generations, strict=True):
            assert value == min(c.metrics[name] for c in run.scored if c.generation == generation)


def test_ancestors_are_the_parents_and_theirs(run_dir: Path) -> None:
    run = read_run(run_dir)
    member = next(m for m in run.front if m.parents and m.generation >= 2)
    ancestors = find_ancestors(run, member, 1000)
    assert ancestors[0] == member
    assert {a.genome_hash for a in ancestors[1:3]} == set(member.parents)
    hashes = {a.genome_hash for a in ancestors}
    assert all(parent in hashes for a in ancestors for parent in a.parents)
    assert len(find_ancestors(run, member, 2)) == 2


# Variation


def test_every_candidate_has_one_origin_and_counts_in_each_of_its_changes(run_dir: Path) -> None:
    run = read_run(run_dir)
    variation = sum_up_variation(run)
    assert [tally.name for tally in variation.origins] == ["sampled afresh", "bred from two parents"]
    assert sum(tally.candidates for tally in variation.origins) == len(run.candidates)
    assert sum(tally.lasting for tally in variation.origins) == len(run.front)
    assert {tally.name for tally in variation.changes} == set(CHANGES)
    for tally in variation.changes:
        members = [c for c in run.candidates if tally.name in c.mutations]
        assert tally.candidates == len(members)
        assert tally.repaired == sum(c.repaired for c in members)
        assert tally.failed == sum(c.status is not Status.OK for c in members)
        assert tally.lasting <= tally.paid <= tally.candidates
    assert [t.candidates for t in variation.changes] == sorted((t.candidates for t in variation.changes), reverse=True)
    repaired = sum(c.repaired for c in run.candidates)
    assert repaired > 0
    assert f"crossover left {repaired} (" in variation.summary


def test_who_paid_was_on_the_front_of_its_own_time(run_dir: Path) -> None:
    run = read_run(run_dir)
    expected = 0
    for generation in run.generations:
        front = front_of([c for c in run.scored if c.generation <= generation], run.ranking)
        expected += sum(member.generation == generation for member in front)
    assert sum(tally.paid for tally in sum_up_variation(run).origins) == expected


def test_what_broke_the_budget_untrained_has_not_failed(run_dir: Path) -> None:
    run = read_run(run_dir)
    untrained = replace(run.candidates[0], status=Status.OVER_BUDGET, parents=(), repaired=False, mutations=())
    variation = sum_up_variation(replace(run, candidates=(untrained,), front=()))
    assert variation.origins == (Tally("sampled afresh", 1, 0, 0, 0, 0),)
    assert variation.changes == ()
    assert variation.summary == (
        "Of 0 candidates that were bred, crossover left 0 invalid, which were repaired. "
        "Of all 1, 0 (0.0\N{NO-BREAK SPACE}%) ended as INVALID."
    )


# Drawings


def test_ancestors_on_the_front_are_numbered_and_lead_to_their_drawings(run_dir: Path) -> None:
    run = read_run(run_dir)
    member = next(m for m in run.front if m.parents)
    ancestors = find_ancestors(run, member, 60)
    numbers = {ancestors[0].genome_hash: 4, ancestors[-1].genome_hash: 7}
    svg = draw_lineage(ancestors, {a.genome_hash: f"title of {a.genome_hash}" for a in ancestors}, numbers)
    space = "{http://www.w3.org/2000/svg}"
    drawn = ElementTree.fromstring(svg)
    assert [link.get("href") for link in drawn.iter(f"{space}a")] == ["#winner-7"]
    texts = [e.text for e in drawn.iter(f"{space}text") if "number" in (e.get("class") or "")]
    assert sorted(texts) == ["4", "7"]
    assert sum(1 for _ in drawn.iter(f"{space}circle")) == len(ancestors)
    assert f"title of {ancestors[-1].genome_hash}" in svg


def test_sharing_of_the_papers_example_becomes_rails() -> None:
    genome = Genome.parse("21211-31112-21221-32112")
    assert weight_rails(genome) == [Rail((0, 2), "W1")]
    assert tensor_rails(genome) == [Rail((1, 3), "k")]
    words = describe_genome(genome)
    assert "LIVs 0, 2 share featurizer weights" in words
    assert "LIV 3 reuses k of LIV 1" in words


def test_groups_with_the_same_readers_share_a_rail() -> None:
    genome = Genome.parse("11114-21112-31111-11114")
    assert tensor_rails(genome) == [Rail((0, 1, 3), "k"), Rail((0, 3), "v")]
    assert tensor_rails(Genome.parse("51114-51114")) == [Rail((0, 1), "B C")]


@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_drawings_are_sound_and_show_every_liv(small: bool) -> None:
    rng = np.random.default_rng(3)
    for depth in (1, 2, 8, 24, 48):
        for _ in range(8):
            genome = random_genome(rng, depth)
            svg = ElementTree.fromstring(draw_genome(genome, small=small))
            space = "{http://www.w3.org/2000/svg}"
            width, height = float(svg.get("width", 0)), float(svg.get("height", 0))
            boxes = [e for e in svg.iter(f"{space}rect") if e.get("class") == "fill"]
            names = [e.text for e in svg.iter(f"{space}text") if e.get("class") == "name"]
            assert len(boxes) == depth
            assert names == [POOL[liv.liv_class].name for liv in genome.livs]
            hatched = [e for e in svg.iter(f"{space}rect") if e.get("fill") == "url(#hatch)"]
            assert len(hatched) == sum(POOL[liv.liv_class].differential for liv in genome.livs)
            ties = [e.text for e in svg.iter(f"{space}text") if "tie" in (e.get("class") or "")]
            assert len(ties) == len(weight_rails(genome)) + len(tensor_rails(genome))
            for path in svg.iter(f"{space}path"):
                numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d", ""))]
                assert min(numbers) >= 0
                assert max(numbers) <= max(width, height)
            for tie in svg.iter(f"{space}text"):
                assert 0 < float(tie.get("x", -1)) < width
                assert 0 < float(tie.get("y", -1)) <= height


def test_genes_beyond_the_papers_are_shown_by_what_runs_alike() -> None:
    text = (
        "11111[operator=12233]-11111[operator=12113]-10.1.1.1.1[operator=94141]-10.1.1.1.1[operator=91142]-"
        "81111[operator=83211]-71111[K=311112]-16.1.1.1.1[taps=3]"
    )
    assert liv_classes(text) == [1, 5, 14, 9, 7, 8, 16]
    assert liv_classes("11111-18.1.1.1.1") == liv_classes("no genome") == []
    words = describe_genome(Genome.parse(text))
    assert "ReLU-SA[operator=12233], Lin-SA[operator=12113], Diff-RG-LRU[operator=94141]" in words
    svg = draw_genome(Genome.parse(text))
    assert ">Lin-SA</text>" in svg
    assert "LIV 4: GConv[operator=83211], short conv" in svg


def test_rails_that_meet_have_lanes_of_their_own() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        lanes = assign_lanes(tensor_rails(random_genome(rng, 30)))
        for a in lanes:
            for b in lanes:
                meet = a.members[0] <= b.members[-1] and b.members[0] <= a.members[-1]
                assert a == b or not meet or lanes[a] != lanes[b]


@pytest.mark.parametrize("number", [2, 3])
def test_front_image_is_a_sound_picture_of_all(tmp_path: Path, number: int) -> None:
    write_synthetic_run(tmp_path, objectives=OBJECTIVES[:number], population=8, generations=2)
    write_front_image(tmp_path, tmp_path / "front.svg")
    run = read_run(tmp_path)
    text = (tmp_path / "front.svg").read_text()
    svg = ElementTree.fromstring(text)
    space, panels = "{http://www.w3.org/2000/svg}", number - 1
    classes = [(e.tag.removeprefix(space), e.get("class")) for e in svg.iter()]
    # One mark of each kind stands in the key.
    assert classes.count(("circle", "member")) == panels * len(run.front) + 1
    assert classes.count(("circle", "candidate")) == panels * (len(run.scored) - len(run.front)) + 1
    shown = [e.text for e in svg.iter(f"{space}text")]
    assert all(shown.count(name) == panels for name in BASELINES)
    assert shown.count("Perplexity (per token)") == panels
    assert "Decode time (× reference)" in shown
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text


# Tables


def test_front_table_lists_front_then_baselines(run_dir: Path) -> None:
    rows, run = front_table(run_dir), read_run(run_dir)
    front = [row for row in rows if row.kind == "candidate"]
    assert [row.number for row in front] == list(range(1, len(run.front) + 1))
    perplexities = [row.metrics["perplexity"] for row in front]
    assert perplexities == sorted(perplexities)
    assert [row.name for row in rows[len(front) :]] == list(BASELINES)
    assert rows[: len(front)] == front


def test_terminal_table_has_units_layouts_and_the_best_marked(run_dir: Path) -> None:
    console = Console(file=io.StringIO(), width=150)
    print_front(run_dir, console)
    text = console.file.getvalue()
    for part in ("(per token)", "(× reference)", "(KiB)", "(million)", *BASELINES):
        assert part in text
    assert text.count("*") == 4 + 1  # four columns, and the explanation
    rows = front_table(run_dir)
    best = min(row.metrics["perplexity"] for row in rows)
    assert f"{best:.3f}*" in text
    assert "AMAMAMAMAMAMAMAMAMAMAMAM" in text


def test_columns_choose_units_for_their_values() -> None:
    assert column_for("cache_bytes", [4096.0, 2048.0]).title == "Cache (KiB)"
    assert column_for("cache_bytes", [3.0 * 1024**3]).format(3.0 * 1024**3) == "3.000"
    assert column_for("cache_bytes", [12.0, 800.0]).format_with_unit(12.0) == "12 bytes"
    assert column_for("parameters", [1_234_567.0]).format_with_unit(1_234_567.0) == "1.235 million"
    assert column_for("decode_ms_per_token", [0.04567]).format(0.04567) == "0.04567"
    assert column_for("prefill_ms_ratio", [0.5, 0.8]).format_with_unit(0.5) == "0.500×"
    assert column_for("warm_up_seconds", [2.0]).title == "Warm up (s)"
    assert column_for("perplexity", [5.0, 200.0]).log
    assert column_for("perplexity", [2.0, 200.0]).decades == pytest.approx(2.0)
    assert not column_for("perplexity", [0.0, 200.0]).log
    assert column_for("perplexity", []).format(None) == "–"


def test_durations_and_facts_are_written_for_people() -> None:
    durations = {0.25: "0.2 s", 41.4: "41 s", 725.0: "12 min 5 s", 300.0: "5 min", 12_000.0: "3 h 20 min"}
    assert {seconds: format_seconds(seconds) for seconds in durations} == durations
    facts = {
        "memory_bytes": 2**34,
        "seed": 12345,
        "tokens": 12345,
        "data": [],
        "corpus": {"name": "sotu"},
        "id": "f" * 64,
        "inherit": False,
        "gpus_per_task": 0.0,
    }
    assert list_facts(facts) == [
        ("Memory", "16.00 GiB"),
        ("Seed", "12345"),
        ("Training tokens", "12,345"),
        ("Corpus name", "sotu"),
        ("Id", "ffffffffffff…"),
        ("Children inherit weights", "no"),
        ("GPUs of a task", "0"),
    ]


# Colours


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(theme: str) -> None:
    light, dark = (TEMPLATES / "palette.css").read_text().split("@media")
    colours = dict(re.findall(r"(--[\w-]+): #([0-9a-f]{6})", light))
    if theme == "dark":
        colours |= dict(re.findall(r"(--[\w-]+): #([0-9a-f]{6})", dark))

    def luminance(name: str) -> float:
        channels = [int(colours[f"--{name}"][i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    texts = ("ink", "soft", "accent", "good", "weights", "tensors", "baseline")
    pairs = [(text, ground) for text in texts for ground in ("page", "surface", "raised")]
    pairs += [(f"series-{number}", ground) for number in range(8) for ground in ("page", "surface")]
    pairs += [("liv-ink", f"liv-{number}") for number in range(1, 10)] + [("on-accent", "accent")]
    for text, ground in pairs:
        low, high = sorted((luminance(text), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
