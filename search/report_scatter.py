"""Static pictures of a front: small panels for every pair of objectives, and the picture that a README can show.

Own SVG, so that they need neither scripts nor a browser to make; the page's interactive figure is in `report_figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from search.evaluation import Evaluation
from search.report_data import Run, read_run
from search.report_metrics import Column, column_for
from search.report_svg import escaped, label, picture, tag

BASELINE_SYMBOLS = ("diamond", "square", "triangle-up", "x")
# Above this many front members their numbers would hide one another.
NUMBERED_FRONT = 24
_CHARACTER = 6.6  # width of a letter of the pictures' 12 px text, with room to spare


@dataclass(frozen=True)
class _Axis:
    """A mapping from values to pixels."""

    column: Column
    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        bent = math.log10(value) if self.column.log else value
        return self.start + (bent - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """Give positions and texts of round values in the column's unit."""
        if self.column.log:
            bent = math.log10(self.column.factor)
            first, last = math.floor(self.low - bent), math.ceil(self.high - bent)
            steps = (1, 2, 5) if self.high - self.low < 1.5 else (1, 3) if self.high - self.low < 3 else (1,)
            every = max(1, round((last - first) / count))
            values = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
            inside = [value for value in values if self.low <= math.log10(value) + bent <= self.high]
            return [(self.place(value * self.column.factor), f"{value:.3g}") for value in inside]
        factor = self.column.factor
        step = _round_step((self.high - self.low) / factor / count)
        first = math.ceil(self.low / factor / step)
        last = math.floor(self.high / factor / step)
        decimals = next((d for d in range(9) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 9)
        return [(self.place(n * step * factor), _tick_text(n * step, decimals)) for n in range(first, last + 1)]


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)

    def overlap(self, other: _Box) -> float:
        """Give the area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


@dataclass(frozen=True)
class _Place:
    """Where a name can stand: its anchor point, and the room it takes there."""

    anchor: str
    x: float
    y: float
    box: _Box


def value_of(evaluation: Evaluation, key: str) -> float | None:
    """Give a metric of an evaluation; "generation" counts as one, which baselines lack."""
    if key == "generation":
        return None if evaluation.kind == "baseline" else float(evaluation.generation)
    return evaluation.metrics.get(key)


def choose_pairs(objectives: Sequence[str]) -> list[tuple[str, str]]:
    """List the (horizontal, vertical) pairs worth a panel: each pair once, the first objective vertical in its own."""
    return [(across, up) for number, up in enumerate(objectives) for across in objectives[number + 1 :]]


def columns_of(run: Run, keys: Sequence[str]) -> dict[str, Column]:
    """Choose unit and scale for each metric from everything a figure of the run shows."""
    shown = (*run.drawn, *run.scored_baselines, *(member for _, member in run.shown_front))
    return {key: column_for(key, [value for e in shown if (value := value_of(e, key)) is not None]) for key in keys}


def lower_left(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Give the points that no other one beats in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def draw_pair(run: Run, columns: Mapping[str, Column], across: str, up: str) -> str:
    """Draw one small panel of a pair of objectives as an inline picture."""
    width, height = 300.0, 230.0
    title = f"{columns[up].title} against {columns[across].title}"
    return picture(
        title, width, height, *_draw_panel(run, columns, across, up, width, height, small=True), class_="scatter"
    )


def write_front_image(run_dir: Path, path: Path) -> None:
    """Write an SVG picture of a run's front, for a README: readable on light and on dark pages.

    With two objectives there is one panel; with more, the first objective stands against the second and the third.

    Args:
        run_dir: A run folder.
        path: The file to write, overwritten if there.
    Raises:
        ValueError: the run folder cannot be read (see `read_run`), or no candidate has succeeded yet.
    """
    run = read_run(run_dir)
    if not run.front:
        raise ValueError(f"run_dir: {run_dir} holds no successful candidate, so there is no front to draw")
    pairs = [pair for pair in choose_pairs(run.objectives) if pair[1] == run.objectives[0]][:2]
    columns = columns_of(run, sorted({key for pair in pairs for key in pair}))
    panel, height, head = (760.0 if len(pairs) == 1 else 500.0), 400.0, 62.0
    width = panel * len(pairs) + 20
    style = "".join(read_template(name) for name in ("palette.css", "scatter.css"))
    heading = f"The front: {len(run.front)} of {len(run.candidates)} candidates"
    parts = [
        tag("style", style.replace("<", "")),
        tag("rect", x=0.5, y=0.5, width=width - 1, height=height + head + 9, rx=10, class_="card"),
        label(heading, 24, 33, "heading"),
        _draw_legend(width - 24, 28, numbered=len(run.front) <= NUMBERED_FRONT),
    ]
    for number, (across, up) in enumerate(pairs):
        body = _draw_panel(run, columns, across, up, panel, height, small=False)
        parts.append(tag("g", *body, transform=f"translate({10 + panel * number:.0f} {head:.0f})"))
    text = picture(_describe(run, heading), width, height + head + 10, *parts, class_="scatter")
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_template(name: str) -> str:
    """Read a style sheet or a script that stands beside the page's template."""
    return (files("search") / "templates" / name).read_text(encoding="utf-8")


def _draw_panel(
    run: Run, columns: Mapping[str, Column], across: str, up: str, width: float, height: float, *, small: bool
) -> list[str]:
    """Draw axes, all candidates, the front and the baselines, into a width x height box."""
    left, right, top, bottom = (52.0, 8.0, 10.0, 42.0) if small else (66.0, 18.0, 8.0, 54.0)
    members = [member for _, member in run.shown_front]
    shown = [*run.drawn, *members, *run.scored_baselines]
    x_axis = _fit_axis(columns[across], _values(shown, across), left, width - right)
    y_axis = _fit_axis(columns[up], _values(shown, up), height - bottom, top)
    parts = _draw_axes(x_axis, y_axis, small)

    def place(evaluation: Evaluation) -> tuple[float, float]:
        return x_axis.place(_value(evaluation, across)), y_axis.place(_value(evaluation, up))

    for candidate in run.drawn:
        x, y = place(candidate)
        parts.append(tag("circle", cx=x, cy=y, r=2.2 if small else 3.2, class_="candidate"))
    # Vertical pixels grow downwards, values upwards: the front is sought among values.
    values = [(_value(member, across), _value(member, up)) for member in members]
    steps = [(x_axis.place(x), y_axis.place(y)) for x, y in lower_left(values)]
    if len(steps) > 1:
        bends = "".join(f"H{x:.1f}V{y:.1f}" for x, y in steps[1:])
        parts.append(tag("path", d=f"M{steps[0][0]:.1f} {steps[0][1]:.1f}{bends}", class_="step"))
    numbered = not small and len(run.front) <= NUMBERED_FRONT
    for number, member in run.shown_front:
        x, y = place(member)
        parts.append(tag("circle", cx=x, cy=y, r=8.5 if numbered else 3.6 if small else 5.5, class_="member"))
        if numbered:
            parts.append(label(number, x, y + 3.6, "number", "middle"))
    spots = [place(baseline) for baseline in run.scored_baselines]
    for number, (x, y) in enumerate(spots):
        parts.append(draw_symbol(BASELINE_SYMBOLS[number % 4], x, y, 4.2 if small else 7.0))
    if not small:
        names = [baseline.name or baseline.genome_hash for baseline in run.scored_baselines]
        frame = _Box(left, top, width - right, height - bottom)
        parts += _label_spots(spots, names, [place(member) for member in members], frame)
    return parts


def _draw_axes(x_axis: _Axis, y_axis: _Axis, small: bool) -> list[str]:
    parts = []
    gap = 15 if small else 19
    for x, text in _thin_out(x_axis.ticks(4 if small else 7), 34 if small else 42):
        parts.append(tag("line", x1=x, x2=x, y1=y_axis.end, y2=y_axis.start, class_="grid"))
        parts.append(label(text, x, y_axis.start + gap, "tick", "middle"))
    for y, text in _thin_out(y_axis.ticks(4 if small else 6), 18):
        parts.append(tag("line", x1=x_axis.start, x2=x_axis.end, y1=y, y2=y, class_="grid"))
        parts.append(label(text, x_axis.start - 7, y + 4, "tick", "end"))
    parts.append(tag("line", x1=x_axis.start, x2=x_axis.end, y1=y_axis.start, y2=y_axis.start, class_="axis"))
    middle, level = (x_axis.start + x_axis.end) / 2, (y_axis.start + y_axis.end) / 2
    parts.append(label(_axis_title(x_axis), middle, y_axis.start + (34 if small else 42), "title", "middle"))
    aside = 12.0 if small else 16.0
    turned = {"transform": f"rotate(-90 {aside:.0f} {level:.1f})", "class_": "title", "text_anchor": "middle"}
    parts.append(tag("text", escaped(_axis_title(y_axis)), x=aside, y=level, **turned))
    return parts


def draw_symbol(symbol: str, x: float, y: float, radius: float) -> str:
    """Draw a baseline's mark: one of `BASELINE_SYMBOLS`, about `radius` in half-width, around a point."""
    r = radius
    shapes = {
        "diamond": [(0, -1.25 * r), (1.1 * r, 0), (0, 1.25 * r), (-1.1 * r, 0)],
        "square": [(-0.85 * r, -0.85 * r), (0.85 * r, -0.85 * r), (0.85 * r, 0.85 * r), (-0.85 * r, 0.85 * r)],
        "triangle-up": [(0, -1.15 * r), (1.1 * r, 0.8 * r), (-1.1 * r, 0.8 * r)],
    }
    if symbol in shapes:
        points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[symbol])
        return tag("polygon", points=points, class_="baseline")
    d = 0.85 * r
    path = f"M{x - d:.1f} {y - d:.1f}L{x + d:.1f} {y + d:.1f}M{x - d:.1f} {y + d:.1f}L{x + d:.1f} {y - d:.1f}"
    return tag("path", d=path, class_="baseline cross")


def _label_spots(
    spots: Sequence[tuple[float, float]], names: Sequence[str], members: Sequence[tuple[float, float]], frame: _Box
) -> list[str]:
    """Write each name beside its mark where it covers least: right, left, above or below."""
    marks = [_Box(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    crowd = [_Box(x - 6, y - 6, x + 6, y + 6) for x, y in members]
    choices = [_places(x, y, name, frame) for (x, y), name in zip(spots, names, strict=True)]
    chosen = [places[0] for places in choices]

    def cost(number: int, place: _Place) -> float:
        others = [other.box for position, other in enumerate(chosen) if position != number]
        outside = place.box.area - place.box.overlap(frame)
        # Two names over each other are worse than a name over one mark of many.
        clashes = sum(place.box.overlap(other) for other in (*marks, *others))
        return 10 * outside + 5 * clashes + sum(place.box.overlap(other) for other in crowd)

    # Each name takes the best place that the others leave; a few rounds settle it for a handful of names.
    for _ in range(4):
        for number, places in enumerate(choices):
            chosen[number] = min(places, key=partial(cost, number))
    return [label(name, place.x, place.y + 4, "name", place.anchor) for name, place in zip(names, chosen, strict=True)]


def _places(x: float, y: float, name: str, frame: _Box) -> list[_Place]:
    """List where a name can stand beside its mark; above and below, it moves inwards near an edge."""
    width = _CHARACTER * len(name)
    inside = min(max(x, frame.left + width / 2), frame.right - width / 2)
    starts = [("start", x + 12, x + 12, y), ("end", x - 12, x - 12 - width, y)]
    starts += [("middle", inside, inside - width / 2, y - 17), ("middle", inside, inside - width / 2, y + 17)]
    return [
        _Place(anchor, at, level, _Box(left, level - 7, left + width, level + 7)) for anchor, at, left, level in starts
    ]


def _draw_legend(right: float, y: float, *, numbered: bool) -> str:
    """Write the key, ending at `right`."""
    front = "front, numbered by first objective" if numbered else "front"
    entries = [("candidate", "candidate"), ("member", front), ("baseline", "baseline")]
    parts, x = [], right
    for class_, text in reversed(entries):
        x -= _CHARACTER * len(text)
        parts.append(label(text, x, y + 4, "key"))
        x -= 12
        mark = tag("circle", cx=x, cy=y, r=5.0 if class_ == "member" else 3.2, class_=class_)
        parts.append(draw_symbol("diamond", x, y, 5.0) if class_ == "baseline" else mark)
        x -= 20
    return tag("g", *parts)


def _fit_axis(column: Column, values: Sequence[float], start: float, end: float) -> _Axis:
    bent = [math.log10(value) for value in values] if column.log else values
    low, high = min(bent), max(bent)
    pad = 0.07 * (high - low) or (abs(high) or 1.0) * 0.1
    return _Axis(column, low - pad, high + pad, start, end)


def _axis_title(axis: _Axis) -> str:
    return axis.column.title + (", log" if axis.column.log else "")


def _thin_out(ticks: Sequence[tuple[float, str]], least: float) -> list[tuple[float, str]]:
    """Drop ticks nearer than `least` pixels to the one before."""
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if not kept or abs(tick[0] - kept[-1][0]) >= max(least, 6.5 * len(tick[1]) if least > 20 else 0):
            kept.append(tick)
    return kept


def _round_step(rough: float) -> float:
    """Give the smallest of 1, 2, 2.5, 5 times a power of ten that is no less than `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= rough * (1 - 1e-9))


def _tick_text(value: float, decimals: int) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size / 10:
            return f"{value / size:.4g}{suffix}" if abs(value) < 1e15 else f"{value:.2g}"
    return f"{value:.{decimals}f}"


def _values(evaluations: Sequence[Evaluation], key: str) -> list[float]:
    return [_value(evaluation, key) for evaluation in evaluations]


def _value(evaluation: Evaluation, key: str) -> float:
    value = value_of(evaluation, key)
    assert value is not None, f"{evaluation.genome_hash} is scored but has no {key}"
    return value


def _describe(run: Run, heading: str) -> str:
    names = ", ".join(baseline.name or baseline.genome_hash for baseline in run.scored_baselines)
    return f"{heading}; objectives {', '.join(run.objectives)}; baselines {names or 'none'}"
