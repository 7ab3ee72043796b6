"""Hyena's implicit filter: a small network of the position, under an exponential window."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from star_core.layers._initialise import mark
from star_core.layers._state import whole


def _register(module: nn.Module, name: str, values: Tensor, lr: float | None) -> None:
    """Hold values as a parameter with safari's mark for the optimiser, or as a buffer where the learning rate is 0."""
    if lr == 0.0:
        module.register_buffer(name, values)
        return
    parameter = nn.Parameter(values)
    mark(parameter, "_optim", {"weight_decay": 0.0} if lr is None else {"lr": lr, "weight_decay": 0.0})
    module.register_parameter(name, parameter)


class Sine(nn.Module):
    """sin(freq * x), with a frequency for each channel.

    Args:
        width: Channels.
        w: Frequency at the start.
    """

    def __init__(self, width: int, w: float) -> None:
        super().__init__()
        self.freq = nn.Parameter(w * torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width)."""
        return torch.sin(self.freq * x)


class PositionalEmbedding(nn.Module):
    """Features of the position: its share of the length, and cosines and sines of whole numbers of turns.

    Args:
        emb_dim: Features, odd.
        seq_len: Length that the share refers to.
        lr_pos_emb: The optimiser's rate for the features; with 0 they are constant.
    """

    z: Tensor
    t: Tensor

    def __init__(self, emb_dim: int, seq_len: int, lr_pos_emb: float | None) -> None:
        super().__init__()
        t = torch.linspace(0, 1, seq_len)[None, :, None]
        bands = (emb_dim - 1) // 2
        frequencies = torch.linspace(1e-4, bands - 1, bands)
        turns = 2 * math.pi * torch.linspace(0, seq_len - 1, seq_len)[None, :, None] / seq_len * frequencies
        _register(self, "z", torch.cat([t, turns.cos(), -turns.sin()], dim=-1), lr_pos_emb)
        _register(self, "t", t, 0.0)


class ExponentialModulation(nn.Module):
    """A window exp(-t |delta|) + shift for each channel.

    Args:
        width: Channels.
        fast_decay_pct: Share of the length at which the fastest channel's window has fallen to `target`.
        slow_decay_pct: The same of the slowest one.
        target: See above.
        modulation_lr: The optimiser's rate for the deltas; with 0 they are constant.
        modulate: Whether there is a window at all.
        shift: Added to it.
    """

    deltas: Tensor

    def __init__(
        self,
        width: int,
        fast_decay_pct: float,
        slow_decay_pct: float,
        target: float,
        modulation_lr: float,
        modulate: bool,
        shift: float,
    ) -> None:
        super().__init__()
        self.modulate, self.shift = modulate, shift
        slow, fast = math.log(target) / slow_decay_pct, math.log(target) / fast_decay_pct
        _register(self, "deltas", torch.linspace(slow, fast, width)[None, None], modulation_lr)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Apply the window to x (1, T, width) at t (1, T, 1)."""
        return x * (torch.exp(-t * self.deltas.abs()) + self.shift) if self.modulate else x


class HyenaFilter(nn.Module):
    """Filters as long as the longest sequence, from a network of the position.

    Source: Poli et al., "Hyena Hierarchy", 2023, arXiv 2302.10866, section 3.3; names and defaults of safari's
    HyenaFilter.

    Args:
        width: Filters.
        emb_dim: Features of the position, odd and at least 3.
        order: Width of the network.
        seq_len: Longest sequence.
        lr: The optimiser's rate for the network.
        lr_pos_emb: The same for the features.
        w: Frequency of its sines at the start.
        wd: The optimiser's weight decay for the network.
        bias: Whether the skip term is used; its weight is held in any case.
        num_inner_mlps: Layers between its first and its last.
        normalized: Whether the filters' taps at a position are divided by the sum of their magnitudes.
        fused_fft_conv: Changes nothing: there is one convolution.
        use_flashfftconv: Changes nothing.
        fast_decay_pct: See `ExponentialModulation`, as of the rest.
        slow_decay_pct: See above.
        target: See above.
        modulation_lr: See above.
        modulate: See above.
        shift: See above.

    Raises:
        ValueError: `emb_dim` is even or below 3.
    """

    def __init__(
        self,
        width: int,
        emb_dim: int = 3,
        order: int = 16,
        seq_len: int = 1024,
        *,
        lr: float = 1e-3,
        lr_pos_emb: float | None = 1e-5,
        w: float = 1,
        wd: float = 0,
        bias: bool = True,
        num_inner_mlps: int = 2,
        normalized: bool = False,
        fused_fft_conv: bool = False,
        use_flashfftconv: bool = False,
        fast_decay_pct: float = 0.3,
        slow_decay_pct: float = 1.5,
        target: float = 1e-2,
        modulation_lr: float = 0.0,
        modulate: bool = True,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        if emb_dim % 2 == 0 or emb_dim < 3:
            raise ValueError(f"emb_dim is {emb_dim}, needs an odd number >= 3: the time, sines and cosines")
        self.use_bias, self.normalized = bias, normalized
        self.bias = nn.Parameter(torch.randn(width))
        self.pos_emb = PositionalEmbedding(emb_dim, whole("l_max", seq_len), lr_pos_emb)
        # One sine for all layers, held in each place, as its weights are named.
        sine = Sine(order, w)
        inner = [layer for _ in range(num_inner_mlps) for layer in (nn.Linear(order, order), sine)]
        last = nn.Linear(order, width, bias=False)
        self.implicit_filter = nn.Sequential(nn.Linear(emb_dim, order), sine, *inner, last)
        for one in self.implicit_filter.parameters():
            mark(one, "_optim", {"lr": lr, "weight_decay": wd})
        self.modulation = ExponentialModulation(
            width, fast_decay_pct, slow_decay_pct, target, modulation_lr, modulate, shift
        )

    def forward(self, length: int) -> Tensor:
        """Return the first `length` taps of every filter, (length, width)."""
        z, t = self.pos_emb.z[:, :length], self.pos_emb.t[:, :length]
        taps = self.implicit_filter(z)
        if self.normalized:
            taps = taps / taps.abs().sum(-1, keepdim=True)
        filters: Tensor = self.modulation(t, taps)[0]
        return filters
