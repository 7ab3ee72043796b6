"""What the sharing genes of a valid genome mean: who computes, who reuses, and the one way to write it.

Two kinds of sharing meet in the filter "K" of a gated convolution. It is made of weights alone, so LIVs that share
their featurizer weights have one filter between them whatever their feature-group genes say. Hence the rule: a LIV
that shares its featurizer weights takes K with them, and a strategy that names K says no more about it. Every other
feature group depends on the LIV's input, and the two kinds of sharing are independent for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from star_core.genome.genes import LIVGenes
from star_core.genome.pool import LIVClass

_FIRST, _SECOND = 1, 2  # bits of feature_strategy - 1: the first and the second of LIVClass.shareable


@dataclass(frozen=True, slots=True)
class Sharing:
    """Where each LIV gets its featurizer weights and its feature groups from.

    Attributes:
        featurizer_source: For each LIV the position of the first LIV whose featurizer weights it uses; its own if it
            shares none.
        tensor_source: For each LIV a mapping from the name of a feature group to the position of the earlier LIV that
            computes the tensor. What a LIV computes itself is not in its mapping. Differential LIVs share the tensors
            of both copies.
    """

    featurizer_source: tuple[int, ...]
    tensor_source: tuple[Mapping[str, int], ...]


def sharing_plan(livs: Sequence[LIVGenes], classes: Sequence[LIVClass]) -> Sharing:
    """Return the sharing plan of the LIVs of a valid genome, each with its class."""
    featurizers, tensors = _shared(livs, classes)
    featurizer_source = list(range(len(livs)))
    tensor_source: list[dict[str, int]] = [{} for _ in livs]
    for (_, bit), members in tensors.items():
        name = classes[members[0]].shareable[bit - 1]
        for position in members[1:]:
            tensor_source[position][name] = members[0]
    for members in featurizers:
        for position in members[1:]:
            featurizer_source[position] = members[0]
            if "K" in classes[position].shareable:
                tensor_source[position]["K"] = members[0]
    return Sharing(tuple(featurizer_source), tuple(tensor_source))


def canonical_livs(livs: Sequence[LIVGenes], classes: Sequence[LIVClass]) -> tuple[LIVGenes, ...]:
    """Return the one way to write the network that the LIVs of a valid genome decode to.

    Strategies name only what is really shared with another LIV; labels count the sharing groups from 1 by first use,
    where the feature groups of LIVs that are linked by nothing get labels of their own; what shares nothing has label
    1 and strategy 1.
    """
    featurizers, tensors = _shared(livs, classes)
    featurizer_group = [0] * len(livs)
    for number, members in enumerate(featurizers, 1):
        for position in members:
            featurizer_group[position] = number

    feature_group = [0] * len(livs)
    mask = [0] * len(livs)
    for number, component in enumerate(_components(tensors), 1):
        for bit, members in component:
            for position in members:
                feature_group[position] = number
                mask[position] |= bit

    written = []
    for liv, featurizer, feature, bits in zip(livs, featurizer_group, feature_group, mask, strict=True):
        genes = (liv.liv_class, featurizer or 1, 2 if featurizer else 1, feature or 1, 1 + bits)
        written.append(liv if genes == liv.as_tuple() else LIVGenes(*genes, liv.extension))
    return tuple(written)


def _shared(
    livs: Sequence[LIVGenes], classes: Sequence[LIVClass]
) -> tuple[list[list[int]], dict[tuple[int, int], list[int]]]:
    """Return who shares featurizer weights, and by label and bit who shares a feature group: two or more each."""
    weights: dict[int, list[int]] = {}
    for position, liv in enumerate(livs):
        if liv.featurizer_strategy == 2:
            weights.setdefault(liv.featurizer_group, []).append(position)
    featurizers = [members for members in weights.values() if len(members) > 1]
    have_filter = {p for members in featurizers for p in members if "K" in classes[p].shareable}

    tensors: dict[tuple[int, int], list[int]] = {}
    for position, liv in enumerate(livs):
        bits = liv.feature_strategy - 1
        if bits & _FIRST:
            tensors.setdefault((liv.feature_group, _FIRST), []).append(position)
        if bits & _SECOND and position not in have_filter:
            tensors.setdefault((liv.feature_group, _SECOND), []).append(position)
    return featurizers, {key: members for key, members in tensors.items() if len(members) > 1}


def _components(tensors: Mapping[tuple[int, int], list[int]]) -> list[list[tuple[int, list[int]]]]:
    """Group what is shared, as (bit, positions), into parts with no LIV in common, ordered by their first positions."""
    components = []
    for (label, bit), members in tensors.items():
        other = tensors.get((label, _FIRST + _SECOND - bit))
        if other is None or set(other).isdisjoint(members):
            components.append([(bit, members)])
        elif bit == _FIRST:
            components.append([(bit, members), (_SECOND, other)])
    return sorted(components, key=lambda component: min(members[0] for _, members in component))
