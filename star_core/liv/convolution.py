"""Gated convolutions: LIV classes GConv-1 (short, explicit filter) and GConv-2 (long, implicit filter)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from star_core.cache import State, StateSpec, append, read, write
from star_core.liv._base import LIV, Features, OutputProjection, cu_seqlens_of, is_step, state_dtype
from star_core.liv.featurizer import ConvolutionFeaturizer, ExplicitFilter, ImplicitFilter
from star_core.ragged import Ragged
from star_kernels import gated_short_conv, gated_short_conv_step, long_conv, long_conv_step


class _GatedConvolution(LIV):
    """What both gated convolutions share: y = out(C * (K conv (B * v))), with "B" and "K" reusable from an earlier
    LIV."""

    def __init__(self, featurizer: ConvolutionFeaturizer, *, width: int, reuse: Collection[str] = ()) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.width = width
        self.reuse = frozenset(reuse)
        self.computed = tuple(name for name in ("v", "B", "C") if name not in self.reuse)
        self.out = OutputProjection(width, width)

    def _gates(self, x: Tensor, reused: Features | None) -> dict[str, Tensor]:
        groups: dict[str, Tensor] = self.featurizer(x, self.computed)
        if "B" in self.reuse:
            groups["B"] = (reused or {})["B"]
        return groups


class GatedShortConv(_GatedConvolution):
    """Gated convolution with a short explicit filter, y = C * conv(B * v).

    Source: the double-gated block of LFM2 (Liquid AI, 2025), and H3 (Fu et al. 2023, arXiv 2212.14052) with its shift
    matrix alone.

    Args:
        featurizer: Makes the groups and the filter that this LIV computes; may be shared with other LIVs.
        width: Width of the residual stream.
        taps: Length of the filter.
        reuse: Of "B" and "K", those that an earlier LIV computes.
    """

    def __init__(
        self, featurizer: ConvolutionFeaturizer, *, width: int, taps: int, reuse: Collection[str] = ()
    ) -> None:
        super().__init__(featurizer, width=width, reuse=reuse)
        self.taps = taps

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. "B" is [B, T, width], "K" the taps [width, taps]."""
        groups = self._gates(x, reused)
        taps = (reused or {})["K"] if "K" in self.reuse else self._filter()
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

    def _filter(self) -> Tensor:
        assert isinstance(self.featurizer.filter, ExplicitFilter)
        taps: Tensor = self.featurizer.filter(self.taps)
        return taps

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The last taps - 1 gated inputs: the same for any `max_length`."""
        return {"conv": StateSpec((batch_size, self.width, self.taps - 1), state_dtype(dtype))}


class GatedLongConv(_GatedConvolution):
    """Gated convolution with an implicit causal filter as long as the sequence, y = C * (K conv (B * v) + skip * B *
    v).

    Source: Poli et al., Hyena Hierarchy, 2023, arXiv 2302.10866, order 2, without its short convolutions. Decoding
    keeps every gated input and the filter's taps, so that its cache grows with the sequence as attention's does.

    Args:
        featurizer: Makes the groups and the filter that this LIV computes; may be shared with other LIVs.
        width: Width of the residual stream.
        reuse: Of "B" and "K", those that an earlier LIV computes.
    """

    def __init__(self, featurizer: ConvolutionFeaturizer, *, width: int, reuse: Collection[str] = ()) -> None:
        super().__init__(featurizer, width=width, reuse=reuse)
        self.skip = nn.Parameter(torch.ones(width))

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. "B" is [B, T, width], "K" the taps: [width, T], or [width, max_length] of the cache where
        there is one."""
        groups = self._gates(x, reused)
        B, v, C = (groups[name] for name in ("B", "v", "C"))
        if "K" in self.reuse:
            taps = (reused or {})["K"]
        elif state is None:
            taps = self._filter(x.shape[1] if ragged is None else ragged.longest)
        elif offset == 0:
            taps = self._filter(state["K"].shape[1])
            write(state, "K", taps)
        else:
            taps = read(state, "K")
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

    def refill(self, state: State) -> None:
        """See `LIV`: the filter's taps."""
        if "K" in state:
            write(state, "K", self._filter(state["K"].shape[1]))

    def _filter(self, length: int) -> Tensor:
        assert isinstance(self.featurizer.filter, ImplicitFilter)
        taps: Tensor = self.featurizer.filter(length)
        return taps

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Every gated input and the filter's taps unless reused."""
        spec = {"history": StateSpec((batch_size, max_length, self.width), state_dtype(dtype), ("row", "token"))}
        return spec if "K" in self.reuse else spec | {"K": StateSpec((self.width, max_length), dtype, ())}


def _right_aligned(x: Tensor, lengths: Tensor) -> Tensor:
    """Move the first `lengths` (B,) tokens of `x` [B, T, D] to its end, with zeros before them."""
    places = torch.arange(x.shape[1], device=x.device) - (x.shape[1] - lengths)[:, None]
    moved = x.take_along_dim(places.clamp_min(0)[:, :, None], dim=1)
    return moved.masked_fill((places < 0)[:, :, None], 0.0)
