"""Gated linear attention's layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.layers._fla import FlaLayer, GatedHeadNorm
from star_core.layers._state import State, check_divides, is_step, split_heads, whole
from star_core.liv._base import state_dtype
from star_kernels import gated_linear_attention, gated_linear_attention_step

_MODES = ("chunk", "fused_recurrent", "fused_chunk")


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": _squared_relu,
    "gelu": partial(F.gelu, approximate="tanh"),
}


def _activation(name: str, value: str) -> Callable[[Tensor], Tensor]:
    if value not in _ACTIVATIONS:
        raise ValueError(f"{name} is {value!r}, needs one of {', '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[value]


class GatedLinearAttention(FlaLayer):
    """Gated linear attention, with the constructor and the parameters of fla.layers.GatedLinearAttention.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, arXiv
    2312.06635, section 4.4.

    Args:
        mode: "chunk", "fused_recurrent" or "fused_chunk"; changes nothing: there is one kernel.
        hidden_size: Width of the input.
        expand_k: Width of the keys over `hidden_size`.
        expand_v: Width of the values over it.
        num_heads: Query heads.
        num_kv_heads: Heads of keys, values and decays, each for a group of query heads; None for as many.
        feature_map: Activation of queries and keys; None for none.
        use_short_conv: Whether queries, keys and values go through short convolutions with a silu.
        conv_size: Their taps.
        conv_bias: Whether they have a bias.
        use_output_gate: Whether the output is gated.
        gate_fn: Activation of that gate.
        elementwise_affine: Whether the norm of the output has a weight.
        norm_eps: Added to the norm's mean square.
        gate_logit_normalizer: Divides the log decays.
        gate_low_rank_dim: Rank of the decays' projection.
        clamp_min: Least log decay; None for none.
        fuse_norm: Whether the norm's weight is named as fla's fused norm and gate name it; changes no number.
        layer_idx: Place of this layer's states in `past_key_values`.

    Raises:
        ValueError: a size is not whole or does not divide another, or a name is unknown.
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 16,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise ValueError(f"mode is {mode!r}, needs one of {', '.join(map(repr, _MODES))}")
        self.hidden_size, self.layer_idx, self.use_short_conv = hidden_size, layer_idx, use_short_conv
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        check_divides("num_kv_heads", self.num_kv_heads, "num_heads", num_heads)
        self.key_dim = whole("hidden_size * expand_k", hidden_size * expand_k)
        self.value_dim = whole("hidden_size * expand_v", hidden_size * expand_v)
        check_divides("num_heads", num_heads, "hidden_size * expand_k", self.key_dim)
        check_divides("num_heads", num_heads, "hidden_size * expand_v", self.value_dim)
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads
        self.gate_logit_normalizer, self.clamp_min = gate_logit_normalizer, clamp_min
        self.feature_map = None if feature_map is None else _activation("feature_map", feature_map)
        self.gate_fn = _activation("gate_fn", gate_fn)
        kv_widths = self.num_kv_heads * self.head_k_dim, self.num_kv_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_widths[0], bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_widths[1], bias=False)
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False) if use_output_gate else None
        if use_short_conv:
            self._make_convolutions((self.key_dim, *kv_widths), conv_size, conv_bias)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False), nn.Linear(gate_low_rank_dim, kv_widths[0], bias=True)
        )
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.fuse_norm_and_gate = gate_fn == "swish" and fuse_norm and use_output_gate
        norm = GatedHeadNorm(self.head_v_dim, norm_eps, affine=bool(elementwise_affine))
        self.add_module("g_norm_swish_gate" if self.fuse_norm_and_gate else "g_norm", norm)

    def _mix(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
        step = is_step(x, state, cu_seqlens)
        q, k, v = self._project(x, state, cu_seqlens, activated=False)
        log_decay = self.gk_proj(x)
        log_decay = F.logsigmoid(log_decay.to(state_dtype(log_decay.dtype))) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            log_decay = log_decay.clamp(min=self.clamp_min)
        q = split_heads(q, self.num_heads)
        k, v, log_decay = (self._shared_heads(one) for one in (k, v, log_decay))
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        if state is not None and step:
            rows = (q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0])
            row, state["recurrent"] = gated_linear_attention_step(state["recurrent"], *rows)
            o = row.unsqueeze(1)
        else:
            held = None if state is None else state.get("recurrent")
            o, final = gated_linear_attention(q, k, v, log_decay, initial_state=held, cu_seqlens=cu_seqlens)
            if state is not None:
                state["recurrent"] = final
        out: Tensor = self.o_proj(self._gate(o, x).flatten(-2))
        return out

    def _shared_heads(self, x: Tensor) -> Tensor:
        """Split (B, T, num_kv_heads width) into heads, each repeated for the query heads that share it."""
        heads = split_heads(x, self.num_kv_heads)
        shared = self.num_heads // self.num_kv_heads
        return heads if shared == 1 else heads.repeat_interleave(shared, dim=2)

    def _gate(self, o: Tensor, x: Tensor) -> Tensor:
        gate = None if self.g_proj is None else self.g_proj(x).view(o.shape)
        norm = self.get_submodule("g_norm_swish_gate" if self.fuse_norm_and_gate else "g_norm")
        if self.fuse_norm_and_gate or gate is None:
            y: Tensor = norm(o, gate)
        else:
            y = norm(o) * self.gate_fn(gate)
        return y
