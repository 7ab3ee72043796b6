"""What a genome may say beyond the paper's genes: a LIV's own operator, featurizer and sizes, and a model's sizes.

Text form: a LIV's extension stands in brackets behind its five genes, "21211[operator=12113,q=111211,window=64]", and
the model's sizes before the first LIV, "width=128,ffn=2;21211-91111".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

from star_core.genome._text import format_genes, member, parse_genes, whole_number
from star_core.genome.featurizers import FeatureGroup
from star_core.genome.operators import OperatorGenome
from star_core.genome.structure import Residual

_NUMBERS = ("window", "taps", "head_dim", "residual")


@dataclass(frozen=True, slots=True)
class Extension:
    """What one LIV has in place of its class's. Whether it makes sense is for `validate` to say.

    Attributes:
        operator: Its operator genome; with it comes the featurizer of the operator's first gene.
        groups: Its own feature groups, by name, where they are not that featurizer's; kept in the names' order.
        window: Tokens that a banded operator sees, the present one included. Default: `WINDOW`.
        taps: Length of the short convolutions inside the featurizer. Default: `TAPS`.
        head_dim: Channels of a head. Default: the model's.
        residual: Where its norms stand. Default: pre-norm.
    Raises:
        TypeError: A part is of another type.
        ValueError: A number is out of its range, or two groups have one name.
    """

    operator: OperatorGenome | None = None
    groups: tuple[FeatureGroup, ...] = ()
    window: int | None = None
    taps: int | None = None
    head_dim: int | None = None
    residual: Residual | None = None

    def __post_init__(self) -> None:
        if self.operator is not None and not isinstance(self.operator, OperatorGenome):
            raise TypeError(f"operator: needs an OperatorGenome, got {type(self.operator).__name__}")
        for group in self.groups:
            if not isinstance(group, FeatureGroup):
                raise TypeError(f"groups: needs FeatureGroups, got {type(group).__name__}")
        groups = tuple(sorted(self.groups, key=lambda group: group.name))
        if len({group.name for group in groups}) < len(groups):
            raise ValueError(f"groups: names are {[group.name for group in groups]}, need to differ")
        object.__setattr__(self, "groups", groups)
        for name in ("window", "taps", "head_dim"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_number(value, name))
        if self.residual is not None:
            object.__setattr__(self, "residual", member(Residual, self.residual, "residual"))

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not self.groups and all(getattr(self, name) is None for name in ("operator", *_NUMBERS))

    def with_groups(self, *groups: FeatureGroup) -> Extension:
        """Return a copy in which these groups take the place of those of the same names."""
        names = {group.name for group in groups}
        return replace(self, groups=(*(group for group in self.groups if group.name not in names), *groups))

    def without_group(self, name: str) -> Extension:
        """Return a copy without the group of this name."""
        return replace(self, groups=tuple(group for group in self.groups if group.name != name))

    @classmethod
    def parse(cls, text: str, where: str) -> Extension:
        """Read the text between the brackets.

        Args:
            text: Such as "operator=12113,q=111211,window=64".
            where: Where it stands, for the error message.
        Raises:
            ValueError: No "name=numbers", a name twice, or a number out of its range.
        """
        operator: OperatorGenome | None = None
        groups: list[FeatureGroup] = []
        numbers: dict[str, Any] = {}
        for name, value in _pairs(text, where, "'window=64'"):
            if name == "operator":
                operator = OperatorGenome.parse(value)
            elif name in _NUMBERS:
                numbers[name] = parse_number(value, f"{name} of {where}")
            else:
                genes = parse_genes(value, 6, f"feature group {name!r} of {where}")
                groups.append(FeatureGroup(name, *cast("tuple[Any, ...]", genes)))
        return cls(operator, tuple(groups), **numbers)

    def __str__(self) -> str:
        parts = [] if self.operator is None else [f"operator={self.operator}"]
        parts += [f"{group.name}={format_genes([group.genes])[0]}" for group in self.groups]
        parts += [f"{name}={int(value)}" for name in _NUMBERS if (value := getattr(self, name)) is not None]
        return ",".join(parts)


@dataclass(frozen=True, slots=True)
class SizeGenes:
    """Sizes of a model that its genome decides; what it leaves open, None, the model's configuration does.

    Attributes:
        width: Width of the residual stream.
        ffn: Channels of gate and value in a memoryless unit with the featurizer of its class / width.
        head_dim: Channels of a head.
    Raises:
        TypeError, ValueError: A size is no whole number from 1.
    """

    width: int | None = None
    ffn: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                object.__setattr__(self, field.name, whole_number(value, field.name))

    def over(self, other: SizeGenes) -> SizeGenes:
        """Return these sizes, with those of `other` where these leave something open."""
        return SizeGenes(*(mine if mine is not None else theirs for mine, theirs in zip(self, other, strict=True)))

    def __iter__(self) -> Iterator[int | None]:
        return (getattr(self, field.name) for field in fields(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what stands before the ";" of a genome, such as "width=128,ffn=2".

        Raises:
            ValueError: Not "name=number", a name twice or unknown, or a number below 1.
        """
        known = [field.name for field in fields(cls)]
        sizes = {}
        for name, value in _pairs(text, "the genome's sizes", "'width=128'"):
            if name not in known:
                raise ValueError(f"the genome's sizes: there is no {name!r}, needs one of {', '.join(known)}")
            sizes[name] = parse_number(value, f"{name} of the genome's sizes")
        return cls(**sizes)

    def __str__(self) -> str:
        named = zip((field.name for field in fields(self)), self, strict=True)
        return ",".join(f"{name}={value}" for name, value in named if value is not None)


NO_SIZES = SizeGenes()
"""A genome that leaves every size open, as all do in the paper's space."""


def parse_number(text: str, what: str) -> int:
    """Read one whole number from 1; raise ValueError, naming `what`, for anything else."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise ValueError(f"{what} is {text!r}: needs a whole number from 1")
    return int(text)


def _pairs(text: str, where: str, example: str) -> list[tuple[str, str]]:
    """Read "name=value,name=value"."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name or name in pairs:
            problem = "twice the same name" if name in pairs else "needs a name, '=' and numbers, such as " + example
            raise ValueError(f"{where}, {part!r}: {problem}")
        pairs[name] = value
    return list(pairs.items())
