"""What every kernel test runs under: two threads, uninitialised memory full of NaN, and every backend that is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import star_kernels
from star_kernels import _native, _triton
from tests.kernels import interpreter

if _triton.interpreting():
    interpreter.close_gaps()
    interpreter.save_time()

# "cuda" makes every test of an operator one of what serves a GPU.
DEVICE = os.environ.get("STAR_TEST_DEVICE", "cpu")
_HERE = Path(__file__).parent


@pytest.fixture(autouse=True, scope="session")
def _default_device() -> None:
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def _poisoned_memory_and_two_threads() -> Iterator[None]:
    """Fill torch.empty with NaN, so that an output element that nothing writes shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if _native.available():
        _native.set_nan_fill(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    if _native.available():
        _native.set_nan_fill(False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the interpreter and on a GPU, leave out what asks for no backend, such as the compiled library's own tests;
    not what is about Triton alone."""
    if _triton.interpreting() or DEVICE != "cpu":
        here = [item for item in items if not item.path.is_relative_to(_HERE) or _concerns_triton(item)]
        kept = set(here)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = here


def _concerns_triton(item: pytest.Item) -> bool:
    return "backend" in _parameters(item) or item.path.name.startswith("test_triton_")


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `backend` on each one; one that asks for a length or variant on its class's."""
    if "backend" in metafunc.fixturenames:
        names = [name for name, status in star_kernels.backends().items() if status.available]
        if _triton.interpreting() or DEVICE != "cpu":
            names = ["triton"] if "triton" in names else []
        metafunc.parametrize("backend", names)
    if "length" in metafunc.fixturenames:
        # Less than a block, and more than four of them; each program of a grid costs the interpreter 1 to 4 ms.
        lengths = (3, 65) if _triton.interpreting() else metafunc.cls.lengths
        metafunc.parametrize("length", lengths, ids=lambda length: f"T{length}")
    if "long_length" in metafunc.fixturenames:
        lengths = () if _triton.interpreting() else metafunc.cls.long_lengths
        metafunc.parametrize("long_length", lengths, ids=lambda length: f"T{length}")
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", range(metafunc.cls.variants), ids=lambda variant: f"v{variant}")
