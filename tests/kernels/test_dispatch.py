"""Who serves a call, and how a backend joins."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import star_kernels
from star_kernels import dispatch

X, WEIGHT = torch.ones(2, 4), torch.ones(4)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty registry, put back afterwards."""
    monkeypatch.setattr(dispatch, "_backends", {})
    monkeypatch.setattr(dispatch, "_implementations", {})
    monkeypatch.setattr(dispatch, "PROVIDERS", [])
    dispatch._forget_all()
    yield
    monkeypatch.undo()
    dispatch._forget_all()


def join(name: str, answer: float, *, unavailable: str | None = None, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Let a backend serve rms_norm with a constant; return the list that grows by one entry a load."""
    loads: list[str] = []

    def load() -> dispatch.Function:
        loads.append(name)
        return lambda x, weight, eps: torch.full_like(x, answer)

    dispatch.declare_backend(name, device_types=("cpu",), unavailable=unavailable)
    dispatch.register("rms_norm", name, load, device_types=("cpu",), dtypes=dtypes)
    return loads


def served(x: Tensor = X, backend: str | None = None) -> float:
    """Return the first number of a call: 1.0 if the reference served it."""
    return star_kernels.rms_norm(x, WEIGHT.to(x.dtype), eps=0.0, backend=backend)[0, 0].item()


@pytest.mark.usefixtures("registry")
class TestRegistry:
    """A registry with none but the test's own backends."""

    def test_reference_alone_serves_without_a_warning(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert served() == 1.0
        assert star_kernels.which("rms_norm", X) == "reference"
        assert list(star_kernels.backends()) == ["reference"]

    def test_first_registered_is_preferred_and_loaded_once_when_needed(self) -> None:
        first = join("first", 11.0, dtypes=(torch.float32,))
        second = join("second", 22.0, dtypes=(torch.float32, torch.float64))
        assert not first
        assert [served(), served(), served(X.double())] == [11.0, 11.0, 22.0]
        assert first == ["first"]
        assert second == ["second"]
        assert star_kernels.which("rms_norm", X.double(), WEIGHT) == "second"

    def test_serving_lists_who_can_the_preferred_first(self) -> None:
        join("first", 11.0, dtypes=(torch.float32,))
        join("away", 0.0, unavailable="it is away", dtypes=(torch.float32,))
        join("second", 22.0, dtypes=(torch.float32, torch.float64))
        assert dispatch.serving("rms_norm", X) == ["first", "second", "reference"]
        assert dispatch.serving("rms_norm", X.double()) == ["second", "reference"]
        with pytest.raises(ValueError, match="op 'nothing' does not exist"):
            dispatch.serving("nothing", X)

    def test_requested_backend_is_honoured(self) -> None:
        join("first", 11.0, dtypes=(torch.float32,))
        join("second", 22.0, dtypes=(torch.float32,))
        assert [served(backend=name) for name in ("second", "first", "reference")] == [22.0, 11.0, 1.0]

    def test_requested_backend_is_refused_in_one_sentence(self) -> None:
        join("fast", 11.0, dtypes=(torch.float32, torch.bfloat16))
        join("gone", 33.0, unavailable="its library is missing", dtypes=(torch.float32,))
        with pytest.raises(ValueError, match="backend='slow' is unknown; it must be one of: reference, fast, gone"):
            served(backend="slow")
        with pytest.raises(ValueError, match="backend='gone' is not available: its library is missing"):
            served(backend="gone")
        with pytest.raises(ValueError, match="backend='fast' does not implement swiglu"):
            star_kernels.swiglu(X, X, backend="fast")
        expected = (
            r"backend='fast' does not serve rms_norm for torch\.float64 on cpu; "
            r"it serves torch\.bfloat16, torch\.float32 on cpu"
        )
        with pytest.raises(ValueError, match=expected):
            served(X.double(), backend="fast")

    def test_fall_to_reference_warns_once_by_name(self) -> None:
        join("fast", 11.0, dtypes=(torch.float32,))
        expected = r"rms_norm is served by reference on cpu for torch\.float64 .*fast: does not serve rms_norm"
        with pytest.warns(RuntimeWarning, match=expected) as caught:
            assert served(X.double()) == 1.0
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert served(X.double()) == 1.0
            assert served(X.bfloat16(), backend="reference") == 1.0

    def test_an_unavailable_backend_is_named_with_its_reason(self) -> None:
        join("gone", 33.0, unavailable="its library is missing", dtypes=(torch.float32,))
        with pytest.warns(RuntimeWarning, match="gone: its library is missing"):
            assert served() == 1.0
        assert star_kernels.backends()["gone"] == (False, "its library is missing")
        assert star_kernels.backends()["reference"].available

    def test_providers_are_imported_on_the_first_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "PROVIDERS", ["star_kernels.no_such_provider", "tests.kernels.samples"])
        monkeypatch.setattr(dispatch, "_discovered", set())
        monkeypatch.delitem(sys.modules, "tests.kernels.samples", raising=False)
        dispatch.discover()
        assert "tests.kernels.samples" in sys.modules

    def test_registration_mistakes_are_named(self) -> None:
        with pytest.raises(ValueError, match="backend 'ghost' is not declared"):
            dispatch.register("rms_norm", "ghost", lambda: print, device_types=("cpu",), dtypes=())
        dispatch.declare_backend("fast", device_types=("cpu",))
        with pytest.raises(ValueError, match="operator 'rms' does not exist; it must be one of: add_rms_norm, "):
            dispatch.register("rms", "fast", lambda: print, device_types=("cpu",), dtypes=())


def test_which_needs_an_operator_and_a_tensor() -> None:
    with pytest.raises(ValueError, match="op 'rms' does not exist; it must be one of: add_rms_norm"):
        star_kernels.which("rms", X)
    with pytest.raises(ValueError, match="tensors is empty"):
        star_kernels.which("rms_norm")


def test_every_public_operator_is_registered_under_its_name() -> None:
    public = set(star_kernels.__all__) - {"backends", "which"}
    assert public == set(dispatch._operators)


def test_import_needs_torch_alone() -> None:
    """No Triton, no compiler of graphs, nothing installed beside torch."""
    script = (
        "import sys, torch; before = set(sys.modules); import star_kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(star_kernels.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["star_kernels"]


@pytest.mark.parametrize("operator", ["rms_norm", "swiglu", "causal_conv1d", "attention", "selective_scan"])
def test_references_compile_as_one_graph(operator: str) -> None:
    """`fullgraph=True` holds from the first call on, resolution included."""
    shape = (1, 3, 2, 4) if operator == "attention" else (1, 3, 4)
    values = [torch.randn(shape) for _ in range(5)]
    if operator == "rms_norm":
        arguments = [values[0], torch.ones(4)]
    elif operator == "swiglu":
        arguments = values[:2]
    elif operator == "causal_conv1d":
        arguments = [values[0], torch.randn(4, 3)]
    elif operator == "attention":
        arguments = values[:3]
    else:
        arguments = [*values[:2], -torch.rand(4, 2), torch.randn(1, 3, 1, 2), torch.randn(1, 3, 1, 2)]
    function = getattr(star_kernels, operator)
    leaves = [one.requires_grad_() for one in arguments]
    dispatch._forget_all()
    compiled = torch.compile(lambda *given: function(*given, backend="reference"), backend="eager", fullgraph=True)
    got, want = compiled(*leaves), function(*leaves, backend="reference")
    for one, expected in zip(*((pair if isinstance(pair, tuple) else (pair,)) for pair in (got, want)), strict=True):
        torch.testing.assert_close(one, expected)
        assert one.requires_grad
