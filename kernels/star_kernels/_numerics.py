"""What the references share: the accumulation dtype, and packed sequences run one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums and states are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call an autograd function; torch leaves `apply` without types."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def all_finite(*tensors: Tensor) -> bool:
    """Whether every element is finite, at the price of one sum a tensor.

    Dense and chunked forms multiply what a mask excludes by zero, and zero times NaN is NaN. Where this is false, their
    callers hide the bad tokens from the earlier ones (`nonfinite`, `hide`) and take those that see them from a
    token-by-token form, so that a NaN moves forward only. A sum that overflows also says False, which costs time and
    changes nothing else. Not looked at while torch.compile traces: a graph holds one form.
    """
    if torch.compiler.is_compiling():
        return True
    return all(bool(torch.isfinite(one.detach().sum(dtype=accumulator(one.dtype)))) for one in tensors)


def nonfinite(x: Tensor) -> Tensor:
    """Return where a token of a head holds NaN or infinity, (B, T, H), for x (B, T, H) or (B, T, H, K)."""
    bad = ~torch.isfinite(x.detach())
    return bad if x.ndim == 3 else bad.any(-1)


def hide(x: Tensor, bad: Tensor) -> Tensor:
    """Return x (B, T, H) or (B, T, H, K) with zeros where `bad` (B, T, H) is true."""
    return x.masked_fill(bad if x.ndim == 3 else bad.unsqueeze(-1), 0.0)


def over_sequences(
    run: Callable[..., tuple[Tensor, Tensor]],
    packed: tuple[Tensor | None, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence on each packed sequence alone and join what it returns.

    Args:
        run: Takes the sliced `packed` tensors and one sequence's state; returns (output, final_state).
        packed: Tensors (1, T, ...), or None.
        initial_state: (S, ...) or None.
        cu_seqlens: (S + 1,).
    """
    ends: list[int] = cu_seqlens.tolist()
    outputs, states = [], []
    for index, (start, stop) in enumerate(pairwise(ends)):
        state = None if initial_state is None else initial_state[index : index + 1]
        output, final = run(*(None if one is None else one[:, start:stop] for one in packed), state)
        outputs.append(output)
        states.append(final)
    if not outputs:
        output, final = run(*packed, None)
        return output, final[:0]
    return torch.cat(outputs, dim=1), torch.cat(states, dim=0)
