"""The loss never holds the logits, and whoever reads them gets transformers' own."""

from typing import Any

import pytest
import torch

from bench.accelerate_models import TINY, build
from bench.harness import peak_tensor_bytes
from star_core import accelerate
from star_core.acceleration._loss import DeferredLogits
from tests.star_core.acceleration.models import LOGITS, largest_difference, pair, tokens

transformers = pytest.importorskip("transformers", reason="needs the extra `hub`")

# Between its output layer and the loss, a model may do nothing, scale, bound, or change the dtype.
MODELS = [
    ("llama", {}),
    ("granitemoehybrid", {"logits_scaling": 3.0}),
    ("falcon_h1", {"lm_head_multiplier": 0.5}),
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("recurrent_gemma", {"logits_soft_cap": 2.0}),
    ("mamba", {}),
]

every_model = pytest.mark.parametrize(("name", "settings"), MODELS, ids=[name for name, _ in MODELS])


@every_model
def test_logits_are_put_off_and_right(name: str, settings: Any) -> None:
    accelerated, untouched, _ = pair(name, **settings)
    ids = tokens(2, 11)
    got, want = (model(ids, labels=ids) for model in (accelerated, untouched))
    assert isinstance(got.logits, DeferredLogits)
    assert (got.logits.shape, got.logits.dtype) == (want.logits.shape, want.logits.dtype)
    assert got.logits.computed is None
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.logits.argmax(-1), want.logits.argmax(-1))
    assert largest_difference(got.logits, want.logits) <= LOGITS
    assert [type(one) for one in got] == [type(one) for one in want]


def test_gradients_flow_through_logits_that_were_put_off() -> None:
    accelerated, untouched, _ = pair("llama")
    ids = tokens(2, 11)
    for model in (accelerated, untouched):
        output = model(ids, labels=ids)
        (output.loss + output.logits.square().mean()).backward()
    torch.testing.assert_close(accelerated.lm_head.weight.grad, untouched.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [13, torch.tensor(13)], ids=["int", "tensor"])
def test_the_loss_over_a_given_count_matches(count: Any) -> None:
    accelerated, untouched, _ = pair("llama")
    ids = tokens(2, 11)
    got, want = (model(ids, labels=ids, num_items_in_batch=count).loss for model in (accelerated, untouched))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_labels_that_are_already_shifted_match() -> None:
    accelerated, untouched, _ = pair("llama")
    ids, shifted = tokens(2, 11), tokens(2, 11, seed=1)
    got, want = (model(ids, labels=ids, shift_labels=shifted).loss for model in (accelerated, untouched))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_labels_by_position_are_seen() -> None:
    model = build("llama", TINY)
    accelerate(model)
    ids = tokens(2, 11)
    assert isinstance(model(ids, None, None, None, None, ids).logits, DeferredLogits)


def test_without_labels_logits_are_plain() -> None:
    model = build("llama", TINY)
    accelerate(model)
    assert type(model(tokens(2, 11)).logits) is torch.Tensor


def test_logits_read_after_the_weights_changed_are_refused() -> None:
    model = build("llama", TINY)
    accelerate(model)
    ids = tokens(2, 11)
    output = model(ids, labels=ids)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="first read after its output layer had changed"):
        output.logits.sum()


def test_the_loss_needs_labels() -> None:
    model = build("llama", TINY)
    accelerate(model)
    ids = tokens(2, 11)
    deferred = model(ids, labels=ids).logits
    with pytest.raises(ValueError, match="labels is None, and so is shift_labels"):
        model.loss_function(logits=deferred, labels=None, vocab_size=TINY.vocab_size)


def test_computed_logits_get_transformers_own_loss() -> None:
    accelerated, untouched, _ = pair("llama")
    ids = tokens(2, 11)
    settings = {"labels": ids, "vocab_size": TINY.vocab_size}
    logits = accelerated(ids).logits
    assert torch.equal(
        accelerated.loss_function(logits=logits, **settings), untouched.loss_function(logits, **settings)
    )
    read = accelerated(ids, labels=ids).logits
    read.sum()
    assert torch.equal(accelerated.loss_function(logits=read, **settings), untouched.loss_function(logits, **settings))


def test_a_loss_of_the_users_own_is_kept() -> None:
    model = build("llama", TINY)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    reasons = {one.path: one.reason for one in accelerate(model).kept}
    assert reasons[""] == "its loss is not transformers' for causal language models"
    ids = tokens(2, 11)
    assert type(model(ids, labels=ids).logits) is torch.Tensor


def test_an_output_layer_that_is_wrapped_is_kept() -> None:
    model = build("llama", TINY)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    reasons = {one.path: one.reason for one in accelerate(model).kept}
    assert reasons[""] == "its output layer is not a plain linear layer"


def test_a_step_holds_no_logits() -> None:
    """With 4,099 tokens' logits of 2 MB each, a step of the untouched model holds at least two such tensors."""
    accelerated, untouched, _ = pair("llama", vocab_size=4099)
    ids = tokens(2, 64)
    logits = ids.numel() * 4099 * 4
    peaks = []
    for model in (accelerated, untouched):
        model.train()
        model(ids, labels=ids).loss.backward()
        peaks.append(peak_tensor_bytes(lambda model=model: model(ids, labels=ids).loss.backward(), device="cpu"))
    assert peaks[1] - peaks[0] >= 1.5 * logits
