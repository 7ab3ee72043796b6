"""From a class of the pool to its modules: featurizers that may be shared, and the LIVs that call them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from star_core.genome import LIVClass, TokenMixing
from star_core.genome.pool import TAPS
from star_core.liv._base import LIV
from star_core.liv.attention import Attention
from star_core.liv.convolution import GatedLongConv, GatedShortConv
from star_core.liv.differential import Differential
from star_core.liv.featurizer import (
    AttentionFeaturizer,
    ConvolutionFeaturizer,
    ExplicitFilter,
    ImplicitFilter,
    MemorylessFeaturizer,
    RecurrenceFeaturizer,
)
from star_core.liv.groups import GroupFeaturizer
from star_core.liv.memoryless import GatedMemoryless
from star_core.liv.own import LIVShape, inner_channels, own_featurizer, own_liv

Featurizer = AttentionFeaturizer | RecurrenceFeaturizer | ConvolutionFeaturizer | MemorylessFeaturizer | GroupFeaturizer

FEATURIZER_TAPS = TAPS
"""Length of the short convolutions inside featurizers of classes 2, 5 and 6."""


def build_featurizer(liv: LIVClass, shape: LIVShape, computed: Collection[str]) -> nn.ModuleList:
    """Make the featurizer of one LIV or one sharing group: one module, or two for a differential class.

    Args:
        liv: Class of the LIVs served.
        shape: Sizes.
        computed: Of the feature groups that can be reused, those that some LIV served computes itself.
    """
    make = own_featurizer if liv.own else _featurizer
    shape = _own_shape(liv, shape)
    return nn.ModuleList(make(liv, shape, computed) for _ in range(2 if liv.differential else 1))


def build_liv(liv: LIVClass, shape: LIVShape, featurizers: nn.ModuleList, reuse: Collection[str]) -> LIV:
    """Make one LIV on the featurizers of its sharing group.

    Args:
        liv: Its class.
        shape: Sizes.
        featurizers: What `build_featurizer` made for this class.
        reuse: Feature groups whose tensors come from an earlier LIV.
    """
    make = own_liv if liv.own else _liv
    parts = [make(liv, _own_shape(liv, shape), featurizer, reuse) for featurizer in featurizers]
    return Differential(*parts) if liv.differential else parts[0]


def _own_shape(liv: LIVClass, shape: LIVShape) -> LIVShape:
    """Return the sizes of a LIV, which may have heads of its own."""
    return shape if liv.head_dim is None else replace(shape, head_dim=liv.head_dim)


def _kv_heads(liv: LIVClass, shape: LIVShape) -> int:
    heads, remainder = divmod(shape.width, shape.head_dim)
    repeat = liv.featurizer["k"].repeat
    if remainder or heads % repeat:
        raise ValueError(
            f"width: {liv.name} needs a multiple of head_dim * {repeat} = {shape.head_dim * repeat}, got {shape.width}"
        )
    return heads // repeat


def _featurizer(liv: LIVClass, shape: LIVShape, computed: Collection[str]) -> nn.Module:
    width = shape.width
    if liv.family == "attention":
        kv = _kv_heads(liv, shape)
        heads = {"q": width // shape.head_dim} | {name: kv for name in ("k", "v") if name in computed}
        toeplitz = liv.featurizer["q"].token_mixing is TokenMixing.SCALED_TOEPLITZ
        taps = FEATURIZER_TAPS if toeplitz else 0
        return AttentionFeaturizer(width, heads, shape.head_dim, taps, norm_eps=shape.qk_norm_eps)
    if liv.family == "recurrence":
        return own_featurizer(liv, shape, computed)
    if liv.family == "memoryless":
        return MemorylessFeaturizer(width, inner_channels(liv, shape))
    groups = [name for name in ("v", "B", "C") if name != "B" or name in computed]
    filter: ExplicitFilter | ImplicitFilter | None = None
    if "K" in computed:
        short = liv.family == "short_conv"
        filter = (
            ExplicitFilter(width, liv.featurizer["K"].expansion) if short else ImplicitFilter(width, shape.time_scale)
        )
    return ConvolutionFeaturizer(width, groups, filter)


def _liv(liv: LIVClass, shape: LIVShape, featurizer: nn.Module, reuse: Collection[str]) -> LIV:
    width = shape.width
    if isinstance(featurizer, AttentionFeaturizer):
        return Attention(
            featurizer,
            width=width,
            heads=width // shape.head_dim,
            kv_heads=_kv_heads(liv, shape),
            head_dim=shape.head_dim,
            reuse=reuse,
            rope_base=shape.rope_base,
        )
    if isinstance(featurizer, RecurrenceFeaturizer):
        return own_liv(liv, shape, featurizer, reuse)
    if isinstance(featurizer, MemorylessFeaturizer):
        return GatedMemoryless(featurizer, width=width, hidden=inner_channels(liv, shape))
    assert isinstance(featurizer, ConvolutionFeaturizer)
    if liv.family == "short_conv":
        return GatedShortConv(featurizer, width=width, taps=liv.featurizer["K"].expansion, reuse=reuse)
    return GatedLongConv(featurizer, width=width, reuse=reuse)
