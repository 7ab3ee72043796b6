"""Attention whose map is no softmax: ReLU, swish, or nothing at all, in plain torch, a stretch of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from star_core.genome import Nonlinearity
from star_core.liv._band import View

_SCORES_A_TOKEN = 1024
"""Queries x heads in a stretch: one key then takes 4 kB of scores."""


def pointwise_attention(
    q: Tensor, k: Tensor, v: Tensor, view: View, *, nonlinearity: Nonlinearity, window: int | None
) -> Tensor:
    """Attend: o_i = sum_j f(q_i . k_j / sqrt(K)) v_j / n_i over the n_i keys that query i sees.

    Source: Wortsman et al., "Replacing softmax with ReLU in Vision Transformers", 2023, arXiv 2309.08586, section 3,
    whose division by the number of keys keeps the output's size as the sequence grows; Shen et al., "A Study on ReLU
    and Softmax in Transformer", 2023, arXiv 2302.06461. Swish takes ReLU's place as in So et al., Primer, 2021, arXiv
    2109.08668, a smooth form of it. Differs from them in: causal, so that n_i is query i's own.

    Args:
        q: [B, T, H, K].
        k: [B, S, Hk, K], Hk divides H.
        v: [B, S, Hk, V].
        view: Where they lie.
        nonlinearity: f: NONE, RELU or SWISH.
        window: Keys that a query sees, its own included; None for all.
    Returns:
        [B, T, H, V], in v.dtype.
    Numerics: scores in float32 (float64 for float64). Cost: O(T S) time; memory of O(S) for each stretch of queries,
        whose scores the backward pass computes again.
    """
    _, queries, heads, _ = q.shape
    grouped = torch.unflatten(q, 2, (k.shape[2], heads // k.shape[2]))
    plain = view.q_rows is None and view.lengths is None
    step = max(8, _SCORES_A_TOKEN // heads)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    parts = []
    # One stretch is no loop over lengths, so that torch.compile can leave the length open.
    for start in range(0, queries, step) if queries > step else (0,):
        stop = min(queries, start + step)
        first, last = 0, k.shape[1]
        if plain:  # positions rise one by one, and the last query is beside the last key
            last -= queries - stop
            first = 0 if window is None else max(0, k.shape[1] - queries + start - window + 1)
        arguments = (
            grouped[:, start:stop],
            k[:, first:last],
            v[:, first:last],
            _visible(view, slice(start, stop), slice(first, last), window),
            _seen(view.q_positions[..., start:stop], window),
            nonlinearity,
        )
        if grad:
            part = checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            part = _attend(*arguments)
        parts.append(part)
    return torch.cat(parts, dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, count: Tensor, nonlinearity: Nonlinearity) -> Tensor:
    """Attend from a stretch of queries [B, T, Hk, G, K], all at once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhgk,bshk->bhgqs", q, k).to(wide) * q.shape[-1] ** -0.5
    if nonlinearity is Nonlinearity.RELU:
        scores = F.relu(scores)
    elif nonlinearity is Nonlinearity.SWISH:
        scores = F.silu(scores)
    scores = scores.masked_fill(~visible[:, None, None], 0.0) / count[:, None, None, :, None]
    return torch.einsum("bhgqs,bshv->bqhgv", scores.to(v.dtype), v).flatten(2, 3)


def _seen(positions: Tensor, window: int | None) -> Tensor:
    """Return the number of keys that each query sees, [1 or B, T]."""
    count = positions + 1 if window is None else (positions + 1).clamp(max=window)
    return count if count.ndim == 2 else count[None]


def _visible(view: View, queries: slice, keys: slice, window: int | None) -> Tensor:
    """Return which keys the queries see, [1 or B, T, S]."""
    q_positions, k_positions = view.q_positions[..., queries, None], view.k_positions[..., None, keys]
    visible = (k_positions <= q_positions) & (k_positions >= 0)
    if window is not None:
        visible = visible & (k_positions > q_positions - window)
    if view.q_rows is not None and view.k_rows is not None:
        visible = visible & (view.q_rows[queries, None] == view.k_rows[None, keys])
    return visible if visible.ndim == 3 else visible[None]
