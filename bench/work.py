"""How much a call has to do, by one set of counting rules, whoever does it.

* Bytes: each input read once, each output written once. The backward reads what the forward read and the outputs'
  gradients, and writes the inputs' gradients; exceptions are in the tables below.
* Operations of matrix products: attention 4 B H pairs D forward (pairs = T^2 / 2 when causal), backward 2.5 times
  that, since the map is made again. Recurrences with a matrix state are counted in chunks of 64 tokens, in which a
  product over the earlier half of a chunk costs 32 tokens on average.
* Exponentials and multiply-adds: the diagonal recurrences', which are no matrix products; each exponential again in the
  backward, which makes the states again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bench.cases import Case, Inputs

_HALF_CHUNK = 32
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Work:
    """What one call has to do.

    Attributes:
        bytes: Read and written.
        footprint: Bytes of the different tensors that it touches: what has to fit into a cache to be there already.
        flops: Operations of matrix products, a multiply-add being two.
        exps: Exponentials (a sigmoid, softplus or tanh counts as one).
        fmas: Multiply-adds that are no matrix product.
    """

    bytes: int
    footprint: int
    flops: int = 0
    exps: int = 0
    fmas: int = 0


# The rotation back needs no input but the positions; the norm's backward reads the sum, not its two terms.
_NOT_READ_AGAIN = {"rotary": ("x",), "add_rms_norm": ("residual",)}
# Both terms of a sum have one gradient.
_NOT_WRITTEN = {"add_rms_norm": ("residual",)}


def work_of(case: Case, mode: str, inputs: Inputs, outputs: Iterable[Tensor]) -> Work:
    """Count one call: `outputs` are all that it returns, states included."""
    made = list(outputs)
    read, written = _bytes(inputs.args.values()), _bytes(made)
    forward, backward = _operations(case, inputs)
    if mode != "full":
        return Work(read + written, read + written, *(round(number) for number in forward))
    again = _bytes(t for name, t in inputs.args.items() if name not in _NOT_READ_AGAIN.get(case.operator, ()))
    unwritten = _NOT_WRITTEN.get(case.operator, ())
    gradients = _bytes(inputs.args[name] for name in inputs.leaves if name not in unwritten)
    upstream = _bytes(differentiated(case.operator, made))
    total = tuple(round(one + other) for one, other in zip(forward, backward, strict=True))
    footprint = read + written + upstream + gradients
    return Work(footprint + again, footprint, *total)


def differentiated(operator: str, outputs: Iterable[Tensor]) -> list[Tensor]:
    """Return the outputs that training takes gradients of: not a final state, which a full pass drops."""
    made = list(outputs)
    return made if operator == "add_rms_norm" else made[:1]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


Counts = tuple[float, float, float]


def _operations(case: Case, inputs: Inputs) -> tuple[Counts, Counts]:
    """Return (flops, exps, fmas) of the forward and of the backward."""
    operator, s = case.operator.removesuffix("_step"), case.sizes
    is_step = case.operator.endswith("_step")
    tokens = float(s["B"] * (1 if is_step else s.get("T", 1)))
    if operator in ("attention", "differential_attention"):
        forward = _attention(case, tokens)
        return (forward, 0.0, 0.0), (_ATTENTION_BACKWARD * forward, 0.0, 0.0)
    if operator in ("ssd", "gated_linear_attention", "gated_delta_rule"):
        forward = tokens * (_step_flops(operator, s) if is_step else _chunk_flops(operator, s))
        return (forward, 0.0, 0.0), (_ATTENTION_BACKWARD * forward, 0.0, 0.0)
    if operator in _DIAGONAL:
        elements = tokens * s["D"] * s.get("N", 1)
        exps, fmas, backward_fmas = (number * elements for number in _DIAGONAL[operator])
        return (0.0, exps, fmas), (0.0, exps, backward_fmas)
    if operator in ("swiglu", "geglu"):
        elements = tokens * s["D"]
        return (0.0, elements, 0.0), (0.0, elements, 0.0)
    if operator in ("causal_conv1d", "gated_short_conv"):
        taps = s["W"] * tokens * s["D"]
        exps = tokens * s["D"] if case.options.get("activation") else 0.0
        # Backward: the input's gradient and the filter's, and before an activation the convolution again.
        return (0.0, exps, taps), (0.0, exps, (3.0 if exps else 2.0) * taps)
    if operator == "long_conv":
        if is_step:
            return (0.0, 0.0, s["B"] * s["T"] * s["D"]), (0.0, 0.0, 0.0)
        # Real transforms of length n = 2 T take 5/2 n log2 n operations: three forward, and three backward.
        transform = 2.5 * 2 * s["T"] * math.log2(2 * s["T"])
        fmas = s["D"] * (2 * s["B"] + 1) * transform / 2
        return (0.0, 0.0, fmas), (0.0, 0.0, fmas)
    if operator == "channel_mix" and inputs.args["weight"].ndim > 1:
        forward = 2.0 * tokens * inputs.args["weight"].numel()
        return (forward, 0.0, 0.0), (2 * forward, 0.0, 0.0)
    if operator == "linear_cross_entropy":
        forward = 2.0 * tokens * s["D"] * s["V"]
        return (forward, 0.0, 0.0), (2 * forward, 0.0, 0.0)
    return (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)


# Exponentials and multiply-adds an element of state and token forward, and multiply-adds backward.
# Selective scan: dt A, dt x B, the state, C h; backward the states again and nine more. RG-LRU: two sigmoids, the decay
# and expm1 of its double.
_DIAGONAL: dict[str, tuple[int, int, int]] = {
    "diagonal_scan": (0, 1, 2),
    "rg_lru": (4, 4, 12),
    "selective_scan": (1, 4, 12),
}


def _attention(case: Case, tokens: float) -> float:
    s = case.sizes
    widths = s["D"] + s.get("Dv", s["D"])
    if case.operator == "attention_step":
        keys = min(s["S"], int(case.options.get("window", s["S"])))
        return 2.0 * tokens * s["H"] * keys * widths
    length, window = s["T"], min(int(case.options.get("window", s["T"])), s["T"])
    # Causal: T^2 / 2, and with a window that of the first keys and then a whole window a query.
    pairs = s["B"] * s["H"] * (window**2 / 2 + (length - window) * window)
    if case.operator == "differential_attention":
        return 2.0 * pairs * 2 * widths
    return 2.0 * pairs * widths


def _step_flops(operator: str, s: Mapping[str, int]) -> float:
    """Return one token's: the state decayed and added to, and read; the delta rule reads it once more."""
    state = s["H"] * (s["P"] * s["N"] if operator == "ssd" else s["K"] * s["V"])
    return float((6 if operator == "gated_delta_rule" else 4) * state)


def _chunk_flops(operator: str, s: Mapping[str, int]) -> float:
    """Return one token's share of a chunk: the state added to and read, and the products within the chunk."""
    if operator == "ssd":
        within = s["H"] * s["P"] + s.get("G", 1) * s["N"]
    elif operator == "gated_linear_attention":
        within = s["H"] * (s["K"] + s["V"])
    else:
        # Keys by keys and queries by keys, the triangular solve's two sides, and what is written times the scores.
        within = s["H"] * (3 * s["K"] + 2 * s["V"])
    return _step_flops(operator, s) + 2.0 * _HALF_CHUNK * within
