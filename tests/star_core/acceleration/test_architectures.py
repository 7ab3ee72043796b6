"""An accelerated model gives transformers' own numbers, in training, in prefill and in decoding."""

import copy

import pytest
import torch

from bench.accelerate_models import ARCHITECTURES, TINY, build
from star_core import accelerate
from tests.star_core.acceleration.models import (
    LOGITS,
    assert_same_gradients,
    in_chunks,
    largest_difference,
    left_padding,
    pair,
    tokens,
)

transformers = pytest.importorskip("transformers", reason="needs the extra `hub`")

MIXERS = {
    "mamba": "selective_scan",
    "falcon_mamba": "selective_scan",
    "mamba2": "ssd",
    "bamba": "ssd",
    "zamba2": "ssd",
    "jamba": "selective_scan",
    "falcon_h1": "ssd",
    "nemotron_h": "ssd",
    "granitemoehybrid": "ssd",
    "recurrent_gemma": "rg_lru",
    "lfm2": "gated_short_conv",
    "qwen3_next": "gated_delta_rule",
    "qwen3_5": "gated_delta_rule",
    "diffllama": "differential_attention",
    "llama": "attention",
    "qwen3": "attention",
    "gemma2": "rms_norm",
}

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_the_mixer_runs_on_its_operator(name: str) -> None:
    report = accelerate(build(name, TINY))
    operators = {operator for one in report.replaced for operator in one.operators}
    assert {MIXERS[name], "rms_norm", "linear_cross_entropy"} <= operators


@every_architecture
def test_logits_match(name: str) -> None:
    accelerated, untouched, _ = pair(name)
    ids = tokens(2, 33)
    with torch.no_grad():
        got, want = accelerated(ids).logits, untouched(ids).logits
    assert float(want.abs().max()) > 1
    assert largest_difference(got, want) <= LOGITS


@every_architecture
def test_loss_and_gradients_match(name: str) -> None:
    accelerated, untouched, _ = pair(name)
    ids = tokens(2, 33)
    labels = ids.masked_fill(left_padding(ids) == 0, -100)
    losses = [model.train()(ids, labels=labels).loss for model in (accelerated, untouched)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    assert_same_gradients(accelerated, untouched)


@every_architecture
def test_left_padded_logits_and_gradients_match(name: str) -> None:
    accelerated, untouched, _ = pair(name)
    ids = tokens(3, 21)
    mask = left_padding(ids)
    got, want = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (accelerated, untouched))
    assert largest_difference(got, want) <= LOGITS
    for logits in (got, want):
        logits.square().mean().backward()
    assert_same_gradients(accelerated, untouched)


@every_architecture
def test_generation_is_token_identical_with_left_padding(name: str) -> None:
    accelerated, untouched, _ = pair(name)
    ids = tokens(2, 9)
    settings = {"max_new_tokens": 16, "do_sample": False, "attention_mask": left_padding(ids), "use_cache": True}
    got, want = (model.generate(ids, **settings) for model in (accelerated, untouched))
    assert torch.equal(got, want)


@every_architecture
@pytest.mark.parametrize("lengths", [[8, *[1] * 13], [1] * 21, [5, 3, 1, 7, 1, 4], [2, 1, 18]], ids=str)
def test_a_continued_cache_gives_the_same_logits(name: str, lengths: list[int]) -> None:
    accelerated, untouched, _ = pair(name)
    ids = tokens(2, 21)
    got, want = (in_chunks(model, ids, lengths) for model in (accelerated, untouched))
    assert largest_difference(got, want) <= LOGITS


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mamba", {"use_bias": True, "use_conv_bias": False}),
        ("mamba", {"conv_kernel": 2}),
        ("mamba2", {"time_step_limit": (0.3, 0.9), "n_groups": 4}),
        ("mamba2", {"n_groups": 1, "use_bias": True, "conv_kernel": 3}),
        ("nemotron_h", {"time_step_min": 0.9}),
        ("zamba2", {"time_step_min": 0.3}),
        ("falcon_h1", {"mamba_rms_norm": False}),
        ("falcon_h1", {"mamba_norm_before_gate": True, "ssm_multipliers": [0.5, 2.0, 1.5, 0.7, 1.2]}),
        ("falcon_h1", {"ssm_in_multiplier": 0.5, "key_multiplier": 0.5, "lm_head_multiplier": 0.5}),
        ("lfm2", {"conv_bias": True, "conv_L_cache": 2}),
        ("qwen3_next", {"linear_num_key_heads": 4}),
        ("recurrent_gemma", {"conv1d_width": 2}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("granitemoehybrid", {"logits_scaling": 3.0}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_settings_are_respected(name: str, settings: dict[str, object]) -> None:
    accelerated, untouched, report = pair(name, **settings)
    assert any(MIXERS[name] in one.operators for one in report.replaced)
    ids = tokens(2, 21)
    losses = [model.train()(ids, labels=ids).loss for model in (accelerated, untouched)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    assert_same_gradients(accelerated, untouched)
    got, want = (in_chunks(model.eval(), ids, [7, 1, 1, 12]) for model in (accelerated, untouched))
    assert largest_difference(got, want) <= LOGITS


@pytest.mark.parametrize("name", ["mamba", "mamba2", "lfm2", "qwen3_next", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    accelerated, untouched, _ = pair(name)
    ids = tokens(2, 21)
    for model in (accelerated, untouched):
        model.train().activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
    assert_same_gradients(accelerated, untouched)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "lfm2", "qwen3_5", "recurrent_gemma", "diffllama"])
def test_half_precision_keeps_dtypes_and_size_of_error(name: str) -> None:
    untouched = build(name, TINY).eval()
    ids = tokens(2, 33)
    with torch.no_grad():
        want = untouched(ids).logits
        accelerated = copy.deepcopy(untouched.to(torch.bfloat16))
        report = accelerate(accelerated)
        assert any(MIXERS[name] in one.operators for one in report.replaced), report
        got, theirs = (model(ids).logits for model in (accelerated, untouched))
    assert got.dtype == theirs.dtype
    # Both round, in other places: over all logits the errors are of one size.
    error, their_error = (float((logits.float() - want).square().mean().sqrt()) for logits in (got, theirs))
    assert error <= 1.25 * their_error


@pytest.mark.parametrize("name", ["mamba", "mamba2", "lfm2", "qwen3_next", "llama"])
def test_autocast_gives_the_dtypes_and_loss_of_the_original(name: str) -> None:
    accelerated, untouched, _ = pair(name)
    ids = tokens(2, 33)
    outputs = []
    for model in (accelerated, untouched):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(model(ids, labels=ids))
        outputs[-1].loss.backward()
    assert outputs[0].logits.dtype == outputs[1].logits.dtype
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=2e-2, atol=2e-2)


def test_beams_reorder_the_states() -> None:
    accelerated, untouched, _ = pair("mamba2")
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    got, want = (model.generate(tokens(2, 7), **settings) for model in (accelerated, untouched))
    assert torch.equal(got, want)
