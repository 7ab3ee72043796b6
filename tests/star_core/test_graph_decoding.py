"""Decoding by a captured graph: what a graph would freeze stays as it is, and replays give plain decoding's logits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from star_core import Cache, Genome, LanguageModel, ModelConfig, graph_decoding
from star_core.genome import POOL
from star_core.genome.baselines import BASELINES
from star_core.graph_decoding import CudaGraph, GraphDecoder
from star_kernels import _triton
from star_kernels.dispatch import use_backend
from tests.kernels import interpreter
from tests.star_core.graphs import ReplayedCalls, RerunSteps
from tests.star_core.test_own_livs import FAMILIES

CONFIG = ModelConfig(width=32, head_dim=8, vocab_size=19, time_scale=16)
PROMPT, NEW = 3, 50


def named(classes: list[int]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("liv_class", classes, ids=lambda liv_class: POOL[liv_class].name)


pool = named(list(POOL))
# The definition of attention's step in plain torch reads the rows' lengths on the host.
without_attention = named([number for number, cls in POOL.items() if cls.family != "attention"])


def model_of(text: str) -> LanguageModel:
    return LanguageModel(Genome.parse(text), CONFIG, seed=0)


def of_class(liv_class: int) -> LanguageModel:
    return model_of(f"{liv_class}.1.1.1.1-9.1.1.1.1-{liv_class}.1.1.1.1")


def tokens_for(batch: int, length: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def filled(model: LanguageModel, tokens: Tensor, mask: Tensor | None = None, room: int = NEW) -> Cache:
    cache = model.new_cache(tokens.shape[0], PROMPT + room)
    with torch.no_grad():
        model(tokens[:, :PROMPT], cache, mask)
    return cache


def plain(model: LanguageModel, cache: Cache, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(one, cache)[:, -1] for one in tokens.split(1, dim=1)])


def replayed(model: LanguageModel, cache: Cache, tokens: Tensor) -> Tensor:
    graph = ReplayedCalls()
    decode = GraphDecoder(model, cache, graph)
    logits = torch.stack([decode(one).clone() for one in tokens.split(1, dim=1)])
    assert graph.replays == tokens.shape[1] - 1
    return logits


def check_replays(model: LanguageModel, exactly: bool, mask: Tensor | None = None, new: int = NEW) -> None:
    tokens = tokens_for(2, PROMPT + new)
    caches = [filled(model, tokens, mask, new) for _ in range(2)]
    want = plain(model, caches[0], tokens[:, PROMPT:])
    got = replayed(model, caches[1], tokens[:, PROMPT:])
    if exactly:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert caches[1].length == caches[0].length == PROMPT + new
    for ours, theirs in zip(caches[1].states, caches[0].states, strict=True):
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=2e-5, atol=2e-5)


def is_exact(liv_class: int) -> bool:
    """Whether plain steps take their sums in the order of steps of fixed shapes: not over a history from its oldest."""
    return "GConv-2" not in POOL[liv_class].name


@pool
def test_replays_give_the_logits_of_plain_steps(liv_class: int) -> None:
    check_replays(of_class(liv_class), exactly=is_exact(liv_class))


@pool
def test_replays_in_bfloat16_give_the_logits_of_plain_steps(liv_class: int) -> None:
    check_replays(of_class(liv_class).bfloat16(), exactly=is_exact(liv_class), new=9)


@without_attention
def test_replays_in_plain_torch_give_the_logits_of_plain_steps(liv_class: int) -> None:
    with use_backend("reference"):
        check_replays(of_class(liv_class), exactly=True)


@pytest.mark.parametrize("text", FAMILIES.values(), ids=list(FAMILIES))
def test_replays_of_every_family_of_own_genes(text: str) -> None:
    check_replays(model_of(f"{text}-{text}"), exactly=False)


@pytest.mark.parametrize("name", list(BASELINES))
def test_replays_of_baselines(name: str) -> None:
    check_replays(LanguageModel(BASELINES[name](8), CONFIG, seed=0), exactly=False)


@pool
def test_replays_with_rows_of_unequal_length(liv_class: int) -> None:
    check_replays(of_class(liv_class), exactly=is_exact(liv_class), mask=torch.tensor([[1, 1, 1], [0, 1, 0]]))


def addresses(model: LanguageModel, decode: GraphDecoder) -> dict[int, str]:
    """Name the storages that outlive a step."""
    held = {f"parameter {name}": one for name, one in model.named_parameters()}
    held |= {f"buffer {name}": one for name, one in model.named_buffers()}
    for index, state in enumerate(decode._cache.states):
        held |= {f"state {index} {name}": one for name, one in state.items()}
    held |= {"tokens": decode._tokens, "logits": decode._logits, "lengths": decode._fixed.lengths}
    return {one.untyped_storage().data_ptr(): name for name, one in held.items()}


def check_frozen(model: LanguageModel, new: int) -> None:
    tokens = tokens_for(2, PROMPT + new)
    graph = RerunSteps(lambda: addresses(model, decode))
    decode = GraphDecoder(model, filled(model, tokens, room=new), graph)
    for one in tokens[:, PROMPT:].split(1, dim=1):
        decode(one)
    assert graph.replays == new - 1
    assert graph.first


@pool
def test_no_step_differs_in_what_a_graph_would_freeze(liv_class: int) -> None:
    check_frozen(of_class(liv_class), 8)


@without_attention
def test_no_step_in_plain_torch_differs_in_what_a_graph_would_freeze(liv_class: int) -> None:
    with use_backend("reference"):
        check_frozen(of_class(liv_class), 8)


@pytest.mark.parametrize("text", FAMILIES.values(), ids=list(FAMILIES))
def test_no_step_of_own_genes_differs_in_what_a_graph_would_freeze(text: str) -> None:
    check_frozen(model_of(f"{text}-{text}"), 8)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[object, ...]]]:
    """List the kernels that Triton's interpreter runs, with the numbers that a launch passes by value."""
    started: list[tuple[object, ...]] = []
    interpret = _triton._interpret

    def listed(kernel, grid, arguments, constants, repeatable) -> None:  # type: ignore[no-untyped-def]
        numbers = tuple(one if not isinstance(one, Tensor) else (one.dtype, one.shape) for one in arguments)
        started.append((kernel.__name__, grid, numbers, tuple(constants.items())))
        interpret(kernel, grid, arguments, constants, repeatable)

    monkeypatch.setattr(_triton, "_interpret", listed)
    with use_backend("triton"):
        yield started


def check_launches(model: LanguageModel, launches: list[tuple[object, ...]], new: int) -> None:
    tokens = tokens_for(1, PROMPT + new)
    want = plain(model, filled(model, tokens, room=new), tokens[:, PROMPT:])
    graph = RerunSteps(lambda: addresses(model, decode))
    decode = GraphDecoder(model, filled(model, tokens, room=new), graph)
    steps = []
    for one, logits in zip(tokens[:, PROMPT:].split(1, dim=1), want, strict=True):
        launches.clear()
        assert torch.equal(decode(one), logits)
        steps.append(list(launches))
    assert steps[0]
    assert all(step == steps[0] for step in steps)
    assert torch.equal(replayed(model, filled(model, tokens, room=new), tokens[:, PROMPT:]), want)


interpreted = pytest.mark.skipif(not _triton.interpreting(), reason="needs TRITON_INTERPRET=1")
if _triton.interpreting():
    interpreter.save_time()


@interpreted
@pool
def test_triton_kernels_start_alike_in_every_step(liv_class: int, launches: list[tuple[object, ...]]) -> None:
    check_launches(model_of(f"{liv_class}.1.1.1.1"), launches, 3)


@interpreted
@pytest.mark.slow
@pool
def test_triton_kernels_start_alike_in_fifty_steps(liv_class: int, launches: list[tuple[object, ...]]) -> None:
    check_launches(model_of(f"{liv_class}.1.1.1.1"), launches, NEW)


def test_a_step_that_cannot_be_captured_goes_on_plainly_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_decoding, "_warned", set())
    model, tokens = of_class(1), tokens_for(2, PROMPT + 6)
    with use_backend("reference"):
        want = plain(model, filled(model, tokens), tokens[:, PROMPT:])
        for expected in (1, 0):
            cache, graph = filled(model, tokens), ReplayedCalls()
            decode = GraphDecoder(model, cache, graph)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                got = torch.stack([decode(one).clone() for one in tokens[:, PROMPT:].split(1, dim=1)])
            assert torch.equal(got, want)
            assert cache.length == PROMPT + 6
            assert not graph.replays
            assert len(said) == expected
            if said:
                assert "a decoding step of Attention cannot be captured" in str(said[0].message)
                assert "a value is read" not in str(said[0].message)
                assert said[0].filename == __file__


def test_generate_decodes_by_a_graph_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = of_class(1), tokens_for(2, PROMPT)
    want = model.generate(prompt, 9, top_k=5, generator=torch.Generator().manual_seed(1))
    graphs: list[ReplayedCalls] = []

    def captured(model: LanguageModel, cache: Cache) -> GraphDecoder:
        graphs.append(ReplayedCalls())
        return GraphDecoder(model, cache, graphs[-1])

    monkeypatch.setattr("star_core.model.stepper", captured)
    got = model.generate(prompt, 9, top_k=5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(got, want)
    assert graphs[0].replays == 7  # the first token comes from the prompt, the second from the warm-up


def test_on_a_cpu_steps_are_plain() -> None:
    model = of_class(1)
    assert not isinstance(graph_decoding.stepper(model, filled(model, tokens_for(2, PROMPT))), GraphDecoder)


def test_bad_input_fails_clearly() -> None:
    model = of_class(1)
    with pytest.raises(ValueError, match="holds none"):
        GraphDecoder(model, model.new_cache(2, 8), ReplayedCalls())
    tokens = tokens_for(2, PROMPT + 1)
    decode = GraphDecoder(model, filled(model, tokens, room=1), ReplayedCalls())
    with pytest.raises(ValueError, match=r"tokens: needs \[B, 1\] = \[2, 1\], got \[2, 3\]"):
        decode(tokens[:, :3])
    decode(tokens[:, :1])
    with pytest.raises(ValueError, match="max_length of 4"):
        decode(tokens[:, :1])


gpu = pytest.mark.skipif(os.environ.get("STAR_TEST_DEVICE") != "cuda", reason="needs STAR_TEST_DEVICE=cuda and a GPU")


@gpu
@pool
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)], ids=["f32", "bf16"])
def test_graphs_of_a_gpu_give_the_logits_of_plain_steps(liv_class: int, dtype: torch.dtype, tolerance: float) -> None:
    model = of_class(liv_class).to("cuda", dtype)
    tokens = tokens_for(2, PROMPT + NEW).to("cuda")
    want = plain(model, filled(model, tokens), tokens[:, PROMPT:])
    cache = filled(model, tokens)
    decode = GraphDecoder(model, cache, CudaGraph(cache.device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.stack([decode(one).clone() for one in tokens[:, PROMPT:].split(1, dim=1)])
    assert decode._call == decode._replay
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@gpu
def test_generate_on_a_gpu_is_the_same_with_and_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = of_class(1).to("cuda"), tokens_for(2, PROMPT).to("cuda")
    got = model.generate(prompt, 20, temperature=0)
    monkeypatch.setattr("star_core.model.stepper", lambda model, cache: lambda one: model(one, cache)[:, -1])
    assert torch.equal(got, model.generate(prompt, 20, temperature=0))
