"""Genomes beyond the paper's as transformers' models: saved, loaded, generating; and no class of another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from star_core import Genome, LanguageModel, ModelConfig
from star_core.convert import to_transformers
from star_core.hub import StarConfig, StarForCausalLM

CONFIG = ModelConfig(width=32, head_dim=8, vocab_size=41, time_scale=16)
TEXT = (
    "width=64,ffn=2,head_dim=16;11114[operator=12233,window=4,residual=4]-11114[operator=12243,window=4]-"
    "91111[operator=94141,residual=3]-91111-11111[operator=14112,z=114211,residual=2]"
)


def test_sizes_of_a_genome_are_those_of_the_configuration() -> None:
    config = StarConfig(genome=TEXT, width=32, head_dim=8, vocab_size=41)
    assert (config.width, config.head_dim, config.ffn_width, config.hidden_size) == (64, 16, 128, 64)
    assert config.num_attention_heads == 4


@torch.no_grad()
def test_a_copy_says_the_same_and_comes_back(tmp_path: Path) -> None:
    model = LanguageModel(Genome.parse(TEXT), CONFIG, seed=0)
    tokens = torch.randint(41, (2, 9), generator=torch.Generator().manual_seed(0))
    star = StarForCausalLM.from_star(model)
    assert torch.equal(star(tokens).logits, model(tokens))
    star.save_pretrained(tmp_path)
    read = StarForCausalLM.from_pretrained(tmp_path)
    assert read.config.genome == TEXT
    assert torch.equal(read(tokens).logits, model(tokens))
    made = read.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, model.generate(tokens, 6, temperature=0.0))


@pytest.mark.parametrize("text", ["11111[residual=3]-91111", "11111[head_dim=16]-91111", "51111[taps=3]"])
def test_no_other_class_has_such_layers(text: str) -> None:
    model = LanguageModel(Genome.parse(text), CONFIG, seed=0)
    with pytest.raises(
        ValueError, match=r"no class of transformers has the layers of .* needs the paper's genes alone"
    ):
        to_transformers(model)
