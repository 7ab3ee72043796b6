"""What is measured: an operator at one size, and the random inputs that make it a call."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MODES = ("fwd", "full", "step")
"""Forward without gradients; forward and backward; one token without gradients."""

_FLAGS = ("quick", "compiled", "bar", "overhead")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        operator: Public name in `star_kernels`.
        sizes: Axis lengths by the letters of the operator's documentation.
        options: What else the call takes, such as a window or an activation.
        dtype: Of the activations and weights; states are float32.
        flags: "quick" (part of a quick run), "compiled" (torch.compile of the eager formula is a peer: some 10 s of
            compilation), "bar" (a bar of the kernel contract is read off here), "overhead" (a step so small that its
            time is the cost of a call).
    """

    operator: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    dtype: torch.dtype = torch.float32
    flags: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Sizes, options and dtype in one word, such as "B8-T128-D64-bfloat16"."""
        parts = [f"{axis}{length}" for axis, length in self.sizes.items()]
        parts += [f"{name}={value}" for name, value in self.options.items()]
        return "-".join(parts if self.dtype == torch.float32 else [*parts, str(self.dtype).removeprefix("torch.")])

    @property
    def modes(self) -> tuple[str, ...]:
        """In which ways it is run."""
        return ("step",) if self.operator.endswith("_step") else ("fwd", "full")


def cases(operator: str, *lines: str, **options: Any) -> tuple[Case, ...]:
    """Write a grid: each line holds axis lengths, flags and a dtype in any order, such as "B8 T128 D64 quick bfloat16".

    Raises:
        ValueError: a word is none of these, or an axis comes twice.
    """
    return tuple(_parse(operator, line, options) for line in lines)


def _parse(operator: str, line: str, options: Mapping[str, Any]) -> Case:
    sizes: dict[str, int] = {}
    flags, dtype = set(), torch.float32
    for word in line.split():
        axis = word.rstrip("0123456789")
        if word in _FLAGS:
            flags.add(word)
        elif word in _DTYPES:
            dtype = _DTYPES[word]
        elif axis and axis != word and axis not in sizes:
            sizes[axis] = int(word[len(axis) :])
        else:
            raise ValueError(
                f"lines: {line!r} of {operator} has {word!r}, needs an axis and its length (once), "
                f"or one of {', '.join((*_FLAGS, *_DTYPES))}"
            )
    return Case(operator, MappingProxyType(sizes), MappingProxyType(dict(options)), dtype, frozenset(flags))


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, by name.

    Attributes:
        args: Tensors.
        options: The rest.
        leaves: Names of the tensors that training differentiates.
    """

    args: dict[str, Tensor]
    options: dict[str, Any]
    leaves: tuple[str, ...]

    @property
    def first(self) -> Tensor:
        """The tensor whose device and dtype decide who serves the call."""
        return next(tensor for name, tensor in self.args.items() if name != "state")


def build(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Make a case's inputs, the same in every process.

    Raises:
        ValueError: the operator has no inputs here.
    """
    maker = _MAKERS.get(case.operator.removesuffix("_step") if case.operator != "attention_step" else "attention_step")
    if maker is None:
        raise ValueError(f"operator: {case.operator!r} has no inputs, needs one of {', '.join(sorted(_MAKERS))}")
    sizes = {"T": 1, **case.sizes}
    wide = maker(sizes, case.options)
    if case.operator.endswith("_step") and case.operator != "attention_step":
        wide = _one_token(case.operator, wide, sizes)
    args = {name: _place(name, tensor, case.dtype, device) for name, tensor in wide.items()}
    leaves = tuple(name for name, tensor in args.items() if tensor.is_floating_point() and name != "state")
    options = {name: value for name, value in case.options.items() if name not in _BUILD_OPTIONS}
    return Inputs(args, {**options, **_FIXED_OPTIONS.get(case.operator.removesuffix("_step"), {})}, leaves)


def _place(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if tensor.is_floating_point():
        tensor = tensor.to(torch.promote_types(dtype, torch.float32) if name == "state" else dtype)
    return tensor.to(device)


def _generator(name: str, shape: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{name}{shape}".encode()))


def _normal(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(name, shape))


def _uniform(name: str, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=_generator(name, shape))


Sizes = dict[str, int]
Tensors = dict[str, Tensor]


def _attention(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    heads, width = s["H"], s["D"]
    keys = (s["B"], s["T"], s.get("Hk", heads))
    made = {
        "q": _normal("q", s["B"], s["T"], heads, width),
        "k": _normal("k", *keys, width),
        "v": _normal("v", *keys, s.get("Dv", width)),
    }
    return {**made, "sinks": _normal("sinks", heads)} if options.get("with_sinks") else made


def _attention_step(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    keys = (s["B"], s["S"], s.get("Hk", s["H"]))
    return {
        "q": _normal("q", s["B"], s["H"], s["D"]),
        "k": _normal("k", *keys, s["D"]),
        "v": _normal("v", *keys, s.get("Dv", s["D"])),
    }


def _differential_attention(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    shape = (s["B"], s["T"], s["H"])
    made = {name: _normal(name, *shape, s["D"]) for name in ("q1", "k1", "q2", "k2")}
    return {**made, "v": _normal("v", *shape, s["Dv"]), "lam": _uniform("lam", 0.2, 0.8, s["H"])}


def _causal_conv1d(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    return {
        "x": _normal("x", s["B"], s["T"], s["D"]),
        "weight": _normal("weight", s["D"], s["W"]) * s["W"] ** -0.5,
        "bias": _normal("bias", s["D"]),
    }


def _gated_short_conv(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    made = {name: _normal(name, s["B"], s["T"], s["D"]) for name in ("x", "gate_in", "gate_out")}
    return {**made, "weight": _normal("weight", s["D"], s["W"]) * s["W"] ** -0.5}


def _long_conv(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    length = s["T"]
    fade = torch.exp(-4.0 * torch.arange(length) / length)
    made = {name: _normal(name, s["B"], length, s["D"]) for name in ("x", "gate_in", "gate_out")}
    made["filter"] = _normal("filter", s["D"], length) * fade * length**-0.5
    return {**made, "skip": _normal("skip", s["D"])}


def _diagonal_scan(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    shape = (s["B"], s["T"], s["D"])
    return {"decay": _uniform("decay", 0.5, 1.0, *shape), "x": _normal("x", *shape)}


def _rg_lru(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    made = {name: _normal(name, s["B"], s["T"], s["D"]) for name in ("x", "recurrence_gate", "input_gate")}
    # Griffin's initialisation: a^c between 0.9 and 0.999.
    return {**made, "log_lambda": _uniform("log_lambda", 0.9, 0.999, s["D"]).log() / 8}


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def _selective_scan(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    batch, length, width, states = s["B"], s["T"], s["D"], s["N"]
    return {
        "x": _normal("x", batch, length, width),
        "dt": _normal("dt", batch, length, width),
        "A": -torch.arange(1.0, states + 1).repeat(width, 1),
        "B": _normal("B", batch, length, s.get("G", 1), states),
        "C": _normal("C", batch, length, s.get("G", 1), states),
        "D": _normal("D", width),
        "z": _normal("z", batch, length, width),
        "dt_bias": _inverse_softplus(_uniform("dt_bias", 0.001, 0.1, width)),
    }


def _ssd(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    batch, length, heads = s["B"], s["T"], s["H"]
    groups = (batch, length, s.get("G", 1), s["N"])
    return {
        "x": _normal("x", batch, length, heads, s["P"]),
        "dt": _normal("dt", batch, length, heads),
        "A": -_uniform("A", 1.0, 16.0, heads),
        "B": _normal("B", *groups),
        "C": _normal("C", *groups),
        "D": _normal("D", heads),
        "z": _normal("z", batch, length, heads, s["P"]),
        "dt_bias": _inverse_softplus(_uniform("dt_bias", 0.001, 0.1, heads)),
    }


def _gated_linear_attention(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    keys, values = (s["B"], s["T"], s["H"], s["K"]), (s["B"], s["T"], s["H"], s["V"])
    # The paper's gate: logsigmoid(...) / 16.
    log_decay = F.logsigmoid(_normal("log_decay", *keys)) / 16
    return {"q": _normal("q", *keys), "k": _normal("k", *keys), "v": _normal("v", *values), "log_decay": log_decay}


def _gated_delta_rule(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    keys, values = (s["B"], s["T"], s["H"], s["K"]), (s["B"], s["T"], s["H"], s["V"])
    return {
        "q": F.normalize(_normal("q", *keys), dim=-1),
        "k": F.normalize(_normal("k", *keys), dim=-1),
        "v": _normal("v", *values),
        "log_decay": F.logsigmoid(_normal("log_decay", *keys[:3]) + 3),
        "beta": torch.sigmoid(_normal("beta", *keys[:3])),
    }


def _gated_unit(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    return {name: _normal(name, s["B"], s["T"], s["D"]) for name in ("gate", "up")}


def _channel_mix(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    width = s["D"]
    shape = {
        "diagonal": (width,),
        "dense": (width, width),
        "grouped": (s.get("G", 1), width // s.get("G", 1), width // s.get("G", 1)),
    }[options["form"]]
    return {
        "x": _normal("x", s["B"], s["T"], width),
        "weight": _normal("weight", *shape) * shape[-1] ** (-0.5 if len(shape) > 1 else 0.0),
    }


def _rms_norm(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    return {"x": _normal("x", s["B"], s["T"], s["D"]), "weight": _normal("weight", s["D"])}


def _add_rms_norm(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    made = _rms_norm(s, options)
    return {"x": made["x"], "residual": _normal("residual", s["B"], s["T"], s["D"]), "weight": made["weight"]}


def _rotary(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    return {"x": _normal("x", s["B"], s["T"], s["H"], s["D"]), "positions": torch.arange(s["T"])}


def _linear_cross_entropy(s: Sizes, options: Mapping[str, Any]) -> Tensors:
    rows, vocabulary = (s["B"], s["T"]), s["V"]
    return {
        "hidden": _normal("hidden", *rows, s["D"]),
        "weight": _normal("weight", vocabulary, s["D"]) * s["D"] ** -0.5,
        "targets": torch.randint(vocabulary, rows, generator=_generator("targets", rows)),
    }


_MAKERS: dict[str, Callable[[Sizes, Mapping[str, Any]], Tensors]] = {
    "attention": _attention,
    "attention_step": _attention_step,
    "differential_attention": _differential_attention,
    "causal_conv1d": _causal_conv1d,
    "gated_short_conv": _gated_short_conv,
    "long_conv": _long_conv,
    "diagonal_scan": _diagonal_scan,
    "rg_lru": _rg_lru,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "gated_linear_attention": _gated_linear_attention,
    "gated_delta_rule": _gated_delta_rule,
    "swiglu": _gated_unit,
    "geglu": _gated_unit,
    "reglu": _gated_unit,
    "channel_mix": _channel_mix,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rotary": _rotary,
    "linear_cross_entropy": _linear_cross_entropy,
}

# Options that shape the inputs and are not passed on.
_BUILD_OPTIONS = ("with_sinks", "form")

# As in the layers that use them.
_FIXED_OPTIONS: dict[str, dict[str, Any]] = {"selective_scan": {"dt_softplus": True}, "ssd": {"dt_softplus": True}}

# Tensors without a time axis: what a step takes as it is.
_TIMELESS = frozenset({"weight", "bias", "filter", "skip", "log_lambda", "A", "D", "dt_bias"})


def _one_token(operator: str, wide: Tensors, s: Sizes) -> Tensors:
    """Return a step's arguments: the state first, and of every sequence its first token."""
    shape = {
        "causal_conv1d_step": ("B", "D", "W"),
        "gated_short_conv_step": ("B", "D", "W"),
        "long_conv_step": ("B", "T", "D"),
        "diagonal_scan_step": ("B", "D"),
        "rg_lru_step": ("B", "D"),
        "selective_scan_step": ("B", "D", "N"),
        "ssd_step": ("B", "H", "P", "N"),
        "gated_linear_attention_step": ("B", "H", "K", "V"),
        "gated_delta_rule_step": ("B", "H", "K", "V"),
    }[operator]
    # A filter of W or T taps meets W - 1 or T - 1 tokens before this one.
    lengths = [s[axis] - (axis in ("W", "T")) for axis in shape]
    tokens = {name: tensor if name in _TIMELESS else tensor[:, 0].contiguous() for name, tensor in wide.items()}
    return {"state": _normal("state", *lengths), **tokens}
