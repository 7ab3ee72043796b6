"""Mamba-2's layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.layers._inference import InferenceCached, check_one_state
from star_core.layers._initialise import step_bias, undecayed
from star_core.layers._state import (
    State,
    check_divides,
    check_input,
    convolve,
    depthwise,
    is_step,
    split_heads,
    whole,
)
from star_core.liv._base import state_dtype
from star_kernels import rms_norm, ssd, ssd_step, swiglu
from star_kernels.compat._sequences import find_sequences


class GroupedRMSNorm(nn.Module):
    """RMS norm over groups of channels, each of its own: mamba-ssm's RMSNormGated without the gate.

    Args:
        width: Channels.
        groups: Groups of equal width.
        eps: Added to the mean square.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(self, width: int, groups: int, eps: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., width)."""
        if self.groups == 1:
            return rms_norm(x, self.weight, eps=self.eps)
        # Wide between the norm and the weight, so that there is one rounding as with one group.
        rows = split_heads(x.to(state_dtype(x.dtype)), self.groups)
        normed = rms_norm(rows, rows.new_ones(rows.shape[-1:]), eps=self.eps).flatten(-2)
        return (normed * self.weight).to(x.dtype)


class Mamba2(InferenceCached):
    """Mamba-2's layer, with the constructor, the parameters and the decoding of mamba_ssm.modules.mamba2.Mamba2.

    Source: Dao and Gu, "Transformers are SSMs", 2024, arXiv 2405.21060, section 7. Differs from mamba-ssm's code in:
    `dt_limit` and `D_has_hdim` hold in decoding too; sequences of `cu_seqlens` or `seq_idx` are apart in every path.

    Args:
        d_model: Width of the input.
        d_state: State numbers of each channel.
        d_conv: Taps of the short convolution.
        conv_init: Bound of the uniform start of its filter; None for torch's.
        expand: Inner width over `d_model`.
        headdim: Channels of a head.
        d_ssm: Channels of the recurrence; the rest of the inner width is a gated unit. None for all.
        ngroups: Groups of heads that share B and C, and groups of the norm.
        A_init_range: Range of the decay rates at the start.
        D_has_hdim: Whether the skip weight is one a channel, not one a head.
        rmsnorm: Whether to normalise before the output projection.
        norm_before_gate: Whether that norm comes before the gate.
        dt_min: Least step size at the start.
        dt_max: Largest one.
        dt_init_floor: No step size starts below this.
        dt_limit: Least and largest step size, after the softplus.
        bias: Whether the input and output projections have a bias.
        conv_bias: Whether the short convolution has one.
        chunk_size: Changes nothing: the kernel chooses.
        use_mem_eff_path: Changes nothing: there is one path.
        layer_idx: Key of this layer's states in `inference_params`.
        process_group: Must be None: one process holds the layer.
        sequence_parallel: Changes nothing without a process group.
        device: Of the parameters.
        dtype: Of the parameters; `D` is float32 in any case.

    Raises:
        ValueError: a size does not divide another, a range is empty, or `process_group` is given.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),  # noqa: N803
        D_has_hdim: bool = False,  # noqa: N803
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if process_group is not None:
            raise ValueError("process_group is given, needs None: a layer is not split among processes")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"A_init_range is {A_init_range}, needs 0 < low <= high")
        if not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"dt_limit is {dt_limit}, needs 0 <= low <= high")
        self.d_model, self.d_state, self.d_conv, self.headdim = d_model, d_state, d_conv, headdim
        self.d_inner = whole("expand * d_model", expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(f"d_ssm is {d_ssm}, needs 1 .. expand * d_model == {self.d_inner}")
        check_divides("headdim", headdim, "d_ssm", self.d_ssm)
        self.nheads = self.d_ssm // headdim
        check_divides("ngroups", ngroups, "d_ssm / headdim", self.nheads)
        self.ngroups, self.dt_limit, self.layer_idx = ngroups, tuple(dt_limit), layer_idx
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        # What the input projection makes: the gated unit's two halves, z, what the convolution takes, and dt.
        self.sizes = [self.d_inner - self.d_ssm] * 2 + [self.d_ssm, conv_dim, self.nheads]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=bias, **factory)
        self.conv1d = depthwise(conv_dim, d_conv, conv_bias, **factory)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = undecayed(step_bias(self.nheads, dt_min, dt_max, dt_init_floor, **factory))
        rates = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = undecayed(rates.log().to(dtype=dtype))
        self.D = undecayed(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            self.norm = GroupedRMSNorm(self.d_ssm, ngroups, 1e-5, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
        *,
        state: State | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            u: (B, T, d_model), or (B T, d_model) with `seqlen`.
            seqlen: T, where u has its rows laid end to end.
            seq_idx: The sequence of each token, (B, T), int32 or int64; a sequence's tokens are adjacent. States are
                those at the ends of the rows. Not read where `cu_seqlens` says the same.
            cu_seqlens: Boundaries of packed sequences, (S + 1,), with B == 1. States are those at their ends.
            inference_params: See `InferenceCached`.
            state: What to continue from and write to; an empty dict starts. Its entries: "conv", (S, channels,
                d_conv - 1), and "ssm", (S, H, headdim, d_state), both float32.

        Returns:
            y: As u.

        Raises:
            ValueError: `u` has another shape or `seqlen` does not divide its rows; `state` and `inference_params` are
                both given; states are of another batch; `layer_idx` is None where `inference_params` is given.
        """
        shape = u.shape
        if seqlen is not None:
            if u.ndim != 2:
                raise ValueError(f"u has shape {tuple(shape)}, needs (B T, {self.d_model}) beside seqlen")
            check_divides("seqlen", seqlen, "the tokens of u", shape[0])
            u = u.view(-1, seqlen, shape[1])
        check_input("u", u, self.d_model)
        check_one_state(state, inference_params)
        if seq_idx is not None and cu_seqlens is None and u.numel():
            if inference_params is not None:
                raise ValueError(
                    "seq_idx is given beside inference_params, needs cu_seqlens to tell whose states are held"
                )
            y = self._mix_indexed(u, state, seq_idx)
        elif inference_params is not None:
            y = self._cached(u, inference_params, cu_seqlens)
        else:
            y = self._mix(u, state, cu_seqlens)
        return y.view(shape)

    def _mix_indexed(self, u: Tensor, state: State | None, seq_idx: Tensor) -> Tensor:
        """Lay the rows end to end; the first sequence of each continues the row's state."""
        sequences = find_sequences(seq_idx, u, (u.shape[0], u.shape[1]))
        inner: State | None = None
        if state is not None:
            inner = {name: held for name, one in state.items() if (held := sequences.spread(one)) is not None}
        y = self._mix(u.reshape(1, -1, self.d_model), inner, sequences.cu_seqlens)
        if state is not None and inner is not None:
            state.update({name: one[sequences.last] for name, one in inner.items()})
        return y

    def _mix(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
        step = is_step(x, state, cu_seqlens)
        gate, up, z, mixed, dt = torch.split(self.in_proj(x), self.sizes, dim=-1)
        mixed = convolve(mixed, self.conv1d, activation="silu", state=state, name="conv", cu_seqlens=cu_seqlens)
        shared = self.ngroups * self.d_state
        x, b, c = torch.split(mixed, [self.d_ssm, shared, shared], dim=-1)
        # The gate goes into the scan unless something comes between the two.
        inside = not (self.D_has_hdim or (self.rmsnorm and self.norm_before_gate))
        y = self._scan(
            split_heads(x, self.nheads),
            dt,
            split_heads(b, self.ngroups),
            split_heads(c, self.ngroups),
            split_heads(z, self.nheads) if inside else None,
            state,
            cu_seqlens,
            step,
        ).flatten(-2)
        if self.D_has_hdim:
            wide = state_dtype(x.dtype)
            y = torch.addcmul(y.to(wide), self.D, x.to(wide)).to(x.dtype)
        if self.rmsnorm and self.norm_before_gate:
            y = swiglu(z, self.norm(y))
        else:
            y = y if inside else swiglu(z, y)
            y = self.norm(y) if self.rmsnorm else y
        if self.d_ssm < self.d_inner:
            y = torch.cat([swiglu(gate, up), y], dim=-1)
        out: Tensor = self.out_proj(y)
        return out

    def _scan(
        self,
        x: Tensor,
        dt: Tensor,
        b: Tensor,
        c: Tensor,
        z: Tensor | None,
        state: State | None,
        cu_seqlens: Tensor | None,
        step: bool,
    ) -> Tensor:
        a = -torch.exp(self.A_log.to(state_dtype(self.A_log.dtype)))
        options: dict[str, Any] = {"D": None if self.D_has_hdim else self.D}
        if self.dt_limit == (0.0, math.inf):
            options |= {"dt_bias": self.dt_bias, "dt_softplus": True}
        else:
            wide = state_dtype(dt.dtype)
            dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
        if state is not None and step:
            gate = None if z is None else z[:, 0]
            row, state["ssm"] = ssd_step(state["ssm"], x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], z=gate, **options)
            return row.unsqueeze(1)
        held = None if state is None else state.get("ssm")
        y, final = ssd(x, dt, a, b, c, z=z, initial_state=held, cu_seqlens=cu_seqlens, **options)
        if state is not None:
            state["ssm"] = final
        return y

    def _cache_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv_shape = (batch_size, self.conv1d.in_channels, self.d_conv)
        return conv_shape, (batch_size, self.nheads, self.headdim, self.d_state)
