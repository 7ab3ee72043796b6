"""What `accelerate` did to a model, and what it left alone and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """One module that now runs on the kernels.

    Attributes:
        path: Its name in the model, as `named_modules` gives it; empty for the model itself.
        kind: Its class's name.
        operators: The `star_kernels` operators that it calls, or what of torch's.
    """

    path: str
    kind: str
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """One module of a known kind that still runs as transformers wrote it.

    Attributes:
        path: Its name in the model; empty for the model itself.
        kind: Its class's name.
        reason: Why, in words.
    """

    path: str
    kind: str
    reason: str


@dataclass(frozen=True)
class AccelerationReport:
    """What was replaced and what was not; prints as one line a kind of module.

    Attributes:
        replaced: Modules that now run on the kernels, in the model's order.
        kept: Modules of a known kind that do not.
    """

    replaced: tuple[Replaced, ...]
    kept: tuple[Kept, ...]

    def __str__(self) -> str:
        if not self.replaced and not self.kept:
            return "nothing replaced: the model holds no module of transformers that is known here"
        lines = [f"replaced {len(self.replaced)} modules, kept {len(self.kept)}"]
        lines += _counted((one.kind, ", ".join(one.operators)) for one in self.replaced)
        lines += _counted((one.kind, f"kept: {one.reason}") for one in self.kept)
        return "\n".join(lines)

    __repr__ = __str__


def _counted(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {count} x {kind}: {words}" for (kind, words), count in Counter(pairs).items()]
