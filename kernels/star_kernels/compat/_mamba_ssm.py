"""mamba-ssm's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from star_kernels._numerics import accumulator
from star_kernels._validation import check_first, check_shape
from star_kernels.compat._sequences import find_sequences
from star_kernels.recurrence import selective_scan, selective_scan_step, ssd, ssd_step

_UNLIMITED = (0.0, float("inf"))


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `selective_scan` with mamba-ssm's signature; the last state has a gradient here.

    Args:
        u: (B, D, T).
        delta: (B, D, T).
        A: (D, N), real.
        B: (D, N), (B, N, T) or (B, G, N, T).
        C: One of the same shapes, not necessarily B's.
        D: (D,).
        z: (B, D, T).
        delta_bias: (D,).
        delta_softplus: Whether step sizes go through softplus.
        return_last_state: Whether to return the state too.

    Returns:
        y (B, D, T), alone or with the last state (B, D, N), float32.

    Raises:
        NotImplementedError: `A` is complex; else as `selective_scan`.
    """
    check_first("u", u, 3, "(B, D, T)")
    check_shape("delta", delta, u.shape, "(B, D, T), the shape of u", u)
    if z is not None:
        check_shape("z", z, u.shape, "(B, D, T), the shape of u", u)
    if delta_bias is not None:
        check_shape("delta_bias", delta_bias, u.shape[1:2], "(D,)", u)
    if A.is_complex():
        raise NotImplementedError("A is complex, which is not supported")
    inward, outward = _grouped("B", B, u), _grouped("C", C, u)
    if inward.shape[2] != outward.shape[2]:
        inward, outward = (one.repeat_interleave(u.shape[1] // one.shape[2], dim=2) for one in (inward, outward))
    y, state = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        inward,
        outward,
        D=D,
        z=None if z is None else z.transpose(1, 2),
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
    )
    return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)


def _grouped(name: str, value: Tensor, u: Tensor) -> Tensor:
    """Return B or C as (B, T, G, N); one that does not change with time has a group for each channel."""
    batch, width, length = u.shape
    if value.ndim == 2:
        check_shape(name, value, (width, value.shape[1]), "(D, N)", u)
        return value.expand(batch, length, width, -1)
    if value.ndim == 3:
        return value.transpose(1, 2).unsqueeze(2)
    check_first(name, value, 4, "(D, N), (B, N, T) or (B, G, N, T)")
    return value.permute(0, 3, 1, 2)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Run one token of `selective_scan` or `ssd` and keep the state; as in mamba-ssm, without a gradient.

    Where A, dt, dt_bias and D hold one number a head, expanded with strides of 0, `ssd_step` serves.

    Args:
        state: (B, D, N), or (B, H, P, N) with heads; modified.
        x: (B, D) or (B, H, P).
        dt: As x.
        A: (D, N) or (H, P, N).
        B: (B, N) or (B, G, N).
        C: As B.
        D: (D,) or (H, P).
        z: As x.
        dt_bias: As D.
        dt_softplus: Whether step sizes go through softplus.
        state_batch_indices: The row of `state` that belongs to each row of x, (B,).

    Returns:
        y: As x.

    Raises:
        ValueError, TypeError: As `selective_scan_step`, which sees heads and their channels as one axis.
    """
    check_first("x", x, 3 if state.ndim == 4 else 2, "(B, H, P)" if state.ndim == 4 else "(B, D)")
    check_first("A", A, x.ndim, "(H, P, N)" if x.ndim == 3 else "(D, N)")
    rows = None if state_batch_indices is None else state_batch_indices.long()
    held = state if rows is None else state[rows]
    B, C = (one.unsqueeze(1) if one.ndim == 2 else one for one in (B, C))
    numbers = [dt, *(one for one in (dt_bias, D) if one is not None)]
    if x.ndim == 3 and A.stride()[1:] == (0, 0) and all(one.stride(-1) == 0 for one in numbers):
        skip, bias = (None if one is None else one[..., 0] for one in (D, dt_bias))
        step, rate = dt[..., 0], A[:, 0, 0]
        y, new_state = ssd_step(held, x, step, rate, B, C, D=skip, z=z, dt_bias=bias, dt_softplus=dt_softplus)
    else:
        # Head h reads group h // (H / G); channel h P + p of the joined axis reads (h P + p) // (H P / G), the same.
        y, new_state = selective_scan_step(
            held.flatten(1, -2),
            x.flatten(1),
            dt.flatten(1),
            A.flatten(0, -2),
            B,
            C,
            D=None if D is None else D.flatten(),
            z=None if z is None else z.flatten(1),
            dt_bias=None if dt_bias is None else dt_bias.flatten(),
            dt_softplus=dt_softplus,
        )
    if rows is None:
        state.copy_(new_state.view(state.shape))
    else:
        state[rows] = new_state.view(held.shape).to(state.dtype)
    return y.view(x.shape)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _UNLIMITED,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Run `ssd` with mamba-ssm's signature.

    Args:
        x: (B, T, H, P).
        dt: (B, T, H).
        A: (H,).
        B: (B, T, G, N).
        C: (B, T, G, N).
        chunk_size: Changes nothing.
        D: (H,); or (H, P), at the price of one more rounding of y.
        z: (B, T, H, P).
        dt_bias: (H,).
        initial_states: For the first sequence of each row, (B, H, P, N).
        seq_idx: The sequence of each token, (B, T), int32 or int64; a sequence's tokens are adjacent.
        cu_seqlens: Boundaries of the same sequences, (S + 1,), with B == 1; read for `return_varlen_states` alone.
        dt_softplus: Whether step sizes go through softplus.
        dt_limit: Least and largest step size, after the softplus.
        return_final_states: Whether to return the states at the ends of the rows, (B, H, P, N), float32.
        return_varlen_states: Whether to return those at the ends of the sequences, (S, H, P, N), float32.

    Returns:
        y (B, T, H, P), alone or followed by the states asked for.

    Raises:
        NotImplementedError: `return_varlen_states` with `initial_states`, or without `seq_idx` and `cu_seqlens`;
        ValueError: `cu_seqlens` and `seq_idx` disagree; else as `ssd`.
    """
    check_first("x", x, 4, "(B, T, H, P)")
    if return_varlen_states and (seq_idx is None or cu_seqlens is None or initial_states is not None):
        raise NotImplementedError("return_varlen_states without seq_idx and cu_seqlens, or with initial_states")
    if dt_limit != _UNLIMITED or not dt_softplus:
        # Softplus never gives less than 0; without it, the least step size counts even when it is left at 0.
        dt = dt.to(accumulator(dt.dtype))
        dt = dt if dt_bias is None else dt + dt_bias
        dt = (functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        dt_bias, dt_softplus = None, False
    arguments: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus}
    if seq_idx is None or seq_idx.numel() == 0:
        y, states = _ssd(x, dt, A, B, C, z, initial_state=initial_states, **arguments)
        final, boundaries = states, None
    else:
        sequences = find_sequences(seq_idx, x, (x.shape[0], x.shape[1]))
        arguments |= {"initial_state": sequences.spread(initial_states), "cu_seqlens": sequences.cu_seqlens}
        rows, steps, inward, outward = (_end_to_end(one) for one in (x, dt, B, C))
        y, states = _ssd(rows, steps, A, inward, outward, None if z is None else _end_to_end(z), **arguments)
        y, final, boundaries = y.view(x.shape), states[sequences.last], sequences.cu_seqlens
    results = [y, final] if return_final_states else [y]
    if return_varlen_states and cu_seqlens is not None:
        results.append(_with_empty_sequences(states, cu_seqlens, boundaries))
    return tuple(results) if len(results) > 1 else y


def _end_to_end(value: Tensor) -> Tensor:
    """Lay the rows of (B, T, ...) end to end: (1, B T, ...)."""
    return value.reshape(1, -1, *value.shape[2:])


def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, *, D: Tensor | None, **rest: Any
) -> tuple[Tensor, Tensor]:
    """Run `ssd` with D of (H,) or (H, P)."""
    if D is None or D.ndim < 2:
        return ssd(x, dt, A, B, C, D=D, z=z, **rest)
    check_shape("D", D, x.shape[2:], "(H,) or (H, P)", x)
    y, states = ssd(x, dt, A, B, C, **rest)
    wide = accumulator(x.dtype)
    y = torch.addcmul(y.to(wide), D.to(wide), x.to(wide))
    if z is not None:
        check_shape("z", z, x.shape, "(B, T, H, P)", x)
        y = y * functional.silu(z.to(wide))
    return y.to(x.dtype), states


def _with_empty_sequences(states: Tensor, cu_seqlens: Tensor, boundaries: Tensor | None) -> Tensor:
    """Return the states of all of `cu_seqlens`' sequences, zeros where empty, from those of the ones with tokens."""
    if boundaries is not None and not torch.equal(torch.unique_consecutive(cu_seqlens.long()), boundaries):
        raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}, needs the boundaries of seq_idx {boundaries.tolist()}")
    full = cu_seqlens.diff().nonzero().squeeze(1)
    zeros = states.new_zeros(cu_seqlens.shape[0] - 1, *states.shape[1:])
    return zeros.index_copy(0, full, states[: full.shape[0]])
