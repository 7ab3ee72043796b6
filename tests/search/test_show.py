"""A genome in words, numbers and a picture."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from search.show import account, as_svg, in_words, main
from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome import Bounds, SizeGenes, random_genome

CONFIG = ModelConfig(width=32, head_dim=8, vocab_size=19, time_scale=16)


def test_account_by_hand():
    counted = account(Genome.parse("11111-31111[residual=3]-91111"), CONFIG, (4, 100))
    maps = 32 * (3 * 32 + 32) + 32 * (32 + 16 + 32) + 32 * (2 * 96 + 96) + 19 * 32
    assert counted.projection_flops == 2 * maps
    assert counted.mixing_flops == {4: 2 * 2 * 2 * 32 * 4, 100: 2 * 2 * 2 * 32 * 100}
    model = LanguageModel(Genome.parse("11111-31111[residual=3]-91111"), CONFIG)
    assert counted.parameters == model.num_parameters()
    assert counted.cache_bytes == {4: model.cache_bytes(1, 4), 100: model.cache_bytes(1, 100)}


@pytest.mark.parametrize(
    ("text", "at_ten", "at_thousand"),
    [
        ("11111[operator=12223,window=16]", 4 * 32 * 10, 4 * 32 * 16),
        ("10.1.1.1.1", 2 * 4 * 32 * 10, 2 * 4 * 32 * 1000),
        ("11111[operator=12113]", 4 * 4 * 8 * 8, 4 * 4 * 8 * 8),
        ("11111[operator=14112]", 6 * 4 * 8 * 8, 6 * 4 * 8 * 8),
        ("51111", 6 * 16 * 64, 6 * 16 * 64),
        ("71111", 2 * 3 * 32, 2 * 3 * 32),
        ("81111", 2 * 10 * 32, 2 * 1000 * 32),
        ("81111[operator=83211,window=16]", 2 * 16 * 32, 2 * 16 * 32),
        ("91111[operator=94111]", 4 * 96, 4 * 96),
        ("91111", 0, 0),
    ],
)
def test_mixing_grows_with_the_context_or_not(text, at_ten, at_thousand):
    assert account(Genome.parse(text), CONFIG, (10, 1000)).mixing_flops == {10: at_ten, 1000: at_thousand}


def test_words_name_what_is_not_usual():
    words = in_words(Genome.parse("width=64,ffn=2;11111[operator=12133,residual=4]-91111"), CONFIG, (8,))
    assert "ReLU-SA[operator=12133,residual=4]" in words
    assert "norms: LIV 0 parallel to the next" in words
    assert "width 64, heads of 8, feed-forward 128, 19 tokens known" in words
    assert "norms" not in in_words(Genome.parse("11111"), CONFIG, (8,))


def test_pictures_stand_alone():
    rng = np.random.default_rng(0)
    bounds = Bounds(sizes=SizeGenes(width=32, head_dim=8))
    for _ in range(10):
        genome = random_genome(rng, 6, level="featurizer", bounds=bounds)
        svg = ElementTree.fromstring(as_svg(genome))
        space = "{http://www.w3.org/2000/svg}"
        names = [e.text for e in svg.iter(f"{space}text") if e.get("class") == "name"]
        assert names == [cls.name.partition("[")[0] for cls in genome.classes]
        assert "--liv-1" in (svg.findtext(f"{space}style") or "")


def test_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["11111[operator=12223]-91111", "--width", "32", "--head-dim", "8", "--contexts", "16,512"]
    assert main([*arguments, "--svg", str(tmp_path / "genome.svg")]) == 0
    said = capsys.readouterr().out
    assert "FLOPs a token in maps of channels" in said
    assert said.count("\n") > 5
    ElementTree.parse(tmp_path / "genome.svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["111"], "error: LIV 0 (from 0) of the genome is '111': needs 5 genes"),
        (["11111", "--contexts", "0"], "error: contexts: are 0, need numbers from 1"),
        (["31111", "--width", "32", "--head-dim", "16"], "error: width: SA-3 needs a multiple of"),
        (["91112"], "error: genome 91112 is not valid"),
        (["11111", "--svg", "/nowhere/genome.svg"], "No such file"),
    ],
)
def test_what_cannot_be_shown_is_said(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
