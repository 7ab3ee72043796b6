"""Gated DeltaNet's layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.layers._fla import FlaLayer, GatedHeadNorm
from star_core.layers._initialise import step_bias, undecayed
from star_core.layers._state import State, check_divides, is_step, split_heads, unit_heads, whole
from star_core.liv._base import state_dtype
from star_kernels import gated_delta_rule, gated_delta_rule_step

_MODES = ("chunk", "fused_recurrent")
_GATES = ("swish", "silu", "sigmoid")
_EPSILON = 1e-6
"""Added to the sum of squares of queries and keys; a constant in fla too."""


class GatedDeltaNet(FlaLayer):
    """Gated DeltaNet, with the constructor and the parameters of fla.layers.GatedDeltaNet.

    Source: Yang et al., "Gated Delta Networks", 2024, arXiv 2412.06464, section 3.4; values of more heads than keys, as
    in fla's code: value head h reads key head h // (num_v_heads / num_heads).

    Args:
        hidden_size: Width of the input.
        expand_v: Width of a value head over `head_dim`.
        head_dim: Width of a head of queries or keys.
        num_heads: Heads of queries and keys.
        num_v_heads: Heads of values, a multiple of `num_heads`; None for as many.
        mode: "chunk" or "fused_recurrent"; changes nothing: there is one kernel.
        use_gate: Whether the output is gated.
        use_short_conv: Whether queries, keys and values go through short convolutions, in front of their silu.
        allow_neg_eigval: Whether the share replaced is doubled (Grazzi et al., 2024, arXiv 2411.12537).
        conv_size: Taps of the convolutions.
        conv_bias: Whether they have a bias.
        layer_idx: Place of this layer's states in `past_key_values`.
        norm_eps: Added to the norm's mean square.
        output_gate_activation: "swish", its other name "silu", or "sigmoid".

    Raises:
        ValueError: a size is not whole or does not divide another, or a name is unknown.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("mode", mode, _MODES),
            ("output_gate_activation", output_gate_activation, _GATES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, needs one of {', '.join(map(repr, known))}")
        self.hidden_size, self.layer_idx, self.use_short_conv = hidden_size, layer_idx, use_short_conv
        self.allow_neg_eigval = allow_neg_eigval
        self.num_heads, self.num_v_heads = num_heads, num_heads if num_v_heads is None else num_v_heads
        check_divides("num_heads", num_heads, "num_v_heads", self.num_v_heads)
        self.head_k_dim, self.head_v_dim = head_dim, whole("head_dim * expand_v", head_dim * expand_v)
        self.key_dim, self.value_dim = num_heads * head_dim, self.num_v_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log = undecayed(torch.empty(self.num_v_heads).uniform_(0, 16).log())
        self.dt_bias = undecayed(step_bias(self.num_v_heads, 0.001, 0.1, 1e-4))
        if use_short_conv:
            self._make_convolutions((self.key_dim, self.key_dim, self.value_dim), conv_size, conv_bias)
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False) if use_gate else None
        self.o_norm = GatedHeadNorm(self.head_v_dim, norm_eps, sigmoid=output_gate_activation == "sigmoid")
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _mix(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
        step = is_step(x, state, cu_seqlens)
        q, k, v = self._project(x, state, cu_seqlens, activated=True)
        copies = self.num_v_heads // self.num_heads
        q, k = (unit_heads(one, self.num_heads, copies, _EPSILON) for one in (q, k))
        v = split_heads(v, self.num_v_heads)
        beta = torch.sigmoid(self.b_proj(x)) * (2.0 if self.allow_neg_eigval else 1.0)
        wide = state_dtype(x.dtype)
        log_decay = -self.A_log.to(wide).exp() * F.softplus(self.a_proj(x).to(wide) + self.dt_bias)
        if state is not None and step:
            rows = (q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], beta[:, 0])
            row, state["recurrent"] = gated_delta_rule_step(state["recurrent"], *rows)
            o = row.unsqueeze(1)
        else:
            held = None if state is None else state.get("recurrent")
            o, final = gated_delta_rule(q, k, v, log_decay, beta, initial_state=held, cu_seqlens=cu_seqlens)
            if state is not None:
                state["recurrent"] = final
        gate = None if self.g_proj is None else self.g_proj(x).view(o.shape)
        out: Tensor = self.o_proj(self.o_norm(o, gate).flatten(-2))
        return out
