"""Checkpoints of transformers as genomes, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome import gqa_transformer_pp, lfm2

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from star_core.convert import from_transformers, genome_of, to_transformers  # noqa: E402
from star_core.hub import StarForCausalLM  # noqa: E402

VOCAB = 41
NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
HEADS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "vocab_size": VOCAB}


def llama(**options: Any) -> Any:
    settings = HEADS | NO_TOKENS | {"num_hidden_layers": 2, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return randomised(LlamaForCausalLM(LlamaConfig(**(settings | options))))


def lfm2_model(**options: Any) -> Any:
    kinds = ["conv", "full_attention", "conv"]
    settings = HEADS | NO_TOKENS | {"num_hidden_layers": 3, "num_key_value_heads": 1, "layer_types": kinds}
    return randomised(Lfm2ForCausalLM(Lfm2Config(**(settings | {"block_multiple_of": 8} | options))))


def mamba(**options: Any) -> Any:
    settings = NO_TOKENS | {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": VOCAB}
    return randomised(MambaForCausalLM(MambaConfig(**(settings | options))))


def randomised(model: Any) -> Any:
    """Draw every weight so that each matters: transformers' own initial logits are nearly equal for all tokens."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1 or name.endswith("A_log"):
                weight.add_(0.2 * noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)
    return model.eval()


def tokens(batch: int = 2, length: int = 19) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


CASES = {
    "llama, heads of their own": (lambda: llama(), "11111-91111-11111-91111"),
    "llama, k and v for two heads": (
        lambda: llama(num_key_value_heads=2, rms_norm_eps=1e-3),
        "41111-91111-41111-91111",
    ),
    "llama, tied, other base": (
        lambda: llama(
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
        "31111-91111-31111-91111",
    ),
    "lfm2": (lambda: lfm2_model(norm_eps=1e-3), "71111-91111-31111-91111-71111-91111"),
    "lfm2, untied, width as given": (
        lambda: lfm2_model(tie_word_embeddings=False, block_auto_adjust_ff_dim=False, num_key_value_heads=2),
        "71111-91111-41111-91111-71111-91111",
    ),
    "lfm2, attention alone": (
        lambda: lfm2_model(layer_types=["full_attention"] * 3),
        "31111-91111-31111-91111-31111-91111",
    ),
    "lfm2, convolutions alone": (
        lambda: lfm2_model(layer_types=["conv"] * 3, use_cache=False),  # theirs has no cache without attention
        "71111-91111-71111-91111-71111-91111",
    ),
    "mamba": (lambda: mamba(layer_norm_epsilon=1e-3), "51111-51111-51111"),
    "mamba, untied, small state": (lambda: mamba(state_size=2, tie_word_embeddings=False), "61111-61111-61111"),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(",", "").replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> tuple[Any, str]:
    make, genome = CASES[request.param]
    return make(), genome


@torch.no_grad()
def test_logits_are_theirs_and_weights_come_back(case: tuple[Any, str]) -> None:
    theirs, genome = case
    ours = from_transformers(theirs)
    assert ours.genome == Genome.parse(genome)
    want = theirs(tokens(), use_cache=False).logits
    assert want.std() > 0.3  # or nothing would be compared
    torch.testing.assert_close(ours(tokens()), want, rtol=0.0, atol=1e-4)
    back = to_transformers(ours)
    assert type(back) is type(theirs)
    weights, returned = theirs.state_dict(), back.state_dict()
    assert returned.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(returned[name], weight), name
    assert torch.equal(back(tokens(), use_cache=False).logits, want)
    tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert (back.lm_head.weight is back.get_input_embeddings().weight) == tied == (ours.output is None)
    assert ours.num_parameters() == theirs.num_parameters()


@torch.no_grad()
def test_generation_is_theirs(case: tuple[Any, str]) -> None:
    theirs, _ = case
    prompt = tokens(length=7)
    want = theirs.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=theirs.config.use_cache)
    assert torch.equal(from_transformers(theirs).generate(prompt, 20, temperature=0.0), want)


@torch.no_grad()
def test_a_converted_model_saves_loads_and_goes_to_the_hub(case: tuple[Any, str], tmp_path: Any) -> None:
    ours = from_transformers(case[0])
    want = ours(tokens())
    ours.save(tmp_path / "model.safetensors")
    assert torch.equal(LanguageModel.load(tmp_path / "model.safetensors")(tokens()), want)
    star = StarForCausalLM.from_star(ours)
    assert torch.equal(star(tokens()).logits, want)
    star.save_pretrained(tmp_path / "star")
    assert torch.equal(StarForCausalLM.from_pretrained(tmp_path / "star")(tokens()).logits, want)


def test_a_configuration_alone_has_a_genome(case: tuple[Any, str]) -> None:
    assert genome_of(case[0].config) == Genome.parse(case[1])
    with pytest.raises(TypeError, match="config: needs one of LlamaConfig, Lfm2Config, MambaConfig, got GPT2Config"):
        genome_of(GPT2Config())


def test_sizes_dtype_and_mode_are_kept_and_the_original_left_alone() -> None:
    theirs = llama(max_position_embeddings=77, rms_norm_eps=1e-5).to(torch.bfloat16).train()
    ours = from_transformers(theirs)
    assert ours.training
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
    assert ours.config == ModelConfig(
        width=32,
        head_dim=8,
        vocab_size=VOCAB,
        time_scale=77,
        rope_base=10000.0,
        norm_eps=1e-5,
        ffn_width=44,
        tie_embeddings=False,
        scale_embeddings=False,
    )
    before = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in theirs.state_dict().items())
    back = to_transformers(from_transformers(theirs), eos_token_id=5)
    assert back.training
    assert back.dtype == torch.bfloat16
    assert (back.config.max_position_embeddings, back.config.eos_token_id, back.config.bos_token_id) == (77, 5, None)


def test_gradients_are_theirs() -> None:
    """Training goes on from a converted model: the same loss, and the same gradient where the weights are the same."""
    theirs = lfm2_model()
    ours = from_transformers(theirs)
    theirs(tokens(), labels=tokens()).loss.backward()
    ours.loss(tokens()[:, :-1], tokens()[:, 1:]).backward()
    want, got = theirs.model.embed_tokens.weight.grad, ours.embedding.grad
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("genome", "sizes"),
    [
        (gqa_transformer_pp(4), {}),
        (Genome.parse("51111-51111"), {}),
        (lfm2(6), {"qk_norm": True}),
        (gqa_transformer_pp(4), {"tie_embeddings": False}),
    ],
)
def test_our_own_models_become_theirs(genome: Genome, sizes: dict[str, Any]) -> None:
    """A scaled embedding is multiplied out; the output layer is a second weight."""
    ours = LanguageModel(genome, ModelConfig(width=32, head_dim=8, vocab_size=VOCAB, **sizes), seed=0).eval()
    theirs = to_transformers(ours)
    assert theirs.lm_head.weight is not theirs.get_input_embeddings().weight
    torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()), rtol=0.0, atol=1e-4)
    again = from_transformers(theirs)
    assert again.genome == genome
    torch.testing.assert_close(again(tokens()), ours(tokens()), rtol=0.0, atol=1e-4)


def test_conversion_leaves_the_random_state_alone() -> None:
    theirs = mamba()
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    to_transformers(from_transformers(theirs))
    assert torch.equal(torch.rand(3), want)


def mixed() -> Any:
    model = llama()
    model.model.norm.to(torch.bfloat16)
    return model


def narrowed() -> Any:
    """A layer narrower than the first, as pruning leaves it."""
    model = llama()
    for name in ("gate_proj", "up_proj"):
        setattr(model.model.layers[1].mlp, name, torch.nn.Linear(32, 40, bias=False))
    return model


SCALED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: llama(num_attention_heads=8, num_key_value_heads=1),
            ValueError,
            "is 1 for 8 .* 8/1 or 8/2 or 8/4",
        ),
        (lambda: llama(head_dim=16), ValueError, "head_dim: is 16, which with 4 heads is not hidden_size = 32"),
        (lambda: llama(hidden_act="gelu"), ValueError, "hidden_act: is 'gelu', and GMemless .* needs 'silu'"),
        (lambda: llama(attention_dropout=0.1), ValueError, "attention_dropout: is 0.1, .* needs 0"),
        (
            lambda: llama(attention_bias=True),
            ValueError,
            "no place for .*layers.0.self_attn.k_proj.bias and 7 more; needs",
        ),
        (
            lambda: llama(mlp_bias=True),
            ValueError,
            "no place for .*mlp.down_proj.bias and 5 more; needs a checkpoint without",
        ),
        (lambda: llama(rope_parameters=SCALED), ValueError, "rope_type: is 'linear', .* needs 'default'"),
        (mixed, ValueError, "weights of dtypes torch.bfloat16 and torch.float32; needs one for all"),
        (narrowed, ValueError, r"layers.1.mlp.up_proj.weight is \[80, 32\]; needs \[88, 32\]"),
        (lambda: llama().to("meta"), ValueError, "weights are on the device meta, without values"),
        (lambda: lfm2_model(conv_L_cache=4), ValueError, "conv_L_cache: is 4, and GConv-1 has a filter of 3; needs 3"),
        (lambda: lfm2_model(conv_bias=True), ValueError, "no place for .*layers.0.conv.conv.bias and 5 more; needs"),
        (lambda: mamba(state_size=8), ValueError, "state_size: is 8, .* needs 2 or 16"),
        (lambda: mamba(expand=4), ValueError, "intermediate_size: is 128, which Rec-1 at width 32 .* needs 64"),
        (lambda: mamba(conv_kernel=3), ValueError, "conv_kernel: is 3, which .* needs 4"),
        (lambda: mamba(time_step_rank=5), ValueError, "time_step_rank: is 5, which .* needs 2"),
        (lambda: mamba(hidden_act="relu"), ValueError, "hidden_act: is 'relu', which .* needs 'silu'"),
        (lambda: mamba(use_conv_bias=False), ValueError, "lacks backbone.layers.0.mixer.conv1d.bias and 2 more; needs"),
        (lambda: mamba(use_bias=True), ValueError, "no place for .*mixer.in_proj.bias and 5 more; needs"),
        (
            lambda: Mamba2ForCausalLM(
                Mamba2Config(
                    hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=1, vocab_size=VOCAB, **NO_TOKENS
                )
            ),
            ValueError,
            "Mamba-2 has one decay for each head, .* needs Mamba",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=VOCAB)),
            TypeError,
            "needs one of LlamaForCausalLM, Lfm2ForCausalLM, MambaForCausalLM, got GPT2LMHeadModel",
        ),
        (lambda: llama().model, TypeError, "got LlamaModel"),
    ],
)
def test_what_has_no_place_is_refused(make: Any, error: type[Exception], message: str) -> None:
    model = make()
    with pytest.raises(error, match=message):
        from_transformers(model)


@pytest.mark.parametrize(
    ("genome", "sizes", "options", "message"),
    [
        ("11211-91111-11211-91111", {}, {}, "LIV 2 shares with an earlier one"),
        ("11114-91111-11114-91111", {}, {}, "LIV 2 shares with an earlier one"),
        (
            "11111-91111-31111-91111",
            {},
            {},
            "no class of transformers has the layers of 11111-91111-31111-91111; needs",
        ),
        ("11111-91111-11111", {}, {}, "no class of transformers"),
        ("91111-11111", {}, {}, "no class of transformers"),
        ("51111-91111", {}, {}, "no class of transformers"),
        ("51111-61111", {}, {}, "no class of transformers"),
        ("21111-91111", {}, {}, "no class of transformers"),
        ("71111-91111-31111-91111", {}, {}, "config: Lfm2ForCausalLM norms .* needs qk_norm=True, got False"),
        ("11111-91111", {}, {"hidden_size": 64}, "options: hidden_size follows from the model; needs options that"),
    ],
)
def test_genomes_that_transformers_has_no_class_for(
    genome: str, sizes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config = ModelConfig(width=32, head_dim=8, vocab_size=VOCAB, **sizes)
    model = LanguageModel(Genome.parse(genome), config, seed=0)
    with pytest.raises(ValueError, match=message):
        to_transformers(model, **options)
