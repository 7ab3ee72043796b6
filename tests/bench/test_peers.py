"""The rivals compute what our operators compute, so that their times can be compared."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels
from bench import peers_installed
from bench.cases import Case, build, cases
from bench.peers import Peer
from bench.peers_installed import installed_peers
from bench.suite import PEERS

CASES = (
    *cases("rms_norm", "B2 T5 D8"),
    *cases("add_rms_norm", "B2 T5 D8"),
    *cases("rotary", "B2 T5 H2 D8"),
    *cases("rotary", "B2 T5 H2 D8", interleaved=True),
    *cases("swiglu", "B2 T5 D8"),
    *cases("geglu", "B2 T5 D8"),
    *cases("reglu", "B2 T5 D8"),
    *cases("channel_mix", "B2 T5 D8", form="diagonal"),
    *cases("channel_mix", "B2 T5 D8 G2", form="grouped"),
    *cases("channel_mix", "B2 T5 D8", form="dense"),
    *cases("attention", "B2 T9 H4 Hk2 D8 Dv6"),
    *cases("attention", "B2 T9 H4 D8", window=3),
    *cases("attention", "B2 T9 H4 D8", softcap=2.0),
    *cases("attention", "B2 T9 H4 D8", with_sinks=True),
    *cases("differential_attention", "B2 T9 H2 D8 Dv16"),
    *cases("causal_conv1d", "B2 T9 D8 W4"),
    *cases("causal_conv1d", "B2 T9 D8 W4", activation="silu"),
    *cases("gated_short_conv", "B2 T9 D8 W3"),
    *cases("long_conv", "B2 T9 D8"),
    *cases("diagonal_scan", "B2 T70 D8"),
    *cases("rg_lru", "B2 T70 D8"),
    *cases("selective_scan", "B2 T70 D8 N4 G2"),
    *cases("ssd", "B2 T70 H4 P8 N4 G2"),
    *cases("gated_linear_attention", "B2 T70 H2 K8 V6"),
    *cases("gated_delta_rule", "B2 T70 H2 K8 V6"),
    *cases("linear_cross_entropy", "B2 T9 D8 V11"),
    *cases("attention_step", "B2 S9 H4 Hk2 D8"),
    *cases("attention_step", "B2 S9 H4 D8", window=3),
    *cases("causal_conv1d_step", "B2 D8 W4", activation="silu"),
    *cases("gated_short_conv_step", "B2 D8 W4"),
    *cases("long_conv_step", "B2 T9 D8"),
    *cases("diagonal_scan_step", "B2 D8"),
    *cases("rg_lru_step", "B2 D8"),
    *cases("selective_scan_step", "B2 D8 N4 G2"),
    *cases("ssd_step", "B2 H4 P8 N4 G2"),
    *cases("gated_linear_attention_step", "B2 H2 K8 V6"),
    *cases("gated_delta_rule_step", "B2 H2 K8 V6"),
)


def served() -> Iterator[tuple[Case, Peer]]:
    for case in CASES:
        for peer in PEERS[case.operator]:
            if peer.applies(case) and not peer.compiled:
                yield case, peer


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def call(function: Callable[..., Any], case: Case, peer: Peer | None = None) -> tuple[Tensor, ...]:
    inputs = build(case)
    prepared = peer.prepare(**inputs.args, **inputs.options) if peer is not None and peer.prepare else {}
    return as_tuple(function(**inputs.args, **inputs.options, **prepared))


@pytest.mark.parametrize(
    "case, peer", [pytest.param(case, peer, id=f"{case.operator}-{case.name}-{peer.name}") for case, peer in served()]
)
def test_it_agrees_with_the_reference(case: Case, peer: Peer) -> None:
    want = call(lambda **arguments: getattr(star_kernels, case.operator)(**arguments, backend="reference"), case)
    got = call(peer.function, case, peer)
    for index, (one, other) in enumerate(zip(got, want, strict=False)):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5, msg=lambda text, index=index: f"{index}: {text}")


def test_every_operator_has_a_plain_formula() -> None:
    assert set(PEERS) == set(star_kernels.__all__) - {"backends", "which"}
    assert all(peers[0].name == "eager" for peers in PEERS.values())
    assert {case.operator for case in CASES} == set(PEERS)


@pytest.mark.parametrize("operator", ["ssd", "gated_delta_rule", "selective_scan"])
def test_recurrences_widen_half_precision(operator: str) -> None:
    line = {"ssd": "B1 T70 H2 P8 N4", "gated_delta_rule": "B1 T70 H2 K8 V6", "selective_scan": "B1 T70 D8 N4"}[operator]
    (half,) = cases(operator, f"{line} bfloat16")
    inputs = build(half)
    wide = {name: tensor.float() for name, tensor in inputs.args.items()}
    peer = PEERS[operator][0]
    got = peer.function(**inputs.args, **inputs.options)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, peer.function(**wide, **inputs.options).bfloat16())


def test_other_packages_are_peers_where_they_import(monkeypatch: pytest.MonkeyPatch) -> None:
    peers_installed._found.cache_clear()
    assert [peer.name for peer in installed_peers("gated_linear_attention")] in ([], ["fla"])
    assert installed_peers("rotary") == ()

    def naive_recurrent_gla(q: Tensor, k: Tensor, v: Tensor, gk: Tensor) -> tuple[Tensor, None]:
        return star_kernels.gated_linear_attention(q, k, v, gk)[0], None

    module = ModuleType("fla.ops.gla.naive")
    module.naive_recurrent_gla = naive_recurrent_gla  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops", "fla.ops.gla"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gla.naive", module)
    peers_installed._found.cache_clear()
    (peer,) = installed_peers("gated_linear_attention")
    (case,) = cases("gated_linear_attention", "B1 T5 H2 K4 V4")
    (want,) = call(lambda **arguments: star_kernels.gated_linear_attention(**arguments)[0], case)
    assert peer.name == "fla"
    assert torch.equal(call(peer.function, case)[0], want)
    monkeypatch.undo()
    peers_installed._found.cache_clear()


def test_liger_takes_its_arguments_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        assert (offset, casting, in_place) == (0.0, "llama", False)
        return star_kernels.rms_norm(x, weight, eps=eps)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return norm(x + residual, weight, *rest), x + residual

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        assert (hidden.ndim, targets.ndim) == (2, 1)
        return star_kernels.linear_cross_entropy(hidden, weight, targets)

    module = ModuleType("liger_kernel.transformers.functional")
    vars(module).update(
        liger_rms_norm=norm,
        liger_fused_add_rms_norm=add_norm,
        liger_swiglu=star_kernels.swiglu,
        liger_fused_linear_cross_entropy=loss,
    )
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    peers_installed._found.cache_clear()
    for operator in ("rms_norm", "add_rms_norm", "swiglu"):
        _agrees(operator, "B2 T5 D8")
    _agrees("linear_cross_entropy", "B2 T9 D8 V11")
    monkeypatch.undo()
    peers_installed._found.cache_clear()


def _agrees(operator: str, sizes: str) -> None:
    (peer,) = installed_peers(operator)
    assert peer.name == "liger"
    (case,) = cases(operator, sizes)
    want = call(getattr(star_kernels, operator), case)
    for got, expected in zip(call(peer.function, case), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_package_that_fails_to_import_has_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise OSError(f"{name}: undefined symbol")

    monkeypatch.setattr(peers_installed.importlib, "import_module", broken)
    peers_installed._found.cache_clear()
    assert installed_peers("gated_delta_rule") == ()
    peers_installed._found.cache_clear()
