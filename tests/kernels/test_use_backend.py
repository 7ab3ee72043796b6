"""One backend for a whole block of calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import star_kernels
from star_kernels import dispatch
from star_kernels.dispatch import use_backend

X, WEIGHT = torch.ones(2, 4), torch.ones(4)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Declare a backend that serves rms_norm in float32 with elevens and nothing else."""
    monkeypatch.setattr(dispatch, "_backends", dict(dispatch._backends))
    monkeypatch.setattr(dispatch, "_implementations", {})
    dispatch.discover()
    dispatch.declare_backend("fast", device_types=("cpu",))
    dispatch.declare_backend("gone", device_types=("cpu",), unavailable="its library is missing")
    dispatch.register(
        "rms_norm",
        "fast",
        lambda: lambda x, weight, eps: torch.full_like(x, 11.0),
        device_types=("cpu",),
        dtypes=(torch.float32,),
    )
    yield "fast"
    monkeypatch.undo()
    dispatch._forget_all()


def served() -> float:
    return star_kernels.rms_norm(X, WEIGHT, eps=0.0)[0, 0].item()


def test_it_serves_the_calls_of_its_block_alone(fast: str) -> None:
    assert served() == 11.0
    with use_backend("reference"):
        assert served() == 1.0
        assert star_kernels.which("rms_norm", X) == "reference"
        with use_backend(fast):
            assert served() == 11.0
        assert served() == 1.0
    assert served() == 11.0
    assert star_kernels.which("rms_norm", X) == "fast"


def test_a_backend_named_in_the_call_wins(fast: str) -> None:
    with use_backend("reference"):
        assert star_kernels.rms_norm(X, WEIGHT, backend=fast)[0, 0].item() == 11.0


def test_an_error_inside_puts_the_choice_back(fast: str) -> None:
    with pytest.raises(RuntimeError, match="on the way"), use_backend("reference"):
        raise RuntimeError("on the way")
    assert served() == 11.0


def test_what_it_cannot_serve_is_refused(fast: str) -> None:
    with pytest.raises(ValueError, match="backend='fast' does not implement swiglu"), use_backend(fast):
        star_kernels.swiglu(X, X)
    with pytest.raises(ValueError, match=r"name 'slow' is no backend; it must be one of: reference, .*fast"):
        use_backend("slow").__enter__()
    with pytest.raises(ValueError, match="name 'gone' is not available: its library is missing"):
        use_backend("gone").__enter__()


def test_a_compiled_call_follows_it(fast: str) -> None:
    compiled = torch.compile(lambda x: star_kernels.rms_norm(x, WEIGHT, eps=0.0), backend="eager", fullgraph=True)
    assert compiled(X)[0, 0].item() == 11.0
    with use_backend("reference"):
        assert compiled(X)[0, 0].item() == 1.0
    assert compiled(X)[0, 0].item() == 11.0
