"""The pool of 17 LIV classes that a backbone genome's first gene chooses from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from star_core.genome.featurizers import FEATURIZERS, FeaturizerGenome
from star_core.genome.operators import OperatorGenome
from star_core.genome.structure import ChannelMixing, Residual, Sparsity

Family = Literal[
    "attention",
    "recurrence",
    "short_conv",
    "long_conv",
    "memoryless",
    "linear_attention",
    "gated_linear_attention",
    "gated_delta_rule",
    "rg_lru",
]
"""What runs a class: the first five in the pool, all nine where a LIV has an operator or a featurizer of its own."""

TAPS = 4
"""Length of the short convolutions inside featurizers, as in Mamba, unless a LIV says otherwise."""

WINDOW = 64
"""Tokens that a banded operator sees, the present one included, unless a LIV says otherwise."""

_SHAREABLE: Mapping[Family, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ("k", "v"),
        "recurrence": ("B", "C"),
        "short_conv": ("B", "K"),
        "long_conv": ("B", "K"),
        "memoryless": (),
        "linear_attention": ("k", "v"),
        "gated_linear_attention": ("k", "v"),
        "gated_delta_rule": ("k", "v"),
        "rg_lru": (),
    }
)


@dataclass(frozen=True, slots=True)
class LIVClass:
    """A class of linear input-varying layers: one of the pool's, or what a LIV with an extension is.

    Attributes:
        id: 1 to 17; of a LIV with an extension, that of the class it departs from.
        name: As the paper writes it, such as "SA-3" or "Diff-GConv-1".
        family: Which module runs it.
        operator: Structure of its T.
        featurizer: Its feature groups.
        differential: Whether it is LIV_a(x) - lambda LIV_b(x), two copies with parameters of their own.
        own: Whether operator, featurizer or a size is the LIV's own and not the pool's.
        window: Tokens that a banded operator sees, the present one included; None where it is not banded.
        taps: Length of the short convolutions inside the featurizer.
        head_dim: Channels of a head, where it is not the model's.
        residual: Where the LIV's norms stand.
    """

    id: int
    name: str
    family: Family
    operator: OperatorGenome
    featurizer: FeaturizerGenome
    differential: bool
    own: bool = False
    window: int | None = None
    taps: int = TAPS
    head_dim: int | None = None
    residual: Residual = Residual.PRE_NORM

    def __hash__(self) -> int:
        return hash((self.id, self.name, self.window, self.taps, self.head_dim))

    @property
    def weights(self) -> tuple[object, ...]:
        """What two LIVs have in common if they can share their featurizer weights."""
        if not self.own:
            return (self.id,)
        banded_filter = self.window if self.family == "short_conv" else None
        mixing = self.operator.channel_mixing
        return (self.family, self.featurizer, self.differential, self.taps, self.head_dim, mixing, banded_filter)

    @property
    def uses_heads(self) -> bool:
        """Whether channels of a head, the model's or its own, make a difference to it."""
        if self.family in ("gated_delta_rule", "rg_lru") or self.operator.channel_mixing is ChannelMixing.GROUPED:
            return True
        return any(group.channel_mixing is ChannelMixing.GROUPED for group in self.featurizer.groups)

    @property
    def has_short_convolutions(self) -> bool:
        """Whether a feature group of its featurizer goes through a convolution of `taps`."""
        return any(group.name != "K" and group.sparsity is Sparsity.BANDED for group in self.featurizer.groups)

    @property
    def shareable(self) -> tuple[str, ...]:
        """Feature groups whose tensors another LIV may reuse: two, or none for a memoryless class."""
        return _SHAREABLE[self.family]

    @property
    def strategies(self) -> Mapping[int, tuple[str, ...]]:
        """Feature-group-sharing strategies and the groups that each shares: 1 none, 2 first, 3 second, 4 both."""
        groups = self.shareable
        return {
            1 + mask: tuple(name for bit, name in enumerate(groups) if mask >> bit & 1)
            for mask in range(1 << len(groups))
        }


def _pool() -> Mapping[int, LIVClass]:
    rows: list[tuple[str, Family, str]] = [
        ("SA-1", "attention", "12123"),
        ("SA-2", "attention", "22123"),
        ("SA-3", "attention", "32123"),
        ("SA-4", "attention", "42123"),
        ("Rec-1", "recurrence", "54111"),
        ("Rec-2", "recurrence", "64111"),
        ("GConv-1", "short_conv", "73111"),
        ("GConv-2", "long_conv", "83111"),
        ("GMemless", "memoryless", "91142"),
    ]
    pool: dict[int, LIVClass] = {}
    for differential, count in ((False, 9), (True, 8)):
        for name, family, text in rows[:count]:
            operator = OperatorGenome.parse(text)
            featurizer = FEATURIZERS[operator.featurizer_class]
            number, full_name = len(pool) + 1, f"Diff-{name}" if differential else name
            pool[number] = LIVClass(number, full_name, family, operator, featurizer, differential)
    return MappingProxyType(pool)


POOL: Mapping[int, LIVClass] = _pool()
"""LIV classes by id: 1 to 9, and 10 to 17, the differential forms of 1 to 8.

Source: Thomas et al., STAR, 2024, arXiv 2411.17800. Differs from it in: GConv-2 is causal."""
