"""The summary figure: one line for each operator, one mark for each case, on a logarithmic axis of ratios.

Own SVG: readable on light and dark pages, with no font, script or library to load.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

_WIDTH, _LINE, _LEFT, _RIGHT, _TOP = 820, 24, 190, 130, 86

_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: var(--ink); stroke: none !important; }
  svg { --ink: #171a21; --soft: #565d6b; --page: #ffffff; --grid: #e3e5e9; --faster: #15803d; --slower: #c2410c;
        --shade: rgba(194, 65, 12, 0.07); }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e8ebf0; --soft: #a3adbb; --page: #0e1116; --grid: #262d37; --faster: #5bd38a; --slower: #ff8552;
          --shade: rgba(255, 133, 82, 0.10); }
  }
  .page { fill: var(--page); } .title { font-size: 15px; font-weight: 600; } .soft { fill: var(--soft); }
  .grid { stroke: var(--grid); } .one { stroke: var(--ink); stroke-width: 1.5; } .shade { fill: var(--shade); }
  .middle { stroke: var(--soft); stroke-width: 2; }
  .faster { stroke: var(--faster); fill: var(--faster); } .slower { stroke: var(--slower); fill: var(--slower); }
  .hollow { fill: var(--page); } .mark { stroke-width: 1.4; fill-opacity: 0.75; }
"""


@dataclass(frozen=True)
class Dot:
    """One case.

    Attributes:
        line: The operator.
        mode: "fwd", "full" or "step", which decide the mark's shape.
        ratio: Above 1, ours is faster.
        note: Shown where the pointer rests.
    """

    line: str
    mode: str
    ratio: float
    note: str


def draw(dots: Iterable[Dot], title: str, subtitle: str) -> str:
    """Return the picture as SVG.

    Raises:
        ValueError: a ratio is not above 0.
    """
    lines: dict[str, list[Dot]] = defaultdict(list)
    for dot in dots:
        if not dot.ratio > 0:
            raise ValueError(f"dots: {dot.line} has the ratio {dot.ratio}, needs one above 0")
        lines[dot.line].append(dot)
    ratios = [dot.ratio for group in lines.values() for dot in group] or [1.0]
    low, high = min(0.5, *ratios) / 1.15, max(4.0, *ratios) * 1.15
    height = _TOP + _LINE * len(lines) + 40

    def place(ratio: float) -> float:
        share = math.log(ratio / low) / math.log(high / low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    parts = [
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
        f'<text class="title" x="16" y="26">{escape(title)}</text>',
        f'<text class="soft" x="16" y="46">{escape(subtitle)}</text>',
        _legend(),
        *_axis(low, high, place(low), place(1.0), place, height),
    ]
    for index, (name, group) in enumerate(lines.items()):
        y = _TOP + _LINE * index + _LINE / 2
        parts.append(f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        middle = median(dot.ratio for dot in group)
        parts.append(
            f'<line class="middle" x1="{place(middle):.1f}" x2="{place(middle):.1f}" y1="{y - 8}" y2="{y + 8}"/>'
        )
        parts += [_mark(dot, place(dot.ratio), y) for dot in sorted(group, key=lambda dot: dot.mode != "full")]
        worst = min(dot.ratio for dot in group)
        colour = "soft" if worst >= 1 else "slower"
        parts.append(f'<text x="{_WIDTH - _RIGHT + 14}" y="{y + 4}">{middle:.2g} x</text>')
        parts.append(f'<text class="{colour}" x="{_WIDTH - 16}" y="{y + 4}" text-anchor="end">{worst:.2g} x</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{_STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _axis(low: float, high: float, start: float, one: float, place: object, height: int) -> list[str]:
    assert callable(place)
    bottom = height - 40
    parts = [f'<rect class="shade" x="{start:.1f}" y="{_TOP}" width="{one - start:.1f}" height="{bottom - _TOP}"/>']
    for value in _ticks(low, high):
        x, kind = place(value), "one" if value == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    y = bottom + 34
    parts.append(f'<text class="soft" x="{one - 8:.1f}" y="{y}" text-anchor="end">slower</text>')
    parts.append(f'<text class="soft" x="{one + 8:.1f}" y="{y}">faster</text>')
    parts.append(f'<text class="soft" x="{_WIDTH - _RIGHT + 14}" y="{_TOP - 8}">median</text>')
    parts.append(f'<text class="soft" x="{_WIDTH - 16}" y="{_TOP - 8}" text-anchor="end">worst</text>')
    return parts


def _ticks(low: float, high: float) -> Sequence[float]:
    steps = (1, 2, 5) if high / low < 300 else (1, 3) if high / low < 3000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _legend() -> str:
    x, parts = _LEFT, []
    for mode, text in (("full", "forward and backward"), ("fwd", "forward"), ("step", "one token")):
        parts.append(_mark(Dot("", mode, 1.0, ""), x, _TOP - 12))
        parts.append(f'<text class="soft" x="{x + 10}" y="{_TOP - 8}">{text}</text>')
        x += 32 + 7 * len(text)
    return "".join(parts)


def _mark(dot: Dot, x: float, y: float) -> str:
    colour = "faster" if dot.ratio >= 1 else "slower"
    note = f"<title>{escape(f'{dot.note}, {dot.mode}: {dot.ratio:.3g} x')}</title>" if dot.note else ""
    if dot.mode == "step":
        corners = f"{x:.1f},{y - 5} {x + 5:.1f},{y} {x:.1f},{y + 5} {x - 5:.1f},{y}"
        return f'<polygon class="mark {colour}" points="{corners}">{note}</polygon>'
    hollow = " hollow" if dot.mode == "fwd" else ""
    return f'<circle class="mark {colour}{hollow}" cx="{x:.1f}" cy="{y}" r="4">{note}</circle>'
