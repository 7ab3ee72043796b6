"""Compiled steps are called before their arguments are checked: what a check refuses, their C++ has to refuse too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels
from star_kernels import dispatch

B, D, H, N, P, W = 2, 4, 2, 3, 5, 3


def _good(operator: str, dtype: torch.dtype) -> dict[str, Any]:
    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)

    row, heads = (B, D), (B, H, P)
    memory = {"state": some(B, H, P, N), "q": some(*heads), "k": some(*heads), "v": some(B, H, N)}
    space = {"D": some(D), "dt_bias": some(D)}
    arguments: dict[str, dict[str, Any]] = {
        "attention_step": {
            "q": some(B, 4, D),
            "k": some(B, 6, H, D),
            "v": some(B, 6, H, P),
            "length": torch.tensor([3, 6]),
            "window": 2,
            "softcap": 5.0,
            "sinks": some(4),
        },
        "causal_conv1d_step": {
            "state": some(B, D, W - 1),
            "x": some(*row),
            "weight": some(D, W),
            "bias": some(D),
            "activation": "silu",
        },
        "gated_short_conv_step": {
            "state": some(B, D, W - 1),
            "x": some(*row),
            "gate_in": some(*row),
            "gate_out": some(*row),
            "weight": some(D, W),
            "bias": some(D),
        },
        "long_conv_step": {
            "state": some(B, 2, D),
            "x": some(*row),
            "filter": some(D, 3),
            "gate_in": some(*row),
            "gate_out": some(*row),
            "skip": some(D),
        },
        "diagonal_scan_step": {"state": some(*row), "decay": some(*row), "x": some(*row)},
        "rg_lru_step": {
            "state": some(*row),
            "x": some(*row),
            "recurrence_gate": some(*row),
            "input_gate": some(*row),
            "log_lambda": -some(D),
            "c": 8.0,
        },
        "selective_scan_step": {
            "state": some(B, D, N),
            "x": some(*row),
            "dt": some(*row),
            "A": -some(D, N),
            "B": some(B, 2, N),
            "C": some(B, 2, N),
            "z": some(*row),
            **space,
        },
        "ssd_step": {
            "state": some(B, D, P, N),
            "x": some(B, D, P),
            "dt": some(*row),
            "A": -some(D),
            "B": some(B, 2, N),
            "C": some(B, 2, N),
            "z": some(B, D, P),
            **space,
        },
        "gated_linear_attention_step": {**memory, "log_decay": -some(*heads)},
        "gated_delta_rule_step": {**memory, "log_decay": -some(B, H), "beta": some(B, H)},
    }
    return arguments[operator]


def _wrong(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a caller might pass by mistake instead of `value`; not all of it is wrong for every argument."""
    if isinstance(value, Tensor):
        for axis in range(value.ndim):
            yield f"axis {axis} longer", torch.cat([value, value.narrow(axis, 0, 1)], axis)
            yield f"axis {axis} shorter", value.narrow(axis, 0, value.shape[axis] - 1)
            yield f"axis {axis} gone", value.select(axis, 0)
        yield "one axis more", value.unsqueeze(0)
        yield "no axes", value.new_ones(())
        for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16):
            yield str(dtype), value.to(dtype)
        yield "float32 or float64", value.to(torch.float64 if value.dtype == torch.float32 else torch.float32)
        yield "on meta", value.to("meta")
        yield "a list", value.tolist()
        yield "an array", value.float().numpy()
        yield "None", None
        yield "sparse", value.to_sparse()
    elif isinstance(value, str):
        yield from (("unknown", "gelu"), ("a number", 3), ("a list", []))
    else:
        yield from (("zero", 0), ("negative", -1), ("NaN", float("nan")), ("large", 2**40))


STEPS = sorted(name for name in dir(star_kernels) if name.endswith("_step"))


@pytest.mark.skipif(not star_kernels.backends()["cpp"].available, reason="no compiled operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("operator", STEPS)
def test_step_refuses_what_its_check_refuses(operator: str, dtype: torch.dtype) -> None:
    """Every argument is replaced by every mistake; the message is the check's own, whoever saw it first."""
    good = _good(operator, dtype)
    public = getattr(star_kernels, operator)
    entry = dispatch._operators[operator]
    public(**good)
    assert entry._checking, "the compiled step does not check its arguments itself: this test has nothing to show"
    seen = 0
    for name, value in good.items():
        for mistake, bad in _wrong(value):
            arguments = {**good, name: bad}
            outcomes = []
            for checked_first in (True, False):
                held = dict(entry._checking)
                if checked_first:
                    entry._checking.clear()
                try:
                    public(**arguments)
                    outcomes.append("accepted")
                except Exception as error:
                    outcomes.append(f"{type(error).__name__}: {error}")
                finally:
                    entry._checking.update(held)
            assert outcomes[0] == outcomes[1], f"{operator}: {name} with {mistake}"
            seen += outcomes[0] != "accepted"
    assert seen > 5 * len(good)
