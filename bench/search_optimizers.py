"""Compare the search's optimizers, and successive halving with whole trainings, at equal numbers of training tokens.

    python -m bench.search_optimizers [--seeds 5] [--generations 20] [--out bench/results/NAME]

Each run is a search on the default text, of the smoke preset's sizes but for depth: by NSGA-II, by random search, by
the genetic algorithm, and by NSGA-II with rungs, which gets as many more generations as bring its training tokens to
the others'. Objectives are counted or trained, so that a run is the same on any machine: perplexity, parameters and
cache_bytes.
Hypervolume is taken over tokens, in one box for all runs: between the best and the worst values of what lies on any
run's front, on a logarithmic scale. Written are NAME.jsonl, a line for each run with what all its candidates gave,
NAME.json, with the curve of every run, and NAME.svg, with the mean of each method and one standard deviation around it.
A run that has its line is not done again, so that a comparison that was stopped goes on where it was.

The default depth is 8. At depth 4, the smoke preset's own, 144 genomes are enough for a random search to be as good as
any: see bench/LOG.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.hardware import machine, short_name
from search.box import dominated_share
from search.data import load_corpus
from search.driver import search
from search.evaluation import Evaluation, Status
from search.nsga2 import Archive, FloatArray
from search.report_svg import label, picture, tag
from search.settings import PRESETS, RUNG_FACTOR, Settings
from search.store import Store, write_json
from search.view import View
from search.workers import make_workers

OBJECTIVES = ("perplexity", "parameters", "cache_bytes")
LEAST = {"cache_bytes": 1024.0}
"""What smaller values count as: a genome of memoryless units has no cache, and 0 has no logarithm."""

METHODS = ("nsga2", "random", "ga", "nsga2 with rungs")
COLOURS = ("#c2410c", "#6b7280", "#15803d", "#1d4ed8")
POINTS = 60  # of a curve
_SIZES = ("depth", "generations", "population", "rungs")


@dataclass(frozen=True)
class Trace:
    """One search: after each candidate, the training tokens spent so far and its losses, None for one without any."""

    method: str
    seed: int
    tokens: tuple[int, ...]
    losses: tuple[tuple[float, ...] | None, ...]
    seconds: float

    def to_line(self, settings: Mapping[str, Any]) -> str:
        """Return the search as a line of JSON, losses to seven digits."""
        losses = [None if one is None else [float(f"{value:.7g}") for value in one] for one in self.losses]
        return json.dumps({**dataclasses.asdict(self), "losses": losses, "settings": settings})

    @classmethod
    def from_line(cls, line: str, settings: Mapping[str, Any]) -> Trace:
        """Read what `to_line` returned.

        Raises:
            ValueError: The search had other settings.
        """
        values = json.loads(line)
        if (found := values.pop("settings")) != settings:
            raise ValueError(f"needs runs of the settings {dict(settings)}, got one of {found}")
        losses = tuple(None if one is None else tuple(one) for one in values["losses"])
        return cls(**values | {"tokens": tuple(values["tokens"]), "losses": losses})


def settings_of(method: str, seed: int, depth: int, generations: int, population: int, rungs: int) -> Settings:
    """Return the settings of one search, with as many generations as its share of the tokens allows."""
    base = dataclasses.replace(
        PRESETS["smoke"],
        objectives=OBJECTIVES,
        depth=depth,
        population=population,
        generations=generations,
        seed=seed,
    )
    if method != "nsga2 with rungs":
        return dataclasses.replace(base, optimizer=method)
    climbing = dataclasses.replace(base, rungs=rungs)
    spent = _steps_of_a_generation(climbing)
    return dataclasses.replace(climbing, generations=round(generations * population * base.steps / spent))


def _steps_of_a_generation(settings: Settings) -> int:
    steps, spent, before = settings.rung_steps, 0, 0
    for rung, stop in enumerate(steps):
        spent += math.ceil(settings.population / RUNG_FACTOR**rung) * (stop - before)
        before = stop
    return spent


def run(settings: Settings, method: str, jobs: int) -> Trace:
    """Run one search in a temporary folder."""
    settings = dataclasses.replace(settings, jobs=jobs)
    with tempfile.TemporaryDirectory() as folder:
        workers = make_workers(settings)
        with Store(Path(folder)) as store, View(settings, Console(quiet=True)) as view:
            load_corpus(None).save(store.work)

            def on_generation() -> None:
                store.keep_front(settings.ranking)

            try:
                search(settings, store, workers, view, on_generation)
            finally:
                workers.close()
            candidates = [e for e in store.evaluations() if e.kind == "candidate"]
    return trace_of(candidates, settings, method)


def trace_of(candidates: Sequence[Evaluation], settings: Settings, method: str) -> Trace:
    """Read a search's trace from its log.

    A candidate that failed counts with all the steps of the rung that it failed in, though it may have stopped earlier:
    how many it took is not in the log.
    """
    per_step = settings.batch_size * settings.seq_len
    spent, tokens, losses = 0, list[int](), list[tuple[float, ...] | None]()
    for candidate in candidates:
        climbed = len(candidate.rungs) + (candidate.status is not Status.OK)
        reached = min(climbed, settings.rungs) if settings.rungs > 1 else 1
        spent += settings.rung_steps[reached - 1] * per_step
        whole = candidate.status is Status.OK and reached == settings.rungs
        tokens.append(spent)
        losses.append(_logarithms(candidate) if whole else None)
    seconds = sum(candidate.seconds for candidate in candidates)
    return Trace(method, settings.seed, tuple(tokens), tuple(losses), seconds)


def _logarithms(candidate: Evaluation) -> tuple[float, ...]:
    return tuple(math.log(max(candidate.metrics[name], LEAST.get(name, 0.0))) for name in OBJECTIVES)


def box_of(traces: Sequence[Trace]) -> tuple[FloatArray, FloatArray]:
    """Return the corners of the box in which all runs are measured: of what lies on any run's front."""
    fronts = []
    for trace in traces:
        archive: Archive[None] = Archive(len(OBJECTIVES))
        known = [one for one in trace.losses if one is not None]
        archive.add(known, [None] * len(known))
        fronts.append(archive.losses)
    everything = np.concatenate(fronts)
    return everything.min(axis=0), everything.max(axis=0)


def curve_of(trace: Trace, counts: Sequence[int], low: FloatArray, high: FloatArray) -> list[float]:
    """Return the hypervolume, as a share of the box, when so many tokens were spent."""
    archive: Archive[None] = Archive(len(OBJECTIVES))
    span = np.where(high > low, high - low, 1.0)
    volumes, done = [], 0
    for count in counts:
        while done < len(trace.tokens) and trace.tokens[done] <= count:
            losses = trace.losses[done]
            if losses is not None:
                archive.add([losses], [None])
            done += 1
        volumes.append(dominated_share((archive.losses - low) / span))
    return volumes


def summarise(traces: Sequence[Trace], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written as JSON: each run's curve, and each method's mean and deviation at the end."""
    low, high = box_of(traces)
    most = min(max(trace.tokens[-1] for trace in traces if trace.method == method) for method in _methods(traces))
    counts = [most * (point + 1) // POINTS for point in range(POINTS)]
    curves = [curve_of(trace, counts, low, high) for trace in traces]
    methods = {}
    for method in _methods(traces):
        ends = [curve[-1] for trace, curve in zip(traces, curves, strict=True) if trace.method == method]
        methods[method] = {
            "runs": len(ends),
            "hypervolume_mean": statistics.fmean(ends),
            "hypervolume_deviation": statistics.stdev(ends) if len(ends) > 1 else None,
        }
    return {
        "machine": machine(),
        "settings": settings,
        "objectives": OBJECTIVES,
        "box": {"low": np.exp(low).tolist(), "high": np.exp(high).tolist(), "scale": "log"},
        "tokens": counts,
        "methods": methods,
        "runs": [
            {
                "method": trace.method,
                "seed": trace.seed,
                "candidates": len(trace.tokens),
                "tokens": trace.tokens[-1],
                "training_seconds": trace.seconds,
                "hypervolume": curve,
            }
            for trace, curve in zip(traces, curves, strict=True)
        ],
    }


def _methods(traces: Sequence[Trace]) -> list[str]:
    return list(dict.fromkeys(trace.method for trace in traces))


def draw(result: Mapping[str, Any]) -> str:
    """Return the picture as SVG: each method's mean hypervolume over tokens, and a deviation around it."""
    width, height, left, right, top, bottom = 760.0, 430.0, 62.0, 178.0, 66.0, 48.0
    tokens = result["tokens"]
    by_method: dict[str, FloatArray] = {}
    for run_of in result["runs"]:
        row = np.array([run_of["hypervolume"]])
        by_method[run_of["method"]] = np.concatenate([by_method.get(run_of["method"], np.zeros((0, len(tokens)))), row])
    highest = max(float(curves.max()) for curves in by_method.values()) * 1.05 or 1.0

    def x(token: float) -> float:
        return left + (width - left - right) * token / float(tokens[-1])

    def y(volume: float) -> float:
        return height - bottom - (height - top - bottom) * volume / highest

    runs = max(len(curves) for curves in by_method.values())
    parts = [
        tag("style", _STYLE),
        tag("rect", width=width, height=height, class_="page"),
        label("Hypervolume found, over training tokens", left, 28, "title"),
        label(f"mean and standard deviation of {runs} searches each; {', '.join(OBJECTIVES)}", left, 48, "soft"),
    ]
    for tick in np.linspace(0, highest, 6):
        parts.append(tag("line", x1=left, x2=width - right, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(label(f"{tick:.2f}", left - 8, y(tick) + 4, "soft", "end"))
    for share in (0.25, 0.5, 0.75, 1.0):
        parts.append(label(f"{share * tokens[-1] / 1e6:.3g} M", x(share * tokens[-1]), height - 24, "soft", "middle"))
    for number, (method, curves) in enumerate(by_method.items()):
        colour = COLOURS[METHODS.index(method)]
        mean = curves.mean(axis=0)
        spread = curves.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(tokens))
        edge = [f"{x(t):.1f},{y(v):.1f}" for t, v in zip(tokens, mean + spread, strict=True)]
        edge += [f"{x(t):.1f},{y(v):.1f}" for t, v in zip(tokens[::-1], (mean - spread)[::-1], strict=True)]
        line = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in zip(tokens, mean, strict=True))
        parts.append(tag("polygon", points=" ".join(edge), fill=colour, fill_opacity=0.14))
        parts.append(tag("polyline", points=line, fill="none", stroke=colour, stroke_width=2))
        level = top + 18 + 20 * number
        parts.append(tag("rect", x=width - right + 16, y=level - 9, width=14, height=4, fill=colour))
        parts.append(label(f"{method}  {mean[-1]:.3f}", width - right + 36, level - 3, "name"))
    return picture("Hypervolume over training tokens", width, height, *parts, class_="optimizers")


_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #171a21; } .title { font-size: 15px; font-weight: 600; }
.page { fill: #ffffff; } .grid { stroke: #e3e5e9; } .soft { fill: #565d6b; }
@media (prefers-color-scheme: dark) { text { fill: #e8ebf0; } .page { fill: #0e1116; } .grid { stroke: #262d37; }
.soft { fill: #a3adbb; } }
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the searches, and write JSON and figure after each of them."""
    parser = argparse.ArgumentParser(description="Compare the search's optimizers at equal numbers of training tokens.")
    parser.add_argument("--seeds", type=int, default=5, help="searches of each method (default: 5)")
    parser.add_argument("--depth", type=int, default=8, help="LIVs of a genome (default: 8)")
    parser.add_argument("--generations", type=int, default=20, help="of a search without rungs (default: 20)")
    parser.add_argument("--population", type=int, default=12, help="genomes in a generation (default: 12)")
    parser.add_argument("--rungs", type=int, default=3, help="of successive halving (default: 3)")
    parser.add_argument("--jobs", type=int, default=0, help="trainings at once (default: 0, the number of cores)")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="default: all")
    parser.add_argument("--out", type=Path, help="JSON file; the figure goes beside it (default: in bench/results)")
    options = parser.parse_args(argv)
    out: Path = options.out or Path(__file__).parent / "results" / f"search-optimizers-{short_name()}.json"
    console = Console()
    settings = {name: getattr(options, name) for name in _SIZES}
    lines = out.with_suffix(".jsonl")
    try:
        traces = [Trace.from_line(line, settings) for line in lines.read_text().splitlines()] if lines.exists() else []
    except ValueError as error:
        parser.error(f"--out: {lines} {error}")
    done = {(trace.method, trace.seed) for trace in traces}
    for seed in range(options.seeds):
        for method in options.methods:
            if (method, seed) in done:
                continue
            traces.append(run(settings_of(method, seed, **settings), method, options.jobs))
            last = traces[-1]
            console.print(f"{method}, seed {seed}: {len(last.tokens)} candidates, {last.tokens[-1]:,} tokens")
            with lines.open("a", encoding="utf-8") as file:
                file.write(last.to_line(settings) + "\n")
            # Written each time: the whole takes an hour or more, and a part of it is worth something.
            result = summarise(traces, settings)
            write_json(out, result)
            out.with_suffix(".svg").write_text(draw(result) + "\n", encoding="utf-8")
    for method, end in summarise(traces, settings)["methods"].items():
        console.print(f"{method}: hypervolume {end['hypervolume_mean']:.4f}")


if __name__ == "__main__":
    main()
