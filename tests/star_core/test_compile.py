"""torch.compile takes every LIV class as one graph, forward and backward, and keeps it for every sequence length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from star_core import Genome, LanguageModel, ModelConfig
from star_core.backbone import Backbone
from star_core.genome import POOL
from star_kernels import which

CONFIG = ModelConfig(width=32, head_dim=8, vocab_size=19, time_scale=64)
LENGTHS = (24, 7, 33, 64, 129)
# Inductor's own code sums more than 4,096 elements in another way, and so compiles once more there: the gradient of a
# differential class's lambda is a sum of 64 T elements here.
INDUCTOR_LENGTHS = (96, 70, 129, 65, 200)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Start with no compiled code, and fail on what is compiled twice."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


OWN = {
    "softmax, band": "11111[operator=12223,window=6]",
    "ReLU, band": "41111[operator=42233,window=6]",
    "linear": "11111[operator=12113,q=113211,k=113211]",
    "gated linear": "31111[operator=34113,q=321211]",
    "delta rule": "21111[operator=24112,z=114211]",
    "RG-LRU": "91111[operator=94141,value=321231]",
    "cut implicit filter": "81111[operator=83211,window=6]",
    "differential, band": "10.1.1.1.1[operator=12223,window=6]",
    "norms everywhere": "11111[residual=2]-71111[residual=3]-11111[residual=4]-91111",
}
"""Genomes beyond the paper's: operators, feature groups and norms of their own."""

OPERATORS = {
    "linear": "gated_linear_attention",
    "gated linear": "gated_linear_attention",
    "delta rule": "gated_delta_rule",
    "RG-LRU": "rg_lru",
}
"""What runs those of `OWN` that are recurrences."""


def backbone(liv_class: int) -> Backbone:
    """Build one LIV between its norms."""
    return backbone_of(f"{liv_class}.1.1.1.1", liv_class)


def backbone_of(genome: str, seed: int) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Backbone(Genome.parse(genome), CONFIG)


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]), requires_grad=True)


def assert_one_graph(model: torch.nn.Module, backend: str, lengths: tuple[int, ...]) -> None:
    """Hold outputs and every gradient to the eager ones, at each length."""
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True, backend=backend)
    for length in lengths:
        x = random_input(2, length, CONFIG.width)
        torch._dynamo.mark_dynamic(x, 1)
        leaves = [x, *model.parameters()]
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        y, want = compiled(x), model(x)
        found, wanted = (torch.autograd.grad(one, leaves, dy) for one in (y, want))
        for got, expected in zip((y, *found), (want, *wanted), strict=True):
            # float32 sums in another order, at worst.
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5 * scale)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def serves_any_length(liv_class: int) -> bool:
    """Whether one trace can hold for all lengths: plain torch walks over tokens in Python loops, as long as traced."""
    return POOL[liv_class].family != "recurrence" or which("selective_scan", torch.empty(0)) != "reference"


@pytest.mark.parametrize("liv_class", list(POOL), ids=lambda liv_class: POOL[liv_class].name)
def test_one_graph_for_every_length(liv_class: int) -> None:
    if serves_any_length(liv_class):
        assert_one_graph(backbone(liv_class), "aot_eager", LENGTHS)
        return
    model = backbone(liv_class)
    x = random_input(2, 7, CONFIG.width)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("liv_class", [1, 5, 7, 8, 9, 10, 17], ids=lambda liv_class: POOL[liv_class].name)
def test_one_graph_with_inductor(liv_class: int) -> None:
    if not serves_any_length(liv_class):
        pytest.skip("no compiled operators: the plain torch form of this recurrence is traced anew for each length")
    assert_one_graph(backbone(liv_class), "inductor", INDUCTOR_LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_own_livs_are_one_graph_for_every_length(name: str) -> None:
    if name in OPERATORS and which(OPERATORS[name], torch.empty(0)) == "reference":
        pytest.skip("no compiled operators: plain torch forms of recurrences are traced anew for each length")
    assert_one_graph(backbone_of(OWN[name], 0), "aot_eager", LENGTHS)


@pytest.mark.parametrize("training", [False, True], ids=["logits", "loss"])
def test_language_model_is_one_graph(training: bool) -> None:
    """Embedding, shared keys and values, norms and loss included; without a gradient too."""
    if not serves_any_length(5):
        pytest.skip("no compiled operators: the plain torch form of the recurrence is traced anew for each length")
    model = LanguageModel(Genome.parse("11114-51111-71111-91111-11114"), CONFIG, seed=0)
    run: Any = model.loss if training else model.__call__
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for length in LENGTHS:
        tokens = torch.randint(CONFIG.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
        torch._dynamo.mark_dynamic(tokens, 1)
        arguments = [tokens, tokens.roll(-1, 1)] if training else [tokens]
        if training:
            torch._dynamo.mark_dynamic(arguments[1], 1)
        with torch.set_grad_enabled(training):
            got, want = compiled(*arguments), run(*arguments)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        if training:
            parameters = list(model.parameters())
            found, wanted = torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters)
            for one, expected in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
