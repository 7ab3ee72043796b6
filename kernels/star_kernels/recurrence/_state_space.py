"""Selective state-space recurrences: Mamba-1's scan and Mamba-2's, with their one-token steps."""

from __future__ import annotations

from torch import Tensor

from star_kernels._validation import check_first, check_groups, check_sequences, check_shape
from star_kernels.dispatch import Operator
from star_kernels.recurrence.reference import selective as selective_reference
from star_kernels.recurrence.reference import ssd as ssd_reference

_selective_scan = Operator("selective_scan", selective_reference.selective_scan)
_ssd = Operator("ssd", ssd_reference.ssd)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run Mamba-1's selective scan.

    With s_t = dt_t + dt_bias, through softplus if asked:  h_t = exp(s_t A) h_{t-1} + s_t B_t x_t,
    y_t = (C_t . h_t + D x_t) * silu(z_t). Channel d reads group d // (D / G) of B and C.

    Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, algorithm 2; B is discretised as s_t B_t, as in its code.

    Args:
        x: (B, T, D), any floating dtype.
        dt: Step sizes, or what becomes them, (B, T, D), any floating dtype.
        A: Rates, negative for a decay, (D, N), any floating dtype.
        B: (B, T, G, N), G divides D, any floating dtype.
        C: As B.
        D: Skip weights, (D,); None for 0.
        z: Gate before its silu, (B, T, D); None for no gate.
        dt_bias: (D,); None for 0.
        dt_softplus: Whether step sizes go through softplus.
        initial_state: (S, D, N); None for zeros.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), int32 or int64, with B == 1.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, T, D) in x.dtype.
        final_state: (S, D, N), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a tensor is not floating.

    Numerics: float32 inside (float64 for float64), token after token, rounded once.
    """
    check_first("x", x, 3, "(B, T, D)")
    _check_scan_arguments(x, dt, A, B, C, D, z, dt_bias, "(B, T, D)", "(B, T, G, N)")
    sequences = check_sequences("cu_seqlens", cu_seqlens, x.shape[0], x.shape[1], x)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (sequences, *A.shape), "(S, D, N)", x)
    serve = _selective_scan.serve(x, backend)
    y, final_state = serve(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    return y, final_state


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `selective_scan` on one token.

    Args:
        state: (B, D, N); not modified.
        x: (B, D), any floating dtype.
        dt: (B, D).
        A: (D, N).
        B: (B, G, N), G divides D.
        C: As B.
        D: (D,); None for 0.
        z: (B, D); None for no gate.
        dt_bias: (D,); None for 0.
        dt_softplus: Whether step sizes go through softplus.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, D) in x.dtype.
        new_state: (B, D, N), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a tensor is not floating.
    """
    y, new_state = _selective_scan_step.run(x, backend, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return y, new_state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run Mamba-2's scan, whose heads each have one scalar decay.

    With s_t = dt_t + dt_bias, through softplus if asked:  S_t = exp(s_t A) S_{t-1} + s_t x_t B_t^T,
    y_t = (S_t C_t + D x_t) * silu(z_t). Head h reads group h // (H / G) of B and C.

    Source: Dao and Gu, "Transformers are SSMs", 2024, arXiv 2405.21060, section 6 (the state-space dual).

    Args:
        x: (B, T, H, P), any floating dtype.
        dt: Step sizes, or what becomes them, (B, T, H), any floating dtype.
        A: Rates, negative for a decay, (H,), any floating dtype.
        B: (B, T, G, N), G divides H, any floating dtype.
        C: As B.
        D: Skip weights, (H,); None for 0.
        z: Gate before its silu, (B, T, H, P); None for no gate.
        dt_bias: (H,); None for 0.
        dt_softplus: Whether step sizes go through softplus.
        initial_state: (S, H, P, N); None for zeros.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), int32 or int64, with B == 1.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, T, H, P) in x.dtype.
        final_state: (S, H, P, N), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a tensor is not floating.

    Numerics: float32 inside (float64 for float64), rounded once; decays between two tokens are sums over the tokens
        between them, so log decays of -3e4 and -inf are exact.
    """
    check_first("x", x, 4, "(B, T, H, P)")
    _check_head_arguments(x, dt, A, B, C, D, z, dt_bias, "(B, T, H)", "(B, T, H, P)", "(B, T, G, N)")
    sequences = check_sequences("cu_seqlens", cu_seqlens, x.shape[0], x.shape[1], x)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (sequences, *x.shape[2:], B.shape[3]), "(S, H, P, N)", x)
    serve = _ssd.serve(x, backend)
    y, final_state = serve(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    return y, final_state


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `ssd` on one token.

    Args:
        state: (B, H, P, N); not modified.
        x: (B, H, P), any floating dtype.
        dt: (B, H).
        A: (H,).
        B: (B, G, N), G divides H.
        C: As B.
        D: (H,); None for 0.
        z: (B, H, P); None for no gate.
        dt_bias: (H,); None for 0.
        dt_softplus: Whether step sizes go through softplus.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, H, P) in x.dtype.
        new_state: (B, H, P, N), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a tensor is not floating.
    """
    y, new_state = _ssd_step.run(x, backend, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return y, new_state


def _check_selective_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> None:
    check_first("x", x, 2, "(B, D)")
    _check_scan_arguments(x, dt, A, B, C, D, z, dt_bias, "(B, D)", "(B, G, N)")
    check_shape("state", state, (x.shape[0], *A.shape), "(B, D, N)", x)


def _check_ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> None:
    check_first("x", x, 3, "(B, H, P)")
    _check_head_arguments(x, dt, A, B, C, D, z, dt_bias, "(B, H)", "(B, H, P)", "(B, G, N)")
    check_shape("state", state, (*x.shape, B.shape[2]), "(B, H, P, N)", x)


def _check_scan_arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    layout: str,
    group_layout: str,
) -> None:
    width = x.shape[-1]
    check_shape("dt", dt, x.shape, layout, x)
    check_first("A", A, 2, "(D, N)")
    check_shape("A", A, (width, A.shape[1]), "(D, N)", x)
    check_first("B", B, x.ndim + 1, group_layout)
    check_shape("B", B, (*x.shape[:-1], B.shape[-2], A.shape[1]), group_layout, x)
    check_groups("B", B.shape[-2], "x", width)
    check_shape("C", C, B.shape, f"{group_layout}, the shape of B", x)
    if D is not None:
        check_shape("D", D, (width,), "(D,)", x)
    if z is not None:
        check_shape("z", z, x.shape, layout, x)
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (width,), "(D,)", x)


def _check_head_arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    head_layout: str,
    layout: str,
    group_layout: str,
) -> None:
    heads = x.shape[-2]
    check_shape("dt", dt, x.shape[:-1], head_layout, x)
    check_shape("A", A, (heads,), "(H,)", x)
    check_first("B", B, x.ndim, group_layout)
    check_shape("B", B, (*x.shape[:-2], *B.shape[-2:]), group_layout, x)
    check_groups("B", B.shape[-2], "x", heads)
    check_shape("C", C, B.shape, f"{group_layout}, the shape of B", x)
    if D is not None:
        check_shape("D", D, (heads,), "(H,)", x)
    if z is not None:
        check_shape("z", z, x.shape, layout, x)
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (heads,), "(H,)", x)


_selective_scan_step = Operator("selective_scan_step", selective_reference.selective_scan_step, _check_selective_step)
_ssd_step = Operator("ssd_step", ssd_reference.ssd_step, _check_ssd_step)
