"""The Differential Transformer's layer by its formula, written out head by head in plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from star_core.layers import MultiheadDiffAttn, State
from tests.kernels import oracles
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal
from tests.star_core.layers import checks

WIDTH = 24
HEADS = [pytest.param(3, None, id="H3"), pytest.param(6, 3, id="H6-KV3"), pytest.param(6, 2, id="H6-KV2")]


def make(heads: int = 3, kv_heads: int | None = None, depth: int = 2) -> Any:
    return checks.randomised(MultiheadDiffAttn(WIDTH, depth, heads, kv_heads))


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return normal("x", batch, length, WIDTH)


def tables(heads: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    """Angles of no formula, so that one taken from elsewhere than the tables shows."""
    angles = normal("angles", rows, WIDTH // heads // 4)
    return angles.cos(), angles.sin()


class Rotated(torch.nn.Module):
    """The layer with its tables."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.rel_pos = layer, tables(layer.num_heads)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y: Tensor = self.layer(x, self.rel_pos, **options)
        return y


def formula(layer: Any, x: Tensor, heads: int, kv_heads: int, depth: int = 2) -> Tensor:
    p = dict(layer.named_parameters())
    d = WIDTH // heads // 2
    cos, sin = tables(heads)
    turn = torch.complex(cos, sin)[: x.shape[1], None]

    def rotate(one: Tensor) -> Tensor:
        pairs = torch.view_as_complex(one.unflatten(-1, (d // 2, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    q, k, v = (x @ p[f"{name}_proj.weight"].T for name in "qkv")
    q, k = rotate(q.unflatten(-1, (2 * heads, d))), rotate(k.unflatten(-1, (2 * kv_heads, d)))
    v = v.unflatten(-1, (kv_heads, 2 * d))
    start = 0.8 - 0.6 * math.exp(-0.3 * depth)
    lam = torch.exp(p["lambda_q1"] @ p["lambda_k1"]) - torch.exp(p["lambda_q2"] @ p["lambda_k2"]) + start
    made = []
    for h in range(heads):
        maps = []
        for j in (2 * h, 2 * h + 1):
            key = j // (heads // kv_heads)
            value = h // (heads // kv_heads)
            maps.append(oracles.attention(q[:, :, j, None], k[:, :, key, None], v[:, :, value, None]))
        o = maps[0] - lam * maps[1]
        made.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["subln.weight"] * (1 - start))
    return torch.cat(made, 2).flatten(-2) @ p["out_proj.weight"].T


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_formula(heads: int, kv_heads: int | None) -> None:
    layer, x = make(heads, kv_heads), tokens()
    assert_close(Rotated(layer)(x), formula(layer, x, heads, kv_heads or heads), "output")


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_every_cut_gives_the_same(heads: int, kv_heads: int | None) -> None:
    layer, x = make(heads, kv_heads), tokens()
    call = Rotated(layer)
    checks.assert_decodes(call, x)
    checks.assert_state_is_replaced(call, x)
    checks.assert_gradients(layer, call, x)


def test_packed_sequences_begin_at_position_0() -> None:
    call, x = Rotated(make()), tokens(1)
    got = call(x, cu_seqlens=torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32))
    want = torch.cat([call(piece) for piece in x.split([3, 1, 5], dim=1)], 1)
    assert_close(got, want, "packed")


def test_gradcheck_and_round_trip() -> None:
    layer = make()
    checks.assert_gradcheck(Rotated(layer), tokens(1, 3))
    checks.assert_round_trip(layer, MultiheadDiffAttn(WIDTH, 2, 3).double(), lambda one: Rotated(one)(tokens()))


def test_names_and_shapes_of_the_published_parameters() -> None:
    # multihead_diffattn.py, with embed_dim 24, 6 heads and 3 key heads: head_dim 2, n_rep 2.
    assert {name: tuple(one.shape) for name, one in MultiheadDiffAttn(24, 0, 6, 3).state_dict().items()} == {
        "lambda_q1": (2,),
        "lambda_k1": (2,),
        "lambda_q2": (2,),
        "lambda_k2": (2,),
        "q_proj.weight": (24, 24),
        "k_proj.weight": (12, 24),
        "v_proj.weight": (12, 24),
        "out_proj.weight": (24, 24),
        "subln.weight": (4,),
    }


def test_half_precision() -> None:
    layer = make().bfloat16()
    state: State = {}
    y = Rotated(layer)(tokens().bfloat16(), state=state)
    assert y.dtype == state["k"].dtype == state["v"].dtype == torch.bfloat16
    want = Rotated(layer.double())(tokens().bfloat16().double())
    assert_close(y, want, "beside float64", 0.05)


def test_bad_arguments() -> None:
    layer, x = make(), tokens()
    cos, sin = tables(3)
    rel_pos = (cos, sin)
    checks.assert_refuses(
        [
            (lambda: layer(x[0], rel_pos), r"x has shape \(9, 24\), needs \(B, T, 24\)"),
            (lambda: layer(x, rel_pos, cos), "attn_mask is given, needs None"),
            (lambda: layer(x, rel_pos, cu_seqlens=cos, state={}), "state and cu_seqlens are both given"),
            (
                lambda: layer(x, (cos[:8], sin)),
                r"rel_pos has cosines of shape \(8, 2\), needs \(P, head_dim / 2\) with",
            ),
            (lambda: layer(x, (cos, sin[:, :1])), r"rel_pos has sines of shape \(12, 1\)"),
            (lambda: MultiheadDiffAttn(WIDTH, 0, 5), r"2 \* num_heads is 10, needs a divisor of embed_dim == 24"),
            (lambda: MultiheadDiffAttn(WIDTH, 0, 6, 4), "num_kv_heads is 4, needs a divisor of num_heads == 6"),
            (lambda: MultiheadDiffAttn(WIDTH, 0, 4), "embed_dim / num_heads / 2 is 3, needs an even width"),
        ]
    )


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    cos, sin = tables(3)
    checks.assert_compiles(MultiheadDiffAttn(WIDTH, 2, 3), tokens().float(), (cos.float(), sin.float()))
