"""Measuring a case: who is timed, who is checked, what a row says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels
from bench import suite
from bench.cases import cases
from bench.peers import Peer
from bench.suite import Settings, measure_case
from star_kernels import dispatch

QUICK = Settings(min_seconds=0.0, min_samples=3)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the ceilings' own search, some seconds, out of these tests."""
    from bench.ceilings import _exp_ceilings, matmul_ceiling

    monkeypatch.setattr(suite, "best_matmul_ceiling", lambda dtype, device: matmul_ceiling(32, dtype, device=device))
    monkeypatch.setattr(suite, "best_exp_ceiling", lambda device: _exp_ceilings(1024, torch.device(device))[0])


def with_peers(monkeypatch: pytest.MonkeyPatch, operator: str, *peers: Peer) -> None:
    monkeypatch.setitem(suite.PEERS, operator, peers)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def test_a_row_for_each_provider_with_ours_first() -> None:
    (case,) = cases("swiglu", "B2 T3 D8 bar")
    outcome = measure_case(case, "full", QUICK)
    ours, *others = outcome.rows
    expected = {"eager"} if ours.backend == "reference" else {"reference", "eager"}
    assert ours.provider == "star"
    assert ours.backend == star_kernels.which("swiglu", torch.ones(1))
    assert {row.provider for row in others} == expected
    eager = next(row for row in others if row.provider == "eager")
    assert (ours.ratio, ours.best_peer, ours.ratio_to_best_peer) == (1.0, "eager", eager.ratio)
    assert eager.best_peer == ""
    assert eager.ratio_to_best_peer is None
    assert eager.percent_of_ceiling == pytest.approx(ours.percent_of_ceiling / eager.ratio)
    assert ours.ceiling == max(ours.percents, key=lambda name: ours.percents[name])
    assert set(ours.percents) == {"copy", "exp+fma"}
    assert ours.shape == {"B": 2, "T": 3, "D": 8}
    assert ours.flags == ["bar"]
    assert ours.bytes == 8 * 4 * 48
    assert ours.samples >= 3
    assert ours.peak_bytes >= 3 * 4 * 48
    assert outcome.grad
    assert len(outcome.run()) == 2  # type: ignore[arg-type]
    assert outcome.absent == []


def test_a_forward_makes_no_graph_and_a_state_is_compared() -> None:
    (case,) = cases("diagonal_scan", "B2 T5 D8")
    outcome = measure_case(case, "fwd", QUICK)
    assert not outcome.grad
    assert {"eager", "loop"} <= {row.provider for row in outcome.rows}
    assert all(not tensor.requires_grad for tensor in outcome.run())  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", ["B1 H1 P4 N4", "B2 H4 P4 N4 G2"])
def test_a_step_is_one_mode(line: str) -> None:
    (case,) = cases("ssd_step", line)
    assert measure_case(case, "step", QUICK).rows[0].mode == "step"
    with pytest.raises(ValueError, match="mode: needs one of step for ssd_step, got 'full'"):
        measure_case(case, "full", QUICK)


@pytest.mark.parametrize(
    "wrong, match",
    [
        (lambda gate, up: swiglu(gate, up) * 1.1, "result 0 of eager differs from ours by"),
        (lambda gate, up: swiglu(gate, up) * float("nan"), "result 0 of eager differs from ours by nan"),
        (lambda gate, up: swiglu(gate, up)[:1], r"result 0 of eager has shape \(1, 3, 8\), ours \(2, 3, 8\)"),
    ],
)
def test_a_rival_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], match: str
) -> None:
    with_peers(monkeypatch, "swiglu", Peer("eager", wrong))
    with pytest.raises(AssertionError, match=f"swiglu B2-T3-D8 fwd: {match}"):
        measure_case(cases("swiglu", "B2 T3 D8")[0], "fwd", QUICK)


def test_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_peers(monkeypatch, "swiglu", Peer("eager", lambda gate, up: swiglu(gate.detach(), up) + 0 * gate))
    with pytest.raises(AssertionError, match="full: result 0 of eager differs"):
        measure_case(cases("swiglu", "B2 T3 D8")[0], "full", QUICK)


def test_another_package_that_computes_something_else_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    with_peers(monkeypatch, "swiglu", Peer("eager", swiglu))
    wrong = Peer("other", lambda gate, up: swiglu(gate, up) * 1.1)
    monkeypatch.setattr(suite, "installed_peers", lambda operator: (wrong,))
    (absent,) = measure_case(cases("swiglu", "B2 T3 D8")[0], "fwd", QUICK).absent
    assert absent.provider == "other"
    assert "result 0 of other differs from ours by" in absent.reason


def test_every_backend_that_serves_is_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Callable[..., Tensor]:
        return lambda gate, up: swiglu(gate, up)

    with_peers(monkeypatch, "swiglu", Peer("eager", swiglu))
    monkeypatch.setattr(suite, "installed_peers", lambda operator: (Peer("extra", lambda gate, up: gate),))
    dispatch.declare_backend("extra", device_types=("cpu",))
    entry = dispatch.register("swiglu", "extra", load, device_types=("cpu",), dtypes=(torch.float32,))
    try:
        outcome = measure_case(cases("swiglu", "B2 T3 D8")[0], "fwd", QUICK)
    finally:
        dispatch.withdraw("swiglu", entry)
        dispatch._backends.pop("extra")
    # The package's kernel, and not the torch code that it brings under its name.
    assert {"star", "reference", "eager", "extra"} <= {row.provider for row in outcome.rows}
    assert outcome.absent == []


def test_what_cannot_run_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(gate: Tensor, up: Tensor) -> Tensor:
        raise TypeError("unexpected keyword argument")

    def waiting(gate: Tensor, up: Tensor) -> Tensor:
        torch.ones(256, 256) @ torch.ones(256, 256)
        return swiglu(gate, up)

    with_peers(monkeypatch, "swiglu", Peer("eager", swiglu), Peer("waiting", waiting))
    monkeypatch.setattr(suite, "installed_peers", lambda operator: (Peer("other", foreign),))
    outcome = measure_case(cases("swiglu", "B2 T3 D8")[0], "fwd", replace(QUICK, longest_s=1e-9))
    reasons = {one.provider: one.reason for one in outcome.absent}
    assert reasons["other"] == "TypeError: unexpected keyword argument"
    assert "s, more than 0" in reasons["waiting"]
    with_peers(monkeypatch, "swiglu", Peer("eager", foreign))
    with pytest.raises(TypeError, match="unexpected keyword"):
        measure_case(cases("swiglu", "B2 T3 D8")[0], "fwd", QUICK)


def test_rivals_whose_products_would_take_too_long_are_not_run_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**arguments: Any) -> Tensor:
        raise AssertionError("it ran")

    with_peers(monkeypatch, "linear_cross_entropy", Peer("eager", never))
    monkeypatch.setattr(suite, "product_rate", lambda dtype, device: 1.0)
    outcome = measure_case(cases("linear_cross_entropy", "B2 T3 D8 V5")[0], "full", QUICK)
    assert [row.provider for row in outcome.rows] == ["star"]
    reasons = {one.provider: one.reason for one in outcome.absent}
    assert "eager" in reasons
    assert all("torch's products would take" in reason for reason in reasons.values())


def test_a_slow_rival_gets_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(gate: Tensor, up: Tensor) -> Tensor:
        for _ in range(400):
            gate + up
        return swiglu(gate, up)

    with_peers(monkeypatch, "swiglu", Peer("eager", swiglu), Peer("slow", slow))
    settings = replace(QUICK, min_samples=7, slow_s=0.0, slow_samples=3)
    rows = {row.provider: row for row in measure_case(cases("swiglu", "B2 T3 D8")[0], "fwd", settings).rows}
    assert rows["slow"].samples == 3
    assert rows["slow"].ratio > 1


def test_compiled_code_is_a_rival_of_flagged_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_compile", lambda function: torch.compile(function, backend="eager"))
    rows = measure_case(cases("swiglu", "B2 T3 D8 compiled")[0], "fwd", QUICK).rows
    assert "compile" in {row.provider for row in rows}
    rows = measure_case(cases("swiglu", "B2 T3 D8")[0], "fwd", QUICK).rows
    assert "compile" not in {row.provider for row in rows}
