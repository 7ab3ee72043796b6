"""`generate`: every strategy, padded and not, equals full passes; and what a forward pass takes and gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from star_core.genome import POOL

pytest.importorskip("transformers")

from tests.star_core.hub.samples import LEFT, make, prompts

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 8, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several sequences": {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
    "sampled sequences": {"num_return_sequences": 2, "do_sample": True},
}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("padded", [False, True])
def test_cached_generation_equals_full_passes(strategy: str, padded: bool) -> None:
    model, tokens = make(), prompts()
    mask = LEFT if padded else torch.ones_like(tokens)
    options = STRATEGIES[strategy] | {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outputs.append(model.generate(tokens, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (3 * STRATEGIES[strategy].get("num_return_sequences", 1), 13)


@pytest.mark.parametrize("liv_class", list(POOL), ids=lambda liv_class: POOL[liv_class].name)
def test_a_padded_batch_generates_as_its_rows_alone(liv_class: int) -> None:
    model, tokens = make(f"{liv_class}.1.1.1.1-9.1.1.1.1"), prompts()
    together = model.generate(tokens, attention_mask=LEFT, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for row, mask in enumerate(LEFT):
        alone = model.generate(tokens[row, mask == 1][None], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(together[row, -5:], alone[0, -5:])


def test_scores_of_padded_rows_equal_those_alone() -> None:
    model, tokens = make(), prompts()
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(tokens, attention_mask=LEFT, pad_token_id=0, **options)
    for row, mask in enumerate(LEFT):
        alone = model.generate(tokens[row, mask == 1][None], pad_token_id=0, **options)
        for got, want in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(got[row], want[0], rtol=1e-4, atol=1e-4)


def test_rows_that_end_early_are_filled() -> None:
    model, tokens = make(), prompts()
    first = model.generate(tokens, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1].item()
    out = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=first, pad_token_id=0)
    assert out[0, 7] == first
    assert not out[0, 8:].any()


def test_generation_goes_on_from_a_returned_cache() -> None:
    model, tokens = make(), prompts()
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    whole = model.generate(tokens, attention_mask=LEFT, max_new_tokens=8, **options)
    first = model.generate(tokens, attention_mask=LEFT, max_new_tokens=4, **options)
    mask = torch.cat((LEFT, torch.ones(3, 4, dtype=LEFT.dtype)), 1)
    rest = model.generate(first.sequences, attention_mask=mask, max_new_tokens=4, **options, cache=first.cache)
    assert torch.equal(rest.sequences, whole.sequences)


def test_forward_continues_from_its_own_cache() -> None:
    """By hand, as the documentation of transformers does it: the state grows where it must."""
    model, tokens = make(), prompts(length=12)
    with torch.no_grad():
        want = model(tokens).logits
        out = model(tokens[:, :5], use_cache=True)
        parts = [out.logits]
        cache = model.new_cache(3, 1)
        model(tokens[:, :5], cache=cache)
        for start, stop in ((5, 6), (6, 7), (7, 10), (10, 12)):
            parts.append(model(tokens[:, start:stop], cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 12
    assert cache.max_length >= 12


def test_embeddings_stand_in_for_tokens() -> None:
    model, tokens = make(), prompts()
    embeddings = model.get_input_embeddings()(tokens)
    options = {"attention_mask": LEFT, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), model.generate(tokens, **options)[:, 7:])


def test_loss_is_that_of_shifted_labels_and_spares_the_logits() -> None:
    model, tokens = make(), prompts()
    labels = tokens.masked_fill(LEFT == 0, -100)
    out = model(tokens, attention_mask=LEFT, labels=labels)
    # Targets of the rows alone: 3, 6 and none; the first token of a row is nobody's, whatever lies before it.
    logits = [out.logits[0, 3:6], out.logits[1, :6]]
    want = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat((tokens[0, 4:], tokens[1, 1:])))
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(
        model(tokens, attention_mask=LEFT, labels=labels, num_items_in_batch=5).loss, want * 9 / 5
    )
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(tokens, attention_mask=LEFT, shift_labels=shifted).loss, want)
    model.train()
    trained = model(tokens, attention_mask=LEFT, labels=labels)
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, want)
    assert model(tokens, labels=labels, skip_logits=False).logits is not None
    assert model(tokens).logits is not None


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_to_keep(kept: int | Tensor) -> None:
    model, tokens = make(), prompts()
    full = model(tokens).logits
    want = full[:, -kept:] if isinstance(kept, int) else full[:, kept]
    torch.testing.assert_close(model(tokens, logits_to_keep=kept).logits, want)


def test_hidden_states_and_tuples() -> None:
    model, tokens = make(), prompts()
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == len(model.config.parsed_genome()) + 1
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    logits, cache = model(tokens, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert cache.length == 7
    assert len(model(tokens, return_dict=False, use_cache=False)) == 1


@pytest.mark.parametrize("chunk", [1, 3])
def test_prompts_are_taken_in_chunks(chunk: int) -> None:
    model, tokens = make(), prompts()
    options = {"attention_mask": LEFT, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, prefill_chunk_size=chunk, **options), model.generate(tokens, **options))


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_returns_states_and_scores_of_every_step(beams: int) -> None:
    model, tokens = make(), prompts()
    out = model.generate(
        tokens,
        attention_mask=LEFT,
        num_beams=beams,
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_scores=True,
    )
    rows = 3 * beams
    shapes = [[tuple(one.shape) for one in step] for step in out.hidden_states]
    assert shapes == [[(rows, 7, 32)] * 8, [(rows, 1, 32)] * 8, [(rows, 1, 32)] * 8]
    assert [tuple(step.shape) for step in out.scores] == [(rows, model.config.vocab_size)] * 3
    # The last token is never fed back.
    assert out.cache.get_seq_length() == 9
    assert out.cache.batch_size == rows


def test_generation_begins_from_nothing() -> None:
    model = make(bos_token_id=1)
    out = model.generate(do_sample=False, max_new_tokens=3, pad_token_id=0)
    assert torch.equal(out, model.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=3, pad_token_id=0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate(prompts(), bogus=3), ValueError, "bogus"),
        (
            lambda m: m.generate(prompts(1), prompt_lookup_num_tokens=2),
            ValueError,
            "not supported with stateful models",
        ),
        (lambda m: m.generate(prompts(), cache_implementation="static"), ValueError, "needs None, got 'static'"),
        (lambda m: m.generate(prompts(), cache=object()), TypeError, "cache: needs a StarCache"),
        (lambda m: m(prompts(), bogus=3), TypeError, "unexpected keyword argument 'bogus'"),
        (lambda m: m(), ValueError, "input_ids: needs either input_ids or inputs_embeds"),
        (lambda m: m(prompts(), cache=object()), TypeError, "cache: needs a StarCache"),
        (lambda m: m(prompts(), attention_mask=torch.ones(3, 5).long()), ValueError, "attention_mask: needs"),
        (lambda m: m(prompts(), attention_mask=torch.ones(3, 1, 7, 7).bool()), ValueError, "attention_mask: needs"),
        (lambda m: m(prompts(), labels=prompts(length=5)), ValueError, r"labels: needs \[B, T\] = \[3, 7\]"),
        (lambda m: m.new_cache(1, 2).crop(1), NotImplementedError, "cannot go back to 1 tokens"),
        (lambda m: m.new_cache(1, 2).activate_past_recording(), NotImplementedError, "cannot go back"),
    ],
)
def test_bad_input_fails_clearly(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make())
