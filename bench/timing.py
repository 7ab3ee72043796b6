"""Time of a callable, alone or interleaved with others, as a median with its spread."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import repeat
from statistics import quantiles
from time import perf_counter

import torch

from bench._validation import MeasurementError, require_integer, require_seconds, resolve_device
from bench.memory import peak_tensor_bytes

# A call is repeated until a sample lasts this long. Reading the clock twice costs 0.1 us and waiting for a GPU 10, but
# the first call after a rival's finds the caches full of that one's code and tensors: steps that take 5 us in a row
# were 12 in samples of 0.1 ms, and 66 where the first call alone had seemed long enough to be a sample.
_SAMPLE_S = 1e-3

# An empty function takes 30 ns: three thousand calls fill a sample, on CUDA thirty thousand.
_MOST_CALLS = 1_000_000

# Below three samples a 20th and an 80th percentile say nothing.
_FEWEST_SAMPLES = 3


@dataclass(frozen=True)
class Provider:
    """What is timed, and what has to be done, untimed, before each sample.

    Attributes:
        run: Timed. With `prepare`, a sample is exactly one call.
        prepare: Called right before each sample; None where `run` can be called again and again.
        once: Whether a sample is exactly one call without `prepare` too, where a call is known to be long enough: none
            are spent to find that out.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    once: bool = False

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise TypeError(f"run: needs a callable, got {type(self.run).__name__}")
        if self.prepare is not None and not callable(self.prepare):
            raise TypeError(f"prepare: needs a callable or None, got {type(self.prepare).__name__}")


@dataclass(frozen=True)
class Measurement:
    """Time of one call, and how it compares.

    Attributes:
        median_s: Median over the samples, in seconds a call.
        p20_s: 20th percentile.
        p80_s: 80th percentile.
        samples: Number of samples.
        calls_per_sample: Calls that one sample averages over; more than one only for calls below 1 ms.
        ratio: Median of (this time / the reference's time in the same round); below 1 is faster. None without a
            reference.
        ratio_p20: 20th percentile of it.
        ratio_p80: 80th percentile of it.
        peak_bytes: `bench.memory.peak_tensor_bytes` of one call, where asked for.
    """

    median_s: float
    p20_s: float
    p80_s: float
    samples: int
    calls_per_sample: int
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)


def measure(
    fn: Callable[[], object] | Provider,
    *,
    reference: Callable[[], object] | Provider | None = None,
    warmup: int = 3,
    min_samples: int = 9,
    min_seconds: float = 0.2,
    max_seconds: float = 60.0,
    device: str | torch.device | None = None,
    peak_memory: bool = False,
) -> Measurement:
    """Time `fn`, and with `reference` compare the two, sample by sample.

    Each round takes one sample of both, in alternating order, and gives one ratio: whatever slows the machine for
    longer than a round slows both, so the ratio holds where the times do not. Garbage is collected between samples and
    never during one.

    Args:
        fn: Called without arguments; its result is dropped. A `Provider` where each sample needs preparing.
        reference: What `fn` is compared with.
        warmup: Calls of each before anything is timed; at least 1.
        min_samples: Samples always taken; at least 3.
        min_seconds: Sampling goes on until it has lasted this long.
        max_seconds: Counted from the first warm-up call; `min_samples` must be there by then, and no more are taken
            after.
        device: "cuda" makes each sample wait for the device; "cpu" does not. Default: wait if this process has used
            CUDA. Calls below 1 ms queue behind one another within a CUDA sample, so that theirs is the time at full
            throughput.
        peak_memory: One more call, to fill `peak_bytes`.

    Returns:
        The measurement of `fn`.

    Raises:
        TypeError: `fn` or `reference` is not callable, or a number is of the wrong type.
        ValueError: A number is out of range, or `device` is not one that can be timed.
        MeasurementError: `max_seconds` were over before `min_samples` were taken, or the clock did not advance.

    Whatever `fn` raises passes through unchanged.
    """
    providers = {"fn": fn} if reference is None else {"fn": fn, "reference": reference}
    return _measure(
        providers,
        baseline=None if reference is None else "reference",
        warmup=warmup,
        min_samples=min_samples,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        device=device,
        peak_memory=("fn",) if peak_memory else (),
    )["fn"]


def measure_many(
    providers: Mapping[str, Callable[[], object] | Provider],
    *,
    baseline: str | None = None,
    warmup: int = 3,
    min_samples: int = 9,
    min_seconds: float = 0.2,
    max_seconds: float = 60.0,
    device: str | torch.device | None = None,
    peak_memory: bool = False,
) -> dict[str, Measurement]:
    """Time any number of providers round by round, each compared with the one named `baseline`.

    Every round takes one sample of each, forwards in one round and backwards in the next. `min_samples`, `min_seconds`
    and `max_seconds` are for all together; the rest is as in `measure`.

    Args:
        providers: What to time, by name.
        baseline: The name that ratios refer to; its own ratio is 1. None: no ratios.
        warmup: As in `measure`.
        min_samples: As in `measure`, of each.
        min_seconds: As in `measure`.
        max_seconds: As in `measure`.
        device: As in `measure`.
        peak_memory: As in `measure`, for each.

    Returns:
        A measurement for each name, in the order given.

    Raises:
        TypeError: As `measure`.
        ValueError: As `measure`; no providers, or none named `baseline`.
        MeasurementError: As `measure`.
    """
    return _measure(
        providers,
        baseline=baseline,
        warmup=warmup,
        min_samples=min_samples,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        device=device,
        peak_memory=tuple(providers) if peak_memory else (),
    )


def _measure(
    providers: Mapping[str, Callable[[], object] | Provider],
    *,
    baseline: str | None,
    warmup: int,
    min_samples: int,
    min_seconds: float,
    max_seconds: float,
    device: str | torch.device | None,
    peak_memory: Sequence[str],
) -> dict[str, Measurement]:
    if not providers:
        raise ValueError("providers: needs at least one, got none")
    if baseline is not None and baseline not in providers:
        raise ValueError(f"baseline: needs one of {', '.join(providers)}, got {baseline!r}")
    require_integer("warmup", warmup, 1)
    require_integer("min_samples", min_samples, _FEWEST_SAMPLES)
    require_seconds("min_seconds", min_seconds)
    require_seconds("max_seconds", max_seconds)
    if min_seconds > max_seconds:
        raise ValueError(f"min_seconds: needs at most max_seconds = {max_seconds}, got {min_seconds}")
    runs = {name: _as_provider(name, provider) for name, provider in providers.items()}
    target = resolve_device(device)
    synchronize = _synchronizer(target)
    deadline = _Deadline(max_seconds, min_samples)
    with _no_collection_while_timing():
        for run in runs.values():
            for _ in range(warmup):
                deadline.check(0)
                _sample(run, 1, synchronize)
        calls = {name: _calls_per_sample(run, synchronize) for name, run in runs.items()}
        samples = _interleave(runs, calls, synchronize, min_samples, min_seconds, deadline)
    return {
        name: _summarise(
            samples[name],
            calls[name],
            None if baseline is None else samples[baseline],
            _peak_bytes(runs[name], target) if name in peak_memory else None,
        )
        for name in runs
    }


def _interleave(
    runs: Mapping[str, Provider],
    calls: Mapping[str, int],
    synchronize: Callable[[], None] | None,
    min_samples: int,
    min_seconds: float,
    deadline: _Deadline,
) -> dict[str, list[float]]:
    """Take one sample of each in every round, the order reversed from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    started = perf_counter()
    rounds = 0
    while rounds < min_samples or perf_counter() - started < min_seconds:
        if rounds < min_samples:
            deadline.check(rounds)
        elif deadline.passed():
            break
        for name in order:
            samples[name].append(_sample(runs[name], calls[name], synchronize))
            # Young garbage only: what a step left in reference cycles goes before it adds up, and 5 us are spent, not
            # 50 ms.
            gc.collect(1)
        order.reverse()
        rounds += 1
    return samples


def _sample(provider: Provider, calls: int, synchronize: Callable[[], None] | None) -> float:
    """Return the seconds of one call, averaged over `calls`."""
    if provider.prepare is not None:
        provider.prepare()
    run = provider.run
    times = repeat(None, calls)
    if synchronize is not None:
        synchronize()
    start = perf_counter()
    for _ in times:
        run()
    if synchronize is not None:
        synchronize()
    return (perf_counter() - start) / calls


def _calls_per_sample(provider: Provider, synchronize: Callable[[], None] | None) -> int:
    """Return how many calls a sample needs to last `_SAMPLE_S`."""
    if provider.once or provider.prepare is not None:
        return 1
    calls = 1
    while True:
        # The faster of two, since an interruption would make a short call look long enough.
        call_s = min(_sample(provider, calls, synchronize) for _ in range(2))
        if call_s * calls >= _SAMPLE_S:
            return calls
        if calls >= _MOST_CALLS:
            raise MeasurementError(f"the clock did not advance during {calls} calls")
        # Grown tenfold at most: a single call of a few tens of ns is timed too badly to extrapolate from.
        calls = min(10 * calls, math.ceil(1.2 * _SAMPLE_S / call_s)) if call_s > 0 else 10 * calls


def _summarise(
    samples: Sequence[float], calls: int, baseline: Sequence[float] | None, peak_bytes: int | None
) -> Measurement:
    if min(samples) <= 0 or (baseline is not None and min(baseline) <= 0):
        raise MeasurementError("the clock did not advance during a sample")
    p20, median, p80 = _spread(samples)
    ratios: tuple[float | None, float | None, float | None] = (None, None, None)
    if baseline is not None:
        ratios = _spread([mine / other for mine, other in zip(samples, baseline, strict=True)])
    return Measurement(
        median_s=median,
        p20_s=p20,
        p80_s=p80,
        samples=len(samples),
        calls_per_sample=calls,
        ratio=ratios[1],
        ratio_p20=ratios[0],
        ratio_p80=ratios[2],
        peak_bytes=peak_bytes,
    )


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th percentile, the median and the 80th percentile."""
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def _peak_bytes(provider: Provider, device: torch.device) -> int:
    if provider.prepare is not None:
        provider.prepare()
    return peak_tensor_bytes(provider.run, device=device)


class _Deadline:
    """The moment by which the samples that were asked for must have been taken."""

    def __init__(self, max_seconds: float, min_samples: int) -> None:
        self._max_seconds = max_seconds
        self._min_samples = min_samples
        self._started = perf_counter()

    def passed(self) -> bool:
        return perf_counter() - self._started >= self._max_seconds

    def check(self, rounds: int) -> None:
        """Raise if it has passed with only `rounds` samples taken."""
        if self.passed():
            elapsed = perf_counter() - self._started
            raise MeasurementError(
                f"only {rounds} of min_samples = {self._min_samples} samples after {elapsed:.1f} s "
                f"(max_seconds = {self._max_seconds})"
            )


@contextmanager
def _no_collection_while_timing() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _synchronizer(device: torch.device) -> Callable[[], None] | None:
    """Return what waits for `device`, or None where calls return when they are done."""
    return None if device.type == "cpu" else lambda: torch.cuda.synchronize(device)


def _as_provider(name: str, provider: Callable[[], object] | Provider) -> Provider:
    if isinstance(provider, Provider):
        return provider
    if not callable(provider):
        raise TypeError(f"{name}: needs a callable or a Provider, got {type(provider).__name__}")
    return Provider(provider)
