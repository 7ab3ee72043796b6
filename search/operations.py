"""Floating-point operations of LIVs, by formula; a multiplication and an addition are two."""

from __future__ import annotations

from star_core import ModelConfig
from star_core.genome import LIVClass
from star_core.genome.decode import count_heads


def mixing_flops(cls: LIVClass, config: ModelConfig, context: int) -> int:
    """Return the operations of the mixing of tokens for one token with `context` ones up to it.

    Attention takes 2 (K + V) for each key and head, a matrix memory 4 K V a head to fade it, write to it and read from
    it and the delta rule 2 K V more, a selective recurrence 6 N a channel, a convolution 2 a channel and tap.
    """
    groups = {group.name: group for group in cls.featurizer.groups}
    copies = 2 if cls.differential else 1
    if "q" in groups:
        heads = count_heads(cls, config.width, cls.head_dim or config.head_dim)
        key_dim, value_dim = (groups[name].expansion * config.width // heads for name in ("k", "v"))
        if cls.family == "attention":
            seen = context if cls.window is None else min(context, cls.window)
            return copies * 2 * heads * (key_dim + value_dim) * seen
        return copies * heads * key_dim * value_dim * (6 if cls.family == "gated_delta_rule" else 4)
    if cls.family == "recurrence":
        return copies * 6 * groups["B"].expansion * groups["x"].expansion * config.width
    if cls.family in ("short_conv", "long_conv"):
        taps = cls.window or (context if cls.family == "long_conv" else groups["K"].expansion)
        return copies * 2 * taps * groups["v"].expansion * config.width
    return copies * 4 * groups["value"].expansion * config.width if cls.family == "rg_lru" else 0
