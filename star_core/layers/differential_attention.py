"""The Differential Transformer's attention layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from star_core.layers._state import State, check_divides, check_input, split_heads
from star_core.liv._base import state_dtype
from star_kernels import differential_attention, rms_norm


class MultiheadDiffAttn(nn.Module):
    """Multi-head differential attention, with the constructor and the parameters of Microsoft's MultiheadDiffAttn.

    Each head's output is its first attention map less lambda times its second, normalised and scaled by 1 -
    lambda_init.

    Source: Ye et al., "Differential Transformer", 2024, arXiv 2410.05258, section 2.1, and multihead_diffattn.py beside
    it, whose order of heads this is: query heads 2 h and 2 h + 1 are the maps of head h, and query head j reads key
    head j // (num_heads / num_kv_heads). (With fewer key heads, the authors' multihead_flashdiff files pair them in
    another way: weights trained there give other numbers here.) Differs from it in: lambda is float32 whatever the
    activations' dtype.

    Args:
        embed_dim: Width of the input.
        depth: Index of the layer, which sets lambda_init = 0.8 - 0.6 exp(-0.3 depth).
        num_heads: Heads, each of two maps.
        num_kv_heads: Heads of keys and values, each for a group of heads; None for as many.

    Raises:
        ValueError: `2 * num_heads` does not divide `embed_dim`, the width of a map is odd, or `num_kv_heads` does not
            divide `num_heads`.
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, num_kv_heads: int | None = None) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divides("2 * num_heads", 2 * num_heads, "embed_dim", embed_dim)
        check_divides("num_kv_heads", self.num_kv_heads, "num_heads", num_heads)
        self.n_rep = num_heads // self.num_kv_heads
        self.head_dim = embed_dim // num_heads // 2
        if self.head_dim % 2:
            raise ValueError(f"embed_dim / num_heads / 2 is {self.head_dim}, needs an even width, whose pairs rotate")
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, embed_dim // self.n_rep, bias=False)
        self.v_proj = nn.Linear(embed_dim, embed_dim // self.n_rep, bias=False)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.lambda_q1 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.lambda_k1 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.lambda_q2 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.lambda_k2 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.subln = nn.RMSNorm(2 * self.head_dim, eps=1e-5)

    def forward(
        self,
        x: Tensor,
        rel_pos: tuple[Tensor, Tensor],
        attn_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            x: (B, T, embed_dim).
            rel_pos: Cosines and sines of the rotary angles by position, from 0, each (P, head_dim / 2) with at least as
                many rows as a sequence has tokens, those of the state included. Pairs are interleaved.
            attn_mask: Must be None: causal.
            cu_seqlens: Boundaries of packed sequences, (S + 1,), with B == 1; positions begin anew in each.
            state: What to continue from and write to; an empty dict starts. Its entries: "k", rotated, (B, P, 2
                num_kv_heads, head_dim), and "v", (B, P, num_kv_heads, 2 head_dim). Each call copies what they hold.

        Returns:
            y: As x.

        Raises:
            ValueError: a shape does not fit, `attn_mask` is given, or a `state` beside `cu_seqlens`.
        """
        check_input("x", x, self.embed_dim)
        if attn_mask is not None:
            raise ValueError(
                "attn_mask is given, needs None: the layer is causal, and packed sequences take cu_seqlens"
            )
        if state is not None and cu_seqlens is not None:
            raise ValueError("state and cu_seqlens are both given, needs at most one: a state holds one sequence a row")
        held = state["k"].shape[1] if state else 0
        angles = self._angles(rel_pos, held, x.shape[1], cu_seqlens)
        q = _rotated(split_heads(self.q_proj(x), 2 * self.num_heads), *angles)
        k = _rotated(split_heads(self.k_proj(x), 2 * self.num_kv_heads), *angles)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if state is not None:
            if held:
                k, v = torch.cat([state["k"], k], dim=1), torch.cat([state["v"], v], dim=1)
            state["k"], state["v"] = k, v
        if self.n_rep > 1:
            k, v = k.repeat_interleave(self.n_rep, dim=2), v.repeat_interleave(self.n_rep, dim=2)
        o = differential_attention(
            q[:, :, 0::2],
            k[:, :, 0::2],
            q[:, :, 1::2],
            k[:, :, 1::2],
            v,
            self._lambda(),
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
        )
        y = rms_norm(o, self.subln.weight * (1 - self.lambda_init), eps=1e-5)
        out: Tensor = self.out_proj(y.flatten(-2))
        return out

    def _lambda(self) -> Tensor:
        wide = state_dtype(self.lambda_q1.dtype)
        first = (self.lambda_q1.to(wide) * self.lambda_k1.to(wide)).sum()
        second = (self.lambda_q2.to(wide) * self.lambda_k2.to(wide)).sum()
        return first.exp() - second.exp() + self.lambda_init

    def _angles(
        self, rel_pos: tuple[Tensor, Tensor], held: int, length: int, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the rows of both tables that belong to the new tokens, (T, 1, head_dim / 2)."""
        cos, sin = rel_pos
        rows = held + (length if cu_seqlens is None else 0)
        for name, table in (("cosines", cos), ("sines", sin)):
            if table.ndim != 2 or table.shape[1] != self.head_dim // 2 or table.shape[0] < rows:
                raise ValueError(
                    f"rel_pos has {name} of shape {tuple(table.shape)}, needs (P, head_dim / 2) with P >= {rows} and"
                    f" head_dim / 2 == {self.head_dim // 2}"
                )
        if cu_seqlens is None:
            return cos[held:rows, None], sin[held:rows, None]
        tokens = torch.arange(length, device=cu_seqlens.device)
        positions = tokens - cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1]
        return cos[positions, None], sin[positions, None]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_2i, x_2i+1) of (B, T, H, D) by angles (T, 1, D / 2), in float32 at least."""
    wide = state_dtype(x.dtype)
    first, second = split_heads(x.to(wide), x.shape[-1] // 2).unbind(-1)
    cos, sin = cos.to(wide), sin.to(wide)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
