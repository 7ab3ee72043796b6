"""Recurrences whose state is a matrix from keys to values: gated linear attention and the gated delta rule."""

from __future__ import annotations

from torch import Tensor

from star_kernels._validation import check_first, check_same_dtype, check_sequences, check_shape
from star_kernels.dispatch import Operator
from star_kernels.recurrence.reference import delta_rule, linear_attention

_gated_linear_attention = Operator("gated_linear_attention", linear_attention.gated_linear_attention)
_gated_delta_rule = Operator("gated_delta_rule", delta_rule.gated_delta_rule)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run linear attention whose memory decays by key channel.

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,  o_t = scale * S_t^T q_t.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, arXiv 2312.06635,
    equation 3 with a decay for keys alone.

    Args:
        q: (B, T, H, K), any floating dtype.
        k: (B, T, H, K); q's dtype.
        v: (B, T, H, V); q's dtype.
        log_decay: Natural logarithm, <= 0, -inf allowed, (B, T, H, K), any floating dtype.
        scale: Factor of q; None for K^(-1/2).
        initial_state: (S, H, K, V); None for zeros.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), int32 or int64, with B == 1.
        backend: Who must serve the call; None takes the best available.

    Returns:
        o: (B, T, H, V) in q.dtype.
        final_state: (S, H, K, V), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from q.dtype.

    Numerics: float32 inside (float64 for float64), rounded once; decays as in `ssd`.
    """
    check_first("q", q, 4, "(B, T, H, K)")
    _check_memory_arguments(q, k, v, "(B, T, H, K)", "(B, T, H, V)")
    check_shape("log_decay", log_decay, q.shape, "(B, T, H, K)", q)
    _check_state(initial_state, q, v, cu_seqlens)
    serve = _gated_linear_attention.serve(q, backend)
    o, final_state = serve(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    return o, final_state


def gated_linear_attention_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `gated_linear_attention` on one token.

    Args:
        state: (B, H, K, V); not modified.
        q: (B, H, K), any floating dtype.
        k: (B, H, K); q's dtype.
        v: (B, H, V); q's dtype.
        log_decay: (B, H, K).
        scale: Factor of q; None for K^(-1/2).
        backend: Who must serve the call; None takes the best available.

    Returns:
        o: (B, H, V) in q.dtype.
        new_state: (B, H, K, V), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from q.dtype.
    """
    o, new_state = _gated_linear_attention_step.run(q, backend, state, q, k, v, log_decay, scale)
    return o, new_state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run linear attention that decays by head and replaces what its memory held for a key.

    S' = exp(log_decay_t) S_{t-1},  S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T,  o_t = scale * S_t^T q_t.

    Source: Yang et al., "Gated Delta Networks", 2024, arXiv 2412.06464, equation 10. Keys are used as they come:
    normalise them before, as the paper does.

    Args:
        q: (B, T, H, K), any floating dtype.
        k: (B, T, H, K); q's dtype.
        v: (B, T, H, V); q's dtype.
        log_decay: Natural logarithm, <= 0, -inf allowed, (B, T, H), any floating dtype.
        beta: Share replaced, 0 .. 1 (up to 2 for negative eigenvalues), (B, T, H), any floating dtype.
        scale: Factor of q; None for K^(-1/2).
        initial_state: (S, H, K, V); None for zeros.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), int32 or int64, with B == 1.
        backend: Who must serve the call; None takes the best available.

    Returns:
        o: (B, T, H, V) in q.dtype.
        final_state: (S, H, K, V), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from q.dtype.

    Numerics: float32 inside (float64 for float64), rounded once; decays as in `ssd`.
    """
    check_first("q", q, 4, "(B, T, H, K)")
    _check_memory_arguments(q, k, v, "(B, T, H, K)", "(B, T, H, V)")
    check_shape("log_decay", log_decay, q.shape[:3], "(B, T, H)", q)
    check_shape("beta", beta, q.shape[:3], "(B, T, H)", q)
    _check_state(initial_state, q, v, cu_seqlens)
    serve = _gated_delta_rule.serve(q, backend)
    o, final_state = serve(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)
    return o, final_state


def gated_delta_rule_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `gated_delta_rule` on one token.

    Args:
        state: (B, H, K, V); not modified.
        q: (B, H, K), any floating dtype.
        k: (B, H, K); q's dtype.
        v: (B, H, V); q's dtype.
        log_decay: (B, H).
        beta: (B, H).
        scale: Factor of q; None for K^(-1/2).
        backend: Who must serve the call; None takes the best available.

    Returns:
        o: (B, H, V) in q.dtype.
        new_state: (B, H, K, V), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from q.dtype.
    """
    o, new_state = _gated_delta_rule_step.run(q, backend, state, q, k, v, log_decay, beta, scale)
    return o, new_state


def _check_linear_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None) -> None:
    check_first("q", q, 3, "(B, H, K)")
    _check_memory_arguments(q, k, v, "(B, H, K)", "(B, H, V)")
    check_shape("log_decay", log_decay, q.shape, "(B, H, K)", q)
    check_shape("state", state, (*q.shape, v.shape[2]), "(B, H, K, V)", q)


def _check_delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float | None
) -> None:
    check_first("q", q, 3, "(B, H, K)")
    _check_memory_arguments(q, k, v, "(B, H, K)", "(B, H, V)")
    check_shape("log_decay", log_decay, q.shape[:2], "(B, H)", q)
    check_shape("beta", beta, q.shape[:2], "(B, H)", q)
    check_shape("state", state, (*q.shape, v.shape[2]), "(B, H, K, V)", q)


def _check_memory_arguments(q: Tensor, k: Tensor, v: Tensor, key_layout: str, value_layout: str) -> None:
    check_shape("k", k, q.shape, f"{key_layout}, the shape of q", q)
    check_first("v", v, q.ndim, value_layout)
    check_shape("v", v, (*q.shape[:-1], v.shape[-1]), value_layout, q)
    check_same_dtype("k", k, "q", q)
    check_same_dtype("v", v, "q", q)


def _check_state(state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    sequences = check_sequences("cu_seqlens", cu_seqlens, q.shape[0], q.shape[1], q)
    if state is not None:
        check_shape("initial_state", state, (sequences, *q.shape[2:], v.shape[3]), "(S, H, K, V)", q)


_gated_linear_attention_step = Operator(
    "gated_linear_attention_step", linear_attention.gated_linear_attention_step, _check_linear_step
)
_gated_delta_rule_step = Operator("gated_delta_rule_step", delta_rule.gated_delta_rule_step, _check_delta_step)
