"""The bars that the kernel contract sets on a CPU in float32, as data, and how far a run is from each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.results import STAR, Row

Providers = Mapping[str, Row]
"""The rows of one case in one mode, by provider."""


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        operators: Whose.
        text: What is asked, in the contract's words.
        figure: What is held against it, from a case's rows; None where a provider that it needs is not there.
        bound: The number asked for.
        at_least: Whether the figure has to be at least that, or else at most.
        unit: Written after the figure.
        mode: In which mode.
        flag: On which cases.
        where: Axis lengths and options that a case must have; None means that it must not have the option.
    """

    operators: tuple[str, ...]
    text: str
    figure: Callable[[Providers], float | None]
    bound: float
    at_least: bool = True
    unit: str = "x"
    mode: str = "full"
    flag: str = "bar"
    where: Mapping[str, Any] = field(default_factory=dict)

    def applies(self, row: Row) -> bool:
        """Return whether the case of our row `row` is one that this bar is read off."""
        return (
            row.operator in self.operators
            and row.mode == self.mode
            and row.dtype == "float32"
            and self.flag in row.flags
            and all(row.shape.get(name) == value for name, value in self.where.items())
        )


@dataclass(frozen=True)
class Verdict:
    """One bar at one case: the figure and whether it meets the bar; both None where it could not be measured."""

    bar: Bar
    operator: str
    case: str
    figure: float | None
    met: bool | None


def faster_than(*providers: str) -> Callable[[Providers], float | None]:
    """Compare with the fastest of these that were measured: its time / ours."""

    def figure(rows: Providers) -> float | None:
        return min((rows[name].ratio for name in providers if name in rows), default=None)

    return figure


def percent_of(ceiling: str) -> Callable[[Providers], float | None]:
    """Return ours as percent of a ceiling."""
    return lambda rows: rows[STAR].percents.get(ceiling)


def _percent_of_binding(rows: Providers) -> float | None:
    return rows[STAR].percent_of_ceiling


def _time_of_eager(rows: Providers) -> float | None:
    return 1 / rows["eager"].ratio if "eager" in rows else None


def _peak_of_logits(rows: Providers) -> float | None:
    shape = rows[STAR].shape
    return rows[STAR].peak_bytes / float(4 * shape["B"] * shape["T"] * shape["V"])


def _microseconds(rows: Providers) -> float | None:
    return rows[STAR].median_s * 1e6


_CONVOLUTIONS = ("causal_conv1d", "gated_short_conv")
_NORMS = ("rms_norm", "add_rms_norm", "rotary")
_UNITS = ("swiglu", "geglu", "reglu")
_SCANS = ("selective_scan", "diagonal_scan", "rg_lru")
_CHUNKED = ("ssd", "gated_linear_attention", "gated_delta_rule")
_STEPS = (
    "attention_step",
    "causal_conv1d_step",
    "gated_short_conv_step",
    "long_conv_step",
    "diagonal_scan_step",
    "rg_lru_step",
    "selective_scan_step",
    "ssd_step",
    "gated_linear_attention_step",
    "gated_delta_rule_step",
)
_FULL_MAP, _WINDOW = {"window": None}, {"window": 128, "T": 4096}

BARS: tuple[Bar, ...] = (
    Bar(_CONVOLUTIONS, "3 x eager", faster_than("eager", "conv1d"), 3.0),
    Bar(_CONVOLUTIONS, "torch.compile", faster_than("compile"), 1.0),
    Bar(_CONVOLUTIONS, "70 % of copy bandwidth", percent_of("copy"), 70.0, unit="%"),
    Bar(_NORMS, "2 x eager (decomposed)", faster_than("eager"), 2.0),
    Bar(_NORMS, "torch.compile", faster_than("compile"), 1.0),
    Bar(_NORMS, "70 % of copy bandwidth", percent_of("copy"), 70.0, unit="%"),
    Bar(_UNITS, "1.5 x eager", faster_than("eager"), 1.5),
    Bar(_UNITS, "torch.compile", faster_than("compile"), 1.0),
    Bar(_UNITS, "70 % of copy bandwidth", percent_of("copy"), 70.0, unit="%"),
    Bar(_SCANS, "20 x the token-by-token loop", faster_than("loop"), 20.0),
    Bar(_SCANS, "5 x the best vectorised torch form", faster_than("eager", "unbound", "compile", "reference"), 5.0),
    # The plain scan has no exponential and two multiply-adds for 20 bytes: memory binds it, not exp + FMA.
    Bar(_SCANS, "40 % of the ceiling that binds", _percent_of_binding, 40.0, unit="%"),
    Bar(_CHUNKED, "5 x the chunked torch form", faster_than("eager", "compile", "reference"), 5.0),
    Bar(_CHUNKED, "50 % of matrix throughput at T = 2048", percent_of("matmul"), 50.0, unit="%", where={"T": 2048}),
    Bar(("attention",), "1.2 x SDPA", faster_than("sdpa"), 1.2, where=_FULL_MAP),
    Bar(("attention",), "70 % of matrix throughput", percent_of("matmul"), 70.0, unit="%", where=_FULL_MAP),
    Bar(("attention",), "10 x SDPA with a mask (window 128, T 4096)", faster_than("sdpa"), 10.0, where=_WINDOW),
    Bar(("differential_attention",), "4 x SDPA calls with the wide values", faster_than("sdpa-wide"), 4.0),
    Bar(("differential_attention",), "70 % of matrix throughput", percent_of("matmul"), 70.0, unit="%"),
    Bar(("long_conv",), "2 x torch.fft with padding to 2 T", faster_than("eager"), 2.0),
    Bar(("linear_cross_entropy",), "1/8 of the logits' memory", _peak_of_logits, 1 / 8, at_least=False),
    Bar(("linear_cross_entropy",), "1.05 x the time of eager", _time_of_eager, 1.05, at_least=False),
    Bar(_STEPS, "3 x the eager step at batch 1", faster_than("eager"), 3.0, mode="step"),
    Bar(_STEPS, "10 us a call", _microseconds, 10.0, at_least=False, unit="us", mode="step", flag="overhead"),
)
"""Every bar with a number. A figure against a form that has several writings is against the fastest of them."""


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Group rows by operator, case and mode."""
    grouped: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        grouped[row.operator, row.case, row.mode][row.provider] = row
    return dict(grouped)


def judge(rows: Iterable[Row], bars: Iterable[Bar] = BARS) -> list[Verdict]:
    """Hold a run against the bars, in the bars' order."""
    grouped = by_case(rows)
    verdicts = []
    for bar in bars:
        for (operator, case, _), providers in grouped.items():
            if STAR not in providers or not bar.applies(providers[STAR]):
                continue
            figure = bar.figure(providers)
            met = None if figure is None else (figure >= bar.bound if bar.at_least else figure <= bar.bound)
            verdicts.append(Verdict(bar, operator, case, figure, met))
    return verdicts
