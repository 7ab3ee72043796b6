"""torch.library.opcheck for every compiled operator, forward, backward and step, on the calls that the suites make."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from star_kernels import _native
from tests.kernels import (
    test_attention,
    test_diagonal,
    test_kinds,
    test_long_conv,
    test_matrix_memory,
    test_memoryless,
    test_norm,
    test_short_conv,
    test_state_space,
)
from tests.kernels.checks import gradients
from tests.kernels.kinds import Kinds

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no compiled operators: {_native.reason()}")

MODULES = (
    test_attention, test_diagonal, test_kinds, test_long_conv, test_matrix_memory, test_memoryless, test_norm,
    test_short_conv, test_state_space,
)  # fmt: skip
# What checks an operator without a gradient; the rest of opcheck is about differentiation.
WITHOUT_GRADIENT = ("test_schema", "test_faketensor")


class _Recorder(TorchDispatchMode):
    """Keep the arguments of the first call of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "star_kernels":
            assert not kwargs
            self.calls.setdefault(func._schema.name.partition("::")[2], args)
        return func(*args, **(kwargs or {}))


@functools.cache
def calls() -> dict[str, tuple[Any, ...]]:
    """Run every suite's variants forward and backward; return one call of each operator, by position."""
    recorder = _Recorder()
    for module in MODULES:
        for suite in vars(module).values():
            if inspect.isclass(suite) and issubclass(suite, Kinds) and hasattr(suite, "operator"):
                for variant in range(suite.variants):
                    case = suite().case(2, 5, variant)
                    leaves = case.leaves(torch.float32)
                    with recorder:
                        gradients(suite().run(_native.BACKEND, leaves, case.options), leaves)
    return recorder.calls


def is_operator(name: str) -> bool:
    """Whether the library has the operator for users, not for its own tests."""
    return not name.startswith("probe")


def test_every_operator_is_called() -> None:
    assert set(calls()) == set(filter(is_operator, _native._names))


@pytest.mark.parametrize("name", sorted(filter(is_operator, _native._names)))
def test_opcheck(name: str) -> None:
    _native.set_nan_fill(False)  # opcheck compares with torch's own empty tensors
    differentiable = not name.endswith(("_backward", "_gradients"))

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().clone().requires_grad_(differentiable)

    arguments = tuple(leaf(value) for value in calls()[name])
    operator = getattr(torch.ops.star_kernels, name).default
    if differentiable:
        torch.library.opcheck(operator, arguments)
    else:
        torch.library.opcheck(operator, arguments, test_utils=WITHOUT_GRADIENT)
