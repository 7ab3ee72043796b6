"""Softmax attention: full and windowed, grouped heads, differential, and one token against a cache."""

from __future__ import annotations

from torch import Tensor

from star_kernels._validation import (
    check_first,
    check_groups,
    check_indices,
    check_positive,
    check_same_dtype,
    check_sequences,
    check_shape,
)
from star_kernels.attention import reference
from star_kernels.dispatch import Operator

__all__ = ["attention", "attention_step", "differential_attention"]

_attention = Operator("attention", reference.attention)
_differential_attention = Operator("differential_attention", reference.differential_attention)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend: o_i = sum_j softmax_j(cap(scale * q_i . k_j)) v_j over the keys that query i sees.

    The causal mask is aligned bottom-right: query i sees keys 0 .. i + Tk - Tq. Query head h reads key head
    h // (Hq / Hk). A query that sees no key gives zeros.

    Source: Vaswani et al., 2017, arXiv 1706.03762, equation 1; grouped heads: Ainslie et al., 2023, arXiv 2305.13245;
    softcap: Gemma 2, 2024, arXiv 2408.00118, section 2; sinks (one more logit a head in the softmax's sum, without a
    value): gpt-oss, 2025, arXiv 2508.10925.

    Args:
        q: (B, Tq, Hq, D), any floating dtype.
        k: (B, Tk, Hk, D), Hk divides Hq; q's dtype.
        v: (B, Tk, Hk, Dv); q's dtype.
        causal: Whether a query sees only keys up to its own position.
        window: See only the last `window` keys, the query's own included; needs `causal`.
        scale: Factor of the scores; None for D^(-1/2).
        softcap: Bound the scaled scores to softcap * tanh(score / softcap); > 0.
        sinks: (Hq,), natural-log units, not scaled and not capped.
        cu_seqlens_q: Boundaries of packed sequences in q, (S + 1,), int32 or int64, with B == 1.
        cu_seqlens_k: The same in k and v; both or neither.
        backend: Who must serve the call; None takes the best available.

    Returns:
        o: (B, Tq, Hq, Dv) in q.dtype.

    Raises:
        ValueError: a shape, device, range or `backend` does not fit; TypeError: a dtype is unfit or differs from q's.

    Numerics: scores, softmax and sums in float32 (float64 for float64), rounded once.
    """
    check_first("q", q, 4, "(B, Tq, Hq, D)")
    _check_keys("k", "v", q, k, v)
    _check_mask(causal, window)
    check_positive("softcap", softcap)
    if sinks is not None:
        check_shape("sinks", sinks, (q.shape[2],), "(Hq,)", q)
    _check_packing(q, k, cu_seqlens_q, cu_seqlens_k)
    serve = _attention.serve(q, backend)
    o: Tensor = serve(q, k, v, causal, window, scale, softcap, sinks, cu_seqlens_q, cu_seqlens_k)
    return o


def differential_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend with the difference of two maps: o = (softmax(q1 k1) - lam softmax(q2 k2)) v.

    Source: Ye et al., "Differential Transformer", 2024, arXiv 2410.05258, equation 1 (without its per-head norm).

    Args:
        q1: (B, Tq, Hq, D), any floating dtype.
        k1: (B, Tk, Hk, D), Hk divides Hq; q1's dtype.
        q2: As q1.
        k2: As k1.
        v: (B, Tk, Hk, Dv); q1's dtype.
        lam: () or (Hq,), any floating dtype.
        causal: As `attention`.
        window: As `attention`.
        scale: As `attention`, for both maps.
        cu_seqlens_q: As `attention`.
        cu_seqlens_k: As `attention`.
        backend: Who must serve the call; None takes the best available.

    Returns:
        o: (B, Tq, Hq, Dv) in q1.dtype.

    Raises:
        ValueError: a shape, device, range or `backend` does not fit; TypeError: a dtype is unfit or differs from q1's.

    Numerics: both maps and their difference in float32 (float64 for float64), rounded once.
    """
    check_first("q1", q1, 4, "(B, Tq, Hq, D)")
    _check_keys("k1", "v", q1, k1, v)
    check_shape("q2", q2, q1.shape, "(B, Tq, Hq, D), the shape of q1", q1)
    check_shape("k2", k2, k1.shape, "(B, Tk, Hk, D), the shape of k1", q1)
    check_same_dtype("q2", q2, "q1", q1)
    check_same_dtype("k2", k2, "q1", q1)
    if not isinstance(lam, Tensor) or lam.ndim > 0:
        check_shape("lam", lam, (q1.shape[2],), "(Hq,), or () for one number", q1)
    else:
        check_shape("lam", lam, (), "()", q1)
    _check_mask(causal, window)
    _check_packing(q1, k1, cu_seqlens_q, cu_seqlens_k)
    serve = _differential_attention.serve(q1, backend)
    o: Tensor = serve(q1, k1, q2, k2, v, lam, causal, window, scale, cu_seqlens_q, cu_seqlens_k)
    return o


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    length: int | Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from one new token to a cache that already holds its key and value.

    The caller writes the token's key and value into the cache first; nothing is modified here. Tokens at `length` and
    beyond are never read, so the cache may be uninitialised there.

    Args:
        q: (B, Hq, D), any floating dtype.
        k: The cache of keys, (B, S, Hk, D), Hk divides Hq; q's dtype.
        v: The cache of values, (B, S, Hk, Dv); q's dtype.
        length: Tokens held, the new one included: an int for all rows, or (B,) int32 or int64; None for S.
        window: See only the last `window` of them.
        scale: Factor of the scores; None for D^(-1/2).
        softcap: As `attention`.
        sinks: As `attention`, (Hq,).
        backend: Who must serve the call; None takes the best available.

    Returns:
        o: (B, Hq, Dv) in q.dtype; zeros for a row whose length is 0.

    Raises:
        ValueError: a shape, device, range or `backend` does not fit (the values of a `length` tensor are the caller's
            promise); TypeError: a dtype is unfit or differs from q's.

    Numerics: as `attention`, of which it is one query.
    """
    o: Tensor = _attention_step.run(q, backend, q, k, v, length, window, scale, softcap, sinks)
    return o


def _check_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int | Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    check_first("q", q, 3, "(B, Hq, D)")
    _check_keys("k", "v", q, k, v)
    if isinstance(length, Tensor):
        check_indices("length", length, q)
        if length.shape != q.shape[:1]:
            raise ValueError(f"length has shape {tuple(length.shape)}, needs (B,) = {tuple(q.shape[:1])}")
    elif length is not None and not 0 <= length <= k.shape[1]:
        raise ValueError(f"length is {length}, needs 0 <= length <= S == {k.shape[1]}")
    _check_mask(True, window)
    check_positive("softcap", softcap)
    if sinks is not None:
        check_shape("sinks", sinks, (q.shape[1],), "(Hq,)", q)


def _check_keys(k_name: str, v_name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check keys and values against queries (B, Tq, Hq, D) or (B, Hq, D)."""
    check_first(k_name, k, 4, "(B, Tk, Hk, D)")
    check_first(v_name, v, 4, "(B, Tk, Hk, Dv)")
    batch, keys, key_heads, _ = k.shape
    check_shape(k_name, k, (q.shape[0], keys, key_heads, q.shape[-1]), "(B, Tk, Hk, D)", q)
    check_shape(v_name, v, (batch, keys, key_heads, v.shape[3]), "(B, Tk, Hk, Dv)", q)
    check_same_dtype(k_name, k, "q", q)
    check_same_dtype(v_name, v, "q", q)
    check_groups(k_name, key_heads, "q", q.shape[-2])


def _check_mask(causal: bool, window: int | None) -> None:
    if window is not None:
        if window < 1:
            raise ValueError(f"window is {window}, needs >= 1, the query's own key included")
        if not causal:
            raise ValueError("window needs causal=True: it counts keys to the left of the query")


def _check_packing(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing} is None, needs boundaries too: packed sequences take both")
    sequences = check_sequences("cu_seqlens_q", cu_seqlens_q, q.shape[0], q.shape[1], q)
    if check_sequences("cu_seqlens_k", cu_seqlens_k, k.shape[0], k.shape[1], k) != sequences:
        raise ValueError(
            f"cu_seqlens_k has shape {tuple(cu_seqlens_k.shape)}, needs {tuple(cu_seqlens_q.shape)}, "
            "the shape of cu_seqlens_q"
        )


_attention_step = Operator("attention_step", reference.attention_step, _check_step)
