"""Softmax attention with rotary positions: LIV classes SA-1 to SA-4."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from star_core.cache import State, StateSpec, append
from star_core.liv._base import LIV, Features, OutputProjection, cu_seqlens_of, is_step, with_reused
from star_core.liv.featurizer import AttentionFeaturizer
from star_core.ragged import Ragged
from star_kernels import attention, attention_step, rotary


class Attention(LIV):
    """Causal multi-head attention: y = softmax(q k^T / sqrt(head_dim)) v, with grouped queries where k and v have
    fewer heads.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); rotary positions, Su et al. 2021 (arXiv 2104.09864); grouped
    queries, Ainslie et al. 2023 (arXiv 2305.13245). Keys are shared and cached after their norm, if
    the featurizer has one, and their rotation.

    Args:
        featurizer: Makes the groups that this LIV computes; may be shared with other LIVs.
        width: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads; a divisor of `heads`.
        head_dim: Channels of a head; even.
        reuse: Of "k" and "v", those that an earlier LIV computes.
        rope_base: Base of the rotary frequencies.
    """

    def __init__(
        self,
        featurizer: AttentionFeaturizer,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        reuse: Collection[str] = (),
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.reuse = frozenset(reuse)
        self.rope_base = rope_base
        self.computed = tuple(name for name in ("q", "k", "v") if name not in self.reuse)
        self.out = OutputProjection(heads * head_dim, width)

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. With a state, "k" and "v" hold every token so far: [B, offset + T, kv_heads, head_dim]."""
        groups = self.featurizer(x, self.computed, state, ragged)
        groups |= rotated(groups, offset, ragged, self.rope_base)
        if state is not None:
            for name in ("k", "v"):
                if name in groups:
                    groups[name] = append(state, name, groups[name], offset, ragged)
        shared = with_reused(groups, reused, ("k", "v"))
        if is_step(x, state, ragged):
            length = None if ragged is None else ragged.positions + 1
            y = attention_step(groups["q"][:, 0], shared["k"], shared["v"], length=length)[:, None]
        else:
            y = attention(
                groups["q"],
                shared["k"],
                shared["v"],
                causal=True,
                cu_seqlens_q=cu_seqlens_of(ragged),
                cu_seqlens_k=None if ragged is None else ragged.all_cu_seqlens,
            )
        return self.out(y.flatten(-2)), shared

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Keys and values of every token, unless reused, and the short convolutions' last inputs."""
        spec = self.featurizer.state_spec(self.computed, batch_size)
        shape = (batch_size, max_length, self.kv_heads, self.head_dim)
        return spec | {name: StateSpec(shape, dtype, ("row", "token")) for name in ("k", "v") if name not in self.reuse}


def rotated(groups: Features, offset: int, ragged: Ragged | None, base: float) -> Features:
    """Return those of q and k, [B, T, heads, channels], that are in `groups`, rotated by their tokens' positions."""
    made = {name: groups[name] for name in ("q", "k") if name in groups}
    first = next(iter(made.values()))
    if ragged is None:
        positions = torch.arange(offset, offset + first.shape[1], device=first.device)
    else:
        positions = ragged.rotary_positions()
    return {name: rotary(group, positions, base=base) for name, group in made.items()}
