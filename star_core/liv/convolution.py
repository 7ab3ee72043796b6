"""Gated convolutions: LIV classes GConv-1 (short, explicit filter) and GConv-2 (long, implicit filter)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from star_core.cache import State, StateSpec
from star_core.liv._base import LIV, Features, OutputProjection, state_dtype
from star_core.liv.featurizer import ConvolutionFeaturizer, ExplicitFilter, ImplicitFilter
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
        self, x: Tensor, *, reused: Features | None = None, state: State | None = None, offset: int = 0
    ) -> tuple[Tensor, Features]:
        """See `LIV`. "B" is [B, T, width], "K" the taps [width, taps]."""
        groups = self._gates(x, reused)
        taps = (reused or {})["K"] if "K" in self.reuse else self._filter()
        if state is None:
            y, _ = gated_short_conv(groups["v"], groups["B"], groups["C"], taps)
        elif x.shape[1] == 1:
            y, final = gated_short_conv_step(
                state["conv"], groups["v"][:, 0], groups["B"][:, 0], groups["C"][:, 0], taps
            )
            y = y[:, None]
            state["conv"].copy_(final)
        else:
            y, final = gated_short_conv(groups["v"], groups["B"], groups["C"], taps, initial_state=state["conv"])
            state["conv"].copy_(final)
        return self.out(y), {"B": groups["B"], "K": taps}

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
        self, x: Tensor, *, reused: Features | None = None, state: State | None = None, offset: int = 0
    ) -> tuple[Tensor, Features]:
        """See `LIV`. "B" is [B, T, width], "K" the taps: [width, T], or [width, max_length] of the cache where
        there is one."""
        groups = self._gates(x, reused)
        tokens = x.shape[1]
        if state is None:
            taps = (reused or {})["K"] if "K" in self.reuse else self._filter(tokens)
            y = long_conv(groups["v"], taps, gate_in=groups["B"], gate_out=groups["C"], skip=self.skip)
            return self.out(y), {"B": groups["B"], "K": taps}
        history = state["history"]
        if "K" not in self.reuse and offset == 0:
            state["K"].copy_(self._filter(history.shape[1]))
        taps = (reused or {})["K"] if "K" in self.reuse else state["K"]
        B, v, C = (groups[name] for name in ("B", "v", "C"))
        history[:, offset : offset + tokens] = B.to(history.dtype) * v.to(history.dtype)
        if tokens == 1:
            seen = history[:, :offset]
            y, _ = long_conv_step(seen, v[:, 0], taps, gate_in=B[:, 0], gate_out=C[:, 0], skip=self.skip)
            y = y[:, None]
        else:
            seen = history[:, : offset + tokens].to(v.dtype)
            y = C * long_conv(seen, taps[:, : offset + tokens], skip=self.skip)[:, offset:]
        return self.out(y), {"B": groups["B"], "K": taps}

    def _filter(self, length: int) -> Tensor:
        assert isinstance(self.featurizer.filter, ImplicitFilter)
        taps: Tensor = self.featurizer.filter(length)
        return taps

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Every gated input and the filter's taps unless reused."""
        spec = {"history": StateSpec((batch_size, max_length, self.width), state_dtype(dtype))}
        return spec if "K" in self.reuse else spec | {"K": StateSpec((self.width, max_length), dtype)}
