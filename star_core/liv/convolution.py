"""Gated convolutions: LIV classes GConv-1 (short, explicit filter) and GConv-2 (long, implicit filter)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from star_core.cache import State, StateSpec, append, read, write
from star_core.liv._base import LIV, Features, OutputProjection, cu_seqlens_of, is_step, state_dtype
from star_core.liv.featurizer import ConvolutionFeaturizer
from star_core.liv.groups import GroupFeaturizer
from star_core.ragged import Ragged
from star_kernels import gated_short_conv, gated_short_conv_step, long_conv, long_conv_step


class _GatedConvolution(LIV):
    """What both gated convolutions share: y = out(C * (K conv (B * v))), with "B" and "K" reusable from an earlier
    LIV."""

    def __init__(
        self,
        featurizer: ConvolutionFeaturizer | GroupFeaturizer,
        *,
        width: int,
        inner: int | None = None,
        reuse: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.inner = width if inner is None else inner
        self.reuse = frozenset(reuse)
        self.computed = tuple(name for name in ("v", "B", "C") if name not in self.reuse)
        self.out = OutputProjection(self.inner, width)

    def _gates(
        self, x: Tensor, reused: Features | None, state: State | None, ragged: Ragged | None
    ) -> dict[str, Tensor]:
        groups: dict[str, Tensor] = self.featurizer(x, self.computed, state, ragged)
        if "B" in self.reuse:
            groups["B"] = (reused or {})["B"]
        return groups

    def _taps(self, length: int, reused: Features | None, state: State | None, offset: int) -> Tensor:
        """Return the filter: reused, or made of the weights, once a sequence where the state has room for it."""
        if "K" in self.reuse:
            return (reused or {})["K"]
        if state is None or "K" not in state:
            return self._filter(length)
        if offset:
            return read(state, "K")
        taps = self._filter(state["K"].shape[1])
        write(state, "K", taps)
        return taps

    def refill(self, state: State) -> None:
        """See `LIV`: the filter's taps."""
        if "K" in state:
            write(state, "K", self._filter(state["K"].shape[1]))

    def _filter(self, length: int) -> Tensor:
        assert self.featurizer.filter is not None
        taps: Tensor = self.featurizer.filter(length)
        return taps


class GatedShortConv(_GatedConvolution):
    """Gated convolution with a short explicit filter, y = C * conv(B * v).

    Source: the double-gated block of LFM2 (Liquid AI, 2025), and H3 (Fu et al. 2023, arXiv 2212.14052) with its shift
    matrix alone.

    Args:
        featurizer: Makes the groups and the filter that this LIV computes; may be shared with other LIVs.
        width: Width of the residual stream.
        taps: Length of the filter.
        inner: Channels of the convolution. Default: `width`.
        reuse: Of "B" and "K", those that an earlier LIV computes.
        keeps_filter: Whether decoding keeps the taps, as it should where a network makes them.
    """

    def __init__(
        self,
        featurizer: ConvolutionFeaturizer | GroupFeaturizer,
        *,
        width: int,
        taps: int,
        inner: int | None = None,
        reuse: Collection[str] = (),
        keeps_filter: bool = False,
    ) -> None:
        super().__init__(featurizer, width=width, inner=inner, reuse=reuse)
        self.taps = taps
        self.keeps_filter = keeps_filter

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. "B" is [B, T, inner], "K" the taps [inner, taps]."""
        groups = self._gates(x, reused, state, ragged)
        taps = self._taps(self.taps, reused, state, offset)
        v, B, C = (groups[name] for name in ("v", "B", "C"))
        cu_seqlens = cu_seqlens_of(ragged)
        if state is None:
            y, _ = gated_short_conv(v, B, C, taps, cu_seqlens=cu_seqlens)
        else:
            held = read(state, "conv")
            if is_step(x, state, ragged):
                y, final = gated_short_conv_step(held, v[:, 0], B[:, 0], C[:, 0], taps)
                y = y[:, None]
            else:
                y, final = gated_short_conv(v, B, C, taps, initial_state=held, cu_seqlens=cu_seqlens)
            write(state, "conv", final)
        return self.out(y), {"B": B, "K": taps}

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The last taps - 1 gated inputs and the short convolutions' inputs, and the taps of a filter that a network
        makes unless reused: the same for any `max_length`."""
        spec = self.featurizer.state_spec(self.computed, batch_size)
        if self.keeps_filter and "K" not in self.reuse:
            spec["K"] = StateSpec((self.inner, self.taps), dtype, ())
        return spec | {"conv": StateSpec((batch_size, self.inner, self.taps - 1), state_dtype(dtype))}


class GatedLongConv(_GatedConvolution):
    """Gated convolution with an implicit causal filter as long as the sequence, y = C * (K conv (B * v) + skip * B *
    v).

    Source: Poli et al., Hyena Hierarchy, 2023, arXiv 2302.10866, order 2, without its short convolutions. Decoding
    keeps every gated input and the filter's taps, so that its cache grows with the sequence as attention's does.

    Args:
        featurizer: Makes the groups and the filter that this LIV computes; may be shared with other LIVs.
        width: Width of the residual stream.
        inner: Channels of the convolution. Default: `width`.
        reuse: Of "B" and "K", those that an earlier LIV computes.
    """

    def __init__(
        self,
        featurizer: ConvolutionFeaturizer | GroupFeaturizer,
        *,
        width: int,
        inner: int | None = None,
        reuse: Collection[str] = (),
    ) -> None:
        super().__init__(featurizer, width=width, inner=inner, reuse=reuse)
        self.skip = nn.Parameter(torch.ones(self.inner))

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. "B" is [B, T, inner], "K" the taps: [inner, T], or [inner, max_length] of the cache where
        there is one."""
        groups = self._gates(x, reused, state, ragged)
        B, v, C = (groups[name] for name in ("B", "v", "C"))
        length = x.shape[1] if ragged is None else ragged.longest
        taps = self._taps(length, reused, state, offset)
        if state is None:
            y = long_conv(v, taps, gate_in=B, gate_out=C, skip=self.skip, cu_seqlens=cu_seqlens_of(ragged))
        else:
            y = self._continue(v, B, C, taps, state, offset, ragged)
        return self.out(y), {"B": B, "K": taps}

    def _continue(
        self, v: Tensor, B: Tensor, C: Tensor, taps: Tensor, state: State, offset: int, ragged: Ragged | None
    ) -> Tensor:
        """Convolve the new tokens with all gated inputs so far, and keep theirs."""
        dtype = state["history"].dtype
        seen = append(state, "history", B.to(dtype) * v.to(dtype), offset, ragged)
        if is_step(v, state, ragged):
            past = seen[:, :offset] if ragged is None else _right_aligned(seen[:, :offset], ragged.positions)
            y, _ = long_conv_step(past, v[:, 0], taps, gate_in=B[:, 0], gate_out=C[:, 0], skip=self.skip)
            return y[:, None]
        if offset == 0:
            return long_conv(v, taps, gate_in=B, gate_out=C, skip=self.skip, cu_seqlens=cu_seqlens_of(ragged))
        all_seqlens = None if ragged is None else ragged.all_cu_seqlens
        y = long_conv(seen.to(v.dtype), taps, skip=self.skip, cu_seqlens=all_seqlens)
        return C * (y[:, offset:] if ragged is None or ragged.new is None else y[:, ragged.new])

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Every gated input and the filter's taps unless reused."""
        spec = self.featurizer.state_spec(self.computed, batch_size)
        spec["history"] = StateSpec((batch_size, max_length, self.inner), state_dtype(dtype), ("row", "token"))
        return spec if "K" in self.reuse else spec | {"K": StateSpec((self.inner, max_length), dtype, ())}


def _right_aligned(x: Tensor, lengths: Tensor) -> Tensor:
    """Move the first `lengths` (B,) tokens of `x` [B, T, D] to its end, with zeros before them."""
    places = torch.arange(x.shape[1], device=x.device) - (x.shape[1] - lengths)[:, None]
    moved = x.take_along_dim(places.clamp_min(0)[:, :, None], dim=1)
    return moved.masked_fill((places < 0)[:, :, None], 0.0)
