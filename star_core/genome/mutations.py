"""Named changes of genomes above backbone level: of operators, featurizers, norms, and the sizes of a model.

Every change keeps a valid genome valid, and gives the genome itself back where it finds nothing to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from star_core.genome._text import whole_number
from star_core.genome.backbone import Genome
from star_core.genome.decode import family_rule, faults, group_map, own_operator, resolve, takes_ffn
from star_core.genome.extension import NO_SIZES, Extension, SizeGenes
from star_core.genome.featurizers import FEATURIZERS, FeatureGroup
from star_core.genome.genes import LIVGenes
from star_core.genome.operators import OperatorGenome
from star_core.genome.pool import POOL
from star_core.genome.rules import FamilyRule
from star_core.genome.structure import ChannelMixing, Nonlinearity, Residual, Sparsity, TokenMixing
from star_core.genome.validity import gene_values, goes_together, validate

Level = Literal["backbone", "operator", "featurizer"]
"""How deep variation goes: backbone is the paper's space; operator adds operators, norms, and a model's sizes and
depth; featurizer adds feature groups."""

LEVELS: tuple[Level, ...] = get_args(Level)

_SHARING_GENES = ("featurizer_group", "featurizer_strategy", "feature_group", "feature_strategy")
_EXPANSIONS = (1, 2, 3, 4)
_STATES = (2, 4, 8, 16, 32)
_FILTERS = (2, 3, 4, 5, 7, 9, 16, 32)
_REPEATS = (1, 2, 4, 8)
_TAPS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Bounds:
    """Between which bounds variation above backbone level keeps.

    Attributes:
        depths: Least and most LIVs. Default: a genome keeps its depth.
        widths: Widths to choose from beside the model's own. Default: none.
        ffn_ratios: Feed-forward ratios, beside that of the class GMemless.
        head_dims: Channels of a head, beside the model's own; even. Default: none.
        windows: Windows of banded operators.
        sizes: The model's own sizes, which genes that say nothing take. Where they are known, what does not fit them is
            not valid.
    Raises:
        TypeError: A number is no integer.
        ValueError: A number is below 1, or the least depth above the most.
    """

    depths: tuple[int, int] | None = None
    widths: tuple[int, ...] = ()
    ffn_ratios: tuple[int, ...] = (1, 2, 4)
    head_dims: tuple[int, ...] = ()
    windows: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    sizes: SizeGenes = NO_SIZES

    def __post_init__(self) -> None:
        for name in ("depths", "widths", "ffn_ratios", "head_dims", "windows"):
            for value in getattr(self, name) or ():
                whole_number(value, name)
        if self.depths is not None and (len(self.depths) != 2 or self.depths[0] > self.depths[1]):
            raise ValueError(f"depths: are {self.depths}, need the least and the most")


def level_of(level: str) -> Level:
    """Return `level` if it is one; raise ValueError if not."""
    for known in LEVELS:
        if level == known:
            return known
    raise ValueError(f"level: is {level!r}, needs one of {', '.join(LEVELS)}")


@dataclass(frozen=True)
class _Change:
    """What a change works on."""

    genome: Genome
    rng: np.random.Generator
    bounds: Bounds
    classes: Sequence[int]

    def position(self) -> int:
        return int(self.rng.integers(len(self.genome)))

    def fits(self, position: int, liv: LIVGenes) -> bool:
        return goes_together(self.genome, position, liv, self.bounds.sizes)

    def sizes(self) -> SizeGenes:
        return self.genome.sizes.over(self.bounds.sizes)

    def one_of(self, position: int, livs: Iterable[LIVGenes]) -> Genome:
        """Put one of those that fit and are not there in place of a LIV."""
        present = self.genome.livs[position]
        fitting = [liv for liv in dict.fromkeys(livs) if liv != present and self.fits(position, liv)]
        if not fitting:
            return self.genome
        return self.genome.with_liv(position, fitting[int(self.rng.integers(len(fitting)))])


def _with(liv: LIVGenes, **parts: object) -> LIVGenes:
    """Return a LIV whose extension has other parts."""
    return replace(liv, extension=replace(liv.extension or Extension(), **parts))  # type: ignore[arg-type]


def _class(change: _Change) -> Genome:
    """Choose another class of the pool; norms stay."""
    position = change.position()
    liv = change.genome.livs[position]
    residual = None if liv.extension is None else liv.extension.residual
    kept = Extension(residual=residual)
    return change.one_of(position, (replace(liv, liv_class=number, extension=kept) for number in change.classes))


def _sharing(change: _Change) -> Genome:
    """Choose another value of a label or strategy."""
    position, gene = change.position(), _SHARING_GENES[int(change.rng.integers(len(_SHARING_GENES)))]
    values = gene_values(change.genome, position, gene, change.bounds.sizes)
    changed = (change.genome.with_gene(position, gene, value) for value in values)
    return change.one_of(position, (genome.livs[position] for genome in changed))


def _copy(change: _Change) -> Genome:
    """Make a LIV a copy of another one."""
    position = change.position()
    liv = change.genome.livs[change.position()]
    return change.one_of(position, [liv if _residual_of(liv) is not Residual.PARALLEL else _with(liv, residual=None)])


def _operator(change: _Change) -> Genome:
    """Choose another operator genome: first its family, so that those with few operators are not rare."""
    position = change.position()
    liv = change.genome.livs[position]
    families = list(_operators().values())
    operators = families[int(change.rng.integers(len(families)))]
    return change.one_of(position, (_with_operator(liv, operator) for operator in operators))


def _with_operator(liv: LIVGenes, operator: OperatorGenome) -> LIVGenes:
    """Give a LIV an operator; of its own feature groups those stay that go with it."""
    changed = _with(liv, operator=operator)
    known = FEATURIZERS[operator.featurizer_class].names
    kept = tuple(group for group in (liv.extension.groups if liv.extension else ()) if group.name in known)
    changed = _with(changed, groups=kept)
    return changed if not faults(changed, NO_SIZES) else _with(changed, groups=())


@lru_cache(maxsize=1)
def _operators() -> Mapping[str, tuple[OperatorGenome, ...]]:
    """Return every operator genome that there are layers for, by family."""
    found: dict[str, list[OperatorGenome]] = {}
    for genes in product(FEATURIZERS, TokenMixing, Sparsity, Nonlinearity, ChannelMixing):
        liv = LIVGenes(1, extension=Extension(operator=OperatorGenome(*genes)))
        if not faults(liv, NO_SIZES):
            found.setdefault(resolve(liv, NO_SIZES).family, []).append(own_operator(liv))
    return MappingProxyType({family: tuple(operators) for family, operators in found.items()})


def _window(change: _Change) -> Genome:
    """Choose another window for a banded operator."""
    banded = [p for p, liv in enumerate(change.genome.livs) if own_operator(liv).sparsity is Sparsity.BANDED]
    if not banded:
        return change.genome
    position = banded[int(change.rng.integers(len(banded)))]
    liv = change.genome.livs[position]
    return change.one_of(position, (_with(liv, window=window) for window in change.bounds.windows))


def _residual(change: _Change) -> Genome:
    """Move the norms of a LIV."""
    position = change.position()
    liv, present = change.genome.livs[position], _residual_of(change.genome.livs[position])
    return change.one_of(position, (_with(liv, residual=one) for one in Residual if one is not present))


def _residual_of(liv: LIVGenes) -> Residual:
    return (liv.extension.residual if liv.extension else None) or Residual.PRE_NORM


def _head_dim(change: _Change) -> Genome:
    """Choose other heads for a LIV."""
    position = change.position()
    liv = change.genome.livs[position]
    if not resolve(liv, change.sizes()).uses_heads:
        return change.genome
    return change.one_of(position, (_with(liv, head_dim=one) for one in (None, *change.bounds.head_dims)))


def _taps(change: _Change) -> Genome:
    """Choose another length for the short convolutions of a featurizer."""
    position = change.position()
    liv = change.genome.livs[position]
    if not resolve(liv, change.sizes()).has_short_convolutions:
        return change.genome
    return change.one_of(position, (_with(liv, taps=taps) for taps in _TAPS))


def _featurizer(change: _Change) -> Genome:
    """Choose another value of one integer of a feature group, and of those that are tied to it."""
    position = change.position()
    liv = change.genome.livs[position]
    groups, rule = group_map(liv), family_rule(liv)
    if rule is None:
        return change.genome
    names = [name for name in rule.groups if name in groups]
    loci = [(name, gene) for name in names for gene in ("mixing", "nonlinearity", "channels", "expansion", "repeat")]
    loci += [(name, "presence") for name in rule.optional]
    for locus in change.rng.permutation(len(loci)):
        name, gene = loci[locus]
        changed = change.one_of(position, _regrouped(liv, groups, rule, name, gene))
        if changed is not change.genome:
            return changed
    return change.genome


def _regrouped(
    liv: LIVGenes, groups: Mapping[str, FeatureGroup], rule: FamilyRule, name: str, gene: str
) -> Iterable[LIVGenes]:
    """Yield a LIV with every value of one gene of a feature group."""
    extension, allowed = liv.extension or Extension(), rule.groups[name]
    if gene == "presence":
        plain = TokenMixing.DIAGONAL, Sparsity.NONE
        gate = FeatureGroup(name, *plain, Nonlinearity.SWISH, ChannelMixing.DENSE, groups["v"].expansion, 1)
        yield replace(liv, extension=extension.without_group(name) if name in groups else extension.with_groups(gate))
        return
    group = groups[name]
    if gene == "mixing":
        for mixing, sparsity in allowed.mixings:
            implicit = name == "K" and sparsity is Sparsity.NONE
            expansion = 1 if implicit else 3 if name == "K" and group.expansion == 1 else group.expansion
            changed = replace(group, token_mixing=mixing, sparsity=sparsity, expansion=expansion)
            yield replace(liv, extension=extension.with_groups(changed))
    elif gene == "nonlinearity":
        for one in allowed.nonlinearities:
            yield replace(liv, extension=extension.with_groups(replace(group, nonlinearity=one)))
    elif gene == "channels":
        for channels in allowed.channels:
            yield replace(liv, extension=extension.with_groups(replace(group, channel_mixing=channels)))
    elif gene == "expansion":
        tied = next((names for names in rule.tied_expansion if name in names), (name,))
        values = _FILTERS if name == "K" else _STATES if "x" in groups and name in ("B", "C") else _EXPANSIONS
        for value in values:
            changes = [replace(groups[each], expansion=value) for each in tied if each in groups]
            yield replace(liv, extension=extension.with_groups(*changes))
    elif allowed.repeats:
        tied = ("k", "v") if name in ("k", "v") else (name,)
        for value in _REPEATS:
            yield replace(liv, extension=extension.with_groups(*(replace(groups[each], repeat=value) for each in tied)))


def _insert(change: _Change) -> Genome:
    """Put in a copy of a LIV, or one of a class of the pool, that shares nothing."""
    genome, rng = change.genome, change.rng
    if change.bounds.depths is None or len(genome) >= change.bounds.depths[1]:
        return genome
    place = int(rng.integers(len(genome) + 1))
    model = genome.livs[change.position()]
    fresh = LIVGenes(change.classes[int(rng.integers(len(change.classes)))])
    liv = LIVGenes(model.liv_class, extension=model.extension) if rng.random() < 0.5 else fresh
    longer = replace(genome, livs=_ended((*genome.livs[:place], liv, *genome.livs[place:])))
    return longer if not validate(longer, change.bounds.sizes) else genome


def _delete(change: _Change) -> Genome:
    """Take out a LIV."""
    genome = change.genome
    if change.bounds.depths is None or len(genome) <= change.bounds.depths[0]:
        return genome
    place = change.position()
    return replace(genome, livs=_ended(genome.livs[:place] + genome.livs[place + 1 :]))


def _ended(livs: tuple[LIVGenes, ...]) -> tuple[LIVGenes, ...]:
    """Return the LIVs with a last one that is not parallel to a next one."""
    return (*livs[:-1], _with(livs[-1], residual=None)) if _residual_of(livs[-1]) is Residual.PARALLEL else livs


def _resized(change: _Change, gene: str, values: Sequence[int | None]) -> Genome:
    """Choose another size of the model."""
    genome = change.genome
    others = [value for value in values if value != getattr(genome.sizes, gene)]
    candidates = (replace(genome, sizes=replace(genome.sizes, **{gene: value})) for value in others)
    fitting = [candidate for candidate in candidates if not validate(candidate, change.bounds.sizes)]
    return fitting[int(change.rng.integers(len(fitting)))] if fitting else genome


def _width(change: _Change) -> Genome:
    return _resized(change, "width", (None, *change.bounds.widths))


def _ffn(change: _Change) -> Genome:
    if not any(takes_ffn(resolve(liv, change.sizes())) for liv in change.genome.livs):
        return change.genome
    return _resized(change, "ffn", (None, *change.bounds.ffn_ratios))


def _heads(change: _Change) -> Genome:
    classes = (resolve(liv, change.sizes()) for liv in change.genome.livs)
    if not any(cls.uses_heads and cls.head_dim is None for cls in classes):
        return change.genome
    return _resized(change, "head_dim", (None, *change.bounds.head_dims))


_OPERATOR_LEVEL: Mapping[str, Callable[[_Change], Genome]] = {
    "class": _class,
    "sharing": _sharing,
    "copy": _copy,
    "operator": _operator,
    "window": _window,
    "residual": _residual,
    "head_dim": _head_dim,
    "insert": _insert,
    "delete": _delete,
    "width": _width,
    "ffn": _ffn,
    "heads": _heads,
}
MUTATIONS: Mapping[Level, Mapping[str, Callable[[_Change], Genome]]] = MappingProxyType(
    {
        "backbone": {},
        "operator": _OPERATOR_LEVEL,
        "featurizer": {**_OPERATOR_LEVEL, "featurizer": _featurizer, "taps": _taps},
    }
)
"""Changes by level and name: class, sharing, copy (of one LIV to another place), operator, window, residual, head_dim
(of one LIV), insert, delete, width, ffn, heads (of the model), featurizer (one integer of a feature group), taps. At
backbone level genes are changed one by one instead."""

LOCAL: Mapping[Level, tuple[str, ...]] = MappingProxyType(
    {
        "backbone": (),
        "operator": ("operator", "window", "head_dim"),
        "featurizer": ("operator", "window", "head_dim", "featurizer", "featurizer", "taps"),
    }
)
"""The changes that concern the layer of one LIV alone, as often as a random genome draws them."""


def apply(
    name: str,
    genome: Genome,
    rng: np.random.Generator,
    *,
    level: Level,
    bounds: Bounds,
    classes: Sequence[int] = tuple(POOL),
) -> Genome:
    """Apply one of `MUTATIONS`; returns `genome` itself where there is nothing to change."""
    return MUTATIONS[level][name](_Change(genome, rng, bounds, classes))
