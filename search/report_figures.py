"""The page's interactive figures, with plotly.

Colours are written as `var(--name)`: the page's script looks each up in the style sheet before plotly draws, and draws
again when the reader's theme changes, so one figure serves the light and the dark theme.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from search.evaluation import Evaluation
from search.report_data import Progress, Run, thin
from search.report_drawing import FAMILIES, base_class, liv_classes
from search.report_metrics import Column, order_metrics
from search.report_scatter import BASELINE_SYMBOLS, NUMBERED_FRONT, choose_pairs, lower_left, value_of
from star_core.genome import POOL

_LIVS_PER_LINE = 4
_CURVE_POINTS = 200
_MOST_TICKS = 8
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
# Keeps a name readable above the marks behind it.
_HALO = ", ".join(f"{x}px {y}px 1px var(--surface)" for x in (-1, 1) for y in (-1, 1))


def front_figure(run: Run, columns: Mapping[str, Column]) -> go.Figure:
    """Scatter all candidates, the front and the baselines over the first pair of objectives.

    Every trace carries all columns as `customdata`, in the order of `columns`, so the page can change the axes.
    """
    across, up = choose_pairs(run.objectives)[0]
    rest, members = run.drawn, [member for _, member in run.shown_front]
    figure = go.Figure()
    last = max((candidate.generation for candidate in run.candidates), default=0)
    figure.add_scatter(
        **_spots(run, rest, columns, across, up),
        name="candidates",
        mode="markers",
        marker={
            "size": 7,
            "color": [candidate.generation for candidate in rest],
            "cmin": 0,
            "cmax": max(1, last),
            "colorscale": [[0, "var(--early)"], [1, "var(--late)"]],
            "line": {"width": 0.6, "color": "var(--surface)"},
        },
    )
    points = [(_shown(m, across, columns), _shown(m, up, columns)) for m in members]
    steps = lower_left([(x, y) for x, y in points if x is not None and y is not None])
    figure.add_scatter(
        x=[x for x, _ in steps],
        y=[y for _, y in steps],
        name="front of these two axes",
        mode="lines",
        line={"shape": "hv", "width": 1.5, "color": "var(--accent)", "dash": "dot"},
        hoverinfo="skip",
    )
    numbered = len(run.front) <= NUMBERED_FRONT
    figure.add_scatter(
        **_spots(run, members, columns, across, up),
        name="front",
        mode="markers+text" if numbered else "markers",
        text=[str(number) for number, _ in run.shown_front],
        textfont={"color": "var(--on-accent)", "size": 10},
        marker={
            "size": 18 if numbered else 10,
            "color": "var(--accent)",
            "line": {"width": 1.5, "color": "var(--surface)"},
        },
    )
    for number, baseline in enumerate(run.scored_baselines):
        symbol = BASELINE_SYMBOLS[number % 4]
        figure.add_scatter(
            **_spots(run, [baseline], columns, across, up),
            name=escape(baseline.name or baseline.genome_hash),
            mode="markers+text",
            text=[escape(baseline.name or baseline.genome_hash)],
            textposition="top center",
            textfont={"color": "var(--baseline)", "size": 12, "shadow": _HALO},
            cliponaxis=False,
            marker={
                "size": 11,
                "symbol": symbol,
                "color": "var(--baseline)",
                "line": {"width": 1, "color": "var(--surface)"},
            },
        )
    figure.update_xaxes(**axis_of(columns[across]))
    figure.update_yaxes(**axis_of(columns[up]))
    return styled(figure, hovermode="closest")


def hypervolume_figure(progress: Progress) -> go.Figure:
    """Draw the hypervolume of everything found so far, by generation, and the baselines' own as a line."""
    figure = go.Figure()
    figure.add_scatter(
        x=list(progress.generations),
        y=list(progress.hypervolume),
        name="search",
        mode="lines+markers",
        line={"color": "var(--accent)", "width": 2.5},
        marker={"size": 7},
        cliponaxis=False,
        fill="tozeroy",
        fillcolor="var(--accent-soft)",
        hovertemplate="generation %{x}: %{y:.4f}<extra></extra>",
    )
    _add_level(figure, progress.generations, progress.baseline_hypervolume, "the baselines alone", "%{y:.4f}")
    figure.update_xaxes(**_generation_axis(progress.generations))
    figure.update_yaxes(title="Hypervolume (share of the box)", rangemode="tozero", tickformat=".2~f")
    return styled(figure, hovermode="x")


def best_figure(run: Run, progress: Progress, column: Column) -> go.Figure:
    """Draw one objective's best value within each generation and so far, and the best baseline's."""
    values = progress.best[column.key]
    so_far: list[float | None] = []
    for value in values:
        known = [v for v in (value, so_far[-1] if so_far else None) if v is not None]
        so_far.append(min(known, default=None))
    figure = go.Figure()
    figure.add_scatter(
        x=list(progress.generations),
        y=[None if value is None else column.scale(value) for value in so_far],
        name="best so far",
        mode="lines",
        line={"shape": "hv", "color": "var(--accent)", "width": 2.5},
        hovertemplate="best so far: %{y:.5~g}<extra></extra>",
    )
    figure.add_scatter(
        x=list(progress.generations),
        y=[None if value is None else column.scale(value) for value in values],
        name="best of the generation",
        mode="markers",
        marker={"color": "var(--late)", "size": 7, "line": {"width": 1, "color": "var(--surface)"}},
        hovertemplate="generation %{x}: %{y:.5~g}<extra></extra>",
    )
    best = min((b.metrics[column.key] for b in run.scored_baselines), default=None)
    _add_level(figure, progress.generations, None if best is None else column.scale(best), "best baseline", "%{y:.5~g}")
    figure.update_xaxes(**_generation_axis(progress.generations))
    figure.update_yaxes(**axis_of(column))
    return styled(figure, hovermode="x")


def population_figure(classes: Mapping[str, Counter[int]]) -> go.Figure:
    """Stack each LIV class's share of all LIVs in a generation's candidates, and in the front as the last bar.

    Args:
        classes: As `population_counts` returns them.
    """
    counts = list(classes.values())
    figure = go.Figure()
    families = list(FAMILIES)
    order = sorted(POOL, key=lambda c: (families.index(POOL[c].family), base_class(c), c))
    for liv_class in order:
        if not any(count[liv_class] for count in counts):
            continue
        pattern = {"shape": "/", "size": 5, "solidity": 0.3, "fgcolor": "var(--hatch)", "fillmode": "overlay"}
        figure.add_bar(
            x=list(classes),
            y=[100 * count[liv_class] / max(1, count.total()) for count in counts],
            name=POOL[liv_class].name,
            marker={
                "color": f"var(--liv-{base_class(liv_class)})",
                "pattern": pattern if POOL[liv_class].differential else {"shape": ""},
                "line": {"width": 0.5, "color": "var(--surface)"},
            },
            hovertemplate=f"{POOL[liv_class].name}: %{{y:.1f}} %<extra>%{{x}}</extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.12)
    ticks = list(thin([name for name in classes if name != "front"], _MOST_TICKS)) + ["front"] * ("front" in classes)
    figure.update_xaxes(title="Generation", type="category", showgrid=False, tickvals=ticks, tickangle=0)
    figure.update_yaxes(title="Share of all LIVs (%)", range=[0, 100], tickvals=[0, 25, 50, 75, 100])
    return styled(figure, hovermode="closest")


def population_counts(run: Run) -> dict[str, Counter[int]]:
    """Count the LIVs of each class in the candidates of each generation that is shown, and last in the front."""
    counts: dict[str, Counter[int]] = {str(generation): Counter() for generation in run.shown_generations}
    for candidate in run.candidates:
        if (count := counts.get(str(candidate.generation))) is not None:
            count.update(liv_classes(candidate.genome))
    if run.front:
        counts["front"] = Counter(c for _, member in run.shown_front for c in liv_classes(member.genome))
    return counts


def curve_figure(run: Run) -> go.Figure:
    """Draw the training loss of the front and of the baselines by step."""
    figure = go.Figure()
    shown = [(f"front {number}", member, False) for number, member in run.shown_front]
    shown += [(baseline.name or baseline.genome_hash, baseline, True) for baseline in run.baselines]
    for name, evaluation, is_baseline in shown:
        if evaluation.curve:
            stride = max(1, len(evaluation.curve) // _CURVE_POINTS)
            points = [*evaluation.curve[:-1:stride], evaluation.curve[-1]]
            figure.add_scatter(
                x=[step for step, _ in points],
                y=[loss for _, loss in points],
                name=escape(name),
                mode="lines",
                line={
                    "color": "var(--baseline)" if is_baseline else "var(--accent)",
                    "width": 1.6,
                    "dash": "dash" if is_baseline else "solid",
                },
                opacity=0.9 if is_baseline else 0.6,
                hovertemplate=f"{escape(name)}, step %{{x}}: %{{y:.4f}}<extra></extra>",
            )
    figure.update_xaxes(title="Training step")
    figure.update_yaxes(title="Training loss (nats per token)", type="log", dtick="D1", tickformat=".3~g")
    return styled(figure, hovermode="closest")


def _spots(
    run: Run, evaluations: Sequence[Evaluation], columns: Mapping[str, Column], across: str, up: str
) -> dict[str, Any]:
    numbers = {id(member): f"{number} " for number, member in run.shown_front}
    return {
        "x": [_shown(evaluation, across, columns) for evaluation in evaluations],
        "y": [_shown(evaluation, up, columns) for evaluation in evaluations],
        "customdata": [[_shown(e, key, columns) for key in columns] for e in evaluations],
        "hovertext": [_hover(run, e, columns, numbers.get(id(e), "")) for e in evaluations],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _shown(evaluation: Evaluation, key: str, columns: Mapping[str, Column]) -> float | None:
    value = value_of(evaluation, key)
    return None if value is None else float(f"{columns[key].scale(value):.6g}")


def _hover(run: Run, evaluation: Evaluation, columns: Mapping[str, Column], number: str) -> str:
    """Write a genome and all its metrics, in plotly's few HTML tags."""
    livs = evaluation.genome.split("-")
    lines = ["-".join(livs[start : start + _LIVS_PER_LINE]) for start in range(0, len(livs), _LIVS_PER_LINE)]
    where = "baseline" if evaluation.kind == "baseline" else f"generation {evaluation.generation}"
    head = f"<b>{number}{escape(evaluation.name or evaluation.genome_hash)}</b>, {where}"
    metrics = [
        f"{columns[key].label} {escape(columns[key].format_with_unit(evaluation.metrics[key]))}"
        for key in order_metrics(evaluation.metrics, run.objectives)
        if key in columns and key in evaluation.metrics
    ]
    return "<br>".join([head, *metrics, *(escape(line) for line in lines)])


def _add_level(figure: go.Figure, generations: Sequence[int], level: float | None, name: str, form: str) -> None:
    if level is not None:
        figure.add_scatter(
            x=[generations[0], generations[-1]],
            y=[level, level],
            name=name,
            mode="lines+markers" if len(generations) == 1 else "lines",
            line={"color": "var(--baseline)", "width": 1.5, "dash": "dash"},
            hovertemplate=f"{name}: {form}<extra></extra>",
        )


def _generation_axis(generations: Sequence[int]) -> dict[str, Any]:
    step = -(-len(generations) // _MOST_TICKS)
    return {"title": "Generation", "tickvals": list(generations[::step]), "tickformat": "d", "tickangle": 0}


def axis_of(column: Column) -> dict[str, Any]:
    """Describe the axis of a metric to plotly; on a log axis every tick is written in full."""
    if not column.log:
        return {"title": column.title, "type": "linear", "dtick": None, "tickformat": ""}
    # Ticks at 1, 2 and 5 of each power of ten, or at powers alone where those would be too many.
    dtick = "D2" if column.decades < 2.5 else max(1, round(column.decades / 6))
    return {"title": column.title, "type": "log", "dtick": dtick, "tickformat": ".4~g"}


def styled(figure: go.Figure, *, hovermode: str) -> go.Figure:
    """Give a figure the page's look; returns it."""
    axis = {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "showline": True,
        "automargin": True,
        "ticks": "",
        "title_standoff": 12,
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        template="none",
        autosize=True,
        showlegend=False,
        hovermode=hovermode,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        # Above, there is room for the buttons that show under a pointer.
        margin={"l": 8, "r": 14, "t": 30, "b": 8},
        font={"family": _FONT, "size": 12.5, "color": "var(--ink)"},
        hoverlabel={
            "bgcolor": "var(--surface)",
            "bordercolor": "var(--line)",
            "align": "left",
            "font": {"color": "var(--ink)", "size": 12, "family": _FONT},
        },
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "var(--soft)", "activecolor": "var(--accent)"},
    )
    return figure
