"""What Ray is told in all tests of the search, and in what they start."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

_RAY = {
    # Ray does tasks at the lowest priority but four otherwise, and on a busy machine waits minutes for them.
    "RAY_worker_niceness": "0",
    # A cluster takes drivers that have its token. One that is started here has a token of its own, for as long as the
    # tests run, and needs none of the person's who runs them.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": uuid.uuid4().hex,
}

# No fixture sets them: Ray reads its mode once, where it is imported, and test modules do that as they are collected.
_patch = pytest.MonkeyPatch()
for _name, _value in _RAY.items():
    _patch.setenv(_name, _value)


@pytest.fixture(scope="session", autouse=True)
def _ray() -> Iterator[None]:
    yield
    _patch.undo()
