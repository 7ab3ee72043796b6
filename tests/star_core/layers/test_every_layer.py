"""What holds for every layer alike: mixed precision, copies, and batches."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from star_core import layers
from star_core.layers import State
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal

WIDTH = 24
MAKERS: dict[str, Any] = {
    "GatedDeltaNet": lambda: layers.GatedDeltaNet(WIDTH, num_heads=2, head_dim=4),
    "GatedLinearAttention": lambda: layers.GatedLinearAttention(hidden_size=WIDTH, use_short_conv=True),
    "HyenaOperator": lambda: layers.HyenaOperator(WIDTH, 16),
    "Lfm2ShortConv": lambda: layers.Lfm2ShortConv(
        SimpleNamespace(hidden_size=WIDTH, conv_L_cache=3, conv_bias=False), 0
    ),
    "Mamba": lambda: layers.Mamba(WIDTH),
    "Mamba2": lambda: layers.Mamba2(WIDTH, d_state=8, headdim=8),
    "MultiheadDiffAttn": lambda: layers.MultiheadDiffAttn(WIDTH, 1, 3),
}


def make(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MAKERS[name]()


def call(layer: nn.Module, x: Tensor, **options: Any) -> Tensor:
    if isinstance(layer, layers.MultiheadDiffAttn):
        angles = normal("angles", 16, 2).to(x.dtype)
        options["rel_pos"] = (angles.cos(), angles.sin())
    out = layer(x, **options)
    y: Tensor = out[0] if isinstance(out, tuple) else out
    return y


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return normal("x", batch, length, WIDTH).float()


def test_all_are_here() -> None:
    assert {*MAKERS, "State"} == set(layers.__all__)


@pytest.mark.parametrize("name", MAKERS)
def test_autocast(name: str) -> None:
    layer, x = make(name), tokens()
    state: State = {}
    with torch.autocast("cpu", torch.bfloat16):
        y = call(layer, x)
        parts = [call(layer, piece, state=state) for piece in x.split([7, 1, 1], dim=1)]
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in layer.parameters() if one.grad is not None)
    # bfloat16 keeps 8 bits; a handful of roundings follow one another.
    scale = call(layer, x).abs().max().item()
    for got in (y, torch.cat(parts, 1)):
        assert (got.float() - call(layer, x)).abs().max().item() < 8 * 2**-8 * scale


@pytest.mark.parametrize("name", MAKERS)
def test_copies(name: str) -> None:
    layer, x = make(name), tokens()
    want = call(layer, x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(call(other, x), want)


@pytest.mark.parametrize("name", MAKERS)
def test_batches(name: str) -> None:
    layer, x = make(name).double(), tokens(3).double()
    want = call(layer, x)
    for i in range(3):
        assert_close(call(layer, x[i : i + 1]), want[i : i + 1], f"row {i} alone")
    assert call(layer, x[:0]).shape == (0, 9, WIDTH)
    state: State = {}
    assert call(layer, x[:, :0], state=state).shape == (3, 0, WIDTH)
    assert_close(call(layer, x, state=state), want, "after no tokens at all")


@pytest.mark.parametrize("name", MAKERS)
def test_later_tokens_change_nothing_before_them(name: str) -> None:
    layer, x = make(name), tokens()
    poisoned = x.clone()
    poisoned[:, 6] = torch.nan
    got, want = call(layer, poisoned), call(layer, x)
    assert torch.equal(got[:, :6], want[:, :6])
    assert bool(got[:, 6].isnan().all())
