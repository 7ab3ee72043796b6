"""The modules of LIVs with genes of their own: feature groups, operators and heads as the genes say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from star_core.genome import ChannelMixing, LIVClass, Nonlinearity, Sparsity
from star_core.genome.decode import count_heads, takes_ffn
from star_core.liv._base import LIV
from star_core.liv.convolution import GatedLongConv, GatedShortConv
from star_core.liv.featurizer import ExplicitFilter, ImplicitFilter, RecurrenceFeaturizer
from star_core.liv.groups import BandedFilter, Filter, GroupFeaturizer, GroupSpec, RepeatedFilter
from star_core.liv.linear_attention import GatedDeltaRule, GatedLinearAttention, LinearAttention
from star_core.liv.low_rank import LowRankAttention
from star_core.liv.memoryless import GatedMemoryless
from star_core.liv.recurrence import Recurrence
from star_core.liv.rg_lru import GatedLRU, LRUFeaturizer


@dataclass(frozen=True)
class LIVShape:
    """Sizes that the layers take from the model's configuration.

    Attributes:
        width: Width of the residual stream.
        head_dim: Channels of an attention head.
        time_scale: Tokens that the implicit filters call 1.
        rope_base: Base of the rotary frequencies.
        ffn_width: Channels of a memoryless unit. Default: as the class says.
        qk_norm_eps: Added to the mean square in the norm of queries and keys. Default: there is none.
    """

    width: int
    head_dim: int
    time_scale: int
    rope_base: float
    ffn_width: int | None = None
    qk_norm_eps: float | None = None


@dataclass(frozen=True)
class _Heads:
    """Heads of a class with q, k and v, and their channels."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


def own_featurizer(liv: LIVClass, shape: LIVShape, computed: Collection[str]) -> nn.Module:
    """Make one featurizer.

    Args:
        liv: Class of the LIVs served.
        shape: Sizes, with the class's own heads.
        computed: Of the feature groups that can be reused, those that some LIV served computes itself.
    """
    if liv.family == "recurrence":
        groups = [name for name in ("B", "C") if name in computed]
        swish = liv.featurizer["x"].nonlinearity is Nonlinearity.SWISH
        return RecurrenceFeaturizer(
            shape.width,
            inner_channels(liv, shape),
            liv.featurizer["B"].expansion,
            groups,
            liv.taps,
            activation="silu" if swish else None,
        )
    names = [name for name in liv.featurizer.names if name not in liv.shareable or name in computed]
    specs = {name: _spec(liv, shape, name) for name in names if name != "K"}
    if liv.family == "rg_lru":
        return LRUFeaturizer(shape.width, specs, shape.width // shape.head_dim)
    return GroupFeaturizer(shape.width, specs, _filter(liv, shape) if "K" in names else None)


def own_liv(liv: LIVClass, shape: LIVShape, featurizer: nn.Module, reuse: Collection[str]) -> LIV:
    """Make one LIV, or one half of a differential one.

    Args:
        liv: Its class.
        shape: Sizes, with the class's own heads.
        featurizer: What `own_featurizer` made for this class.
        reuse: Feature groups whose tensors come from an earlier LIV.
    """
    width, inner = shape.width, inner_channels(liv, shape)
    if isinstance(featurizer, RecurrenceFeaturizer):
        return Recurrence(featurizer, width=width, inner=inner, state_size=liv.featurizer["B"].expansion, reuse=reuse)
    if isinstance(featurizer, LRUFeaturizer):
        return GatedLRU(featurizer, width=width, inner=inner, nonlinearity=liv.operator.nonlinearity)
    assert isinstance(featurizer, GroupFeaturizer)
    if liv.family == "memoryless":
        return GatedMemoryless(featurizer, width=width, hidden=inner, nonlinearity=liv.operator.nonlinearity)
    if liv.family == "short_conv":
        taps = liv.window or liv.featurizer["K"].expansion
        cut = liv.window is not None
        return GatedShortConv(featurizer, width=width, taps=taps, inner=inner, reuse=reuse, keeps_filter=cut)
    if liv.family == "long_conv":
        return GatedLongConv(featurizer, width=width, inner=inner, reuse=reuse)
    heads = _heads(liv, shape)
    if liv.family == "attention":
        return LowRankAttention(
            featurizer,
            width=width,
            **vars(heads),
            nonlinearity=liv.operator.nonlinearity,
            window=liv.window,
            reuse=reuse,
            # single channels have no pairs to rotate
            rope_base=None if heads.key_dim % 2 else shape.rope_base,
            norm_eps=shape.qk_norm_eps,
        )
    kinds: Mapping[str, type[LinearAttention]] = {
        "linear_attention": LinearAttention,
        "gated_linear_attention": GatedLinearAttention,
        "gated_delta_rule": GatedDeltaRule,
    }
    gated = "z" in liv.featurizer.names
    return kinds[liv.family](featurizer, width=width, **vars(heads), gated=gated, reuse=reuse)


def _heads(liv: LIVClass, shape: LIVShape) -> _Heads:
    heads = count_heads(liv, shape.width, shape.head_dim)
    repeat, size = liv.featurizer["k"].repeat, shape.width // heads
    if shape.width % heads or heads % repeat:
        raise ValueError(
            f"width: {liv.name} needs a multiple of head_dim * {repeat} = {size * repeat}, got {shape.width}"
        )
    key_dim, value_dim = (liv.featurizer[name].expansion * size for name in ("k", "v"))
    return _Heads(heads, heads // repeat, key_dim, value_dim)


def inner_channels(liv: LIVClass, shape: LIVShape) -> int:
    """Return the channels of a LIV without heads."""
    if takes_ffn(liv) and shape.ffn_width is not None:
        return shape.ffn_width
    main = next((name for name in ("v", "x", "value") if name in liv.featurizer.names), None)
    assert main is not None
    return liv.featurizer[main].expansion * shape.width


def _spec(liv: LIVClass, shape: LIVShape, name: str) -> GroupSpec:
    group = liv.featurizer[name]
    if "q" in liv.featurizer.names:
        heads = _heads(liv, shape)
        head = heads.key_dim if name in ("q", "k") else heads.value_dim
        size = head * (heads.kv_heads if name in ("k", "v") else heads.heads)
    else:
        head, size = 1, inner_channels(liv, shape)
    blocks = {
        ChannelMixing.DIAGONAL: shape.width,
        ChannelMixing.DENSE: 1,
        ChannelMixing.GROUPED: shape.width // shape.head_dim,
    }[group.channel_mixing]
    if size % blocks:
        raise ValueError(f"width: {name} of {liv.name} has {size} channels, needs a multiple of {blocks} blocks")
    taps = liv.taps if group.sparsity is Sparsity.BANDED else 0
    return GroupSpec(size, blocks, taps, group.nonlinearity, head)


def _filter(liv: LIVClass, shape: LIVShape) -> Filter:
    group = liv.featurizer["K"]
    channels, remainder = divmod(inner_channels(liv, shape), group.repeat)
    if remainder:
        raise ValueError(
            f"width: {liv.name} needs a multiple of {group.repeat} channels, got {inner_channels(liv, shape)}"
        )
    made: Filter
    if group.sparsity is Sparsity.BANDED:
        made = ExplicitFilter(channels, group.expansion)
    else:
        made = ImplicitFilter(channels, shape.time_scale)
        made = made if liv.window is None else BandedFilter(made)
    return made if group.repeat == 1 else RepeatedFilter(made, group.repeat)
