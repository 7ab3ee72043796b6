"""Dense layers by oneDNN, and routed experts, give the numbers of the layers that they stand for."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.accelerate_models import TINY, build
from star_core import accelerate, restore
from star_core.acceleration import _experts, _linear
from tests.star_core.acceleration.models import (
    LOGITS,
    assert_same_gradients,
    in_chunks,
    largest_difference,
    pair,
    tokens,
)

transformers = pytest.importorskip("transformers", reason="needs the extra `hub`")

pytestmark = pytest.mark.skipif(_linear._product is None, reason="this build of torch has no oneDNN")

WIDE, NARROW = 1024, 512
"""Together as many weights as are worth it."""


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let oneDNN serve dense layers of any size; returns the shapes that it was called with."""
    shapes: list[tuple[int, ...]] = []
    product = _linear._product
    assert product is not None

    def counted(x: Tensor, *rest: object) -> Tensor:
        shapes.append(tuple(x.shape))
        return product(x, *rest)

    monkeypatch.setattr(_linear, "_LEAST", 0)
    monkeypatch.setattr(_linear, "_product", counted)
    return shapes


class _Marked(Tensor):
    """Stands for a quantised weight."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def test_rows_beyond_those_that_are_worth_it_go_to_the_blas(
    every_size: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linear, "_MOST_ROWS", 6)
    weight = normal(4, WIDE)
    for shape in ((6, WIDE), (2, 3, WIDE), (7, WIDE), (2, 4, WIDE)):
        x = normal(*shape)
        torch.testing.assert_close(_linear.linear(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-5)
    assert every_size == [(6, WIDE), (2, 3, WIDE)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(WIDE,), (1, WIDE), (3, 5, WIDE), (2, 1, 3, WIDE), (0, WIDE)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_outputs_and_gradients_are_those_of_a_linear_layer(bias: bool, shape: tuple[int, ...], layout: str) -> None:
    layer = nn.Linear(WIDE, NARROW, bias=bias)
    plain, own = (normal(*shape).requires_grad_() for _ in range(2))
    given = strided(own) if layout == "strided" else own
    got, want = _linear.linear(given, layer.weight, layer.bias), F.linear(plain, layer.weight, layer.bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    dy = normal(*want.shape, seed=1)
    leaves = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    found, wanted = torch.autograd.grad(got, [own, *leaves], dy), torch.autograd.grad(want, [plain, *leaves], dy)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_second_gradients_and_frozen_weights(every_size: list[tuple[int, ...]]) -> None:
    x, weight, bias = (normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(5, 6), (4, 6), (4,)]))

    def second(linear: object) -> tuple[Tensor, ...]:
        y = linear(x, weight, bias).tanh()  # type: ignore[operator]
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight, bias))

    for one, other in zip(second(_linear.linear), second(F.linear), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    frozen = weight.detach()
    torch.testing.assert_close(torch.autograd.grad(_linear.linear(x, frozen).sum(), x)[0], frozen.sum(0).expand(5, 6))
    assert not _linear.linear(x.detach(), frozen).requires_grad
    assert len(every_size) == 3


def test_what_it_does_not_serve_is_torchs(every_size: list[tuple[int, ...]]) -> None:
    x, weight = normal(3, 6), normal(4, 6)
    assert _linear.linear(x.double(), weight.double()).dtype == torch.float64
    assert _linear.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _linear.linear(x, weight).dtype == torch.bfloat16
    assert _linear.linear(x[:0], weight).shape == (0, 4)
    assert isinstance(_linear.linear(x, weight.as_subclass(_Marked)), _Marked)
    layer = nn.ModuleList([nn.Linear(6, 4)])
    layer[0].weight = nn.Parameter(weight.as_subclass(_Marked))  # type: ignore[assignment]
    assert not list(_linear.inside(layer))
    torch.testing.assert_close(torch.func.vmap(lambda row: _linear.linear(row, weight))(x), x @ weight.t())
    assert not every_size


def test_layers_worth_it_are_replaced_and_given_back() -> None:
    """Those that lie in a module of transformers: two of a feed-forward layer here, and not the narrow ones."""
    model = build("llama", TINY, intermediate_size=WIDE * 16)
    untouched = copy.deepcopy(model)
    model.proj = nn.Linear(WIDE, NARROW)
    report = accelerate(model)
    found = {one.path for one in report.replaced if one.operators == _linear.OPERATORS}
    names = ("gate_proj", "up_proj", "down_proj")
    assert found == {"proj", *(f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in names)}
    assert f"  {len(found)} x Linear: oneDNN's product" in str(report).splitlines()
    ids = tokens(2, 9)
    assert largest_difference(model(ids).logits, untouched(ids).logits) <= LOGITS
    assert restore(model)
    assert "forward" not in model.model.layers[0].mlp.up_proj.__dict__


@pytest.mark.parametrize("name", ["lfm2", "recurrent_gemma", "mamba2", "qwen3_next", "jamba"])
def test_models_keep_their_numbers(name: str, every_size: list[tuple[int, ...]]) -> None:
    accelerated, untouched, report = pair(name)
    assert any(one.operators == _linear.OPERATORS for one in report.replaced)
    ids = tokens(2, 21)
    for model in (accelerated, untouched):
        model.train()(ids, labels=ids).loss.backward()
    assert_same_gradients(accelerated, untouched)
    got, want = (in_chunks(model.eval(), ids, [7, 1, 1, 12]) for model in (accelerated, untouched))
    assert largest_difference(got, want) <= LOGITS
    assert every_size


class _Experts(nn.Module):
    """Four experts of 6 channels, 5 of them hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(normal(4, 10, 6))
        self.down_proj = nn.Parameter(normal(4, 6, 5, seed=1))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for token, chosen, factors in zip(x, index, weights, strict=True):
            y = torch.zeros_like(token)
            for expert, factor in zip(chosen.tolist(), factors, strict=True):
                if expert < 4:
                    gate, up = (self.gate_up_proj[expert] @ token).chunk(2)
                    y = y + factor * (self.down_proj[expert] @ (F.silu(gate) * up))
            rows.append(y)
        return torch.stack(rows)


@pytest.mark.parametrize(
    "index",
    [[[0, 1], [3, 0], [1, 3]], [[2, 0], [2, 1], [2, 3]], [[4, 1], [0, 4], [4, 4]], [[4, 4]] * 3],
    ids=["one unused", "one for all", "some elsewhere", "all elsewhere"],
)
def test_experts_mix_the_tokens_that_chose_them(index: list[list[int]]) -> None:
    module, x, weights = _Experts(), normal(3, 6, seed=2), normal(3, 2, seed=3)
    chosen = torch.tensor(index)
    got, want = _experts.forward(module, x, chosen, weights), module(x, chosen, weights)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if want.requires_grad:
        leaves = list(module.parameters())
        for one, other in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_experts_elsewhere_keep_their_grouped_product() -> None:
    reason = "torch's grouped product serves its device and dtype"
    assert _experts._offers(SimpleNamespace(gate_up_proj=normal(2, 4, 6).bfloat16(), act_fn=nn.SiLU())) == reason
    assert _experts._offers(SimpleNamespace(gate_up_proj=normal(2, 4, 6), act_fn=nn.Tanh())) == (
        "no operator gates with Tanh"
    )
    report = accelerate(build("qwen3_next", TINY))
    assert any(one.kind == "Qwen3NextExperts" and one.operators == ("swiglu",) for one in report.replaced)
