"""The page that sets several runs side by side: a table, and hypervolume over training tokens and over candidates."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

import plotly.graph_objects as go

from search.comparison import NOTE, Standing, groups_of, tabulate
from search.report_figures import styled
from search.report_html import render_template

_COLOURS = 8  # in the palette, as series-0 and so on


def render_comparison(standings: Sequence[Standing]) -> str:
    """Write the page as HTML text."""
    figures = {f"{over}-figure": comparison_figure(standings, over) for over in ("tokens", "trained")}
    table = tabulate(standings)
    return render_template(
        "comparison.html",
        figures,
        titles=table.titles,
        rows=table.rows,
        means=table.means,
        note=NOTE,
        groups=[
            (group, index % _COLOURS, len(each)) for index, (group, each) in enumerate(groups_of(standings).items())
        ],
    )


def comparison_figure(standings: Sequence[Standing], over: Literal["tokens", "trained"]) -> go.Figure:
    """Draw hypervolume over training tokens or trained candidates, a line for each run, a colour for each group."""
    figure = go.Figure()
    unit = "tokens" if over == "tokens" else "candidates"
    for index, (group, members) in enumerate(groups_of(standings).items()):
        for member in members:
            figure.add_scatter(
                x=[0, *(getattr(point, over) for point in member.curve)],
                y=[0.0, *(point.hypervolume for point in member.curve)],
                name=escape(group),
                mode="lines",
                line={"color": f"var(--series-{index % _COLOURS})", "width": 2, "shape": "hv"},
                hovertemplate=f"{escape(member.name)}<br>%{{x:,}} {unit}: %{{y:.4f}}<extra>{escape(group)}</extra>",
            )
    title = "Training tokens" if over == "tokens" else "Trained candidates"
    figure.update_xaxes(title=title, rangemode="tozero", tickangle=0, nticks=6)
    figure.update_yaxes(title="Hypervolume (share of the box)", rangemode="tozero", tickformat=".2~f")
    return styled(figure, hovermode="closest")
