"""What is wrong with a genome, in words: one violation of each rule that validity knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from star_core.genome.decode import faults, resolve
from star_core.genome.extension import SizeGenes
from star_core.genome.genes import LIVGenes
from star_core.genome.pool import POOL, LIVClass
from star_core.genome.structure import ChannelMixing

MOST_STRATEGIES = max(len(cls.strategies) for cls in POOL.values())
"""The most feature-group-sharing strategies that a class of the pool has."""

KIND = {
    "attention": "attention",
    "recurrence": "recurrence",
    "short_conv": "gated convolution",
    "long_conv": "gated convolution",
    "memoryless": "memoryless unit",
    "linear_attention": "linear attention",
    "gated_linear_attention": "linear attention",
    "gated_delta_rule": "gated delta rule",
    "rg_lru": "recurrent unit",
}
"""Family to the kind of layer whose feature groups may stand in for one another."""

Size = tuple[int, int, str]
"""Expansion, repeat and form of a feature group; tensors of the same group name match where these do."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a genome.

    Attributes:
        position: Of the LIV, from 0; -1 for the sizes of the model.
        gene: Name of the gene that `repair` would change: one of `GENES`, of the fields of `Extension` or of
            `SizeGenes`, or a feature group's name.
        message: What is wrong and what is needed, in words.
    """

    position: int
    gene: str
    message: str


def group_size(cls: LIVClass, name: str) -> Size:
    """Return what a feature group's tensor has to have in common with another's to be shared."""
    group = cls.featurizer[name]
    return group.expansion, group.repeat, _form(cls, name) if cls.own else ""


def _form(cls: LIVClass, name: str) -> str:
    """Say what the tensor of a group has of its LIV's own, beside expansion and repeat; nothing if it is as usual."""
    parts = []
    if name in ("k", "v"):
        mixing = cls.operator.channel_mixing
        if mixing is not ChannelMixing.GROUPED and cls.family != "gated_delta_rule":
            parts.append("a single head" if mixing is ChannelMixing.DENSE else "heads of 1 channel")
        elif cls.head_dim is not None:
            parts.append(f"heads of {cls.head_dim} channels")
    if cls.window is not None and name in ("k", "v", "K"):
        parts.append(f"a window of {cls.window} tokens")
    if name == "K" and (expansion := cls.featurizer["v"].expansion) > 1:
        parts.append(f"{expansion} times the width's channels")
    return " and ".join(parts)


def bad_sizes(sizes: SizeGenes) -> Iterator[Violation]:
    """Yield what is wrong with the sizes of a model."""
    if sizes.head_dim is not None and sizes.head_dim % 2:
        yield Violation(-1, "head_dim", f"head_dim is {sizes.head_dim}; needs an even number")
    elif sizes.head_dim is not None and sizes.width is not None and sizes.width % sizes.head_dim:
        yield Violation(-1, "width", f"width is {sizes.width}; needs a multiple of head_dim = {sizes.head_dim}")


def faulty_class(position: int, liv: LIVGenes, sizes: SizeGenes) -> Iterator[Violation]:
    """Yield what is wrong with a LIV that no layer can serve."""
    for gene, words in faults(liv, sizes):
        yield Violation(position, gene, f"LIV {position}: {words}")


def unknown_class(position: int, liv: LIVGenes) -> Iterator[Violation]:
    """Yield what is wrong with a LIV whose class does not exist."""
    message = f"LIV {position}: there is no class {liv.liv_class}; needs {min(POOL)} to {max(POOL)}"
    yield Violation(position, "liv_class", message)
    if liv.featurizer_strategy > 2:
        yield no_featurizer_strategy(position, liv)
    if liv.feature_strategy > MOST_STRATEGIES:
        yield no_feature_strategy(position, liv, None)


def no_featurizer_strategy(position: int, liv: LIVGenes) -> Violation:
    """Blame a strategy of sharing weights that does not exist."""
    message = (
        f"LIV {position}: there is no featurizer-sharing strategy {liv.featurizer_strategy}; "
        "needs 1 (none) or 2 (all weights)"
    )
    return Violation(position, "featurizer_strategy", message)


def no_feature_strategy(position: int, liv: LIVGenes, cls: LIVClass | None) -> Violation:
    """Blame a strategy of sharing feature groups that a class, or if it is unknown every class, does not have."""
    message = f"LIV {position}: there is no feature-group-sharing strategy {liv.feature_strategy}" + (
        f" for {cls.name}; needs {_listed(cls)}" if cls else f"; needs 1 to {MOST_STRATEGIES}"
    )
    return Violation(position, "feature_strategy", message)


def _listed(cls: LIVClass) -> str:
    """Return the strategies of a class in words, such as "1 (none), 2 (k), 3 (v) or 4 (k and v)"."""
    words = [f"{number} ({' and '.join(names) or 'none'})" for number, names in cls.strategies.items()]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def mixed_classes(position: int, first: int, livs: Sequence[LIVGenes], sizes: SizeGenes) -> Violation:
    """Blame the later one of two LIVs that share weights and are not of one class."""
    name, first_name = (resolve(livs[index], sizes).name for index in (position, first))
    message = (
        f"LIV {position}: {name} cannot share featurizer weights with LIV {first}, {first_name}, "
        f"under label {livs[position].featurizer_group}; needs the same class"
    )
    return Violation(position, "featurizer_group", message)


def mixed_features(position: int, first: int, livs: Sequence[LIVGenes], sizes: SizeGenes) -> Violation:
    """Blame the later one of two LIVs that share feature groups that are no substitute for one another."""
    liv, other = livs[position], livs[first]
    cls, other_cls = resolve(liv, sizes), resolve(other, sizes)
    if KIND[cls.family] != KIND[other_cls.family]:
        needs = f"another {KIND[cls.family]}"
    elif cls.differential != other_cls.differential:
        needs = "a differential class" if cls.differential else "a class that is not differential"
    else:
        common = (
            name
            for name in cls.strategies[liv.feature_strategy]
            if name in other_cls.strategies[other.feature_strategy]
        )
        name = next(name for name in common if group_size(cls, name) != group_size(other_cls, name))
        (expansion, repeat, form), (other_expansion, other_repeat, other_form) = (
            group_size(one, name) for one in (cls, other_cls)
        )
        needs = (
            f"{name} of one size, and has expansion {expansion} and repeat {repeat} against "
            f"{other_expansion} and {other_repeat}"
        )
        if form != other_form:
            needs = f"{name} of one form, and has {form or 'the usual one'} against {other_form or 'the usual one'}"
    message = (
        f"LIV {position}: {cls.name} cannot share feature groups with LIV {first}, {other_cls.name}, "
        f"under label {liv.feature_group}; needs {needs}"
    )
    return Violation(position, "feature_group", message)
