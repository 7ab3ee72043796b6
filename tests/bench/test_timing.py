"""Time: medians, ratios that hold while the machine's speed changes, and refusals."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat

import pytest
import torch

from bench.harness import Measurement, MeasurementError, Provider, measure, measure_many

WARMUP = 1
CALIBRATION = 2
UNTIMED = WARMUP + CALIBRATION


class FakeClock:
    """A clock that only the timed functions move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call_lasting(self, seconds: float | Iterator[float]) -> Callable[[], None]:
        lasting = repeat(seconds) if isinstance(seconds, float) else seconds

        def run() -> None:
            self.now += next(lasting)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr("bench.timing.perf_counter", fake)
    return fake


def test_median_and_percentiles_of_known_times(clock: FakeClock) -> None:
    times = [7.0, 1.0, 11.0, 3.0, 5.0, 9.0, 2.0, 4.0, 10.0, 8.0, 6.0]
    run = clock.call_lasting(chain(repeat(100.0, UNTIMED), times))
    got = measure(run, warmup=WARMUP, min_samples=11, min_seconds=0, max_seconds=1000)
    assert got == Measurement(median_s=6.0, p20_s=3.0, p80_s=9.0, samples=11, calls_per_sample=1)


def test_ratio_holds_while_the_machine_changes_speed(clock: FakeClock) -> None:
    slowness = [1.0, 8.0, 2.0, 16.0, 4.0, 1.0, 32.0, 2.0, 8.0]
    fn = clock.call_lasting(chain(repeat(1.0, UNTIMED), (6.0 * s for s in slowness)))
    reference = clock.call_lasting(chain(repeat(1.0, UNTIMED), (2.0 * s for s in slowness)))
    got = measure(fn, reference=reference, warmup=WARMUP, min_samples=9, min_seconds=0, max_seconds=1000)
    assert got.p80_s > 3 * got.p20_s
    assert (got.ratio_p20, got.ratio, got.ratio_p80) == (3.0, 3.0, 3.0)


def test_order_alternates_from_round_to_round() -> None:
    calls: list[str] = []
    runs = {name: Provider(partial(calls.append, name), lambda: None) for name in "abc"}
    measure_many(runs, warmup=1, min_samples=4, min_seconds=0)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc" + "cba"


def test_short_calls_share_a_sample(clock: FakeClock) -> None:
    got = measure(clock.call_lasting(1e-6), min_seconds=0)
    assert got.calls_per_sample >= 1000
    assert got.median_s == pytest.approx(1e-6)


def test_calls_of_a_millisecond_are_timed_one_by_one(clock: FakeClock) -> None:
    assert measure(clock.call_lasting(1.01e-3), min_seconds=0).calls_per_sample == 1
    assert measure(clock.call_lasting(0.99e-3), min_seconds=0).calls_per_sample == 2


def test_one_slow_call_does_not_make_a_sample_of_one(clock: FakeClock) -> None:
    # After the warm-up's call, the first of the two that are tried finds its caches empty.
    got = measure(clock.call_lasting(chain([5e-6, 2e-3], repeat(5e-6))), warmup=1, min_seconds=0)
    assert got.calls_per_sample >= 200


def test_preparing_is_not_timed(clock: FakeClock) -> None:
    prepared: list[None] = []

    def prepare() -> None:
        prepared.append(None)
        clock.now += 10.0

    # 1 us would be repeated, were it not prepared
    got = measure(Provider(clock.call_lasting(1e-6), prepare), warmup=2, min_samples=5, min_seconds=0, max_seconds=1000)
    assert got.median_s == pytest.approx(1e-6)
    assert got.calls_per_sample == 1
    assert len(prepared) == 2 + 5


def test_once_spends_no_call_on_how_many_make_a_sample(clock: FakeClock) -> None:
    calls: list[None] = []
    once = clock.call_lasting(1e-6)

    def run() -> None:
        calls.append(None)
        once()

    got = measure(Provider(run, once=True), warmup=2, min_samples=5, min_seconds=0, max_seconds=1000)
    assert got.calls_per_sample == 1
    assert len(calls) == 2 + 5


def test_sampling_goes_on_for_min_seconds(clock: FakeClock) -> None:
    assert measure(clock.call_lasting(1.0), min_samples=5, min_seconds=20.0, max_seconds=100.0).samples == 20


def test_sampling_stops_at_max_seconds(clock: FakeClock) -> None:
    got = measure(clock.call_lasting(1.0), warmup=WARMUP, min_samples=5, min_seconds=20.0, max_seconds=20.0)
    assert got.samples == 20 - UNTIMED


def test_too_few_samples_in_time_fail(clock: FakeClock) -> None:
    with pytest.raises(MeasurementError, match=r"only 2 of min_samples = 9 samples after 5\.0 s \(max_seconds = 5\)"):
        measure(clock.call_lasting(1.0), warmup=WARMUP, min_samples=9, max_seconds=5)


def test_warmup_counts_towards_max_seconds(clock: FakeClock) -> None:
    with pytest.raises(MeasurementError, match=r"only 0 of min_samples = 9 samples after 4\.0 s"):
        measure(clock.call_lasting(2.0), warmup=3, max_seconds=4)


@pytest.mark.parametrize("provider", [Provider(lambda: None), Provider(lambda: None, lambda: None)])
def test_clock_that_stands_still_fails(clock: FakeClock, provider: Provider) -> None:
    with pytest.raises(MeasurementError, match="clock did not advance"):
        measure(provider, min_seconds=0)


def test_garbage_is_not_collected_while_timing() -> None:
    collecting: set[bool] = set()
    measure(lambda: collecting.add(gc.isenabled()), min_seconds=0)
    assert collecting == {False}
    assert gc.isenabled()


def test_error_passes_through_and_collection_goes_on() -> None:
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 // 0)
    assert gc.isenabled()


def test_garbage_in_cycles_does_not_add_up() -> None:
    alive = 0

    class Node:
        def __init__(self) -> None:
            nonlocal alive
            alive += 1
            self.me = self

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    most = 0

    def run() -> None:
        nonlocal most
        Node()
        most = max(most, alive)

    measure(Provider(run, lambda: None), warmup=1, min_samples=50, min_seconds=0)
    assert most <= 3


def test_fifty_times_the_work_takes_longer() -> None:
    x = torch.randn(64, 64)

    def fifty() -> None:
        for _ in range(50):
            torch.mm(x, x)

    got = measure(fifty, reference=lambda: torch.mm(x, x), min_seconds=0.05)
    assert got.ratio is not None
    assert got.ratio > 3
    assert 0 < got.p20_s <= got.median_s <= got.p80_s


def test_many_compare_with_the_baseline(clock: FakeClock) -> None:
    runs = {"slow": clock.call_lasting(3.0), "base": clock.call_lasting(2.0), "fast": clock.call_lasting(1.0)}
    got = measure_many(runs, baseline="base", min_seconds=0, max_seconds=1000)
    assert list(got) == ["slow", "base", "fast"]
    assert [each.ratio for each in got.values()] == [1.5, 1.0, 0.5]
    assert [each.median_s for each in got.values()] == [3.0, 2.0, 1.0]


def test_without_a_baseline_there_is_no_ratio(clock: FakeClock) -> None:
    got = measure_many({"one": clock.call_lasting(1.0)}, min_seconds=0, max_seconds=1000)["one"]
    assert (got.ratio, got.ratio_p20, got.ratio_p80) == (None, None, None)


def test_peak_bytes_on_request() -> None:
    got = measure_many({"a": lambda: torch.empty(1000), "b": lambda: torch.empty(10)}, min_seconds=0, peak_memory=True)
    assert (got["a"].peak_bytes, got["b"].peak_bytes) == (4000, 40)
    alone = measure(lambda: torch.empty(8), reference=lambda: None, min_seconds=0, peak_memory=True)
    assert alone.peak_bytes == 32


def test_peak_bytes_leave_preparing_out() -> None:
    held: list[torch.Tensor] = []
    provider = Provider(lambda: held.pop().neg(), lambda: held.append(torch.ones(1000)))
    assert measure(provider, min_seconds=0, peak_memory=True).peak_bytes == 4000


def test_measurement_is_frozen_and_goes_to_json(clock: FakeClock) -> None:
    got = measure(clock.call_lasting(1.0), min_seconds=0, max_seconds=1000)
    as_dict = json.loads(json.dumps(got.to_dict()))
    assert Measurement(**as_dict) == got
    assert {"median_s", "p20_s", "p80_s", "samples", "ratio", "peak_bytes"} <= as_dict.keys()
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.median_s = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fn": 3}, TypeError, "fn: needs a callable or a Provider, got int"),
        ({"reference": "f"}, TypeError, "reference: needs a callable or a Provider, got str"),
        ({"warmup": 0}, ValueError, "warmup: needs at least 1, got 0"),
        ({"warmup": 1.5}, TypeError, "warmup: needs an integer, got float"),
        ({"min_samples": 2}, ValueError, "min_samples: needs at least 3, got 2"),
        ({"min_samples": True}, TypeError, "min_samples: needs an integer, got bool"),
        ({"min_seconds": -1}, ValueError, "min_seconds: needs a finite number, 0 or more, got -1"),
        ({"max_seconds": float("nan")}, ValueError, "max_seconds: needs a finite number"),
        ({"max_seconds": "1"}, TypeError, "max_seconds: needs a number of seconds, got str"),
        ({"min_seconds": 2, "max_seconds": 1}, ValueError, "min_seconds: needs at most max_seconds = 1, got 2"),
        ({"device": "meta"}, ValueError, "device: needs cpu or cuda, got 'meta'"),
        ({"device": "gpu"}, ValueError, "device: needs cpu or cuda, got 'gpu'"),
    ],
)
def test_bad_argument_fails_clearly(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure(**{"fn": lambda: None, **arguments})  # type: ignore[arg-type]


def test_bad_providers_fail_clearly() -> None:
    with pytest.raises(ValueError, match="providers: needs at least one"):
        measure_many({})
    with pytest.raises(ValueError, match="baseline: needs one of a, b, got 'c'"):
        measure_many({"a": lambda: None, "b": lambda: None}, baseline="c")
    with pytest.raises(TypeError, match="run: needs a callable, got int"):
        Provider(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prepare: needs a callable or None, got int"):
        Provider(lambda: None, 3)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_fails_clearly() -> None:
    with pytest.raises(ValueError, match="device: 'cuda' asked for, but this torch sees no CUDA device"):
        measure(lambda: None, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sample_waits_for_the_device() -> None:
    x = torch.randn(8192, 8192, device="cuda")
    one = measure(lambda: torch.mm(x, x), min_samples=5, device="cuda")
    default = measure(lambda: torch.mm(x, x), min_samples=5)
    # 1.1e12 operations: launching takes 10 us, running at least 0.5 ms on any device there is
    assert one.median_s > 200e-6
    assert default.median_s > 200e-6
