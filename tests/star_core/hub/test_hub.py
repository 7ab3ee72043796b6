"""Saving, loading, conversion, initial weights and the model card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from star_core import Genome, LanguageModel, ModelConfig, load

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from star_core.hub import StarConfig, StarForCausalLM, StarModel, from_winner, model_card  # noqa: E402
from tests.star_core.hub.samples import GENOME, LEFT, SIZES, VOCAB, make, prompts  # noqa: E402


def test_star_core_does_not_import_transformers() -> None:
    code = "import sys, star_core; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_auto_classes_know_the_model_type(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), StarConfig)
    base, read = AutoModel.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(base, StarModel)
    assert isinstance(read, StarForCausalLM)
    assert isinstance(AutoModelForCausalLM.from_config(model.config), StarForCausalLM)
    tokens = prompts()
    assert torch.equal(read(tokens).logits, model(tokens).logits)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    assert read.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}


def test_equals_the_language_model_both_ways(tmp_path: Path) -> None:
    star = LanguageModel(Genome.parse(GENOME), ModelConfig(**SIZES), seed=3)
    star.save(tmp_path / "winner.safetensors")
    model, tokens = from_winner(tmp_path / "winner.safetensors", measured={"perplexity": 3.5}), prompts()
    assert torch.equal(model(tokens).logits, star(tokens))
    assert model.config.measured == {"perplexity": 3.5}
    assert model.num_parameters() == star.num_parameters()
    back = model.to_star()
    assert torch.equal(back(tokens), star(tokens))
    assert back.genome == star.genome
    back.save(tmp_path / "back.safetensors")
    assert torch.equal(load(tmp_path / "back.safetensors")(tokens), star(tokens))
    half = StarForCausalLM.from_star(star.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half(tokens).logits, star(tokens))


def test_initial_weights_are_those_of_the_language_model() -> None:
    """The same spread, weight by weight, from the constructor and where a checkpoint lacks a weight."""
    star = LanguageModel(Genome.parse(GENOME), ModelConfig(**SIZES), seed=0)
    want = dict(star.backbone.named_parameters()) | {"embedding": star.embedding}
    model = make(seed=1)
    got = dict(model.model.backbone.named_parameters()) | {"embedding": model.model.embed_tokens.weight}
    assert got.keys() == want.keys()
    for name, weight in got.items():
        if want[name].numel() == 1 or not want[name].std():
            assert torch.equal(weight, want[name]), name
        else:
            assert 0.6 < float(weight.std() / want[name].std()) < 1.6, name


@pytest.mark.parametrize(
    "lost", ["A_log", "lam", "norms.0", "filter.log_decay", "dt_bias", "skip", "embed_tokens", "project"]
)
def test_missing_weights_are_drawn_and_others_kept(lost: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        for tensor in weights.values():
            tensor.fill_(7.0)
    save_file({n: t for n, t in weights.items() if lost not in n}, tmp_path / "model.safetensors", {"format": "pt"})
    read, info = StarForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(lost in name for name in info["missing_keys"] if name != "lm_head.weight")
    for name, weight in read.named_parameters():
        if lost in name:
            assert weight.isfinite().all()
            assert not (weight == 7.0).any(), name
        else:
            assert (weight == 7.0).all(), name


def test_resized_and_untied_embeddings(tmp_path: Path) -> None:
    model = make()
    model.resize_token_embeddings(VOCAB + 5)
    assert model.config.vocab_size == VOCAB + 5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(prompts()).logits.shape[-1] == VOCAB + 5
    apart = make(tie_word_embeddings=False)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    apart.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(prompts()).logits, apart(prompts()).logits)
    star = apart.to_star()
    assert torch.equal(star(prompts()), apart(prompts()).logits)
    assert star.num_parameters() == apart.num_parameters()
    star.save(tmp_path / "star.safetensors")
    assert torch.equal(from_winner(tmp_path / "star.safetensors")(prompts()).logits, apart(prompts()).logits)


def test_card_tells_the_genome_and_the_numbers(tmp_path: Path) -> None:
    model = make(measured={"decode_ms_per_token": 1.875, "perplexity": 3})
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card == model_card(model)
    for part in (
        GENOME,
        "featurizer weights of LIV 1",
        "k and v of LIV 0",
        "Diff-GConv-1",
        "| decode_ms_per_token | 1.875 |",
    ):
        assert part in card
    assert f"| parameters | {model.num_parameters():,} |" in card
    assert f"| {model.to_star().cache_bytes(1, 1024):,} bytes |" in card
    assert "## Measured" not in model_card(make())
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model_card(read) == card


def test_card_front_matter_is_yaml(tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    make().save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert "star" in card.data.tags


def test_half_precision_loads_and_generates(tmp_path: Path) -> None:
    model, tokens = make(), prompts()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    got, want = (one(tokens, attention_mask=LEFT).logits for one in (half, model))
    # 8 bits of mantissa through 7 LIVs, on logits of size 1.
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.15)
    out = half.generate(tokens, attention_mask=LEFT, max_new_tokens=4, num_beams=2, pad_token_id=0)
    assert out.shape == (3, 11)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"widht": 32}, ValueError, "unknown option 'widht'; did you mean 'width'"),
        ({"layers": 4}, ValueError, "unknown option 'layers'; needs one of width, head_dim"),
        ({"genome": "9.1.1.1.2-9.1.1.1.2"}, ValueError, "genome: .* is not valid"),
        ({"genome": "x"}, ValueError, "'x'"),
        ({"width": 30, "head_dim": 8}, ValueError, "head_dim: needs an even divisor of width = 30"),
        ({"measured": [3]}, TypeError, "measured: needs a mapping from names to numbers"),
    ],
)
def test_bad_options_fail_clearly(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StarConfig(**options)


def test_unknown_option_in_a_saved_folder_fails_clearly(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    options = json.loads((tmp_path / "config.json").read_text()) | {"heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="unknown option 'heads'"):
        AutoConfig.from_pretrained(tmp_path)
