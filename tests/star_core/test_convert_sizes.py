"""The sizes that checkpoints of others need: feed-forward width, normed queries and keys, embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from star_core import Genome, LanguageModel, ModelConfig, count_parameters, load

CONFIG = ModelConfig(width=32, head_dim=8, vocab_size=19, time_scale=16)
# Attention, keys shared, through short convolutions, differential; a memoryless unit, a short convolution.
GENOME = Genome.parse("1.1.1.1.4-9.1.1.1.1-1.1.1.1.4-2.1.1.1.1-7.1.1.1.1-12.1.1.1.1")
OTHERS: list[dict[str, Any]] = [
    {"ffn_width": 20},
    {"qk_norm": True},
    {"tie_embeddings": False},
    {"scale_embeddings": False},
    {"ffn_width": 20, "qk_norm": True, "tie_embeddings": False, "scale_embeddings": False},
]


@pytest.fixture(params=OTHERS, ids=lambda sizes: "-".join(sizes))
def model(request: pytest.FixtureRequest) -> LanguageModel:
    made = LanguageModel(GENOME, replace(CONFIG, **request.param), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return made


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_decoding_continues_a_full_pass(model: LanguageModel) -> None:
    want, cache = model(tokens()), model.new_cache(2, 11)
    got = [model(tokens()[:, :4], cache), *(model(tokens()[:, t : t + 1], cache) for t in range(4, 11))]
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing(model: LanguageModel) -> None:
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :5] = False
    got = model(tokens(), attention_mask=mask)
    torch.testing.assert_close(got[:1, 5:], model(tokens()[:1, 5:]), rtol=1e-4, atol=1e-4)


def test_saved_models_keep_their_sizes(model: LanguageModel, tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors")
    read = load(tmp_path / "model.safetensors")
    assert read.config == model.config
    assert torch.equal(read(tokens()), model(tokens()))
    assert count_parameters(GENOME, model.config) == model.num_parameters()


def test_every_size_changes_what_it_says() -> None:
    """Also that the loss uses the output layer that the logits use."""
    plain = LanguageModel(GENOME, CONFIG, seed=0)
    norms = LanguageModel(GENOME, replace(CONFIG, qk_norm=True), seed=0)
    added = {name for name, _ in norms.named_parameters()} - {name for name, _ in plain.named_parameters()}
    # The third LIV reuses the first one's keys.
    assert added == {
        *(f"backbone.livs.{index}.featurizer.norms.{name}.weight" for index in (0, 3) for name in "qk"),
        "backbone.livs.2.featurizer.norms.q.weight",
        *(
            f"backbone.livs.5.{part}.featurizer.norms.{name}.weight"
            for part in ("positive", "negative")
            for name in "qk"
        ),
    }
    narrow = LanguageModel(GENOME, replace(CONFIG, ffn_width=20), seed=0)
    assert plain.num_parameters() - narrow.num_parameters() == 3 * 32 * (96 - 20)
    untied = LanguageModel(GENOME, replace(CONFIG, tie_embeddings=False), seed=0)
    assert untied.num_parameters() - plain.num_parameters() == 19 * 32
    assert torch.equal(untied.embedding, plain.embedding)
    loss = untied.loss(tokens()[:, :-1], tokens()[:, 1:])
    want = torch.nn.functional.cross_entropy(untied(tokens()[:, :-1]).flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert untied.output is not None
    assert untied.output.grad is not None
    unscaled = LanguageModel(GENOME, replace(CONFIG, scale_embeddings=False), seed=0)
    with torch.no_grad():
        # Scaled by hand on its way in alone, where the output layer is a weight of its own.
        by_hand = LanguageModel(GENOME, replace(CONFIG, scale_embeddings=False, tie_embeddings=False), seed=0)
        by_hand.output.copy_(plain.embedding)  # type: ignore[union-attr]
        by_hand.embedding.mul_(32**0.5)
        assert torch.equal(by_hand(tokens()), plain(tokens()))
        assert not torch.allclose(unscaled(tokens()), plain(tokens()), atol=0.1)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"ffn_width": 0}, ValueError, "ffn_width: needs a positive integer, got 0"),
        ({"ffn_width": 2.5}, ValueError, "ffn_width: needs a positive integer, got 2.5"),
        ({"qk_norm": 1}, TypeError, "qk_norm: needs a bool, got 1"),
        ({"tie_embeddings": "no"}, TypeError, "tie_embeddings: needs a bool, got 'no'"),
        ({"scale_embeddings": None}, TypeError, "scale_embeddings: needs a bool, got None"),
    ],
)
def test_bad_sizes_fail_clearly(sizes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ModelConfig(**sizes)
