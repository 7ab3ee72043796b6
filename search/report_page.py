"""Assemble `report.html`: everything the template shows, as finished text, drawings and figures.

Styles, scripts and plotly are inside the page, and its content security policy forbids every request.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from search.evaluation import Evaluation, Status
from search.front import sentence_without_front
from search.report_data import Progress, Run, Rung, compare_rungs, count_failures, find_ancestors, follow_progress
from search.report_drawing import FAMILIES, base_class, draw_genome, draw_lineage, family_of, liv_classes
from search.report_figures import (
    axis_of,
    best_figure,
    curve_figure,
    front_figure,
    hypervolume_figure,
    population_counts,
    population_figure,
)
from search.report_html import embed, render_template
from search.report_metrics import Column, format_seconds, humanise, list_facts, order_metrics
from search.report_scatter import NUMBERED_FRONT, choose_pairs, columns_of, draw_pair
from search.report_table import FrontRow, best_value, columns_of_rows, rows_of
from search.report_variation import sum_up_variation
from star_core.genome import POOL, Genome

# More would not be told apart in the drawing; a run of 18 generations seldom needs as many.
_MOST_ANCESTORS = 60
_SHALLOW = 14
_INHERITED = (
    "Children began with their parents' weights where they are built alike: descendants have trained longer than "
    "newcomers and baselines, and their losses are lower by that. "
)


def render_page(run: Run) -> str:
    """Write the page of a run as HTML text."""
    rows, progress = rows_of(run), follow_progress(run)
    columns = columns_of_rows(rows, run.objectives)
    members = zip(rows, run.shown_front, strict=False)
    cards = [_winner_card(run, row, member, columns, rows) for row, (_, member) in members]
    baseline_cards = [_baseline_card(run, baseline, columns) for baseline in run.baselines]
    axes = _axes(run)
    classes = population_counts(run)
    figures = _figures(run, progress, axes, classes)
    sections = {
        "front": ("Front", run.front),
        "table": ("Table", rows),
        "progress": ("Progress", progress),
        "population": ("Population", run.candidates),
        "variation": ("Variation", run.candidates),
        "winners": ("Winners", cards),
        "baselines": ("Baselines", baseline_cards),
        "use": ("Use and resume", True),
    }
    return render_template(
        "report.html",
        figures,
        **_run_context(run),
        **_front_context(run, axes),
        tiles=[_tile(run, column) for column in columns if column.key in run.objectives] if progress else [],
        sections={id_: name for id_, (name, content) in sections.items() if content},
        columns=columns,
        table=_table(rows, columns, run.finals),
        repeated=max((final["seeds"] + final["failed"] for final in run.finals.values()), default=0),
        progress=_progress_context(run, progress, axes) if progress else None,
        legend=_legend(run, classes),
        variation=sum_up_variation(run),
        cards=cards,
        baseline_cards=baseline_cards,
    )


def _run_context(run: Run) -> dict[str, Any]:
    """Describe the run itself: what was searched, where, with what budget, and how it went."""
    config, done = run.config, len(run.generations)
    untrained = sum(candidate.status is Status.OVER_BUDGET for candidate in run.candidates)
    failed = sum(candidate.status is not Status.OK for candidate in run.candidates) - untrained
    planned = config.get("generations", done)
    of_planned = f" of {planned} planned" if isinstance(planned, int) and planned > done else ""
    labels = dict.fromkeys(column.label.lower() for column in columns_of(run, run.objectives).values())
    counts = {status: sum(candidate.status is status for candidate in run.candidates) for status in Status}
    seconds = sum(evaluation.seconds for evaluation in (*run.candidates, *run.baselines))
    return {
        "title": f"Searching for low {_join([*labels])}",
        "run_name": run.directory.resolve().name,
        "lead": f"{_count(len(run.candidates), 'candidate')} in {_count(done, 'generation')}{of_planned}: "
        f"{f'{untrained} over the budget and not trained, ' if untrained else ''}"
        f"{len(run.candidates) - failed - untrained} trained and measured"
        f"{f' ({run.stopped} of them to a lower rung)' if run.stopped else ''}, {failed} failed, "
        f"{len(run.front)} on the front. "
        f"{'' if run.front or not run.ranking.budget else sentence_without_front(run.candidates, run.ranking) + ' '}"
        f"{_INHERITED if run.config.get('inherit') else ''}"
        f"{_count(len(run.baselines), 'baseline')} beside them. {format_seconds(seconds)} of work in all.",
        "machine": list_facts(config.get("machine") or {}),
        "settings": list_facts({key: value for key, value in config.items() if key not in ("machine", "objectives")}),
        "last_generation": max(run.generations, default=0),
        "total": len(run.candidates),
        "outcomes": [{"status": status.value, "count": count} for status, count in counts.items()],
        "outcome_summary": ", ".join(f"{status.value} {count}" for status, count in counts.items()),
        "failures": count_failures((*run.candidates, *run.baselines)),
        "unscored": counts[Status.OK] - len(run.scored) - run.over_budget - run.stopped,
        "rungs": [_rung_row(rung) for rung in compare_rungs(run)],
        "stopped": run.stopped,
        "thinned": _thinned(run),
        "over_budget": run.over_budget,
        "budget": [str(term) for term in run.ranking.budget],
        "load_snippet": _load_snippet(run) if run.front else None,
        "resume_snippet": f"python -m search.run --resume --out {shlex.quote(str(run.directory))}",
    }


def _thinned(run: Run) -> str:
    """Say what a large run's page leaves out; nothing where it has everything."""
    parts = []
    if len(run.shown_front) < len(run.front):
        parts.append(f"{len(run.shown_front):,} of the {len(run.front):,} members of the front")
    if len(run.drawn) < len(run.scored) - len(run.front):
        parts.append(f"{len(run.drawn):,} of the {len(run.scored) - len(run.front):,} candidates beside it")
    if len(run.shown_generations) < len(run.generations):
        parts.append(f"{len(run.shown_generations):,} of the {len(run.generations):,} generations")
    return f"This page lists and draws {_join(parts)}, evenly spaced; run.db and front.json have all." if parts else ""


def _rung_row(rung: Rung) -> dict[str, Any]:
    correlation = rung.correlation
    shown = "–" if correlation is None or math.isnan(correlation) else f"{correlation:.2f}".replace("-", "−")
    return {"steps": rung.steps, "candidates": rung.candidates, "finished": rung.finished, "correlation": shown}


def _axes(run: Run) -> dict[str, Column]:
    """Choose the columns that the front's figure can have as axes: every metric of a candidate, then the generation."""
    keys = {key for evaluation in run.scored for key in evaluation.metrics}
    return columns_of(run, [*order_metrics(keys, run.objectives), "generation"]) if run.front else {}


def _figures(
    run: Run, progress: Progress | None, axes: Mapping[str, Column], classes: Mapping[str, Counter[int]]
) -> dict[str, go.Figure]:
    figures: dict[str, go.Figure] = {}
    if run.front:
        figures["front-figure"] = front_figure(run, axes)
    if progress is not None:
        figures["hypervolume-figure"] = hypervolume_figure(progress)
        for name in run.objectives:
            figures[f"best-{name}-figure"] = best_figure(run, progress, axes[name])
    if any(evaluation.curve for evaluation in (*run.front, *run.baselines)):
        figures["curve-figure"] = curve_figure(run)
    if run.candidates:
        figures["population-figure"] = population_figure(classes)
    return figures


def _front_context(run: Run, axes: Mapping[str, Column]) -> dict[str, Any]:
    pairs = choose_pairs(run.objectives)
    places = {key: number for number, key in enumerate(axes)}
    return {
        "axes": list(axes.values()),
        "axes_json": embed([axis_of(column) for column in axes.values()]),
        "default_pair": pairs[0],
        "pairs": [
            {"x": places[across], "y": places[up], "drawing": Markup(draw_pair(run, axes, across, up))}
            for across, up in pairs
            if run.front
        ],
        "objectives": run.objectives,
        "front_count": len(run.front),
        "numbered": len(run.front) <= NUMBERED_FRONT,
        "candidate_count": len(run.scored),
        "baseline_count": len(run.scored_baselines),
    }


def _tile(run: Run, column: Column) -> dict[str, Any]:
    """Sum up one objective: the best found, beside the initial population's best and the best baseline."""
    best = min(member.metrics[column.key] for member in run.front)
    notes = []
    initial = [member.metrics[column.key] for member in run.scored if member.generation == 0]
    if initial:
        notes.append(f"{column.format(min(initial))} in the initial population ({_change(best, min(initial))})")
    if run.scored_baselines:
        rival = min(run.scored_baselines, key=lambda baseline: baseline.metrics[column.key])
        value = rival.metrics[column.key]
        notes.append(f"{column.format(value)} for {rival.name}, the best baseline ({_change(best, value)})")
    return {
        "label": f"Lowest {column.label.lower()}",
        "value": column.format(best),
        "unit": column.unit,
        "notes": notes,
    }


def _table(
    rows: Sequence[FrontRow], columns: Sequence[Column], finals: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    best = {column.key: best_value(rows, column.key) for column in columns}
    return [
        {
            "row": row,
            "cells": [
                _cell(row.metrics, column, best[column.key])
                | {"final": _final(finals[row.genome_hash], column) if row.number and row.genome_hash in finals else ""}
                for column in columns
            ],
        }
        for row in rows
    ]


def _final(final: Mapping[str, Any], column: Column) -> str:
    """Write mean and deviation of a winner's repetitions."""
    if column.key not in final["mean"]:
        return "failed" if not final["seeds"] else ""
    deviation = final["deviation"].get(column.key)
    return column.format(final["mean"][column.key]) + ("" if deviation is None else f" ± {column.format(deviation)}")


def _cell(metrics: Mapping[str, float], column: Column, best: float | None) -> dict[str, Any]:
    value = metrics.get(column.key)
    low, high = metrics.get(f"{column.key}_p20"), metrics.get(f"{column.key}_p80")
    spread = "" if low is None or high is None else f"{column.format(low)}–{column.format(high)}"
    return {"value": value, "text": column.format(value), "spread": spread, "best": value is not None and value == best}


def _progress_context(run: Run, progress: Progress, axes: Mapping[str, Column]) -> dict[str, Any]:
    first, last = progress.hypervolume[0], progress.hypervolume[-1]
    corners = [
        {
            "label": axes[name].label,
            "ideal": axes[name].format_with_unit(ideal),
            "reference": axes[name].format_with_unit(progress.reference[name]),
            "log": name in progress.log_scaled,
        }
        for name, ideal in progress.ideal.items()
    ]
    baselines = progress.baseline_hypervolume
    return {
        "summary": f"Hypervolume from {first:.3f} in the first generation to {last:.3f} in the last"
        + (f"; the baselines alone have {baselines:.3f}" if baselines is not None else ""),
        "corners": corners,
        "best": [
            {
                "id": f"best-{name}-figure",
                "label": axes[name].label,
                "summary": f"{axes[name].title}: best value by generation; lowest "
                f"{axes[name].format_with_unit(min(v for v in progress.best[name] if v is not None))}",
            }
            for name in run.objectives
        ],
    }


def _legend(run: Run, classes: Mapping[str, Counter[int]]) -> list[dict[str, Any]]:
    """List the classes that occur in the run, by family."""
    seen = {liv_class for count in classes.values() for liv_class in count}
    seen |= {liv_class for baseline in run.baselines for liv_class in liv_classes(baseline.genome)}
    return [
        {
            "name": humanise(FAMILIES[family]),
            "classes": [
                {"name": POOL[c].name, "colour": base_class(c), "differential": POOL[c].differential}
                for c in sorted(seen, key=lambda c: (base_class(c), c))
                if family_of(c) == family
            ],
        }
        for family in FAMILIES
        if any(family_of(c) == family for c in seen)
    ]


def _winner_card(
    run: Run, row: FrontRow, member: Evaluation, columns: Sequence[Column], rows: Sequence[FrontRow]
) -> dict[str, Any]:
    baselines = [other for other in rows if other.kind == "baseline"]
    ancestors = find_ancestors(run, member, _MOST_ANCESTORS)
    numbers = {other.genome_hash: number for number, other in run.shown_front}
    first = columns[0]
    titles = {
        e.genome_hash: f"{e.name or e.genome_hash}, generation {e.generation}, "
        f"{first.label.lower()} {first.format_with_unit(e.metrics.get(first.key))}"
        f"{f', made by {_join(e.mutations)}' if e.mutations else ''}"
        for e in ancestors
    }
    return {
        "row": row,
        "seconds": format_seconds(member.seconds),
        "drawing": Markup(draw_genome(Genome.parse(member.genome))),
        "lines": [_compare(row.metrics.get(column.key), column, baselines) for column in columns],
        "lineage": Markup(draw_lineage(ancestors, titles, numbers)) if len(ancestors) > 1 else None,
        "ancestors": len(ancestors) - 1,
        "winning_ancestors": sum(e.genome_hash in numbers for e in ancestors[1:]),
        # Beside a short stack there is room below it, beside a tall one there is not.
        "shallow": len(liv_classes(member.genome)) <= _SHALLOW,
        "cut": len(ancestors) == _MOST_ANCESTORS,
    }


def _compare(value: float | None, column: Column, baselines: Sequence[FrontRow]) -> dict[str, Any]:
    """Set a metric beside the best baseline's."""
    line = {"label": column.label, "unit": column.unit, "value": column.format(value), "other_name": ""}
    best = best_value(baselines, column.key)
    if value is None or best is None:
        return {**line, "change": "–", "better": False}
    name = next(baseline.name for baseline in baselines if baseline.metrics.get(column.key) == best)
    change = {"other_name": name, "change": _change(value, best), "better": value < best}
    return {**line, **change}


def _baseline_card(run: Run, baseline: Evaluation, columns: Sequence[Column]) -> dict[str, Any]:
    shown = [column for column in columns if column.key in (*run.objectives, "perplexity", "parameters")]
    reason = (baseline.error or "no reason recorded").strip().splitlines()[0]
    return {
        "name": baseline.name or baseline.genome_hash,
        "problem": None if baseline.status is Status.OK else f"{baseline.status}: {reason}",
        "drawing": Markup(draw_genome(Genome.parse(baseline.genome), small=True)),
        "lines": [(c.label, c.format_with_unit(baseline.metrics[c.key])) for c in shown if c.key in baseline.metrics],
    }


def _load_snippet(run: Run) -> str:
    path = run.directory / "best" / f"{run.front[0].genome_hash}.safetensors"
    lines = ["from star_core import LanguageModel", "", f"model = LanguageModel.load({json.dumps(str(path))})"]
    if (run.config.get("corpus") or {}).get("vocab_size") == 256:
        lines = ["import torch", *lines, 'prompt = torch.tensor([list(b"The state of the union")])']
        lines += ["tokens = model.generate(prompt, 200, temperature=0.8)"]
        lines += ['print(bytes(tokens[0].tolist()).decode(errors="replace"))']
    return "\n".join(lines)


def _change(value: float, other: float) -> str:
    """Write how a value differs from another, in per cent; as a factor where it is several times as large."""
    if value == other:
        return "the same"
    if other == 0:
        return "–"
    ratio = value / other
    if not 0 <= ratio < 4:
        return f"{ratio:.3g}×"
    return f"{100 * (ratio - 1):+.1f}\N{NO-BREAK SPACE}%".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
