"""Hyena's layer by its formula, filter and all, in plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_core.layers import HyenaOperator
from tests.kernels import oracles
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal
from tests.star_core.layers import checks

WIDTH, L_MAX = 6, 12
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "order-4": {"order": 4, "emb_dim": 7, "num_inner_mlps": 1, "w": 2, "short_filter_order": 4},
    "scaled": {"order": 3, "post_order_ffn": True, "activation": "gelu", "normalized": True, "shift": 0.1},
    "one-tap": {"short_filter_order": 1, "bias": False, "activation": None, "lr_pos_emb": 0.0},
    "no-window": {"modulate": False, "modulation_lr": 0.1, "activation": "silu", "num_inner_mlps": 0},
    "window": {"fast_decay_pct": 0.1, "slow_decay_pct": 2.0, "target": 0.05, "jit_filter": True, "filter_dropout": 0.5},
}
CASES = [pytest.param(one, id=name) for name, one in OPTIONS.items()]


def make(options: dict[str, Any]) -> Any:
    return checks.randomised(HyenaOperator(WIDTH, L_MAX, filter_order=8, **options))


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return normal("x", batch, length, WIDTH)


def filter_formula(layer: Any, options: dict[str, Any]) -> Tensor:
    """Return the taps, (order - 1, width, L_MAX)."""
    p = layer.state_dict(keep_vars=True)
    h = p["filter_fn.pos_emb.z"][0]
    last = 2 * (options.get("num_inner_mlps", 2) + 1)
    for i in range(0, last, 2):
        name = f"filter_fn.implicit_filter.{i}"
        h = torch.sin(p["filter_fn.implicit_filter.1.freq"] * F.linear(h, p[f"{name}.weight"], p[f"{name}.bias"]))
    h = h @ p[f"filter_fn.implicit_filter.{last}.weight"].T
    if options.get("normalized"):
        h = h / h.abs().sum(-1, keepdim=True)
    if options.get("modulate", True):
        h = h * (
            torch.exp(-p["filter_fn.pos_emb.t"][0] * p["filter_fn.modulation.deltas"][0].abs())
            + options.get("shift", 0)
        )
    order = options.get("order", 2)
    return torch.stack([h.T[o :: order - 1] for o in range(order - 1)])


def formula(layer: Any, u: Tensor, options: dict[str, Any]) -> Tensor:
    p = layer.state_dict(keep_vars=True)
    order = options.get("order", 2)
    u = F.linear(u, p["in_proj.weight"], p["in_proj.bias"])
    u, _ = oracles.causal_conv1d(u, p["short_filter.weight"][:, 0], p["short_filter.bias"])
    *x, v = u.split(WIDTH, -1)
    taps = filter_formula(layer, options)
    for o in range(order - 1):
        skip = p["filter_fn.bias"][o :: order - 1] if options.get("bias", True) else None
        v = oracles.long_conv(v, taps[o], gate_in=x[order - 1 - o], skip=skip)
        if options.get("post_order_ffn"):
            v = v * p["ord_proj_w"][o]
    y = v * x[0]
    y = {"gelu": F.gelu, "silu": F.silu}.get(options.get("activation") or "id", lambda one: one)(y)
    return F.linear(y, p["out_proj.weight"], p["out_proj.bias"])


@pytest.mark.parametrize("options", CASES)
def test_formula(options: dict[str, Any]) -> None:
    layer = make(options)
    # A sequence of the filters' length, a shorter one, and one that goes on beyond it.
    for length in (L_MAX, 5, L_MAX + 7):
        x = tokens(length=length)
        assert_close(layer(x), formula(layer, x, options), f"T == {length}")


@pytest.mark.parametrize("options", CASES)
def test_every_cut_gives_the_same(options: dict[str, Any]) -> None:
    layer = make(options)
    for length in (9, L_MAX + 5):
        checks.assert_decodes(layer, tokens(length=length))
    checks.assert_state_is_replaced(layer, tokens())


def test_states_stop_at_the_filters_reach() -> None:
    layer, state = make({}), {}
    layer(tokens(length=L_MAX + 7), state=state)
    assert state["inputs_0"].shape == (2, L_MAX - 1, WIDTH)
    layer(tokens(length=1), state=state)
    assert state["inputs_0"].shape == (2, L_MAX - 1, WIDTH)


@pytest.mark.parametrize("options", CASES)
def test_gradients(options: dict[str, Any]) -> None:
    layer = make(options)
    unused = {"bias": "filter_fn.bias", "modulate": "filter_fn.modulation.deltas"}
    for name, parameter in unused.items():
        if options.get(name, True) is False:
            layer.get_parameter(parameter).requires_grad_(False)
            path, _, last = parameter.rpartition(".")
            module = layer.get_submodule(path)
            held = getattr(module, last).detach()
            delattr(module, last)
            module.register_buffer(last, held)
    if "post_order_ffn" in options:
        # Only the first order - 1 of its numbers are used, as in safari.
        assert layer.ord_proj_w.shape == (3, 1, 1)
    checks.assert_gradients(layer, layer, tokens())


def test_packed_sequences() -> None:
    layer, x = make(OPTIONS["order-4"]), tokens(1, 15)
    got = layer(x, cu_seqlens=torch.tensor([0, 3, 3, 4, 15], dtype=torch.int32))
    assert_close(got, torch.cat([layer(piece) for piece in x.split([3, 1, 11], dim=1)], 1), "packed")


def test_gradcheck_and_round_trip() -> None:
    layer = make({})
    checks.assert_gradcheck(layer, tokens(1, 3))
    other = HyenaOperator(WIDTH, L_MAX, filter_order=8).double()
    checks.assert_round_trip(layer, other, lambda one: one(tokens()))


def test_names_shapes_and_values_of_the_published_parameters() -> None:
    layer = HyenaOperator(4, 10, order=3, filter_order=5, emb_dim=5, post_order_ffn=True, wd=0.25, w=3)
    state = layer.state_dict()
    sines = {f"filter_fn.implicit_filter.{i}.freq": (1, 5) for i in (1, 3, 5)}
    assert {name: tuple(one.shape) for name, one in state.items()} == sines | {
        "ord_proj_w": (3, 1, 1),
        "in_proj.weight": (16, 4),
        "in_proj.bias": (16,),
        "out_proj.weight": (4, 4),
        "out_proj.bias": (4,),
        "short_filter.weight": (16, 1, 3),
        "short_filter.bias": (16,),
        "filter_fn.bias": (8,),
        "filter_fn.pos_emb.z": (1, 10, 5),
        "filter_fn.pos_emb.t": (1, 10, 1),
        "filter_fn.implicit_filter.0.weight": (5, 5),
        "filter_fn.implicit_filter.0.bias": (5,),
        "filter_fn.implicit_filter.2.weight": (5, 5),
        "filter_fn.implicit_filter.2.bias": (5,),
        "filter_fn.implicit_filter.4.weight": (5, 5),
        "filter_fn.implicit_filter.4.bias": (5,),
        "filter_fn.implicit_filter.6.weight": (8, 5),
        "filter_fn.modulation.deltas": (1, 1, 8),
    }
    parameters = dict(layer.named_parameters())
    assert "filter_fn.pos_emb.z" in parameters
    assert not {"filter_fn.pos_emb.t", "filter_fn.modulation.deltas"} & set(parameters)
    assert parameters["filter_fn.pos_emb.z"]._optim == {"lr": 1e-5, "weight_decay": 0.0}
    assert parameters["filter_fn.implicit_filter.1.freq"]._optim == {"lr": 1e-3, "weight_decay": 0.25}
    assert bool((state["filter_fn.implicit_filter.3.freq"] == 3).all())
    t = torch.arange(10) / 9
    wave = torch.outer(2 * math.pi * torch.arange(10) / 10, torch.tensor([1e-4, 1.0]))
    want = torch.cat([t[:, None], torch.exp(-1j * wave).real, torch.exp(-1j * wave).imag], 1)
    torch.testing.assert_close(state["filter_fn.pos_emb.z"][0], want)
    torch.testing.assert_close(state["filter_fn.pos_emb.t"][0, :, 0], t)
    ends = state["filter_fn.modulation.deltas"][0, 0, [0, -1]]
    torch.testing.assert_close(ends, math.log(0.01) / torch.tensor([1.5, 0.3]))
    free = HyenaOperator(4, 10, lr_pos_emb=None, modulation_lr=0.1)
    assert free.filter_fn.pos_emb.z._optim == {"weight_decay": 0.0}
    assert free.filter_fn.modulation.deltas._optim == {"lr": 0.1, "weight_decay": 0.0}


def test_dropout_of_the_gated_inputs() -> None:
    layer, x = make({"dropout": 0.5}), tokens()
    layer.eval()
    want = layer(x)
    assert_close(want, formula(layer, x, {}), "without dropout")
    layer.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        got = layer(x)
        torch.manual_seed(0)
        again = layer(x, state={})
    assert not torch.allclose(got, want)
    assert_close(again, got, "with a state")
    layer.dropout.p = 1.0
    bias = layer.out_proj.bias.expand_as(want)
    assert_close(layer(x), bias, "with nothing left")


def test_forms_of_the_call_and_half_precision() -> None:
    layer = HyenaOperator(WIDTH, L_MAX, return_state=True).bfloat16()
    state: dict[str, Tensor] = {}
    y, nothing = layer(tokens().bfloat16(), state=state)
    assert nothing is None
    assert layer.d_output == WIDTH
    assert y.dtype == torch.bfloat16
    assert state["inputs_0"].dtype == state["conv"].dtype == torch.float32
    step, _ = layer(tokens(length=1).bfloat16(), state=state)
    assert step.dtype == torch.bfloat16


def test_bad_arguments() -> None:
    layer, x = make({}), tokens()
    cases = [
        (lambda: layer(x[0]), r"u has shape \(9, 6\), needs \(B, T, 6\)"),
        (lambda: layer(x, cu_seqlens=x, state={}), "state and cu_seqlens are both given"),
    ]
    for options, message in (
        ({"num_heads": 2}, "num_heads is 2, needs 1"),
        ({"inner_factor": 2}, "inner_factor is 2, needs 1"),
        ({"num_blocks": 2}, "num_blocks is 2, needs 1"),
        ({"outer_mixing": True}, "outer_mixing is True, needs False"),
        ({"filter_cls": "mine"}, "filter_cls is 'mine', needs 'hyena-filter'"),
        ({"order": 1}, "order is 1, needs >= 2"),
        ({"activation": "glu"}, "activation is 'glu', needs one of 'id', 'tanh'"),
        ({"emb_dim": 4}, "emb_dim is 4, needs an odd number >= 3"),
    ):
        cases.append((lambda options=options: HyenaOperator(WIDTH, L_MAX, **options), message))
    checks.assert_refuses(cases)
    checks.assert_refuses(
        [(lambda: HyenaOperator(WIDTH, L_MAX, emb=3), "unexpected keyword argument 'emb'")], TypeError
    )


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    checks.assert_compiles(HyenaOperator(WIDTH, L_MAX), tokens().float())
