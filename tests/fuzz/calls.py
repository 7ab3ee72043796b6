"""A random call of every public operator: valid arguments over the whole range that its docstring allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.draw import INTEGERS, Draw


@dataclass
class Call:
    """What a public function is called with.

    Attributes:
        operator: Its name.
        tensors: Floating arguments in float64, the one that decides the dtype first.
        options: The other arguments.
        free: Names of the tensors whose dtype need not be the first one's.
        timed: Names of the tensors with a time axis, (B, T, ...); the others are states and parameters.
    """

    operator: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    timed: tuple[str, ...] = ()


class Sequences:
    """Sizes of a random batch, packed into one row or not."""

    def __init__(self, draw: Draw, most_tokens: int = 600, step: bool = False) -> None:
        self.options: dict[str, Any] = {}
        self.batch, self.length = draw.batch_and_length(most_tokens)
        if step:
            self.length = 1
        self.states = self.batch
        if not step and draw.chance(0.4):
            self.batch = 1
            cu_seqlens = draw.packing(self.length)
            self.options, self.states = {"cu_seqlens": cu_seqlens}, cu_seqlens.shape[0] - 1


def _some(draw: Draw, tensors: dict[str, Tensor], **optional: tuple[int, ...]) -> None:
    """Add each optional tensor, by the name and shape given, two times of three."""
    for name, shape in optional.items():
        if draw.chance(2 / 3):
            tensors[name] = draw.values(*shape)


def causal_conv1d(draw: Draw, step: bool) -> Call:
    rows, width, taps = Sequences(draw, step=step), draw.width(), draw.taps()
    tensors = {"x": draw.values(rows.batch, rows.length, width), "weight": draw.values(width, taps)}
    _some(draw, tensors, bias=(width,), initial_state=(rows.states, width, taps - 1))
    options = {**rows.options, "activation": draw.choose((None, "silu", "swish"))}
    return Call("causal_conv1d", tensors, options, frozenset({"weight", "bias"}), ("x",))


def gated_short_conv(draw: Draw, step: bool) -> Call:
    rows, width, taps = Sequences(draw, step=step), draw.width(), draw.taps()
    timed = ("x", "gate_in", "gate_out")
    tensors = {name: draw.values(rows.batch, rows.length, width) for name in timed}
    tensors["weight"] = draw.values(width, taps)
    _some(draw, tensors, bias=(width,), initial_state=(rows.states, width, taps - 1))
    return Call("gated_short_conv", tensors, rows.options, frozenset({"weight", "bias"}), timed)


def long_conv(draw: Draw, step: bool) -> Call:
    rows, width = Sequences(draw, 1200, step), draw.width(65)
    reach = draw.choose((1, 2, 7, 33, 64, 130, 300)) if step or draw.chance(0.4) else max(1, rows.length)
    tensors = {"x": draw.values(rows.batch, rows.length, width), "filter": draw.values(width, reach)}
    gate = (rows.batch, rows.length, width)
    _some(draw, tensors, gate_in=gate, gate_out=gate, skip=(width,))
    if step:
        tensors["initial_state"] = draw.values(rows.batch, draw.count(0, reach - 1), width)
    return Call("long_conv", tensors, rows.options, frozenset({"filter", "skip"}), ("x", "gate_in", "gate_out"))


def diagonal_scan(draw: Draw, step: bool) -> Call:
    rows, width = Sequences(draw, step=step), draw.width()
    shape = (rows.batch, rows.length, width)
    decay = draw.uniform(*draw.choose(((0.0, 1.0), (-1.0, 1.0), (0.99, 1.0), (0.0, 0.0))), *shape)
    tensors = {"decay": decay, "x": draw.values(*shape)}
    _some(draw, tensors, initial_state=(rows.states, width))
    return Call("diagonal_scan", tensors, rows.options, timed=("decay", "x"))


def rg_lru(draw: Draw, step: bool) -> Call:
    rows, width = Sequences(draw, step=step), draw.width()
    timed = ("x", "recurrence_gate", "input_gate")
    tensors = {name: draw.values(rows.batch, rows.length, width) for name in timed}
    tensors["log_lambda"] = -draw.uniform(*draw.choose(((0.0, 1.0), (1e-3, 1e-2), (1.0, 20.0))), width)
    _some(draw, tensors, initial_state=(rows.states, width))
    options = {**rows.options, "c": draw.choose((8.0, 0.5))}
    return Call("rg_lru", tensors, options, frozenset({"log_lambda"}), timed)


def _state_space(draw: Draw, tensors: dict[str, Tensor], dt: tuple[int, ...]) -> bool:
    """Add step sizes, and say whether they go through softplus."""
    if draw.chance(0.5):
        tensors["dt"] = draw.values(*dt, size=20.0)
        return True
    tensors["dt"] = draw.uniform(0.0, draw.choose((1e-3, 0.5)), *dt)
    return False


def selective_scan(draw: Draw, step: bool) -> Call:
    rows, groups, size = Sequences(draw, 300, step), draw.choose((1, 1, 2, 3)), draw.choose((1, 2, 5, 8, 16, 17, 33))
    width = groups * draw.width(33)
    shape = (rows.batch, rows.length, width)
    tensors = {"x": draw.values(*shape)}
    softplus = _state_space(draw, tensors, shape)
    tensors["A"] = -draw.uniform(0.0, draw.choose((1.0, 16.0)), width, size)
    tensors |= {name: draw.values(rows.batch, rows.length, groups, size) for name in ("B", "C")}
    _some(draw, tensors, D=(width,), z=shape, initial_state=(rows.states, width, size))
    if softplus:
        _some(draw, tensors, dt_bias=(width,))
    free = frozenset(tensors) - {"x"}
    return Call("selective_scan", tensors, {**rows.options, "dt_softplus": softplus}, free, ("x", "dt", "B", "C", "z"))


def ssd(draw: Draw, step: bool) -> Call:
    rows, groups, size = Sequences(draw, 300, step), draw.choose((1, 1, 2, 3)), draw.choose((1, 2, 5, 16, 17, 33, 64))
    heads, width = groups * draw.count(1, 3), draw.width(65)
    tensors = {"x": draw.values(rows.batch, rows.length, heads, width)}
    softplus = _state_space(draw, tensors, (rows.batch, rows.length, heads))
    tensors["A"] = -draw.uniform(0.0, draw.choose((1.0, 16.0)), heads)
    tensors |= {name: draw.values(rows.batch, rows.length, groups, size) for name in ("B", "C")}
    _some(draw, tensors, D=(heads,), z=tensors["x"].shape, initial_state=(rows.states, heads, width, size))
    if softplus:
        _some(draw, tensors, dt_bias=(heads,))
    free = frozenset(tensors) - {"x"}
    return Call("ssd", tensors, {**rows.options, "dt_softplus": softplus}, free, ("x", "dt", "B", "C", "z"))


def _memory(draw: Draw, step: bool) -> tuple[Sequences, tuple[int, int, int], tuple[int, int, int], dict[str, Any]]:
    """Return a batch, the shape of queries and keys, the shape of values, and the options."""
    rows, heads = Sequences(draw, 300, step), draw.count(1, 3)
    keys, values = (draw.width(65) for _ in range(2))
    options = {**rows.options, "scale": draw.choose((None, 0.3, -1.0))}
    return rows, (rows.batch, rows.length, heads, keys), (rows.batch, rows.length, heads, values), options


def gated_linear_attention(draw: Draw, step: bool) -> Call:
    rows, keys, values, options = _memory(draw, step)
    tensors = {"q": draw.values(*keys), "k": draw.values(*keys), "v": draw.values(*values)}
    tensors["log_decay"] = draw.log_decays(*keys)
    _some(draw, tensors, initial_state=(rows.states, *keys[2:], values[3]))
    return Call("gated_linear_attention", tensors, options, frozenset({"log_decay"}), ("q", "k", "v", "log_decay"))


def gated_delta_rule(draw: Draw, step: bool) -> Call:
    rows, keys, values, options = _memory(draw, step)
    # Keys of a norm above 1 make the memory grow without bound, by the rule itself.
    k = torch.nn.functional.normalize(draw.values(*keys), dim=-1)
    tensors = {"q": draw.values(*keys), "k": k, "v": draw.values(*values)}
    tensors["log_decay"] = draw.log_decays(*keys[:3])
    tensors["beta"] = draw.uniform(*draw.choose(((0.0, 1.0), (0.0, 2.0), (0.0, 0.0))), *keys[:3])
    _some(draw, tensors, initial_state=(rows.states, *keys[2:], values[3]))
    timed = ("q", "k", "v", "log_decay", "beta")
    return Call("gated_delta_rule", tensors, options, frozenset({"log_decay", "beta"}), timed)


def _attention_sizes(draw: Draw) -> dict[str, Any]:
    batch, key_heads = draw.choose((0, 1, 1, 2, 3)), draw.choose((1, 1, 2, 3))
    queries, keys = draw.length(), draw.length()
    if draw.chance(0.5):
        queries = keys
    width, value_width = (draw.width() for _ in range(2))
    packing: dict[str, Any] = {}
    if draw.chance(0.3):
        batch = 1
        cu_q = draw.packing(queries)
        cu_k = cu_q.clone() if queries == keys and draw.chance(0.5) else draw.packing(keys)
        if len(cu_q) == len(cu_k):
            packing = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    options: dict[str, Any] = {
        **packing,
        "causal": draw.chance(0.7),
        "scale": draw.choose((None, None, 0.3, -0.2, 0.0)),
    }
    if options["causal"] and draw.chance(0.5):
        options["window"] = draw.choose((1, 2, 7, 16, 40, 128, 1000))
    heads = key_heads * draw.choose((1, 2, 3, 4))
    return {
        "q": (batch, queries, heads, width),
        "k": (batch, keys, key_heads, width),
        "v": (batch, keys, key_heads, value_width),
        "options": options,
    }


def attention(draw: Draw, step: bool) -> Call:
    sizes = _attention_sizes(draw)
    tensors = {name: draw.values(*sizes[name]) for name in "qkv"}
    _some(draw, tensors, sinks=sizes["q"][2:3])
    options = {**sizes["options"], "softcap": draw.choose((None, None, 5.0))}
    return Call("attention", tensors, options, frozenset({"sinks"}))


def differential_attention(draw: Draw, step: bool) -> Call:
    sizes = _attention_sizes(draw)
    tensors = {name: draw.values(*sizes[name[0]]) for name in ("q1", "k1", "q2", "k2", "v")}
    tensors["lam"] = draw.values(*draw.choose(((), sizes["q"][2:3])), size=1.0)
    return Call("differential_attention", tensors, sizes["options"], frozenset({"lam"}))


def attention_step(draw: Draw, step: bool) -> Call:
    """Draw a cache that is NaN where no token is held."""
    sizes = _attention_sizes(draw)
    batch, room = sizes["k"][:2]
    tensors = {"q": draw.values(batch, *sizes["q"][2:]), "k": draw.values(*sizes["k"]), "v": draw.values(*sizes["v"])}
    _some(draw, tensors, sinks=sizes["q"][2:3])
    options = {name: value for name, value in sizes["options"].items() if name in ("window", "scale")}
    held = draw.integers(room + 1, batch)
    kind = draw.choose(("all", "number", "each"))
    if kind == "number":
        options["length"] = draw.count(0, room)
        held.fill_(options["length"])
    elif kind == "each":
        options["length"] = held.to(draw.choose(INTEGERS))
    if kind != "all":
        for name in ("k", "v"):
            tensors[name][torch.arange(room) >= held[:, None]] = float("nan")
    options["softcap"] = draw.choose((None, None, 5.0))
    return Call("attention_step", tensors, options, frozenset({"sinks"}))


def _gated_unit(operator: str) -> Callable[[Draw, bool], Call]:
    def build(draw: Draw, step: bool) -> Call:
        shape = [draw.choose((0, 1, 2, 3, 5)) for _ in range(draw.count(0, 3))] + [draw.width()]
        return Call(operator, {"gate": draw.values(*shape, size=200.0), "up": draw.values(*shape)})

    return build


def channel_mix(draw: Draw, step: bool) -> Call:
    groups, share = draw.choose((1, 2, 3, 5)), draw.width(33)
    width = groups * share
    shape = [draw.choose((0, 1, 2, 3, 17)) for _ in range(draw.count(0, 2))] + [width]
    weight = draw.values(*draw.choose(((width,), (groups, share, share), (width, width))))
    return Call("channel_mix", {"x": draw.values(*shape), "weight": weight}, free=frozenset({"weight"}))


def rms_norm(draw: Draw, step: bool) -> Call:
    shape = [draw.choose((0, 1, 2, 3, 17)) for _ in range(draw.count(0, 3))] + [draw.width() * draw.choose((1, 1, 4))]
    tensors = {"x": draw.values(*shape, size=300.0), "weight": draw.values(shape[-1])}
    return Call("rms_norm", tensors, {"eps": draw.choose((1e-6, 1e-3))}, frozenset({"weight"}))


def add_rms_norm(draw: Draw, step: bool) -> Call:
    call = rms_norm(draw, step)
    x, weight = call.tensors["x"], call.tensors["weight"]
    tensors = {"x": x, "residual": draw.values(*x.shape), "weight": weight}
    return Call("add_rms_norm", tensors, call.options, frozenset({"residual", "weight"}))


def rotary(draw: Draw, step: bool) -> Call:
    batch, length = draw.batch_and_length()
    shape = (batch, length, draw.count(1, 4), 2 * draw.width(65))
    positions = draw.integers(5000, *draw.choose(((length,), (batch, length))))
    positions = positions.to(draw.choose((torch.int32, torch.int64, torch.float32, torch.float64)))
    options = {"positions": positions, "base": draw.choose((10000.0, 500000.0)), "interleaved": draw.chance(0.5)}
    return Call("rotary", {"x": draw.values(*shape)}, options)


def linear_cross_entropy(draw: Draw, step: bool) -> Call:
    shape = [draw.choose((0, 1, 2, 3, 17, 65)) for _ in range(draw.count(0, 2))]
    width, vocabulary = draw.width(65), draw.choose((1, 2, 7, 33, 64, 257, 1000))
    ignored = draw.choose((-100, 0, 3))
    targets = draw.integers(vocabulary, *shape).to(draw.choose(INTEGERS))
    if draw.chance(0.5):
        targets = torch.where(draw.uniform(0, 1, *shape) < draw.choose((0.3, 1.0)), ignored, targets).to(targets.dtype)
    tensors = {"hidden": draw.values(*shape, width), "weight": draw.values(vocabulary, width)}
    _some(draw, tensors, bias=(vocabulary,))
    options = {
        "targets": targets,
        "ignore_index": ignored,
        "reduction": draw.choose(("mean", "sum", "none")),
        "label_smoothing": draw.choose((0.0, 0.0, 0.1, 1.0)),
        "softcap": draw.choose((None, None, 5.0)),
    }
    return Call("linear_cross_entropy", tensors, options, frozenset({"weight", "bias"}))


def _step_of(build: Callable[[Draw, bool], Call]) -> Callable[[Draw, bool], Call]:
    """Turn a call of one token into one of the operator's step: no time axis, and a state."""

    def draw_step(draw: Draw, step: bool) -> Call:
        call = build(draw, True)
        tensors = {name: one[:, 0] if name in call.timed else one for name, one in call.tensors.items()}
        first = next(iter(tensors))
        state = tensors.pop("initial_state", None)
        if state is None:
            state = draw.values(*_state_shape(call))
        return Call(
            f"{call.operator}_step", {first: tensors.pop(first), "state": state, **tensors}, call.options, call.free
        )

    return draw_step


def _state_shape(call: Call) -> tuple[int, ...]:
    one = call.tensors
    batch = next(iter(one.values())).shape[0]
    if call.operator in ("causal_conv1d", "gated_short_conv"):
        return batch, one["weight"].shape[0], one["weight"].shape[1] - 1
    if call.operator in ("diagonal_scan", "rg_lru"):
        return batch, one["x"].shape[2]
    if call.operator == "selective_scan":
        return batch, *one["A"].shape
    if call.operator == "ssd":
        return batch, *one["x"].shape[2:], one["B"].shape[3]
    return batch, *one["k"].shape[2:], one["v"].shape[3]


_CARRYING = (
    causal_conv1d,
    gated_short_conv,
    long_conv,
    diagonal_scan,
    rg_lru,
    selective_scan,
    ssd,
    gated_linear_attention,
    gated_delta_rule,
)
_OTHERS = (
    attention,
    differential_attention,
    attention_step,
    channel_mix,
    rms_norm,
    add_rms_norm,
    rotary,
    linear_cross_entropy,
)

CALLS: dict[str, Callable[[Draw, bool], Call]] = {
    **{build.__name__: build for build in _CARRYING},
    **{f"{build.__name__}_step": _step_of(build) for build in _CARRYING},
    **{build.__name__: build for build in _OTHERS},
    **{operator: _gated_unit(operator) for operator in ("swiglu", "geglu", "reglu")},
}
"""How to draw a call of each public operator, by its name; the second argument asks for one token."""
