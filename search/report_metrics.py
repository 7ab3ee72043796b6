"""Names, units and number formats of what a search measures, for tables, axes and terminals alike.

A metric's key carries its unit (`decode_ms_per_token`, `cache_bytes`); a person reads "Decode time (ms per token)" and
"Cache (KiB)". A `Column` fixes one unit for all values shown together, so that they can be compared digit by digit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# key: (label, unit); unit "bytes" and "count" are scaled to the values at hand.
_KNOWN: dict[str, tuple[str, str]] = {
    "perplexity": ("Perplexity", "per token"),
    "bits_per_byte": ("Bits per byte", "bits"),
    "parameters": ("Parameters", "count"),
    "cache_bytes": ("Cache", "bytes"),
    "prefill_ms": ("Prefill time", "ms"),
    "decode_ms_per_token": ("Decode time", "ms per token"),
    "train_ms_per_step": ("Training step", "ms"),
    "peak_memory_bytes": ("Peak memory", "bytes"),
    "prefill_ms_ratio": ("Prefill time", "× reference"),
    "decode_ms_per_token_ratio": ("Decode time", "× reference"),
    "train_ms_per_step_ratio": ("Training step", "× reference"),
    "peak_memory_bytes_ratio": ("Peak memory", "× reference"),
    "generation": ("Generation", "0 is the initial population"),
}
_SUFFIXES = (("_ms_per_token", "ms per token"), ("_ms", "ms"), ("_bytes", "bytes"), ("_seconds", "s"))
_SPREAD = re.compile(r"_p\d+$")
_BYTES = ((1024.0**3, "GiB"), (1024.0**2, "MiB"), (1024.0, "KiB"))
_COUNTS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))

_FACTS = {
    "seq_len": "Sequence length (tokens)",
    "tokens": "Training tokens",
    "valid_tokens": "Held-out tokens",
    "batch_size": "Batch (sequences)",
    "depth": "Depth (LIVs)",
    "width": "Width (channels)",
    "head_dim": "Head (channels)",
    "jobs": "Trained at once (0: one a core)",
    "measure_seconds": "Time to measure",
    "vocab_size": "Vocabulary (tokens)",
    "gpus": "GPUs",
    "gpus_per_task": "GPUs of a task",
    "inherit": "Children inherit weights",
    "omp_wait_policy": "OpenMP waiting",
}

# Beyond this ratio of largest to smallest, a linear axis squeezes all but a few marks into one corner.
LOG_AXIS_RATIO = 30.0


@dataclass(frozen=True)
class Column:
    """One metric as it is shown: `shown = value / factor`, in `unit`.

    `decades` is the base-10 logarithm of largest to smallest where `log` is set, else 0.
    """

    key: str
    label: str
    unit: str
    factor: float
    decimals: int
    log: bool
    decades: float = 0.0

    @property
    def title(self) -> str:
        """Label and unit, for an axis or a table header."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def scale(self, value: float) -> float:
        """Give the value in this column's unit."""
        return value / self.factor

    def format(self, value: float | None) -> str:
        """Write a value in this column's unit, without the unit; a dash where there is none."""
        if value is None or not math.isfinite(value):
            return "–"
        shown = value / self.factor
        if abs(shown) >= 1e7:
            return f"{shown:.3g}"
        return f"{shown:,.{self.decimals}f}"

    def format_with_unit(self, value: float | None) -> str:
        """Write a value with its unit."""
        text = self.format(value)
        if text == "–" or not self.unit:
            return text
        return f"{text}{self.unit.split()[0]}" if self.unit.startswith("×") else f"{text} {self.unit}"


def is_spread(key: str) -> bool:
    """Tell whether the metric is a percentile of another one (`prefill_ms_p20`), shown beside it and not by itself."""
    return _SPREAD.search(key) is not None


def order_metrics(keys: Iterable[str], objectives: Iterable[str]) -> list[str]:
    """Sort metric names for display: objectives as given, the known ones, the rest by name; no percentiles."""
    first = list(objectives)
    known = [key for key in _KNOWN if key not in first]
    present = {key for key in keys if not is_spread(key)} | set(first)
    rest = sorted(present - set(first) - set(known))
    return first + [key for key in known if key in present] + rest


def lower_is_better(key: str) -> bool:
    """Tell whether the metric is one of those that a search minimises, or named like one."""
    return key in _KNOWN or key.endswith(("_ratio", *(suffix for suffix, _ in _SUFFIXES)))


def needs_log_axis(values: Iterable[float]) -> bool:
    """Tell whether the values spread over so many powers of ten that a linear axis would hide most of them."""
    seen = list(values)
    return bool(seen) and min(seen) > 0 and max(seen) / min(seen) > LOG_AXIS_RATIO


def column_for(key: str, values: Iterable[float]) -> Column:
    """Choose label, unit and number of decimals for a metric from all the values that will be shown."""
    finite = sorted(value for value in values if math.isfinite(value))
    label, unit = _label_and_unit(key)
    middle = abs(finite[len(finite) // 2]) if finite else 0.0
    factor = 1.0
    if unit in ("bytes", "count"):
        steps = _BYTES if unit == "bytes" else _COUNTS
        unit = "bytes" if unit == "bytes" else ""
        factor, unit = next(((size, name) for size, name in steps if middle >= size), (1.0, unit))
    whole = factor == 1.0 and all(value == int(value) for value in finite)
    log = needs_log_axis(finite)
    decades = math.log10(finite[-1] / finite[0]) if log else 0.0
    return Column(key, label, unit, factor, 0 if whole else _decimals(middle / factor), log, decades)


def format_seconds(seconds: float) -> str:
    """Write a duration for people: 41 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def humanise(key: str) -> str:
    """Turn a key into words: `seq_len` becomes "Seq len"."""
    words = key.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def list_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Write settings, or facts about a machine, for people: names and values; empty ones are left out.

    Bytes and seconds get their units from the key; of a long word, such as a fingerprint, the beginning is enough.
    """
    lines: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += [(f"{humanise(key)} {name[:1].lower()}{name[1:]}", text) for name, text in list_facts(value)]
        elif value not in ([], (), "", None):
            name = _FACTS.get(key) or humanise(key.removesuffix("_bytes").removesuffix("_seconds"))
            lines.append((name, _plain(key, value)))
    return lines


def _plain(key: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_plain("", inner) for inner in value)
    if isinstance(value, str) and len(value) > 40 and " " not in value:
        return f"{value[:12]}…"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value).replace("T", " ").replace("+00:00", " UTC") if key == "started" else str(value)
    if key.endswith("_bytes"):
        return column_for(key, [float(value)]).format_with_unit(float(value))
    if key.endswith("_seconds"):
        return format_seconds(float(value))
    if key == "seed":  # a name, not an amount
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _label_and_unit(key: str) -> tuple[str, str]:
    if key in _KNOWN:
        return _KNOWN[key]
    if key.endswith("_ratio"):
        return _label_and_unit(key.removesuffix("_ratio"))[0], "× reference"
    for suffix, unit in _SUFFIXES:
        if key.endswith(suffix):
            return humanise(key.removesuffix(suffix)), unit
    return humanise(key), ""


def _decimals(magnitude: float) -> int:
    """Keep about four significant digits, and no more than three decimals where three digits are left."""
    if magnitude <= 0:
        return 2
    return min(3 if magnitude >= 0.1 else 6, max(0, 3 - math.floor(math.log10(magnitude))))
