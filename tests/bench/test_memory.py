"""Bytes: exact on known allocations, whoever makes them, and the same in every call."""

from __future__ import annotations

import gc
import operator
import os
import sys
import time
from collections.abc import Callable

import pytest
import torch

from bench.harness import MeasurementError, peak_tensor_bytes, resident_bytes_fresh_process
from bench.memory import _largest_sum

MIB = 2**20


def test_one_tensor() -> None:
    assert peak_tensor_bytes(lambda: torch.empty(1000, dtype=torch.float64)) == 8000


def test_nothing() -> None:
    assert peak_tensor_bytes(lambda: None) == 0


def test_tensor_freed_midway_makes_room() -> None:
    def run() -> None:
        first = torch.empty(1000)
        second = torch.empty(2000)
        del second
        third = torch.empty(500)
        del first, third
        torch.empty(2500)

    assert peak_tensor_bytes(run) == 4 * (1000 + 2000)


def test_what_was_there_before_is_not_counted() -> None:
    before = torch.ones(10_000)
    assert peak_tensor_bytes(lambda: before[:100].neg()) == 400


def test_what_the_call_keeps_is_counted_once() -> None:
    kept: list[torch.Tensor] = []
    assert [peak_tensor_bytes(lambda: kept.append(torch.empty(1000))) for _ in range(3)] == [4000] * 3


def test_freeing_what_was_there_before_is_not_set_off() -> None:
    # One of the tensors takes the address of the first one, which the profiler believes still held.
    kept: list[torch.Tensor] = []
    peak_tensor_bytes(lambda: kept.append(torch.empty(1000)))
    address = kept.pop().data_ptr()
    while len(kept) < 1000 and (not kept or kept[-1].data_ptr() != address):
        kept.append(torch.empty(1000))

    def run() -> torch.Tensor:
        kept.clear()
        return torch.empty(500)

    assert peak_tensor_bytes(run) == 2000


def test_release_of_an_unknown_block_changes_nothing() -> None:
    assert _largest_sum([(1, 100), (2, -100), (3, 50), (1, -100), (4, 60)]) == 150


def test_temporaries_inside_an_operator_are_counted() -> None:
    # logsumexp is one operator whose result is a column; inside it, exp(x - max) has the size of x
    x = torch.randn(64, 1000)
    peak = peak_tensor_bytes(lambda: torch.logsumexp(x, 1))
    assert x.nbytes <= peak < 1.1 * x.nbytes


def test_tensors_saved_for_backward_are_counted() -> None:
    x = torch.zeros(1000, requires_grad=True)

    def run() -> None:
        h = x
        for _ in range(5):
            h = h.exp()

    with torch.no_grad():
        assert peak_tensor_bytes(run) == 2 * 4000
    assert peak_tensor_bytes(run) == 5 * 4000


def test_backward_is_counted() -> None:
    weight = torch.ones(1000, requires_grad=True)

    def run() -> None:
        (2 * weight).exp().sum().backward()  # type: ignore[no-untyped-call]
        weight.grad = None

    peak = peak_tensor_bytes(run)
    # the saved exponential and one gradient, then two gradients; scalars beside
    assert 2 * 4000 <= peak < 2 * 4000 + 100
    assert [peak_tensor_bytes(run) for _ in range(3)] == [peak] * 3


def test_cyclic_garbage_counts_as_live() -> None:
    def run() -> None:
        for _ in range(1000):
            cycle: list[object] = [torch.empty(10)]
            cycle.append(cycle)

    assert peak_tensor_bytes(run) == 40 * 1000
    assert gc.isenabled()


def test_same_model_step_same_bytes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    x = torch.randn(16, 32)

    def run() -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    peaks = {peak_tensor_bytes(run) for _ in range(5)}
    assert len(peaks) == 1
    assert peaks.pop() >= sum(parameter.nbytes for parameter in model.parameters())


def test_running_profiler_fails_clearly_and_lives_on() -> None:
    with torch.autograd.profiler.profile() as outer:
        with pytest.raises(MeasurementError, match="a torch profiler is running"):
            peak_tensor_bytes(lambda: None)
        torch.empty(1)
    assert any(event.name == "aten::empty" for event in outer.function_events or [])


def test_error_passes_through_and_the_next_call_works() -> None:
    with pytest.raises(ZeroDivisionError):
        peak_tensor_bytes(lambda: 1 // 0)
    assert gc.isenabled()
    assert peak_tensor_bytes(lambda: torch.empty(1)) == 4


def test_profiler_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    peak_tensor_bytes(lambda: torch.empty(1))
    assert "profiler" not in capfd.readouterr().err
    assert "KINETO_LOG_LEVEL" not in os.environ


def test_bad_argument_fails_clearly() -> None:
    with pytest.raises(TypeError, match="fn: needs a callable, got int"):
        peak_tensor_bytes(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: needs cpu or cuda, got 'meta'"):
        peak_tensor_bytes(lambda: None, device="meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak() -> None:
    before = torch.ones(MIB, device="cuda")

    def run() -> None:
        first = before + 1
        del first
        torch.empty(3 * MIB, device="cuda")

    assert peak_tensor_bytes(run, device="cuda") == peak_tensor_bytes(run) == 12 * MIB


def test_resident_bytes_of_a_known_allocation() -> None:
    ballast = b"x" * (300 * MIB)  # a large parent must not hide what the small child takes
    taken = resident_bytes_fresh_process(operator.mul, b"y", 100 * MIB)
    assert len(ballast) == 300 * MIB
    assert 95 * MIB < taken < 120 * MIB


@pytest.mark.parametrize(
    ("target", "args", "seconds", "message"),
    [
        (operator.truediv, (1, 0), 60.0, "(?s)target raised in its process:.*ZeroDivisionError"),
        (os._exit, (3,), 60.0, "the process died with exit code 3"),
        (time.sleep, (60,), 0.2, "not done after timeout_seconds = 0.2"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_failing_process_fails_with_its_reason(
    target: Callable[..., object], args: tuple[object, ...], seconds: float, message: str
) -> None:
    with pytest.raises(MeasurementError, match=message):
        resident_bytes_fresh_process(target, *args, timeout_seconds=seconds)


def test_bad_target_fails_clearly() -> None:
    with pytest.raises(TypeError, match="target: needs a callable, got int"):
        resident_bytes_fresh_process(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target: needs a function of a module and arguments that pickle"):
        resident_bytes_fresh_process(lambda: None)
    with pytest.raises(ValueError, match="target: needs a function of a module and arguments that pickle"):
        resident_bytes_fresh_process(print, sys.stdout)
    with pytest.raises(ValueError, match="timeout_seconds: needs a finite number"):
        resident_bytes_fresh_process(print, timeout_seconds=float("inf"))
