"""Which operator and featurizer genomes there are layers for: the tables that LIVs of their own are held against.

The structure of T decides which family of layers runs a LIV. Ours, where the paper's table stops:

* q, k and v with a low-rank T are attention, with or without softmax, banded or not; without nonlinearity and band,
  linear attention.
* q, k and v with a semi-separable T are gated linear attention, whose transition from token to token is diagonal; with
  dense channel mixing the gated delta rule, whose transition mixes the channels of a head.
* gate and value with a semi-separable T are the real-gated linear recurrent unit.
* A banded implicit filter is cut to the window.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from star_core.genome.featurizers import FEATURIZERS, FeatureGroup
from star_core.genome.operators import OperatorGenome
from star_core.genome.pool import Family
from star_core.genome.structure import ChannelMixing, Nonlinearity, Sparsity, TokenMixing

Mixing = tuple[TokenMixing, Sparsity]

PLAIN: Mixing = (TokenMixing.DIAGONAL, Sparsity.NONE)
CONVOLVED: Mixing = (TokenMixing.SCALED_TOEPLITZ, Sparsity.BANDED)
IMPLICIT: Mixing = (TokenMixing.SCALED_TOEPLITZ, Sparsity.NONE)

MOST_EXPANSION = 8
MOST_TAPS = 64


@dataclass(frozen=True, slots=True)
class GroupRule:
    """What one feature group of a family may be.

    Attributes:
        mixings: Token mixing and sparsity.
        nonlinearities: What may be applied to the group.
        channels: Channel mixing.
        most_expansion: Largest expansion; the least is 1.
        repeats: Whether copies may be repeated over heads or channels.
    """

    mixings: tuple[Mixing, ...] = (PLAIN,)
    nonlinearities: tuple[Nonlinearity, ...] = (Nonlinearity.NONE,)
    channels: tuple[ChannelMixing, ...] = tuple(ChannelMixing)
    most_expansion: int = MOST_EXPANSION
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class FamilyRule:
    """What the operators and featurizers of one family may be.

    Attributes:
        sparsities: Of the operator, like the next two.
        nonlinearities: What may be applied to T.
        channels: Channel mixing of T.
        groups: Rules of the feature groups.
        tied_expansion: Groups whose expansions must be equal.
        optional: Groups that a featurizer may lack.
    """

    sparsities: tuple[Sparsity, ...]
    nonlinearities: tuple[Nonlinearity, ...]
    channels: tuple[ChannelMixing, ...]
    groups: Mapping[str, GroupRule]
    tied_expansion: tuple[tuple[str, ...], ...] = ()
    optional: Collection[str] = ()


_ALONE, _BOTH = (Sparsity.NONE,), tuple(Sparsity)
_LINEAR, _ANY = (Nonlinearity.NONE,), tuple(Nonlinearity)
_GATES = (Nonlinearity.NONE, Nonlinearity.RELU, Nonlinearity.SWISH)
_DIAGONAL, _DENSE = (ChannelMixing.DIAGONAL,), (ChannelMixing.DENSE,)
_EITHER = (PLAIN, CONVOLVED)

_QUERY = GroupRule(_EITHER, _ANY)
_KEY = GroupRule(_EITHER, _ANY, repeats=True)
_QKV = {"q": _QUERY, "k": _KEY, "v": _KEY}
_GATED_QKV = _QKV | {"z": GroupRule((PLAIN,), _GATES)}
_QKV_TIES = (("q", "k"), ("v", "z"))
_STATE = GroupRule((CONVOLVED,), channels=_DENSE, most_expansion=64)
_PROJECTED = GroupRule(_EITHER, _GATES)
_FILTER = GroupRule((CONVOLVED, IMPLICIT), channels=_DIAGONAL, most_expansion=MOST_TAPS, repeats=True)
_CONVOLUTION = {"v": _PROJECTED, "B": _PROJECTED, "C": _PROJECTED, "K": _FILTER}
_CONVOLUTION_TIES = (("v", "B", "C"),)
_RECURRENCE = {
    "x": GroupRule((CONVOLVED,), (Nonlinearity.NONE, Nonlinearity.SWISH), _DENSE),
    "z": GroupRule((PLAIN,), channels=_DENSE),
    "dt": GroupRule((CONVOLVED,), channels=_DENSE),
    "B": _STATE,
    "C": _STATE,
}
_UNIT = GroupRule()

RULES: Mapping[Family, FamilyRule] = MappingProxyType(
    {
        "attention": FamilyRule(_BOTH, _ANY, tuple(ChannelMixing), _QKV, _QKV_TIES),
        "linear_attention": FamilyRule(_ALONE, _LINEAR, tuple(ChannelMixing), _GATED_QKV, _QKV_TIES, ("z",)),
        "gated_linear_attention": FamilyRule(
            _ALONE, _LINEAR, (ChannelMixing.DIAGONAL, ChannelMixing.GROUPED), _GATED_QKV, _QKV_TIES, ("z",)
        ),
        "gated_delta_rule": FamilyRule(_ALONE, _LINEAR, _DENSE, _GATED_QKV, _QKV_TIES, ("z",)),
        "recurrence": FamilyRule(_ALONE, _LINEAR, _DIAGONAL, _RECURRENCE, (("x", "z", "dt"), ("B", "C"))),
        "short_conv": FamilyRule(_BOTH, _LINEAR, _DIAGONAL, _CONVOLUTION, _CONVOLUTION_TIES),
        "long_conv": FamilyRule(_ALONE, _LINEAR, _DIAGONAL, _CONVOLUTION, _CONVOLUTION_TIES),
        "memoryless": FamilyRule(_ALONE, _GATES, _DENSE, {"gate": _UNIT, "value": _UNIT}, (("gate", "value"),)),
        "rg_lru": FamilyRule(
            _ALONE, _GATES, _DIAGONAL, {"gate": _UNIT, "value": GroupRule(_EITHER, _GATES)}, (("gate", "value"),)
        ),
    }
)
"""What each family's layers compute."""


def family_of(operator: OperatorGenome, groups: Mapping[str, FeatureGroup]) -> Family | None:
    """Return the family that runs an operator on these feature groups; None if there is none."""
    names, mixing = FEATURIZERS[operator.featurizer_class].names, operator.token_mixing
    if "q" in names:
        if mixing is TokenMixing.LOW_RANK:
            plain = operator.nonlinearity is Nonlinearity.NONE and operator.sparsity is Sparsity.NONE
            return "linear_attention" if plain else "attention"
        if mixing is TokenMixing.SEMI_SEPARABLE:
            dense = operator.channel_mixing is ChannelMixing.DENSE
            return "gated_delta_rule" if dense else "gated_linear_attention"
        return None
    if "K" in names:
        if mixing is not TokenMixing.SCALED_TOEPLITZ:
            return None
        short = Sparsity.BANDED in (groups["K"].sparsity, operator.sparsity)
        return "short_conv" if short else "long_conv"
    if "gate" in names:
        families: Mapping[TokenMixing, Family] = {
            TokenMixing.DIAGONAL: "memoryless",
            TokenMixing.SEMI_SEPARABLE: "rg_lru",
        }
        return families.get(mixing)
    return "recurrence" if mixing is TokenMixing.SEMI_SEPARABLE else None
