"""Measure one case: ours, the reference and every rival, checked against one another and then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import star_kernels
from bench._validation import MeasurementError, resolve_device
from bench.cases import Case, Inputs, build
from bench.ceilings import Ceiling, best_exp_ceiling, best_matmul_ceiling, copy_ceiling, product_rate
from bench.disturbance import calmest
from bench.hardware import machine
from bench.peers import DENSE_PEERS, Peer
from bench.peers_installed import installed_peers
from bench.peers_recurrence import RECURRENCE_PEERS
from bench.peers_steps import STEP_PEERS
from bench.results import REFERENCE, STAR, Absent, Row, now, versions
from bench.timing import Measurement, Provider, measure_many
from bench.work import Work, differentiated, work_of
from star_kernels.dispatch import serving

PEERS: dict[str, tuple[Peer, ...]] = {**DENSE_PEERS, **RECURRENCE_PEERS, **STEP_PEERS}
"""Every operator's rivals."""

Record = Callable[[Case, str], None]
"""What the benchmarks' fixture gives them: measure this case in this mode, and keep the rows."""

# Results that differ by more of the largest value are two different computations, and comparing their times says
# nothing. The tests hold kernels to far less; here float32 sums of 10^5 terms in any order have to fit, and bfloat16
# intermediates.
_AGREEMENT = {torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float64: 1e-5}


# A first call is not taken for a measure of the next, unless it and the check took so long that set-up hardly counts.
_LONG_ENOUGH_S = 1.0


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        min_seconds: Sampling time of one case, providers together.
        min_samples: Samples of each provider at least.
        slow_s: A provider whose call takes longer is measured apart, beside ours, in fewer samples.
        slow_samples: That many.
        longest_s: One whose call takes longer than this is not measured.
        tries: Most times that a case is measured where others take processor time meanwhile.
        disturbed: The share of the processors from which on it is measured again.
        device: Where.
    """

    min_seconds: float = 0.5
    min_samples: int = 9
    slow_s: float = 0.25
    slow_samples: int = 3
    longest_s: float = 20.0
    tries: int = 3
    disturbed: float = 0.05
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """What a case gave.

    Attributes:
        rows: One for each provider, ours first.
        absent: Rivals without a number.
        run: Our call, to be run with gradients enabled as in `grad`.
        grad: Whether the mode differentiates.
        calls_per_sample: As ours was timed.
    """

    rows: list[Row]
    absent: list[Absent]
    run: Callable[[], object]
    grad: bool
    calls_per_sample: int


def measure_case(case: Case, mode: str, settings: Settings) -> Outcome:
    """Time a case in one mode.

    Raises:
        ValueError: `mode` is not one of the case's.
        AssertionError: a provider computes something else than ours.
        MeasurementError: as `bench.timing.measure_many`.
    """
    if mode not in case.modes:
        raise ValueError(f"mode: needs one of {', '.join(case.modes)} for {case.operator}, got {mode!r}")
    device = resolve_device(settings.device)
    inputs = build(case, device)
    grad = mode == "full"
    with torch.set_grad_enabled(grad), _compiled_code_dropped():
        if grad:
            for name in inputs.leaves:
                inputs.args[name].requires_grad_()
        backend = star_kernels.which(case.operator, inputs.first)
        public = getattr(star_kernels, case.operator)
        with torch.no_grad():
            outputs = _as_tuple(public(**inputs.args, **inputs.options))
        call = _caller(case, inputs, grad, outputs)
        runs = {STAR: call(partial(public, **inputs.args, **inputs.options))}
        work = work_of(case, mode, inputs, outputs)
        products_s = work.flops / product_rate(case.dtype, device=device)
        for name, function in _rivals(case, mode, inputs):
            runs[name] = call(function)
        # Last, so that a package's kernel stands under its name rather than the torch code that it brings.
        for name in serving(case.operator, inputs.first):
            if name != backend:
                runs[name] = call(partial(public, **inputs.args, **inputs.options, backend=name))
        too_slow: list[Absent] = []
        if products_s > settings.longest_s:
            # Not even once: where the processor has no instructions for bfloat16, torch's products run at 1 GFLOP/s.
            reason = f"torch's products would take {products_s:.0f} s, more than {settings.longest_s:.0f}"
            too_slow = [Absent(case.operator, case.name, mode, name, reason) for name in runs if name != STAR]
            runs = {STAR: runs[STAR]}
        seconds, absent = _check(case, mode, runs)
        absent += too_slow
        timed, ceilings = _choose(runs, seconds, work, case, settings, absent, mode)
        (measured, percents), others = calmest(
            lambda: _time(timed, ceilings, work, settings), tries=settings.tries, at_most=settings.disturbed
        )
    rows = _rows(case, mode, backend, work, measured, percents, others)
    return Outcome(rows, absent, runs[STAR], grad, measured[STAR].calls_per_sample)


def _caller(
    case: Case, inputs: Inputs, grad: bool, outputs: tuple[Tensor, ...]
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Return what turns a forward function into the call that is timed: itself, or with its backward."""
    if not grad:
        return lambda function: function
    leaves = [inputs.args[name] for name in inputs.leaves]
    upstream = [_like(output) for output in differentiated(case.operator, outputs)]

    def with_backward(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> tuple[Tensor, ...]:
            made = differentiated(case.operator, _as_tuple(function()))
            return torch.autograd.grad(made, leaves, upstream)

        return run

    return with_backward


def _like(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(output.shape, generator=generator).to(output)


def _rivals(case: Case, mode: str, inputs: Inputs) -> Iterator[tuple[str, Callable[[], Any]]]:
    for peer in (*PEERS[case.operator], *installed_peers(case.operator)):
        if mode not in peer.modes or not peer.applies(case):
            continue
        arguments = {**inputs.args, **inputs.options}
        if peer.prepare is not None:
            arguments |= peer.prepare(**arguments)
        function = _compile(peer.function) if peer.compiled else peer.function
        yield peer.name, partial(function, **arguments)
        if peer.name == "eager" and "compiled" in case.flags:
            yield "compile", partial(_compile(peer.function), **arguments)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


@contextmanager
def _compiled_code_dropped() -> Iterator[None]:
    """Forget compiled code afterwards: a function is compiled for a few shapes at most before torch gives up on it."""
    try:
        yield
    finally:
        torch.compiler.reset()


def _check(case: Case, mode: str, runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], list[Absent]]:
    """Hold every provider's results against ours; return the seconds of a call, and who failed to run.

    A rival from another package may fail or compute something else, and one that torch.compile makes: both are absent
    then, with the reason.
    Our own formulas and operators may not.
    """
    own = {STAR, REFERENCE} | {peer.name for peer in PEERS[case.operator] if not peer.compiled}
    seconds: dict[str, float] = {}
    absent: list[Absent] = []
    expected: tuple[Tensor, ...] = ()
    for name, run in list(runs.items()):
        started = perf_counter()
        try:
            results = _as_tuple(run())
        except Exception as error:
            if name in own:
                raise
            absent.append(Absent(case.operator, case.name, mode, name, f"{type(error).__name__}: {error}"[:300]))
            del runs[name]
            continue
        if name == STAR:
            expected = results
        try:
            for index, (got, want) in enumerate(zip(results, expected, strict=mode == "full")):
                label = f"{case.operator} {case.name} {mode}: result {index} of {name}"
                _require_agreement(label, got, want, case.dtype)
        except AssertionError as error:
            if name in own:
                raise
            absent.append(Absent(case.operator, case.name, mode, name, str(error)[:300]))
            del runs[name]
            continue
        finally:
            del results
        if perf_counter() - started < _LONG_ENOUGH_S or name not in own:
            started = perf_counter()
            run()
        seconds[name] = perf_counter() - started
    return seconds, absent


def _require_agreement(what: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape, f"{what} has shape {tuple(got.shape)}, ours {tuple(want.shape)}"
    if not want.numel():
        return
    scale = want.abs().max().item()
    error = (got.double() - want.double()).abs().max().item()
    assert error <= _AGREEMENT[dtype] * scale, f"{what} differs from ours by {error:.2e} of {scale:.2e}"


@dataclass(frozen=True)
class _Timed:
    """What is timed in turns, what apart since it is slow, and in how many samples."""

    together: dict[str, Callable[[], Any]]
    slow: dict[str, Callable[[], Any]]
    order: tuple[str, ...]
    samples: int


def _choose(
    runs: dict[str, Callable[[], Any]],
    seconds: dict[str, float],
    work: Work,
    case: Case,
    settings: Settings,
    absent: list[Absent],
    mode: str,
) -> tuple[_Timed, dict[str, Ceiling]]:
    """Return what is to be timed, and beside which ceilings; a rival that takes too long is absent."""
    together: dict[str, Callable[[], Any]] = {}
    slow: dict[str, Callable[[], Any]] = {}
    for name, run in runs.items():
        if name != STAR and seconds[name] > settings.longest_s:
            reason = f"a call takes {seconds[name]:.0f} s, more than {settings.longest_s:.0f}"
            absent.append(Absent(case.operator, case.name, mode, name, reason))
        elif name != STAR and seconds[name] > max(settings.slow_s, 4 * seconds[STAR]):
            slow[name] = run
        else:
            together[name] = run
    samples = settings.min_samples if seconds[STAR] < settings.slow_s else settings.slow_samples
    return _Timed(together, slow, tuple(runs), samples), _ceilings(work, case.dtype, settings.device)


def _time(
    timed: _Timed, ceilings: dict[str, Ceiling], work: Work, settings: Settings
) -> tuple[dict[str, Measurement], dict[str, float]]:
    """Return the measurements by provider, and ours as percent of each ceiling."""
    beside = {_key(name): one.run for name, one in ceilings.items()}
    measured = _measure({**timed.together, **beside}, timed.samples, settings)
    if timed.slow:
        once = {name: Provider(run, once=True) for name, run in timed.slow.items()}
        apart = _measure({STAR: timed.together[STAR], **once}, settings.slow_samples, settings)
        measured |= {name: apart[name] for name in timed.slow}
    # How long the ceilings would take for the same, of our time.
    percents = {
        bound: 100
        * sum(amount / ceilings[part].work * _ratio(measured[_key(part)]) for part, amount in amounts.items())
        for bound, amounts in _amounts(work).items()
    }
    return {name: measured[name] for name in timed.order if name in measured}, percents


def _measure(
    runs: Mapping[str, Callable[[], Any] | Provider], samples: int, settings: Settings
) -> dict[str, Measurement]:
    return measure_many(
        runs,
        baseline=STAR,
        warmup=1,
        min_samples=samples,
        min_seconds=settings.min_seconds if samples == settings.min_samples else 0.0,
        max_seconds=500.0,
        device=settings.device,
        peak_memory=True,
    )


def _key(ceiling: str) -> str:
    return f"ceiling:{ceiling}"


def _amounts(work: Work) -> dict[str, dict[str, int]]:
    """Return for each bound the ceilings whose times add up to it, with how much of each is done."""
    bounds = {
        "copy": {"copy": work.bytes},
        "matmul": {"matmul": work.flops},
        # Exponentials and multiply-adds share the vector units; a matrix product is the measure of the latter.
        "exp+fma": {"exp": work.exps, "matmul": 2 * work.fmas},
    }
    done = {bound: {part: amount for part, amount in amounts.items() if amount} for bound, amounts in bounds.items()}
    return {bound: amounts for bound, amounts in done.items() if amounts}


def _ceilings(work: Work, dtype: torch.dtype, device: str) -> dict[str, Ceiling]:
    """Return the ceilings that can bind, to be timed in the same rounds."""
    found = {"copy": copy_ceiling(max(8, work.footprint), device=device)}
    if work.flops or work.fmas:
        found["matmul"] = best_matmul_ceiling(dtype if work.flops else torch.float32, device=device)
    if work.exps:
        found["exp"] = best_exp_ceiling(device=device)
    return found


def _ratio(measurement: Measurement) -> float:
    if measurement.ratio is None:
        raise MeasurementError("measured without a baseline")
    return measurement.ratio


def _rows(
    case: Case,
    mode: str,
    backend: str,
    work: Work,
    measured: dict[str, Measurement],
    percents: dict[str, float],
    others: float | None,
) -> list[Row]:
    binding = max(percents, key=lambda name: percents[name])
    rivals = {name: _ratio(one) for name, one in measured.items() if name not in (STAR, REFERENCE)}
    best = min(rivals, key=lambda name: rivals[name]) if rivals else ""
    device = str(machine()["processor"])
    date = now()
    return [
        Row(
            operator=case.operator,
            case=case.name,
            mode=mode,
            provider=name,
            backend={STAR: backend, REFERENCE: REFERENCE}.get(name, ""),
            dtype=str(case.dtype).removeprefix("torch."),
            shape={**case.sizes, **case.options},
            flags=sorted(case.flags),
            threads=torch.get_num_threads(),
            median_s=one.median_s,
            p20_s=one.p20_s,
            p80_s=one.p80_s,
            samples=one.samples,
            calls_per_sample=one.calls_per_sample,
            bytes=work.bytes,
            flops=work.flops,
            exps=work.exps,
            fmas=work.fmas,
            percents={bound: percent / _ratio(one) for bound, percent in percents.items()},
            ceiling=binding,
            percent_of_ceiling=percents[binding] / _ratio(one),
            ratio=_ratio(one),
            ratio_p20=one.ratio_p20 or 1.0,
            ratio_p80=one.ratio_p80 or 1.0,
            best_peer=best if name == STAR else "",
            ratio_to_best_peer=rivals.get(best) if name == STAR else None,
            peak_bytes=one.peak_bytes or 0,
            others_percent=None if others is None else 100 * others,
            device=device,
            versions=versions(),
            date=date,
        )
        for name, one in measured.items()
    ]


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)
