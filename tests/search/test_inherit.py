"""Weights from parents: what is copied, what is not, and that a search with them can be interrupted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from search import run
from search.inherit import inherit_weights
from star_core import Genome, LanguageModel, ModelConfig
from tests.search.test_run import PLAIN, RESULTS, check_kills_and_resumes, rows

CONFIG = ModelConfig(width=32, head_dim=8, vocab_size=9)
CHILD = Genome.parse("1.1.1.1.1-9.1.1.1.1-7.1.1.1.1-9.1.1.1.1")
FIRST = Genome.parse("1.1.1.1.1-9.1.1.1.1-5.1.1.1.1-9.1.1.1.1")
SECOND = Genome.parse("5.1.1.1.1-9.1.1.1.1-7.1.1.1.1-10.1.1.1.1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Fourscore and seven years ago our fathers brought forth a new nation.\n" * 200)
    return path


def saved(path: Path, genome: Genome, seed: int, config: ModelConfig = CONFIG) -> LanguageModel:
    model = LanguageModel(genome, config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    model.save(path)
    return model


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_unchanged_livs_have_the_parents_weights_and_changed_ones_their_own(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first", FIRST, 1), saved(tmp_path / "second", SECOND, 2)
    child, fresh = (LanguageModel(CHILD, CONFIG, seed=3) for _ in range(2))
    assert inherit_weights(child, [tmp_path / "first", tmp_path / "second"]) == 4
    for place, parent in enumerate((first, first, second, first)):
        assert same(child.backbone.livs[place], parent.backbone.livs[place])
        assert torch.equal(child.backbone.norms[place], parent.backbone.norms[place])
    assert torch.equal(child.embedding, first.embedding)
    assert torch.equal(child.backbone.norms[-1], first.backbone.norms[-1])
    alone = LanguageModel(CHILD, CONFIG, seed=3)
    assert inherit_weights(alone, [tmp_path / "nowhere", tmp_path / "first"]) == 3
    assert same(alone.backbone.livs[2], fresh.backbone.livs[2])
    assert not same(alone.backbone.livs[0], fresh.backbone.livs[0])


def test_models_of_another_depth_width_or_norm(tmp_path: Path) -> None:
    sandwich = "1.1.1.1.1[residual=3]"
    short = saved(tmp_path / "short", Genome.parse(f"{sandwich}-9.1.1.1.1"), 1)
    saved(tmp_path / "narrow", Genome.parse(f"width=16;{CHILD}"), 2)
    child = LanguageModel(Genome.parse(f"{sandwich}-9.1.1.1.1-7.1.1.1.1"), CONFIG, seed=3)
    assert inherit_weights(child, [tmp_path / "narrow", tmp_path / "short"]) == 2
    assert torch.equal(child.backbone.out_norms["0"], short.backbone.out_norms["0"])
    assert not torch.equal(child.backbone.out_norms["0"], torch.ones(32))
    alone, fresh = (LanguageModel(CHILD, CONFIG, seed=3) for _ in range(2))
    assert inherit_weights(alone, [tmp_path / "narrow"]) == 0
    assert same(alone, fresh)


def test_without_parents_nothing_changes(tmp_path: Path) -> None:
    child, fresh = (LanguageModel(CHILD, CONFIG, seed=3) for _ in range(2))
    assert inherit_weights(child, [tmp_path / "nowhere"]) == 0
    assert inherit_weights(child, []) == 0
    assert same(child, fresh)


def test_an_output_layer_of_its_own_is_inherited(tmp_path: Path) -> None:
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    parent = saved(tmp_path / "parent", FIRST, 1, untied)
    child = LanguageModel(CHILD, untied, seed=3)
    inherit_weights(child, [tmp_path / "parent"])
    assert torch.equal(child.output_weight, parent.output_weight)


def test_a_liv_that_shares_otherwise_is_not_inherited(tmp_path: Path) -> None:
    # The same genes, and in the parent the second attention has no featurizer of its own for what it reuses.
    sharing = Genome.parse("1.2.1.1.1-9.1.1.1.1-1.2.1.1.1-9.1.1.1.1")
    alone = Genome.parse("5.1.1.1.1-9.1.1.1.1-1.2.1.1.1-9.1.1.1.1")
    saved(tmp_path / "parent", sharing, 1)
    child = LanguageModel(alone, CONFIG, seed=3)
    inherited = inherit_weights(child, [tmp_path / "parent"])
    assert 2 <= inherited <= 3
    assert child.loss(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).isfinite()


def test_children_inherit_and_the_log_and_the_report_say_so(tmp_path: Path, text: Path) -> None:
    root, plain = tmp_path / "run", tmp_path / "plain"
    arguments = [*PLAIN, "--workers", "inline", "--data", str(text)]
    assert run.main([*arguments, "--out", str(root), "--inherit", "--final-seeds", "1"]) == 0
    assert run.main([*arguments, "--out", str(plain)]) == 0
    inherited = [json.loads(d).get("inherited", 0) for d, k in rows(root, "details, kind") if k == "candidate"]
    assert inherited[:4] == [0] * 4
    assert sum(inherited[4:]) > 0
    assert not any(json.loads(d).get("inherited") for d, k in rows(root, "details, kind") if k != "candidate")
    # The first generation has no parents, and is that of a search without inheritance.
    assert rows(root, RESULTS)[:8] == rows(plain, RESULTS)[:8]
    assert rows(root, RESULTS)[8:12] != rows(plain, RESULTS)[8:12]
    assert "descendants have trained longer than newcomers" in (root / "report.html").read_text()
    assert "descendants have trained longer" not in (plain / "report.html").read_text()
    front = {f"{row['genome_hash']}.safetensors" for row in json.loads((root / "front.json").read_text())}
    assert {path.name for path in (root / "best").iterdir()} == front
    assert not list((root / "work").glob("*.safetensors"))


@pytest.mark.slow
def test_a_killed_search_with_inheritance_ends_as_an_uninterrupted_one(tmp_path: Path, text: Path) -> None:
    check_kills_and_resumes(
        tmp_path, text, 3, [*PLAIN, "--inherit", "--generations", "3", "--population", "6", "--tokens", "8192"]
    )
