"""Rows of unequal length, row order, growing memory, gradients through a cache and recomputation change no number."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome import POOL
from star_core.ragged import Ragged
from star_kernels.dispatch import use_backend
from tests.star_core.strategies import genomes

CONFIG = ModelConfig(width=32, head_dim=8, vocab_size=19, time_scale=16)
EVERY_FAMILY = (
    "1.1.1.1.4-2.1.1.1.1-5.1.1.2.4-7.1.1.3.4-8.1.1.4.4-9.1.1.1.1-1.1.1.1.4-5.1.1.2.4-7.1.1.3.4-8.1.1.4.4-"
    "10.1.1.5.4-17.1.1.6.4-10.1.1.5.4-17.1.1.6.4"
)
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]],
    "between": [[0, 1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0, 0]],
    "empty row": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]],
    "equal rows": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]],
}


def close(got: Tensor, want: Tensor) -> None:
    # float32 sums in another order; logits are of size 1.
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


def tokens_for(seed: int, batch: int, length: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def check_against_rows_alone(model: LanguageModel, chunks: list[tuple[Tensor, Tensor | None]]) -> None:
    """Feed the (tokens, mask) chunks through one cache, and each row's real tokens through the model without any."""
    cache = model.new_cache(chunks[0][0].shape[0], sum(tokens.shape[1] for tokens, _ in chunks))
    with torch.no_grad():
        logits = [model(tokens, cache, mask) for tokens, mask in chunks]
    for row in range(cache.batch_size):
        kept = [torch.ones_like(t[row]).bool() if m is None else m[row].bool() for t, m in chunks]
        alone = torch.cat([t[row][keep] for (t, _), keep in zip(chunks, kept, strict=True)])
        got = torch.cat([one[row][keep] for one, keep in zip(logits, kept, strict=True)])
        held = cache.length if cache.lengths is None else int(cache.lengths[row])
        assert held == alone.numel()
        if alone.numel():
            with torch.no_grad():
                close(got, model(alone[None])[0])
        for one, keep in zip(logits, kept, strict=True):
            assert not one[row][~keep].any()


@SETTINGS
@given(genome=genomes(2, 5), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("side", list(MASKS))
def test_padding_has_no_effect(side: str, genome: Genome, seed: int) -> None:
    """Prefill, decode, and two more chunks of unequal rows: as every row alone."""
    model = LanguageModel(genome, CONFIG, seed=seed)
    mask = torch.tensor(MASKS[side])
    tokens = tokens_for(seed, 3, 7)
    with torch.no_grad():
        full = model(tokens, attention_mask=mask)
        prefilled = model(tokens, model.new_cache(3, 7), mask)
    close(prefilled, full)
    step, chunk = tokens_for(seed + 1, 3, 1), tokens_for(seed + 2, 3, 4)
    late = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    single = torch.tensor([[1], [0], [0]])
    check_against_rows_alone(
        model,
        [(tokens, mask), (step, None), (step + 0, None), (chunk, late), (chunk, None), (step, single), (step, None)],
    )


@pytest.mark.parametrize("liv_class", list(POOL), ids=lambda liv_class: POOL[liv_class].name)
def test_padded_gradients_equal_those_of_rows_alone(liv_class: int) -> None:
    model = LanguageModel(Genome.parse(f"{liv_class}.1.1.1.1-{liv_class}.1.1.1.1"), CONFIG, seed=0).double()
    tokens, mask = tokens_for(0, 3, 7), torch.tensor(MASKS["left"])
    dy = torch.randn(3, 7, CONFIG.vocab_size, generator=torch.Generator().manual_seed(1)).double()
    parameters = list(model.parameters())
    got = torch.autograd.grad((model(tokens, attention_mask=mask) * dy).sum(), parameters)
    alone = [
        (model(tokens[row][mask[row] == 1][None])[0] * dy[row][mask[row] == 1]).sum() for row in range(tokens.shape[0])
    ]
    want = torch.autograd.grad(torch.stack(alone).sum(), parameters)
    for one, expected in zip(got, want, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)  # logits are rounded to float32


def test_an_all_ones_mask_is_no_mask() -> None:
    model = LanguageModel(Genome.parse(EVERY_FAMILY), CONFIG, seed=0)
    tokens = tokens_for(0, 2, 6)
    cache = model.new_cache(2, 6)
    assert torch.equal(model(tokens, cache, torch.ones(2, 6, dtype=torch.int64)), model(tokens, model.new_cache(2, 6)))
    assert cache.lengths is None


@SETTINGS
@given(genome=genomes(2, 5), seed=st.integers(0, 2**31), rows=st.lists(st.integers(0, 2), min_size=1, max_size=5))
@pytest.mark.parametrize("padded", [False, True])
def test_reorder_moves_whole_rows(padded: bool, genome: Genome, seed: int, rows: list[int]) -> None:
    model = LanguageModel(genome, CONFIG, seed=seed)
    tokens, mask = tokens_for(seed, 3, 7), torch.tensor(MASKS["left"]) if padded else None
    cache, want = model.new_cache(3, 9), model.new_cache(len(rows), 9)
    following = tokens_for(seed + 1, len(rows), 1)
    with torch.no_grad():
        model(tokens, cache, mask)
        cache.reorder(torch.tensor(rows))
        model(tokens[rows], want, None if mask is None else mask[rows])
        assert cache.batch_size == len(rows)
        assert cache.nbytes == want.nbytes
        for _ in range(2):
            close(model(following, cache), model(following, want))


def test_reorder_of_as_many_rows_keeps_the_memory() -> None:
    model = LanguageModel(Genome.parse(EVERY_FAMILY), CONFIG, seed=0)
    cache = model.new_cache(3, 8)
    addresses = [tensor.data_ptr() for state in cache.states for tensor in state.values()]
    with torch.no_grad():
        model(tokens_for(0, 3, 5), cache)
    cache.reorder(torch.tensor([2, 2, 0], dtype=torch.int32))
    assert [tensor.data_ptr() for state in cache.states for tensor in state.values()] == addresses


@SETTINGS
@given(genome=genomes(2, 5), seed=st.integers(0, 2**31))
def test_growing_keeps_every_token(genome: Genome, seed: int) -> None:
    model = LanguageModel(genome, CONFIG, seed=seed)
    tokens, mask = tokens_for(seed, 3, 7), torch.tensor(MASKS["left"])
    small, large = model.new_cache(3, 7), model.new_cache(3, 24)
    with torch.no_grad():
        model(tokens, small, mask)
        model(tokens, large, mask)
        model.backbone.grow(small, 24)
        assert (small.max_length, small.nbytes) == (24, large.nbytes)
        step = tokens_for(seed + 1, 3, 1)
        for _ in range(3):
            close(model(step, small), model(step, large))


def test_an_empty_cache_grows() -> None:
    model = LanguageModel(Genome.parse(EVERY_FAMILY), CONFIG, seed=0)
    cache, tokens = model.new_cache(2, 1), tokens_for(0, 2, 9)
    model.backbone.grow(cache, 9)
    with torch.no_grad():
        close(model(tokens, cache), model(tokens))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("liv_class", list(POOL), ids=lambda liv_class: POOL[liv_class].name)
def test_gradients_reach_the_new_tokens_through_a_cache(liv_class: int, padded: bool) -> None:
    """What is held is constant; later writes to the cache spoil no backward pass of an earlier chunk or step."""
    sharing = 1 if POOL[liv_class].family == "memoryless" else 4
    model = LanguageModel(Genome.parse("-".join([f"{liv_class}.1.1.1.{sharing}"] * 2)), CONFIG, seed=0)
    mask = torch.tensor(MASKS["left"]) if padded else None
    cache = model.new_cache(3, 12)
    parameters = list(model.parameters())
    first = model(tokens_for(0, 3, 7), cache, mask)
    want = torch.autograd.grad(model(tokens_for(0, 3, 7), attention_mask=mask).square().sum(), parameters)
    steps = [model(tokens_for(1, 3, 2), cache), model(tokens_for(2, 3, 1), cache), model(tokens_for(3, 3, 1), cache)]
    got = torch.autograd.grad(first.square().sum(), parameters, retain_graph=True)
    for one, expected in zip(got, want, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-3)
    for step in steps:
        gradients = torch.autograd.grad(step.square().sum(), parameters, allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
        assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > len(parameters) // 2


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_changes_no_gradient(padded: bool, use_reentrant: bool) -> None:
    model = LanguageModel(Genome.parse(EVERY_FAMILY), CONFIG, seed=0)
    tokens, mask = tokens_for(0, 3, 7), torch.tensor(MASKS["left"]) if padded else None
    parameters = list(model.parameters())

    def gradients() -> tuple[Tensor, ...]:
        loss = model(tokens, attention_mask=mask).square().mean()
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # reentrant checkpoints refuse autograd.grad
        return tuple(parameter.grad.clone() for parameter in parameters if parameter.grad is not None)

    want = gradients()
    calls = []
    recompute = partial(checkpoint, use_reentrant=use_reentrant)

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return recompute(*arguments)

    model.backbone.gradient_checkpointing = True
    model.backbone._gradient_checkpointing_func = counted
    got = gradients()
    assert len(calls) == len(model.genome)
    assert len(got) == len(want) == len(parameters)
    for one, expected in zip(got, want, strict=True):
        # A reentrant checkpoint adds to the gradient of a shared weight LIV by LIV: another order of the same sums.
        tolerance = 1e-6 if use_reentrant else 0.0
        torch.testing.assert_close(one, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))
    model.eval()
    gradients()
    assert len(calls) == len(model.genome), "recomputation is for training alone"


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_whole_training_step_can_be_recomputed(backend: str | None) -> None:
    """No operator's backward pass looks twice at what it saved, which torch forbids under a checkpoint."""
    model = LanguageModel(Genome.parse(EVERY_FAMILY), CONFIG, seed=0)
    tokens = tokens_for(0, 2, 9)
    parameters = list(model.parameters())
    with use_backend(backend) if backend else nullcontext():
        want = torch.autograd.grad(model.loss(tokens[:, :-1], tokens[:, 1:]), parameters)
        loss = checkpoint(model.loss, tokens[:, :-1], tokens[:, 1:], use_reentrant=False)
        got = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(one, expected) for one, expected in zip(got, want, strict=True))


def test_gradient_checkpointing_keeps_less() -> None:
    """Bytes that autograd saves for the backward pass: under a third of those of a plain pass."""
    model = LanguageModel(Genome.parse("5.1.1.1.1-" * 5 + "1.1.1.1.1"), CONFIG, seed=0)
    saved: list[int] = []

    def held() -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.nbytes), t)[1], lambda t: t):
            model(tokens_for(0, 4, 64))
        return sum(saved)

    plain = held()
    model.backbone.gradient_checkpointing = True
    assert held() < plain / 3


def test_residuals_are_the_stream_between_livs() -> None:
    model = LanguageModel(Genome.parse("11111-51111-91111"), CONFIG, seed=0)
    x, mask = torch.randn(3, 7, CONFIG.width), torch.tensor(MASKS["left"])
    residuals: list[Tensor] = []
    packed: list[Tensor] = []
    with torch.no_grad():
        model.backbone(x, residuals=residuals)
        model.backbone(x, attention_mask=mask, residuals=packed)
        y, _ = model.backbone.livs[0](torch.nn.functional.rms_norm(x, (CONFIG.width,), eps=CONFIG.norm_eps))
    assert [tuple(one.shape) for one in residuals] == [tuple(one.shape) for one in packed] == [(3, 7, CONFIG.width)] * 4
    assert torch.equal(residuals[0], x)
    close(residuals[1], x + y)
    close(packed[3][1], residuals[3][1])  # the row without padding
    assert not packed[3][0, :3].any()


def test_packing_counts_by_hand() -> None:
    packed = Ragged.pack(torch.tensor([[0, 1, 1], [1, 0, 0]]).bool(), torch.tensor([1, 2]))
    assert packed.cu_seqlens is not None
    assert packed.all_cu_seqlens is not None
    assert packed.new is not None
    assert packed.rows.tolist() == [0, 0, 1]
    assert packed.positions.tolist() == [1, 2, 2]
    assert packed.cu_seqlens.tolist() == [0, 2, 3]
    assert packed.all_cu_seqlens.tolist() == [0, 3, 6]
    assert packed.new.tolist() == [1, 2, 5]
    assert packed.longest == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m(tokens_for(0, 2, 3), None, torch.ones(2, 4).long()),
            ValueError,
            r"attention_mask: needs \[B, T\]",
        ),
        (lambda m: m(tokens_for(0, 2, 3), None, torch.ones(2, 3)), TypeError, "booleans or integers, 0 for padding"),
        (lambda m: m(tokens_for(0, 2, 3), None, [[1]]), TypeError, "attention_mask: .* got list"),
        (lambda m: m.new_cache(2, 3).reorder(torch.zeros(2)), TypeError, "rows: needs a tensor of int32 or int64"),
        (lambda m: m.new_cache(2, 3).reorder([0, 1]), TypeError, "rows: .* got list"),
        (lambda m: m.new_cache(2, 3).reorder(torch.zeros(0).long()), ValueError, r"rows: needs \(R,\) with R >= 1"),
        (lambda m: fill(m, 3, 2), ValueError, "max_length: needs at least the 3 tokens"),
        (lambda m: overflow(m), ValueError, "exceed its max_length of 4"),
    ],
)
def test_bad_input_fails_clearly(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(LanguageModel(Genome.parse("11111-81111"), CONFIG, seed=0))


def fill(model: LanguageModel, tokens: int, room: int) -> None:
    cache = model.new_cache(2, tokens)
    model(tokens_for(0, 2, tokens), cache)
    model.backbone.grow(cache, room)


def overflow(model: LanguageModel) -> None:
    cache = model.new_cache(2, 4)
    model(tokens_for(0, 2, 3), cache, torch.tensor([[0, 1, 1], [0, 0, 1]]))
    model(tokens_for(0, 2, 3), cache)
