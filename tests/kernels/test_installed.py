"""Other packages as backends: each adapter, given a package whose functions are `compat`'s, computes the operator.

`compat` has the packages' own signatures, and its tests hold them to the packages' text where those are installed.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels
from star_kernels import _installed, compat
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for key, function in functions.items():
        setattr(sys.modules[name], key, function)


def _with_kvcache(q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Any, window_size: Any, **options: Any) -> Tensor:
    """Stand for flash_attn_with_kvcache: each row attends to its own part of the cache."""
    held = cache_seqlens.tolist() if isinstance(cache_seqlens, Tensor) else [cache_seqlens] * q.shape[0]
    rows = [
        compat.flash_attn_func(q[i : i + 1], k[i : i + 1, :end], v[i : i + 1, :end], window_size=window_size, **options)
        for i, end in enumerate(held)
    ]
    return torch.cat(rows)


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = {name: getattr(compat, name) for name in ("flash_attn_func", "flash_attn_varlen_func")}
    _module(monkeypatch, "flash_attn", flash_attn_with_kvcache=_with_kvcache, **flash)
    _module(
        monkeypatch,
        "causal_conv1d",
        causal_conv1d_fn=compat.causal_conv1d_fn,
        causal_conv1d_update=compat.causal_conv1d_update,
    )
    _module(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=compat.selective_scan_fn)
    for name, function in (
        ("selective_state_update", compat.selective_state_update),
        ("ssd_combined", compat.mamba_chunk_scan_combined),
    ):
        module = ModuleType(f"mamba_ssm.ops.triton.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    _module(monkeypatch, "fla.ops.gla", chunk_gla=compat.chunk_gla)
    delta = ModuleType("fla.ops.gated_delta_rule")
    delta.chunk_gated_delta_rule = compat.chunk_gated_delta_rule  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", delta)


def _agree(operator: str, arguments: tuple[Any, ...], got: Any) -> None:
    entry = star_kernels.dispatch._operators[operator]
    want = entry._reference(*arguments)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for index, (one, other) in enumerate(pairs):
        assert_close(one, other, f"{operator}, output {index}", 1e-5)


def _values(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(f"v{index}", *shape).float() for index, shape in enumerate(shapes)]


@pytest.mark.parametrize("window", [None, 3])
def test_flash_attn(window: int | None) -> None:
    q, k, v = _values((2, 7, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    arguments = (q, k, v, True, window, 0.3, None, None, None, None)
    _agree("attention", arguments, _installed.attention(*arguments))
    ends_q, ends_k = torch.tensor([0, 2, 2, 7]), torch.tensor([0, 3, 4, 9])
    packed = (q[:1], k[:1], v[:1], True, window, None, 5.0, None, ends_q, ends_k)
    _agree("attention", packed, _installed.attention(*packed))
    for length in (None, 5, torch.tensor([4, 9])):
        step = (q[:, 0], k, v, length, window, None, None, None)
        _agree("attention_step", step, _installed.attention_step(*step))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(activation: str | None) -> None:
    x, weight, bias, state = _values((2, 6, 5), (5, 4), (5,), (2, 5, 3))
    for initial in (None, state):
        arguments = (x, weight, bias, activation, initial, None)
        _agree("causal_conv1d", arguments, _installed.causal_conv1d(*arguments))
    before = state.clone()
    step = (state, x[:, 0], weight, bias, activation)
    _agree("causal_conv1d_step", step, _installed.causal_conv1d_step(*step))
    assert torch.equal(state, before)


def test_mamba_ssm() -> None:
    x, dt, rates, B, C, D, z, bias, state = _values(
        (2, 6, 4), (2, 6, 4), (4, 3), (2, 6, 2, 3), (2, 6, 2, 3), (4,), (2, 6, 4), (4,), (2, 4, 3)
    )
    options = D, z, bias, True
    arguments = (x, dt, -rates.abs(), B, C, *options, None, None)
    _agree("selective_scan", arguments, _installed.selective_scan(*arguments))
    step = (state, x[:, 0], dt[:, 0], -rates.abs(), B[:, 0], C[:, 0], D, z[:, 0], bias, True)
    _agree("selective_scan_step", step, _installed.selective_scan_step(*step))


def test_mamba_2() -> None:
    x, dt, rates, B, C, D, z, bias, state = _values(
        (2, 6, 4, 5), (2, 6, 4), (4,), (2, 6, 2, 3), (2, 6, 2, 3), (4,), (2, 6, 4, 5), (4,), (2, 4, 5, 3)
    )
    for initial in (None, state):
        arguments = (x, dt, -rates.abs(), B, C, D, z, bias, True, initial, None)
        _agree("ssd", arguments, _installed.ssd(*arguments))
    step = (state, x[:, 0], dt[:, 0], -rates.abs(), B[:, 0], C[:, 0], D, z[:, 0], bias, True)
    _agree("ssd_step", step, _installed.ssd_step(*step))


def test_fla() -> None:
    q, k, v, decay, beta, state = _values(
        (1, 6, 2, 4), (1, 6, 2, 4), (1, 6, 2, 3), (1, 6, 2, 4), (1, 6, 2), (1, 2, 4, 3)
    )
    arguments = (q, k, v, -decay.abs(), None, state, None)
    _agree("gated_linear_attention", arguments, _installed.gated_linear_attention(*arguments))
    k = torch.nn.functional.normalize(k, dim=-1)
    for initial, ends in ((state, None), (None, torch.tensor([0, 2, 6]))):
        delta = (q, k, v, -decay[..., 0].abs(), beta.sigmoid(), 0.5, initial, ends)
        _agree("gated_delta_rule", delta, _installed.gated_delta_rule(*delta))


def test_what_a_package_has_no_form_for_is_refused() -> None:
    q, v, sinks = _values((1, 3, 2, 8), (1, 3, 2, 4), (2,))
    with pytest.raises(ValueError, match="'flash-attn' does not serve values of another width"):
        _installed.attention(q, q, v, True, None, None, None, None, None, None)
    with pytest.raises(ValueError, match="'flash-attn' does not serve sinks"):
        _installed.attention(q, q, q, True, None, None, None, sinks, None, None)
    x, weight = _values((1, 3, 5), (5, 6))
    with pytest.raises(ValueError, match="'causal-conv1d' does not serve other widths than 2 to 4"):
        _installed.causal_conv1d(x, weight, None, None, None, None)


def test_they_are_listed_with_the_reason() -> None:
    table = star_kernels.backends()
    for name in ("flash-attn", "causal-conv1d", "mamba-ssm", "fla"):
        assert table[name].available or "not installed" in table[name].reason or "no CUDA" in table[name].reason


def test_a_package_that_fails_to_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    q = normal("q", 1, 3, 2, 8).float()
    with pytest.raises(ValueError, match="importing flash_attn failed"):
        _installed.attention(q, q, q, True, None, None, None, None, None, None)
