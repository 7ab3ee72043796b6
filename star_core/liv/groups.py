"""The featurizer of LIVs with genes of their own: every feature group as its six integers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from star_core.cache import State
from star_core.genome import Nonlinearity
from star_core.liv._base import init_linear_
from star_core.liv.featurizer import Convolved, ExplicitFilter, GroupLinear, ImplicitFilter, ShortConv
from star_core.ragged import Ragged


@dataclass(frozen=True)
class GroupSpec:
    """How one feature group is made.

    Attributes:
        size: Its channels.
        blocks: Blocks of channels that are mapped each to itself: 1 for a dense map.
        taps: Length of the short convolution that follows; 0 for none.
        nonlinearity: What is applied last.
        head: Channels over which a softmax goes.
    """

    size: int
    blocks: int = 1
    taps: int = 0
    nonlinearity: Nonlinearity = Nonlinearity.NONE
    head: int = 1


class BlockLinear(nn.Module):
    """A block-diagonal map: each of `blocks` equal parts of the input to one of the output; diagonal where every
    channel is a block."""

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, out_features // blocks, in_features // blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights."""
        init_linear_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in_features] to [..., out_features]."""
        parts = torch.unflatten(x, -1, (self.weight.shape[0], -1))
        return torch.einsum("...bi,boi->...bo", parts, self.weight).flatten(-2)


class RepeatedFilter(nn.Module):
    """A filter each of whose channels serves `repeat` neighbours."""

    def __init__(self, filter: nn.Module, repeat: int) -> None:
        super().__init__()
        self.filter = filter
        self.repeat = repeat

    def forward(self, length: int) -> Tensor:
        """Return the taps, [channels * repeat, taps]."""
        taps: Tensor = self.filter(length).repeat_interleave(self.repeat, dim=0)
        return taps


class BandedFilter(nn.Module):
    """An implicit filter cut to its first taps, in the order of an explicit one: the last meets the present token."""

    def __init__(self, filter: ImplicitFilter) -> None:
        super().__init__()
        self.filter = filter

    def forward(self, length: int) -> Tensor:
        """Return `length` taps, [channels, length]."""
        taps: Tensor = self.filter(length).flip(-1)
        return taps


Filter = ExplicitFilter | ImplicitFilter | RepeatedFilter | BandedFilter


class GroupFeaturizer(Convolved):
    """Feature groups that are each a dense, grouped or diagonal map of the residual stream, through a short
    convolution and a nonlinearity or not.

    Args:
        width: Width of the residual stream.
        groups: How each is made; groups left out are never computed.
        filter: What makes the filter of a gated convolution; None where no LIV of the sharing group computes it.
    """

    def __init__(self, width: int, groups: Mapping[str, GroupSpec], filter: Filter | None = None) -> None:
        super().__init__()
        self.groups = dict(groups)
        dense = {name: spec.size for name, spec in groups.items() if spec.blocks == 1}
        self.dense = GroupLinear(width, dense) if dense else None
        self.blocks = nn.ModuleDict(
            {name: BlockLinear(width, spec.size, spec.blocks) for name, spec in groups.items() if name not in dense}
        )
        self.convs = nn.ModuleDict(
            {name: ShortConv(spec.size, spec.taps) for name, spec in groups.items() if spec.taps}
        )
        self.filter = filter

    def forward(
        self, x: Tensor, names: Sequence[str], state: State | None = None, ragged: Ragged | None = None
    ) -> dict[str, Tensor]:
        """Return the named groups of `x` [B, T, width], each [B, T, size]."""
        made: dict[str, Tensor] = {}
        if self.dense is not None:
            made |= self.dense(x, [name for name in self.dense.sizes if name in names])
        made |= {name: self.blocks[name](x) for name in names if name in self.blocks}
        # Autocast has lists of its own for what runs in which dtype, and operators want their arguments alike.
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        for name in names:
            group = self.convolved(name, made[name].to(dtype), state, ragged)
            made[name] = activated(group, self.groups[name].nonlinearity, self.groups[name].head).to(dtype)
        return made


def activated(x: Tensor, nonlinearity: Nonlinearity, head: int = 1) -> Tensor:
    """Apply a nonlinearity to `x` [..., D]; a softmax goes over every `head` channels."""
    if nonlinearity is Nonlinearity.RELU:
        return F.relu(x)
    if nonlinearity is Nonlinearity.SWISH:
        return F.silu(x)
    if nonlinearity is Nonlinearity.SOFTMAX:
        return torch.unflatten(x, -1, (-1, head)).softmax(dim=-1).flatten(-2)
    return x
