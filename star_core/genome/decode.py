"""From the genes of one LIV to the class of layer that it is, and to the one way to write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum
from functools import lru_cache

from star_core.genome.extension import Extension, SizeGenes
from star_core.genome.featurizers import FEATURIZERS, FeatureGroup, FeaturizerGenome
from star_core.genome.genes import LIVGenes
from star_core.genome.operators import OperatorGenome
from star_core.genome.pool import POOL, TAPS, WINDOW, Family, LIVClass
from star_core.genome.rules import RULES, FamilyRule, family_of
from star_core.genome.structure import ChannelMixing, Nonlinearity, Residual, Sparsity, TokenMixing

Fault = tuple[str, str]
"""A gene of an extension, and what is wrong with it in words."""

_NAMES = {
    "linear_attention": "Lin-SA",
    "gated_linear_attention": "GLA",
    "gated_delta_rule": "GDelta",
    "recurrence": "Rec",
    "short_conv": "GConv",
    "long_conv": "GConv",
    "memoryless": "GMemless",
    "rg_lru": "RG-LRU",
}
_NONLINEARITIES = {Nonlinearity.NONE: "linear-", Nonlinearity.RELU: "ReLU-", Nonlinearity.SWISH: "swish-"}


def resolve(liv: LIVGenes, sizes: SizeGenes) -> LIVClass:
    """Return the class of a LIV of a valid genome with these sizes: the pool's, or its own."""
    if liv.extension is None:
        return POOL[liv.liv_class]
    number, extension = _canonical(liv.liv_class, liv.extension, sizes.head_dim)
    return _own_class(number, extension) if extension is not None else POOL[number]


def plain_liv(liv: LIVGenes, sizes: SizeGenes) -> LIVGenes:
    """Return the one way to write the class of a LIV: the nearest class, and what differs from it; labels stay."""
    if liv.extension is None:
        return liv
    number, extension = _canonical(liv.liv_class, liv.extension, sizes.head_dim)
    return replace(liv, liv_class=number, extension=extension)


def canonical_sizes(sizes: SizeGenes, classes: Sequence[LIVClass]) -> SizeGenes:
    """Return the sizes that some LIV of a genome uses."""
    head_dim = sizes.head_dim if any(cls.uses_heads and cls.head_dim is None for cls in classes) else None
    ffn = sizes.ffn if any(takes_ffn(cls) for cls in classes) else None
    return SizeGenes(sizes.width, ffn, head_dim)


def takes_ffn(cls: LIVClass) -> bool:
    """Whether the model's feed-forward ratio, and not its own expansion, is the width of a memoryless class."""
    return cls.family == "memoryless" and cls.featurizer["gate"].expansion == FEATURIZERS[9]["gate"].expansion


def faults(liv: LIVGenes, sizes: SizeGenes) -> tuple[Fault, ...]:
    """Return what is wrong with the class of a LIV: genes of its extension, or sizes that do not fit it.

    Args:
        liv: Of a class in the pool.
        sizes: What is known of the model's.
    """
    extension = liv.extension
    if extension is not None and (found := _structure_faults(liv.liv_class, extension)):
        return found
    if sizes.width is None:
        return ()
    return _size_faults(resolve(liv, sizes), sizes.width, sizes.head_dim, extension)


def group_map(liv: LIVGenes) -> dict[str, FeatureGroup]:
    """Return all feature groups of a LIV by name, those of its operator's featurizer and its own."""
    operator = own_operator(liv)
    groups = {group.name: group for group in FEATURIZERS[operator.featurizer_class].groups}
    return groups | {group.name: group for group in (liv.extension.groups if liv.extension else ())}


def own_operator(liv: LIVGenes) -> OperatorGenome:
    """Return the operator genome of a LIV: its own, or its class's."""
    own = None if liv.extension is None else liv.extension.operator
    return POOL[liv.liv_class].operator if own is None else own


def family_rule(liv: LIVGenes) -> FamilyRule | None:
    """Return the rules that a LIV is held against; None where no layer has the structure of its operator."""
    operator = own_operator(liv)
    family = family_of(operator, group_map(liv))
    return None if family is None else RULES[family]


@lru_cache(maxsize=65_536)
def _structure_faults(liv_class: int, extension: Extension) -> tuple[Fault, ...]:
    """Return the genes of an extension that no layer can serve."""
    liv = LIVGenes(liv_class, extension=extension)
    operator, groups = own_operator(liv), group_map(liv)
    own = family_of(operator, groups)
    if own is None:
        listed = ", ".join(FEATURIZERS[operator.featurizer_class].names)
        return (("operator", f"there is no layer with the token mixing of {operator} on the groups {listed}"),)
    rule, found = RULES[own], []
    for gene, allowed in (
        ("sparsity", _sparsities(rule, groups)),
        ("nonlinearity", rule.nonlinearities),
        ("channel_mixing", rule.channels),
    ):
        if getattr(operator, gene) not in allowed:
            value = getattr(operator, gene)
            found.append(("operator", f"{gene} of {_family_name(own)} is {int(value)}; needs {_listed(allowed)}"))
    names = [group.name for group in extension.groups]
    found += [(name, words) for name in names for words in _group_faults(name, groups, rule, operator, own)]
    if not found:
        # What the featurizer of the operator brings along is in order by itself, but not beside any operator.
        rest = [name for name in groups if name not in names]
        found += [("operator", words) for name in rest for words in _group_faults(name, groups, rule, operator, own)]
    if extension.head_dim is not None and extension.head_dim % 2:
        found.append(("head_dim", f"head_dim is {extension.head_dim}; needs an even number"))
    return tuple(found)


def _sparsities(rule: FamilyRule, groups: dict[str, FeatureGroup]) -> Sequence[Sparsity]:
    """Return the operator's sparsities: an explicit filter is banded as it is, an implicit short one is cut."""
    if "K" in groups and groups["K"].sparsity is Sparsity.BANDED:
        return (Sparsity.NONE,)
    return rule.sparsities


def _group_faults(
    name: str, groups: dict[str, FeatureGroup], rule: FamilyRule, operator: OperatorGenome, family: Family
) -> list[str]:
    group, allowed = groups[name], rule.groups.get(name)
    if allowed is None:
        return [f"{_family_name(family)} has no feature group {name!r}; needs one of {', '.join(rule.groups)}"]
    found = []
    if (group.token_mixing, group.sparsity) not in allowed.mixings:
        pairs = " or ".join(f"{int(mixing)}{int(sparsity)}" for mixing, sparsity in allowed.mixings)
        found.append(
            f"token mixing and sparsity of {name} are {int(group.token_mixing)}{int(group.sparsity)}; needs {pairs}"
        )
    if group.nonlinearity not in allowed.nonlinearities:
        listed = _listed(allowed.nonlinearities)
        found.append(f"nonlinearity of {name} is {int(group.nonlinearity)}; needs {listed}")
    if group.nonlinearity is Nonlinearity.SOFTMAX and operator.channel_mixing is ChannelMixing.DIAGONAL:
        found.append(f"nonlinearity of {name} is 2 (softmax); needs another one, as heads have a single channel")
    if group.channel_mixing not in allowed.channels:
        found.append(f"channel mixing of {name} is {int(group.channel_mixing)}; needs {_listed(allowed.channels)}")
    implicit = name == "K" and group.sparsity is Sparsity.NONE
    least, most = (2 if name == "K" and not implicit else 1), (1 if implicit else allowed.most_expansion)
    if not least <= group.expansion <= most:
        found.append(f"expansion of {name} is {group.expansion}; needs {f'{least} to {most}' if most > 1 else '1'}")
    for tied in rule.tied_expansion:
        other = next((groups[one] for one in tied if one in groups and one != name), None)
        if name in tied and other is not None and other.expansion != group.expansion:
            found.append(f"expansion of {name} is {group.expansion}; needs {other.expansion}, as of {other.name}")
    return found + _repeat_faults(name, groups, allowed.repeats, operator)


def _repeat_faults(name: str, groups: dict[str, FeatureGroup], repeats: bool, operator: OperatorGenome) -> list[str]:
    """Say what is wrong with the number of heads or channels that share a copy of a group."""
    group = groups[name]
    other = groups.get({"k": "v", "v": "k"}.get(name, ""))
    single = operator.channel_mixing is ChannelMixing.DENSE and operator.token_mixing is TokenMixing.LOW_RANK
    needs = ""
    if other is not None and other.repeat != group.repeat:
        needs = f"{other.repeat}, as of {other.name}"
    elif group.repeat > 1 and not repeats:
        needs = "1"
    elif group.repeat > 1 and other is not None and single:
        needs = "1, as there is one head"
    elif group.repeat > 1 and other is not None and group.channel_mixing is not ChannelMixing.DENSE:
        needs = "1, or the dense channel mixing 2"
    return [f"repeat of {name} is {group.repeat}; needs {needs}"] if needs else []


def _size_faults(cls: LIVClass, width: int, head_dim: int | None, extension: Extension | None) -> tuple[Fault, ...]:
    """Return what does not fit a model of this width."""
    blame = "liv_class" if extension is None else "operator"
    if not cls.uses_heads and "k" not in cls.featurizer.names and "K" not in cls.featurizer.names:
        return ()
    head = cls.head_dim or head_dim
    own_head = extension is not None and extension.head_dim is not None
    if cls.uses_heads:
        if head is None:
            return ()
        if width % head:
            return (("head_dim" if own_head else blame, f"width is {width}; needs a multiple of head_dim = {head}"),)
    if "K" in cls.featurizer.names:
        repeat, inner = cls.featurizer["K"].repeat, cls.featurizer["v"].expansion * width
        return (("K", f"repeat of K is {repeat}; needs a divisor of {inner} channels"),) if inner % repeat else ()
    if "k" not in cls.featurizer.names:
        return ()
    heads, repeat = count_heads(cls, width, head), cls.featurizer["k"].repeat
    if heads % repeat:
        gene = "k" if extension is not None and any(group.name == "k" for group in extension.groups) else blame
        return (("head_dim" if own_head else gene, f"repeat of k is {repeat}; needs a divisor of {heads} heads"),)
    return ()


def count_heads(cls: LIVClass, width: int, head_dim: int | None) -> int:
    """Return the query heads of a class with q, k and v: of `head_dim` channels, of one, or a single one of all."""
    mixing = cls.operator.channel_mixing
    if mixing is ChannelMixing.GROUPED or cls.family == "gated_delta_rule":
        assert head_dim is not None
        return width // head_dim
    return width if mixing is ChannelMixing.DIAGONAL else 1


@lru_cache(maxsize=65_536)
def _canonical(liv_class: int, extension: Extension, head_dim: int | None) -> tuple[int, Extension | None]:
    """Return the class nearest to a LIV's, and the extension that says what differs from it."""
    liv = LIVGenes(liv_class, extension=extension)
    operator, groups = own_operator(liv), group_map(liv)
    template = _nearest_featurizer(groups)
    differential, mixing = POOL[liv_class].differential, _structure(operator)
    number = template + 9 * differential if template < 9 or not differential else 10
    own_genome = OperatorGenome(template, *mixing)
    listed = FEATURIZERS[template].names
    differing = tuple(
        group for name, group in groups.items() if name not in listed or FEATURIZERS[template][name] != group
    )
    written = Extension(
        operator=None if POOL[number].operator == own_genome else own_genome,
        groups=differing,
        window=_unless(extension.window, WINDOW) if operator.sparsity is Sparsity.BANDED else None,
        residual=extension.residual if extension.residual not in (None, Residual.PRE_NORM) else None,
    )
    cls = _build(number, written)
    written = replace(
        written,
        taps=_unless(extension.taps, TAPS) if cls.has_short_convolutions else None,
        head_dim=_unless(extension.head_dim, head_dim) if cls.uses_heads else None,
    )
    return number, None if written.is_empty else written


def _nearest_featurizer(groups: dict[str, FeatureGroup]) -> int:
    """Return the class of the table that has these groups with the fewest differences, the first of several."""
    names = set(groups) - ({"z"} if "q" in groups else set())
    same = {number: genome for number, genome in FEATURIZERS.items() if set(genome.names) == names}
    return min(same, key=lambda number: sum(groups[group.name] != group for group in same[number].groups))


@lru_cache(maxsize=65_536)
def _own_class(number: int, extension: Extension) -> LIVClass:
    """Return the class of a LIV whose genes are in their canonical form."""
    return _build(number, extension)


def _build(number: int, extension: Extension) -> LIVClass:
    liv = LIVGenes(number, extension=extension)
    pool, residual = POOL[number], extension.residual or Residual.PRE_NORM
    if extension == Extension(residual=extension.residual):
        return replace(pool, residual=residual)
    operator, groups = own_operator(liv), group_map(liv)
    family = family_of(operator, groups)
    assert family is not None
    banded = operator.sparsity is Sparsity.BANDED
    kind = _family_name(family)
    if family == "attention":
        kind = _NONLINEARITIES.get(operator.nonlinearity, "") + "SA"
    return LIVClass(
        id=number,
        name=f"{'Diff-' if pool.differential else ''}{kind}[{extension}]",
        family=family,
        operator=operator,
        featurizer=FeaturizerGenome(tuple(groups.values())),
        differential=pool.differential,
        own=True,
        window=(extension.window or WINDOW) if banded else None,
        taps=extension.taps or TAPS,
        head_dim=extension.head_dim,
        residual=residual,
    )


def _structure(operator: OperatorGenome) -> tuple[TokenMixing, Sparsity, Nonlinearity, ChannelMixing]:
    return operator.token_mixing, operator.sparsity, operator.nonlinearity, operator.channel_mixing


def _family_name(family: Family) -> str:
    return _NAMES.get(family, "attention")


def _listed(values: Sequence[IntEnum]) -> str:
    words = [f"{int(value)} ({value.name.lower().replace('_', ' ')})" for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _unless(value: int | None, default: int | None) -> int | None:
    return None if value == default else value
