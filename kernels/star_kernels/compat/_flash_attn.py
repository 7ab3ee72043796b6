"""flash-attn's functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from star_kernels._validation import check_first
from star_kernels.attention import attention


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Run `attention` with flash-attn's signature.

    Args:
        q: (B, Tq, Hq, D).
        k: (B, Tk, Hk, D).
        v: (B, Tk, Hk, Dv).
        dropout_p: 0.
        softmax_scale: None for D^(-1/2).
        causal: Aligned bottom-right.
        window_size: Keys to the left and to the right of a query's own that it sees, -1 for all of them; with `causal`
            none to the right, whatever is said here. Keys to the right without those to the left, or some of both,
            are not supported.
        softcap: 0 for none.
        alibi_slopes: None.
        deterministic: Changes nothing.
        return_attn_probs: False.

    Returns:
        o: (B, Tq, Hq, Dv).

    Raises:
        NotImplementedError: another `dropout_p`, `window_size`, `alibi_slopes` or `return_attn_probs`; else as
            `attention`.
    """
    options = _options(dropout_p, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return attention(q, k, v, scale=softmax_scale, **options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Run `attention` on packed sequences with flash-attn's signature.

    Args:
        q: (total of Tq, Hq, D).
        k: (total of Tk, Hk, D).
        v: (total of Tk, Hk, Dv).
        cu_seqlens_q: Boundaries in q, (S + 1,), int32 or int64.
        cu_seqlens_k: Boundaries in k and v, (S + 1,).
        max_seqlen_q: Changes nothing.
        max_seqlen_k: Changes nothing.
        dropout_p: As `flash_attn_func`, and so are the others.
        softmax_scale: None for D^(-1/2).
        causal: Aligned bottom-right.
        window_size: Keys to the left and to the right.
        softcap: 0 for none.
        alibi_slopes: None.
        deterministic: Changes nothing.
        return_attn_probs: False.
        block_table: None.

    Returns:
        o: (total of Tq, Hq, Dv).

    Raises:
        NotImplementedError: `block_table`, and as `flash_attn_func`.
    """
    for name, value, layout in (("q", q, "(T, Hq, D)"), ("k", k, "(T, Hk, D)"), ("v", v, "(T, Hk, Dv)")):
        check_first(name, value, 3, layout)
    if block_table is not None:
        raise NotImplementedError("block_table is not supported: keys and values are not paged")
    options = _options(dropout_p, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    packed = [one.unsqueeze(0) for one in (q, k, v)]
    return attention(
        *packed, scale=softmax_scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options
    ).squeeze(0)


def _options(
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> dict[str, Any]:
    """Return `attention`'s options. Raises NotImplementedError."""
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p is {dropout_p}: dropout is not supported, needs 0")
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes is not supported, needs None")
    if return_attn_probs:
        raise NotImplementedError("return_attn_probs is not supported, needs False")
    left, right = window_size
    causal = causal or right == 0
    if not causal and (left >= 0 or right >= 0):
        raise NotImplementedError(f"window_size is {window_size}: a window to the right is not supported")
    return {"causal": causal, "window": left + 1 if left >= 0 else None, "softcap": softcap if softcap else None}
