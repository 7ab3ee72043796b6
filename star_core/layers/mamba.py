"""Mamba's layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.layers._inference import InferenceCached, check_one_state
from star_core.layers._initialise import mark, step_bias, undecayed
from star_core.layers._state import State, check_input, convolve, depthwise, is_step, whole
from star_core.liv._base import state_dtype
from star_kernels import selective_scan, selective_scan_step


class Mamba(InferenceCached):
    """Mamba's layer, with the constructor, the parameters and the decoding of mamba_ssm.modules.mamba_simple.Mamba.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752,
    section 3.4.

    Args:
        d_model: Width of the input.
        d_state: State numbers of each channel.
        d_conv: Taps of the short convolution.
        expand: Channels of the recurrence over `d_model`.
        dt_rank: Rank of the step sizes' projection; "auto" for ceil(d_model / 16).
        dt_min: Least step size at the start.
        dt_max: Largest one.
        dt_init: How the weight of the steps' projection starts: "random" or "constant".
        dt_scale: Its factor.
        dt_init_floor: No step size starts below this.
        conv_bias: Whether the short convolution has a bias.
        bias: Whether the input and output projections have one.
        use_fast_path: Changes nothing: there is one path.
        layer_idx: Key of this layer's states in `inference_params`.
        device: Of the parameters.
        dtype: Of the parameters; `A_log` and `D` are float32 in any case.

    Raises:
        ValueError: `expand * d_model` is not whole, `dt_init` is unknown, or the range of step sizes is empty.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"dt_rank is {dt_rank!r}, needs a number or 'auto'")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init is {dt_init!r}, needs 'random' or 'constant'")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = whole("expand * d_model", expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.layer_idx = layer_idx
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = depthwise(self.d_inner, d_conv, conv_bias, **factory)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        spread = self.dt_rank**-0.5 * dt_scale
        with torch.no_grad():
            if dt_init == "constant":
                self.dt_proj.weight.fill_(spread)
            else:
                self.dt_proj.weight.uniform_(-spread, spread)
            self.dt_proj.bias.copy_(step_bias(self.d_inner, dt_min, dt_max, dt_init_floor, **factory))
        mark(self.dt_proj.bias, "_no_reinit")
        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = undecayed(rates.log().repeat(self.d_inner, 1))
        self.D = undecayed(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: (B, T, d_model).
            inference_params: See `InferenceCached`.
            state: What to continue from and write to; an empty dict starts. Its entries: "conv", (S, d_inner,
                d_conv - 1), and "ssm", (S, d_inner, d_state), both float32.
            cu_seqlens: Boundaries of packed sequences, (S + 1,), with B == 1.

        Returns:
            y: As hidden_states.

        Raises:
            ValueError: `hidden_states` has another shape; `state` and `inference_params` are both given; states are
                of another batch; `layer_idx` is None where `inference_params` is given.
        """
        check_input("hidden_states", hidden_states, self.d_model)
        check_one_state(state, inference_params)
        if inference_params is not None:
            return self._cached(hidden_states, inference_params, cu_seqlens)
        return self._mix(hidden_states, state, cu_seqlens)

    def _mix(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
        step = is_step(x, state, cu_seqlens)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = convolve(x, self.conv1d, activation="silu", state=state, name="conv", cu_seqlens=cu_seqlens)
        low, b, c = torch.split(self.x_proj(x), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.linear(low, self.dt_proj.weight)
        a = -torch.exp(self.A_log.to(state_dtype(self.A_log.dtype)))
        options: dict[str, Any] = {"D": self.D, "dt_bias": self.dt_proj.bias, "dt_softplus": True}
        if state is not None and step:
            # b and c, (B, 1, N), are those of one token and of one group.
            row, state["ssm"] = selective_scan_step(state["ssm"], x[:, 0], dt[:, 0], a, b, c, z=z[:, 0], **options)
            y = row.unsqueeze(1)
        else:
            options |= {"initial_state": None if state is None else state.get("ssm"), "cu_seqlens": cu_seqlens}
            y, final = selective_scan(x, dt, a, b.unsqueeze(2), c.unsqueeze(2), z=z, **options)
            if state is not None:
                state["ssm"] = final
        out: Tensor = self.out_proj(y)
        return out

    def _cache_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch_size, self.d_inner, self.d_conv), (batch_size, self.d_inner, self.d_state)
