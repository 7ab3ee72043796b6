"""LFM2's layer: by formula everywhere, and by transformers' own where it is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_core.layers import Lfm2ShortConv
from tests.kernels import oracles
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal
from tests.star_core.layers import checks

WIDTH = 10
CONFIGS = [pytest.param(3, False, id="W3"), pytest.param(5, True, id="W5-bias"), pytest.param(1, False, id="W1")]


def config(taps: int = 3, bias: bool = False) -> Any:
    return SimpleNamespace(hidden_size=WIDTH, conv_L_cache=taps, conv_bias=bias)


def make(taps: int = 3, bias: bool = False) -> Any:
    return checks.randomised(Lfm2ShortConv(config(taps, bias), 0))


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return normal("x", batch, length, WIDTH)


@pytest.mark.parametrize("taps, bias", CONFIGS)
def test_formula(taps: int, bias: bool) -> None:
    layer, x = make(taps, bias), tokens()
    p = dict(layer.named_parameters())
    b, c, inner = F.linear(x, p["in_proj.weight"], p.get("in_proj.bias")).chunk(3, -1)
    y, _ = oracles.gated_short_conv(inner, b, c, p["conv.weight"][:, 0], p.get("conv.bias"))
    assert_close(layer(x), F.linear(y, p["out_proj.weight"], p.get("out_proj.bias")), "output")


@pytest.mark.parametrize("taps, bias", CONFIGS)
def test_every_cut_gives_the_same(taps: int, bias: bool) -> None:
    layer, x = make(taps, bias), tokens()
    checks.assert_decodes(layer, x)
    checks.assert_state_is_replaced(layer, x)
    if taps > 1:
        checks.assert_packs(layer, x)
    checks.assert_gradients(layer, layer, x)


def test_gradcheck_and_round_trip() -> None:
    layer = make()
    checks.assert_gradcheck(layer, tokens(1, 3))
    checks.assert_round_trip(layer, Lfm2ShortConv(config(), 0).double(), lambda one: one(tokens()))


def test_packed_rows_and_padding() -> None:
    layer, x = make(), tokens()
    index = torch.tensor([[0] * 3 + [1] * 6, [4] * 9])
    got = layer(x, seq_idx=index)
    assert_close(got[:1], torch.cat([layer(x[:1, :3]), layer(x[:1, 3:])], 1), "first row")
    assert_close(got[1:], layer(x[1:]), "second row")
    ends = torch.tensor([0, 3, 9])
    for arguments in ({"cu_seqlens": ends}, {"cu_seq_lens_q": ends}, {"cu_seqlens": ends, "seq_idx": index[:1]}):
        assert_close(layer(x[:1], **arguments), got[:1], str(arguments))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    assert_close(layer(x, attention_mask=mask)[:1, 2:], layer(x[:1, 2:]), "left padding")
    padded = layer(x, attention_mask=mask, seq_idx=torch.tensor([[0] * 9, [1] * 9]))
    assert_close(padded, layer(x, attention_mask=mask), "left padding of packed rows")


def test_bad_arguments() -> None:
    layer, x = make(), tokens()
    index = torch.zeros(2, 9, dtype=torch.int64)
    checks.assert_refuses(
        [
            (lambda: layer(x[0]), r"hidden_states has shape \(9, 10\), needs \(B, T, 10\)"),
            (lambda: layer(x, object(), state={}), "cache is given beside state, needs to be alone"),
            (lambda: layer(x, object(), cu_seqlens=index[0]), "cache is given beside cu_seqlens"),
            (lambda: layer(x, seq_idx=index, state={}), "state is given beside seq_idx, needs cu_seqlens"),
            (lambda: Lfm2ShortConv(config(0), 0), r"config\.conv_L_cache is 0, needs >= 1"),
        ]
    )


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    checks.assert_compiles(Lfm2ShortConv(config(), 0), tokens().float())


@pytest.mark.parametrize("taps, bias", CONFIGS)
def test_values_of_transformers(taps: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = pytest.importorskip("transformers.models.lfm2.modeling_lfm2", reason="needs the extra `hub`")
    from transformers import DynamicCache

    # Its torch functions, in whose place it takes causal-conv1d's where that is installed, with or without CUDA.
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        monkeypatch.setattr(modeling, name, getattr(modeling, name).__wrapped__)
    settings = modeling.Lfm2Config(
        hidden_size=WIDTH,
        conv_L_cache=taps,
        conv_bias=bias,
        num_hidden_layers=1,
        layer_types=["conv"],
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=8,
        vocab_size=7,
    )
    theirs = checks.randomised(modeling.Lfm2ShortConv(settings, 0))
    ours = Lfm2ShortConv(settings, 0).double()
    ours.load_state_dict(theirs.state_dict())
    x = tokens()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    want = theirs(x, attention_mask=mask)
    assert_close(ours(x, attention_mask=mask), want, "output")
    # transformers' cache, filled and read by either in turn; its steps with one tap are not what its whole pass is.
    if taps > 1:
        for first, second in ((ours, theirs), (theirs, ours), (ours, ours)):
            cache = DynamicCache(config=settings)
            pieces = [first(x[:, :5], cache=cache, attention_mask=mask[:, :5])]
            pieces += [layer(x[:, t : t + 1], cache=cache) for t, layer in enumerate((second, first, second, first), 5)]
            assert_close(torch.cat(pieces, 1), want, "handed over")
