"""Pages that are one file: styles, scripts, plotly and figures are inside, and a content security policy forbids every
request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from search.report_scatter import read_template


def render_template(name: str, figures: Mapping[str, go.Figure], **context: Any) -> str:
    """Write a page as HTML text.

    Args:
        name: Of the template, beside the style sheets.
        figures: By the id that the template shows them under.
        context: What else the template asks for.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("search"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name).render(
        figures={id_: embed(figure.to_plotly_json()) for id_, figure in figures.items()},
        styles=Markup("".join(read_template(sheet) for sheet in ("palette.css", "scatter.css", "report.css"))),
        script=Markup(read_template("report.js")),
        plotly=Markup(get_plotlyjs()),
        **context,
    )


def embed(value: Any) -> Markup:
    """Write JSON that can stand inside a script element whatever text it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
