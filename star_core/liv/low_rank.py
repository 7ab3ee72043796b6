"""Attention with genes of its own: any nonlinearity, a band or none, heads of any size."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from star_core.cache import State, StateSpec, append
from star_core.genome import Nonlinearity
from star_core.liv._band import append_to_band, view_of
from star_core.liv._base import LIV, Features, OutputProjection, is_step, with_reused
from star_core.liv.attention import rotated
from star_core.liv.featurizer import head_norms
from star_core.liv.groups import GroupFeaturizer
from star_core.liv.pointwise import pointwise_attention
from star_core.ragged import Ragged
from star_kernels import attention, attention_step


class LowRankAttention(LIV):
    """Causal attention y = f(q k^T / sqrt(K)) v, where f is softmax, ReLU, swish or nothing, and a query sees all
    tokens or the last `window` of them.

    Source: as `Attention`; without softmax, `pointwise_attention`. With a window the cache holds that many tokens and
    no more (Child et al., Sparse Transformers, 2019, arXiv 1904.10509; Mistral 7B, 2023, arXiv 2310.06825, section 2).

    Args:
        featurizer: Makes the groups that this LIV computes; may be shared with other LIVs.
        width: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads; a divisor of `heads`.
        key_dim: Channels of a head of queries and keys.
        value_dim: Channels of a head of values.
        nonlinearity: f.
        window: Tokens that a query sees, its own included; None for all.
        reuse: Of "k" and "v", those that an earlier LIV computes.
        rope_base: Base of the rotary frequencies; None for no rotation.
        norm_eps: Added to the mean square in the norm of queries and keys; None for no norm.
    """

    def __init__(
        self,
        featurizer: GroupFeaturizer,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        nonlinearity: Nonlinearity,
        window: int | None = None,
        reuse: Collection[str] = (),
        rope_base: float | None = 10000.0,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.heads = {"q": (heads, key_dim), "k": (kv_heads, key_dim), "v": (kv_heads, value_dim)}
        self.nonlinearity = nonlinearity
        self.window = window
        self.reuse = frozenset(reuse)
        self.rope_base = rope_base
        self.computed = tuple(name for name in ("q", "k", "v") if name not in self.reuse)
        self.norms = head_norms(self.computed, key_dim, norm_eps)
        self.out = OutputProjection(heads * value_dim, width)

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. With a state, "k" and "v" hold every token so far, or those that the new ones see in a band."""
        groups = self._groups(x, state, offset, ragged)
        if state is not None:
            for name in ("k", "v"):
                if name in groups and self.window is None:
                    groups[name] = append(state, name, groups[name], offset, ragged)
                elif name in groups:
                    groups[name] = append_to_band(state, name, groups[name], offset, ragged)
        shared = with_reused(groups, reused, ("k", "v"))
        q, k, v = groups["q"], shared["k"], shared["v"]
        view = view_of(x, k.shape[1], offset, ragged, self.window)
        if self.nonlinearity is not Nonlinearity.SOFTMAX:
            y = pointwise_attention(q, k, v, view, nonlinearity=self.nonlinearity, window=self.window)
        elif is_step(x, state, ragged):
            y = attention_step(q[:, 0], k, v, length=view.lengths)[:, None]
        else:
            y = attention(q, k, v, causal=True, window=self.window, cu_seqlens_q=view.q_ends, cu_seqlens_k=view.k_ends)
        return self.out(y.flatten(-2)), shared

    def _groups(self, x: Tensor, state: State | None, offset: int, ragged: Ragged | None) -> dict[str, Tensor]:
        """Return the groups that this LIV computes, [B, T, heads, channels], normed and rotated."""
        made = self.featurizer(x, self.computed, state, ragged)
        groups = {name: group.unflatten(-1, self.heads[name]) for name, group in made.items()}
        groups |= {name: norm(groups[name]) for name, norm in self.norms.items()}
        return groups if self.rope_base is None else groups | rotated(groups, offset, ragged, self.rope_base)

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Keys and values of every token, or of the window, unless reused; the short convolutions' last inputs."""
        spec = self.featurizer.state_spec(self.computed, batch_size)
        tokens = max_length if self.window is None else min(self.window, max_length)
        held = (name for name in ("k", "v") if name not in self.reuse)
        return spec | {
            name: StateSpec((batch_size, tokens, *self.heads[name]), dtype, ("row", "token")) for name in held
        }
