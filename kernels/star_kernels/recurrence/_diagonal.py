"""Diagonal recurrences: the plain scan and the RG-LRU."""

from __future__ import annotations

from torch import Tensor

from star_kernels._validation import check_first, check_positive, check_same_dtype, check_sequences, check_shape
from star_kernels.dispatch import Operator
from star_kernels.recurrence.reference import diagonal as reference

_diagonal_scan = Operator("diagonal_scan", reference.diagonal_scan)
_rg_lru = Operator("rg_lru", reference.rg_lru)


def diagonal_scan(
    decay: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run h_t = decay_t * h_{t-1} + x_t along time.

    Source: the first-order linear recurrence of Martin and Cundy, 2018, arXiv 1709.04057, equation 1.

    Args:
        decay: Linear (not logarithmic) decay, any sign, (B, T, D); x's dtype.
        x: (B, T, D), any floating dtype.
        initial_state: h_{-1}, (S, D); None for zeros.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), int32 or int64, with B == 1.
        backend: Who must serve the call; None takes the best available.

    Returns:
        h: (B, T, D) in x.dtype.
        final_state: (S, D), float32 (float64 for float64); the initial state where a sequence is empty.

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from x.dtype.

    Numerics: float32 inside (float64 for float64), token after token: a decay of 0 or below needs no special case.
    """
    check_first("x", x, 3, "(B, T, D)")
    check_shape("decay", decay, x.shape, "(B, T, D), the shape of x", x)
    check_same_dtype("decay", decay, "x", x)
    _check_state(initial_state, x, cu_seqlens)
    h, final_state = _diagonal_scan.serve(x, backend)(decay, x, initial_state, cu_seqlens)
    return h, final_state


def diagonal_scan_step(state: Tensor, decay: Tensor, x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Run `diagonal_scan` on one token.

    Args:
        state: (B, D); not modified.
        decay: (B, D); x's dtype.
        x: (B, D), any floating dtype.
        backend: Who must serve the call; None takes the best available.

    Returns:
        h: (B, D) in x.dtype.
        new_state: (B, D), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from x.dtype.
    """
    h, new_state = _diagonal_scan_step.run(x, backend, state, decay, x)
    return h, new_state


def rg_lru(
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    log_lambda: Tensor,
    *,
    c: float = 8.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the real-gated linear recurrent unit: h_t = a_t h_{t-1} + (1 - a_t^2)^(1/2) sigmoid(input_gate_t) x_t.

    log a_t = c * sigmoid(recurrence_gate_t) * log_lambda, so a_t = lambda^(c r_t).

    Source: De et al., "Griffin", 2024, arXiv 2402.19427, equations 1 to 4. There lambda = sigmoid(Lambda): pass
    log_lambda = logsigmoid(Lambda), which for RecurrentGemma's parameter p is -softplus(p).

    Args:
        x: (B, T, D), any floating dtype.
        recurrence_gate: Before the sigmoid, as x.
        input_gate: Before the sigmoid, as x.
        log_lambda: Natural logarithm of the decay at an open gate with c = 1, <= 0, (D,), any floating dtype.
        c: The paper's constant, > 0.
        initial_state: (S, D); None for zeros.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), int32 or int64, with B == 1.
        backend: Who must serve the call; None takes the best available.

    Returns:
        h: (B, T, D) in x.dtype.
        final_state: (S, D), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device, `c` or `backend` does not fit; TypeError: a dtype is unfit or differs from x.dtype.

    Numerics: float32 inside (float64 for float64); 1 - a^2 through expm1. Its root's slope, infinite at log a = 0, is
        held at its value for 1 - a^2 = 1e-12, so gradients stay finite.
    """
    check_first("x", x, 3, "(B, T, D)")
    _check_gates(x, recurrence_gate, input_gate, log_lambda, c, "(B, T, D)")
    _check_state(initial_state, x, cu_seqlens)
    serve = _rg_lru.serve(x, backend)
    h, final_state = serve(x, recurrence_gate, input_gate, log_lambda, c, initial_state, cu_seqlens)
    return h, final_state


def rg_lru_step(
    state: Tensor,
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    log_lambda: Tensor,
    *,
    c: float = 8.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `rg_lru` on one token.

    Args:
        state: (B, D); not modified.
        x: (B, D), any floating dtype.
        recurrence_gate: Before the sigmoid, as x.
        input_gate: Before the sigmoid, as x.
        log_lambda: (D,), <= 0.
        c: The paper's constant, > 0.
        backend: Who must serve the call; None takes the best available.

    Returns:
        h: (B, D) in x.dtype.
        new_state: (B, D), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device, `c` or `backend` does not fit; TypeError: a dtype is unfit or differs from x.dtype.
    """
    h, new_state = _rg_lru_step.run(x, backend, state, x, recurrence_gate, input_gate, log_lambda, c)
    return h, new_state


def _check_scan_step(state: Tensor, decay: Tensor, x: Tensor) -> None:
    check_first("x", x, 2, "(B, D)")
    check_shape("state", state, x.shape, "(B, D)", x)
    check_shape("decay", decay, x.shape, "(B, D)", x)
    check_same_dtype("decay", decay, "x", x)


def _check_lru_step(
    state: Tensor, x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor, c: float
) -> None:
    check_first("x", x, 2, "(B, D)")
    check_shape("state", state, x.shape, "(B, D)", x)
    _check_gates(x, recurrence_gate, input_gate, log_lambda, c, "(B, D)")


def _check_gates(
    x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor, c: float, layout: str
) -> None:
    check_shape("recurrence_gate", recurrence_gate, x.shape, layout, x)
    check_shape("input_gate", input_gate, x.shape, layout, x)
    check_same_dtype("recurrence_gate", recurrence_gate, "x", x)
    check_same_dtype("input_gate", input_gate, "x", x)
    check_shape("log_lambda", log_lambda, x.shape[-1:], "(D,)", x)
    check_positive("c", c)


def _check_state(state: Tensor | None, x: Tensor, cu_seqlens: Tensor | None) -> None:
    sequences = check_sequences("cu_seqlens", cu_seqlens, x.shape[0], x.shape[1], x)
    if state is not None:
        check_shape("initial_state", state, (sequences, x.shape[2]), "(S, D)", x)


_diagonal_scan_step = Operator("diagonal_scan_step", reference.diagonal_scan_step, _check_scan_step)
_rg_lru_step = Operator("rg_lru_step", reference.rg_lru_step, _check_lru_step)
