"""Hyena's layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.layers._hyena_filter import HyenaFilter
from star_core.layers._state import State, check_input, convolve, depthwise
from star_core.liv._base import state_dtype
from star_kernels import long_conv, long_conv_step

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "elu": F.elu,
    "silu": F.silu,
    "swish": F.silu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}
_IDENTITY = ("id", "identity", "linear", None)


class HyenaOperator(nn.Module):
    """Hyena's operator of any order, with the constructor and the parameters of safari's HyenaOperator.

    With projections x_0 .. x_{N - 1} and v, each beyond a short convolution:  v <- conv(x_i * v) from the last x_i to
    x_1, with an implicit filter as long as the sequence and a skip term each, then y = out_proj(x_0 * v).

    Source: Poli et al., "Hyena Hierarchy", 2023, arXiv 2302.10866, definition 3.1. Differs from safari's code in:
    tokens beyond `l_max` are not cut off; like all others, they read the `l_max` tokens that the filters reach.

    Args:
        d_model: Width of the input.
        l_max: Length of the filters.
        order: Projections beside v, at least 2.
        filter_order: Width of the filters' network.
        num_heads: Must be 1; safari's code fails with more.
        inner_factor: Must be 1; safari's code fails with more.
        num_blocks: Must be 1; blocks would be convolved in a circle.
        fused_bias_fc: Changes nothing.
        outer_mixing: Must be False.
        dropout: Of the gated inputs of the long convolutions, in training.
        filter_dropout: Changes nothing, as in safari.
        filter_cls: Must be "hyena-filter".
        post_order_ffn: Whether each long convolution's output is scaled by a number of its own, which is what safari's
            mixing of heads is with one head.
        jit_filter: Changes nothing.
        short_filter_order: Taps of the short convolution.
        activation: Between the last gate and the output projection: "id", "tanh", "relu", "gelu", "elu", "silu" (also
            written "swish"), "sigmoid" or "softplus".
        return_state: Whether the forward pass returns (y, None).
        filter_args: Of `HyenaFilter`.

    Raises:
        ValueError: an argument is none of the above; TypeError: a filter argument is unknown.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        order: int = 2,
        filter_order: int = 64,
        num_heads: int = 1,
        inner_factor: int = 1,
        num_blocks: int = 1,
        fused_bias_fc: bool = False,
        outer_mixing: bool = False,
        dropout: float = 0.0,
        filter_dropout: float = 0.0,
        filter_cls: str = "hyena-filter",
        post_order_ffn: bool = False,
        jit_filter: bool = False,
        short_filter_order: int = 3,
        activation: str | None = "id",
        return_state: bool = False,
        **filter_args: Any,
    ) -> None:
        super().__init__()
        for name, value, served in (
            ("num_heads", num_heads, 1),
            ("inner_factor", inner_factor, 1),
            ("num_blocks", num_blocks, 1),
            ("outer_mixing", outer_mixing, False),
            ("filter_cls", filter_cls, "hyena-filter"),
        ):
            if value != served:
                raise ValueError(f"{name} is {value!r}, needs {served!r}")
        if order < 2:
            raise ValueError(f"order is {order}, needs >= 2")
        if activation not in _IDENTITY and activation not in _ACTIVATIONS:
            known = ", ".join(map(repr, ("id", *_ACTIVATIONS)))
            raise ValueError(f"activation is {activation!r}, needs one of {known}")
        self.d_model, self.l_max, self.order, self.return_state = d_model, l_max, order, return_state
        self.activation = None if activation is None else _ACTIVATIONS.get(activation)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, d_model)
        self.in_proj = nn.Linear(d_model, (order + 1) * d_model)
        scales = torch.randn(order, 1, 1) / d_model**0.5
        self.ord_proj_w = nn.Parameter(scales) if post_order_ffn else None
        self.short_filter = depthwise((order + 1) * d_model, short_filter_order, True)
        self.filter_fn = HyenaFilter(d_model * (order - 1), order=filter_order, seq_len=l_max, **filter_args)

    @property
    def d_output(self) -> int:
        """Width of the output."""
        return self.d_model

    def forward(
        self, u: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> Tensor | tuple[Tensor, None]:
        """Run the operator.

        Args:
            u: (B, T, d_model).
            cu_seqlens: Boundaries of packed sequences, (S + 1,), with B == 1.
            state: What to continue from and write to; an empty dict starts. Its entries, float32: "conv", (B, (order +
                1) d_model, taps - 1); "filter", the filters' taps, (order - 1, d_model, l_max), which are computed once
                a dict; and "inputs_0", ..., the gated inputs of each long convolution, (B, P, d_model).

        Returns:
            y: As u, alone or in front of None with `return_state`.

        Raises:
            ValueError: `u` has another shape, or a `state` is given beside `cu_seqlens`.
        """
        check_input("u", u, self.d_model)
        if state is not None and cu_seqlens is not None:
            raise ValueError("state and cu_seqlens are both given, needs at most one: a state holds one sequence a row")
        filters = self._filters(min(u.shape[1], self.l_max), state)
        mixed = convolve(
            self.in_proj(u), self.short_filter, activation=None, state=state, name="conv", cu_seqlens=cu_seqlens
        )
        *gates, v = torch.split(mixed, self.d_model, dim=-1)
        skips = self.filter_fn.bias.view(self.d_model, self.order - 1).T if self.filter_fn.use_bias else None
        for o, gate_in in enumerate(reversed(gates[1:])):
            inner: dict[str, Any] = {
                "gate_in": gate_in,
                "gate_out": gates[0] if o == self.order - 2 else None,
                "skip": None if skips is None else skips[o],
            }
            if self.training and self.dropout.p > 0:
                v, inner["gate_in"] = self.dropout(v * gate_in), None
            v = self._convolve(v, filters[o], inner, state, f"inputs_{o}", cu_seqlens)
            if self.ord_proj_w is not None:
                v = v * self.ord_proj_w[o, 0, 0]
        y: Tensor = self.out_proj(v if self.activation is None else self.activation(v))
        return (y, None) if self.return_state else y

    def _filters(self, length: int, state: State | None) -> Tensor:
        """Return the taps of each order's filters, (order - 1, d_model, length or l_max)."""
        if state and "filter" in state:
            return state["filter"]
        taps = self.filter_fn(length if state is None else self.l_max)
        filters: Tensor = taps.view(-1, self.d_model, self.order - 1).permute(2, 1, 0)
        if state is not None:
            state["filter"] = filters = filters.contiguous()
        return filters

    def _convolve(
        self,
        v: Tensor,
        taps: Tensor,
        inner: dict[str, Any],
        state: State | None,
        name: str,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        if state is None:
            return long_conv(v, taps, cu_seqlens=cu_seqlens, **inner)
        held = state.get(name)
        gate_in, gate_out = inner["gate_in"], inner["gate_out"]
        if held is not None and v.shape[1] == 1:
            rows = {key: one[:, 0] if key != "skip" and one is not None else one for key, one in inner.items()}
            row, state[name] = long_conv_step(held, v[:, 0], taps, **rows)
            return row.unsqueeze(1)
        wide = state_dtype(v.dtype)
        inputs = v.to(wide) if gate_in is None else v.to(wide) * gate_in.to(wide)
        if held is not None:
            inputs = torch.cat([held, inputs], dim=1)
        state[name] = inputs[:, max(0, inputs.shape[1] - taps.shape[1] + 1) :]
        y = long_conv(inputs, taps, skip=inner["skip"])[:, inputs.shape[1] - v.shape[1] :]
        return (y if gate_out is None else y * gate_out.to(wide)).to(v.dtype)
