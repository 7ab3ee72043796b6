"""The text form that featurizer, operator and backbone genomes share: compact digits, or numbers joined by dots."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import TypeVar

_COMPACT = re.compile(r"[1-9]+")
_DOTTED = re.compile(r"[1-9][0-9]*(\.[1-9][0-9]*)*")

E = TypeVar("E", bound=IntEnum)


def parse_genes(text: str, count: int, what: str) -> tuple[int, ...]:
    """Read `count` genes written as "21211" or as "2.1.2.1.1".

    Args:
        text: The genes, nothing around them.
        count: How many there have to be.
        what: Where the text stands, for the error message.
    Raises:
        ValueError: Another number of genes, or something that is not a whole number from 1.
    """
    if _COMPACT.fullmatch(text):
        genes = tuple(map(int, text))
    elif _DOTTED.fullmatch(text):
        genes = tuple(map(int, text.split(".")))
    else:
        genes = ()
    if len(genes) != count:
        example = "123451"[:count]
        raise ValueError(
            f"{what} is {text!r}: needs {count} genes, each a whole number from 1, as digits ({example!r}) "
            f"or joined by dots ({'.'.join(example)!r})"
        )
    return genes


def format_genes(rows: Sequence[Sequence[int]]) -> list[str]:
    """Write every row of genes, all of them with dots if one gene of any row has two digits."""
    joint = "." if max(map(max, rows)) > 9 else ""
    pattern = joint.join(["%d"] * len(rows[0]))  # with IntEnums too, and 3 times as fast as joining strings
    return [pattern % tuple(row) for row in rows]


def require_text(text: object, what: str) -> str:
    """Return `text` without the blanks around it, or raise TypeError if it is not a str."""
    if not isinstance(text, str):
        raise TypeError(f"{what}: needs a str, got {type(text).__name__}")
    return text.strip()


def whole_number(value: object, what: str) -> int:
    """Return `value`, an int or a numpy integer, as an int from 1.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below 1.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # what has no __index__ raises TypeError
    except TypeError:
        raise TypeError(f"{what}: needs an int, got {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{what}: is {number}, needs a whole number from 1")
    return number


def one_of(value: object, allowed: Collection[int], what: str) -> int:
    """Return `value` as an int if it is in `allowed`; raise TypeError or ValueError with the range if it is not."""
    number = whole_number(value, what)
    if number not in allowed:
        raise ValueError(f"{what}: is {number}, needs {min(allowed)} to {max(allowed)}")
    return number


def member(kind: type[E], value: object, what: str) -> E:
    """Return the member of `kind` that `value` stands for; raise TypeError or ValueError if there is none."""
    return kind(one_of(value, [int(each) for each in kind], what))
