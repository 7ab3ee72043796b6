"""Command lines that say what is wrong in one sentence, and what may have been meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from search.settings import SettingsError, nearest


class UsageError(SettingsError):
    """A command line that asks for what can't be done; its text is one sentence for the person who typed it."""


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError`; options that are not given are absent from what `given` returns."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`."""
        raise UsageError(message)

    def given(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """Return the options of a command line by name.

        Raises:
            UsageError: One is not known, or its value is not what it takes.
        """
        values, unknown = self.parse_known_args(argv)
        if unknown:
            options = tuple(string for action in self._actions for string in action.option_strings)
            raise UsageError(f"unknown option {unknown[0]!r}{nearest(unknown[0].split('=')[0], options)}")
        return vars(values)
