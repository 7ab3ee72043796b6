"""What transformers' own generation tests ask of a model, beside the numbers that test_generation.py holds.

Those tests are in its clone alone; test_transformers_suite.py says how to run them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from star_core.hub import StarCache, StarForCausalLM  # noqa: E402
from tests.star_core.hub.samples import LEFT, VOCAB, make, prompts  # noqa: E402

NEW = 3
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
PROCESSORS: dict[str, Any] = {"bad_words_ids": [[5], [6, 7]], "repetition_penalty": 1.2, "remove_invalid_values": True}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 2, "length_penalty": 2.0, "early_stopping": False},
    "several beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2, "top_k": 10},
}


def check_same_caches(got: StarCache, want: StarCache) -> None:
    """Compare what two caches hold, whatever room they have."""
    assert (got.columns, got.length, got.batch_size) == (want.columns, want.length, want.batch_size)
    assert (got.lengths is None) == (want.lengths is None)
    assert got.lengths is None or torch.equal(got.lengths, want.lengths)
    for one, other, axes in zip(got.states, want.states, want._axes, strict=True):
        assert one.keys() == other.keys()
        for name, state in one.items():
            held, wanted = state, other[name]
            if "token" in axes[name]:
                held, wanted = held[:, : got.length], wanted[:, : got.length]
            if axes[name]:
                torch.testing.assert_close(held, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", list(MODES))
def test_outputs_hold_everything_that_was_asked_for(mode: str, use_cache: bool) -> None:
    model, tokens = make(), prompts()
    options = MODES[mode]
    beams, returned = options.get("num_beams", 1), options.get("num_return_sequences", 1)
    # Sampled sequences are rows from the start; beams hold theirs until the end.
    rows, kept = 3 * (beams if beams > 1 else returned), 3 * returned
    torch.manual_seed(0)
    out = model.generate(
        tokens,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        use_cache=use_cache,
        **PROCESSORS,
        **options,
    )
    assert type(out) is (GenerateDecoderOnlyOutput if beams == 1 else GenerateBeamDecoderOnlyOutput)
    assert out.sequences.shape == (kept, 7 + NEW)
    for scores in (out.scores, out.logits):
        assert [tuple(step.shape) for step in scores] == [(rows, VOCAB)] * NEW
    lengths = [7] + [1] * (NEW - 1) if use_cache else [7 + step for step in range(NEW)]
    layers = len(model.config.parsed_genome()) + 1
    shapes = [[tuple(one.shape) for one in step] for step in out.hidden_states]
    assert shapes == [[(rows, length, 32)] * layers for length in lengths]
    assert (out.cache is not None) == use_cache
    if use_cache:
        assert isinstance(out.cache, StarCache)
        assert (out.cache.get_seq_length(), out.cache.max_batch_size) == (6 + NEW, rows)
    assert not torch.isin(out.sequences[:, 7:], torch.tensor([5])).any()
    if beams > 1:
        assert out.sequences_scores.shape == (kept,)
        assert bool((out.sequences_scores.view(3, returned).diff(dim=1) <= 0).all())
        assert out.beam_indices.shape == (kept, 7 + NEW) or out.beam_indices.shape == (kept, NEW)
    transitions = model.compute_transition_scores(out.sequences, out.scores, getattr(out, "beam_indices", None))
    assert transitions.shape == (kept, NEW)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_call_leaves_nothing_behind(mode: str) -> None:
    model, tokens = make(), prompts()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(model.generate(tokens, max_new_tokens=4, pad_token_id=0, **MODES[mode]))
        model.generate(prompts(2, 5, seed=8), max_new_tokens=2, **GREEDY)
    assert torch.equal(*outputs)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("padded", [False, True])
def test_what_follows_a_returned_cache_is_what_one_call_gives(padded: bool) -> None:
    """3 tokens and one more are 4: tokens, scores and the cache at the end."""
    model, tokens = make(), prompts()
    mask = LEFT if padded else torch.ones_like(tokens)
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True}
    whole = model.generate(tokens, attention_mask=mask, max_new_tokens=4, **options)
    first = model.generate(tokens, attention_mask=mask, max_new_tokens=3, **options)
    longer = torch.nn.functional.pad(mask, (0, 3), value=1)
    rest = model.generate(first.sequences, attention_mask=longer, cache=first.cache, max_new_tokens=1, **options)
    assert torch.equal(rest.sequences, whole.sequences)
    for got, want in zip(first.scores + rest.scores, whole.scores, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    check_same_caches(rest.cache, whole.cache)


def test_embeddings_go_on_from_a_returned_cache() -> None:
    model, tokens = make(), prompts()
    embed, options = model.get_input_embeddings(), GREEDY | {"return_dict_in_generate": True}
    whole = model.generate(inputs_embeds=embed(tokens), max_new_tokens=4, **options)
    first = model.generate(inputs_embeds=embed(tokens), max_new_tokens=3, **options)
    longer = torch.cat((embed(tokens), embed(first.sequences)), dim=1)
    rest = model.generate(inputs_embeds=longer, cache=first.cache, max_new_tokens=1, **options)
    assert torch.equal(torch.cat((first.sequences, rest.sequences), dim=1), whole.sequences)
    check_same_caches(rest.cache, whole.cache)


@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_beside_tokens_decide(beams: int) -> None:
    model, tokens = make(), prompts()
    options = GREEDY | {"num_beams": beams, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    want = model.generate(tokens, attention_mask=LEFT, **options)
    embeddings = model.get_input_embeddings()(tokens)
    got = model.generate(tokens, inputs_embeds=embeddings, attention_mask=LEFT, **options)
    assert torch.equal(got.sequences, want.sequences)
    alone = model.generate(inputs_embeds=embeddings, attention_mask=LEFT, **options)
    assert torch.equal(alone.sequences, want.sequences[:, 7:])
    other = model.generate(tokens, inputs_embeds=torch.rand_like(embeddings), attention_mask=LEFT, **options)
    assert not any(torch.allclose(one, two) for one, two in zip(other.scores, want.scores, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
def test_much_left_padding_changes_no_logit(use_cache: bool) -> None:
    model, tokens = make(), prompts()
    padded = torch.cat((torch.zeros(3, 32, dtype=torch.int64), tokens), dim=1)
    mask = torch.cat((torch.zeros(3, 32, dtype=torch.int64), torch.ones_like(tokens)), dim=1)
    got = model(padded, attention_mask=mask, use_cache=use_cache).logits[:, -1]
    torch.testing.assert_close(got, model(tokens, use_cache=use_cache).logits[:, -1], rtol=1e-5, atol=1e-5)


def test_all_logits_give_the_tokens_that_the_last_ones_give() -> None:
    model, tokens = make(), prompts()
    want = model.generate(tokens, max_new_tokens=6, **GREEDY)
    assert torch.equal(model.generate(tokens, max_new_tokens=6, logits_to_keep=0, **GREEDY), want)


class _OnlyEven(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -torch.inf)


class _StopsAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class _Keeps(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("beams", [1, 2])
def test_own_processors_and_criteria_are_called(beams: int) -> None:
    model, tokens = make(), prompts()
    out = model.generate(
        tokens, num_beams=beams, max_new_tokens=9, logits_processor=[_OnlyEven()], stopping_criteria=[_StopsAt(11)],
        **GREEDY,
    )  # fmt: skip
    assert out.shape[1] == 11
    assert not (out[:, 7:] % 2).any()


def test_a_streamer_sees_every_token() -> None:
    model, tokens, streamer = make(), prompts(1), _Keeps()
    out = model.generate(tokens, max_new_tokens=4, streamer=streamer, **GREEDY)
    assert torch.equal(torch.cat(streamer.values), out[0])
    assert len(streamer.values) == 5
    assert streamer.ended


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_runs_the_model_a_second_time(use_cache: bool) -> None:
    """Scores under guidance are those of two full passes, one of which sees the last token of the prompt alone."""
    model, tokens, scale = make(), prompts(), 1.5
    out = model.generate(
        tokens, guidance_scale=scale, max_new_tokens=3, use_cache=use_cache, return_dict_in_generate=True,
        output_scores=True, **GREEDY,
    )  # fmt: skip
    for step, scores in enumerate(out.scores):
        seen = out.sequences[:, : 7 + step]
        with_prompt, without = (model(one).logits[:, -1].log_softmax(-1) for one in (seen, seen[:, 6:]))
        torch.testing.assert_close(scores, scale * (with_prompt - without) + without, rtol=1e-4, atol=1e-3)


def test_arguments_reach_the_forward_pass_unchanged() -> None:
    model, tokens = make(), prompts()
    assert GenerationMixin in StarForCausalLM.__bases__
    given = {"output_hidden_states": True, "custom": "value", "number": 42}
    inputs = model.prepare_inputs_for_generation(tokens, attention_mask=LEFT, **given)
    assert torch.equal(inputs["input_ids"], tokens)
    assert {name: inputs[name] for name in given} == given


def test_saved_defaults_are_those_of_the_next_model(tmp_path: Path) -> None:
    model, tokens = make(eos_token_id=None), prompts()
    model.generation_config = GenerationConfig(max_new_tokens=5, num_beams=2, pad_token_id=0, do_sample=False)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (read.generation_config.max_new_tokens, read.generation_config.num_beams) == (5, 2)
    assert torch.equal(read.generate(tokens), model.generate(tokens, max_new_tokens=5, num_beams=2, **GREEDY))


def test_a_forward_pass_returns_a_cache_of_every_token() -> None:
    model, tokens = make(), prompts()
    out = model(tokens, use_cache=True)
    assert isinstance(out.cache, StarCache)
    assert (out.cache.get_seq_length(), out.cache.max_batch_size, len(out.cache.states)) == (7, 3, 7)
    assert model(tokens, use_cache=False).cache is None


def test_assisted_decoding_is_refused() -> None:
    """A recurrence cannot go back to before a rejected token."""
    model = make()
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(prompts(1), assistant_model=make(), max_new_tokens=2)
