"""Draw genomes: a stack of LIVs with its sharing arcs, and the line of ancestors of a winner.

Inline SVG; colours come from the page's style sheet, so one drawing serves the light and the dark theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from search.evaluation import Evaluation
from search.report_svg import escaped, label, picture, tag
from star_core.genome import POOL, Genome, LIVClass

FAMILIES: Mapping[str, str] = {
    "attention": "attention",
    "recurrence": "recurrence",
    "short_conv": "short conv",
    "long_conv": "long conv",
    "memoryless": "gated MLP",
    "linear_attention": "linear attention",
    "gated_linear_attention": "linear attention",
    "gated_delta_rule": "delta rule",
    "rg_lru": "recurrence",
}


# What has a state of constant size and no pool class of its own runs as a recurrence does.
_STAND_INS: Mapping[str, int] = {
    "attention": 1,
    "recurrence": 5,
    "linear_attention": 5,
    "gated_linear_attention": 5,
    "gated_delta_rule": 5,
    "rg_lru": 5,
    "short_conv": 7,
    "long_conv": 8,
    "memoryless": 9,
}


@dataclass(frozen=True)
class Rail:
    """LIVs that share something: `members[0]` owns it, the others reuse it. Drawn as one arc with a stop at each."""

    members: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class _Size:
    row: float
    box: float
    width: float
    lane: float
    room: float
    text: str


_LARGE = _Size(row=30.0, box=24.0, width=204.0, lane=21.0, room=76.0, text="")
_SMALL = _Size(row=17.0, box=14.0, width=86.0, lane=14.0, room=50.0, text=" small")
_PORT_STEP = 7.0
_MARGIN = 6.0


def family_of(liv_class: int) -> str:
    """Name the family of a class, 1..17."""
    return str(POOL[liv_class].family)


def base_class(liv_class: int) -> int:
    """Give the class that a differential class is made of, whose colour it takes; other classes are their own."""
    return liv_class - 9 if POOL[liv_class].differential else liv_class


def shown_class(cls: LIVClass) -> int:
    """Give the class of the pool that stands for a LIV: its own, or one that runs alike where its genes are its own."""
    if POOL[cls.id].family == cls.family:
        return cls.id
    base = _STAND_INS[cls.family]
    return base + 9 if cls.differential and base < 9 else base


def liv_classes(genome: str) -> list[int]:
    """List the classes that stand for a genome's LIVs; none for a text that is no valid genome, as an INVALID
    candidate's may be."""
    try:
        return [shown_class(cls) for cls in Genome.parse(genome).classes]
    except ValueError:
        return []


def weight_rails(genome: Genome) -> list[Rail]:
    """List the groups of LIVs that share featurizer weights."""
    groups: dict[int, list[int]] = {}
    for position, source in enumerate(genome.sharing().featurizer_source):
        groups.setdefault(source, []).append(position)
    shared = [members for members in groups.values() if len(members) > 1]
    return [Rail(tuple(members), f"W{number}") for number, members in enumerate(shared, start=1)]


def tensor_rails(genome: Genome) -> list[Rail]:
    """List who reuses whose tensors; groups with the same owner and the same readers make one rail ("k v")."""
    readers: dict[tuple[int, str], list[int]] = {}
    for position, sources in enumerate(genome.sharing().tensor_source):
        for group, source in sources.items():
            if source != position:
                readers.setdefault((source, group), []).append(position)
    names: dict[tuple[int, ...], list[str]] = {}
    for (source, group), positions in readers.items():
        names.setdefault((source, *positions), []).append(group)
    return [Rail(members, " ".join(sorted(groups))) for members, groups in sorted(names.items())]


def assign_lanes(rails: Sequence[Rail]) -> dict[Rail, int]:
    """Give each rail the innermost lane in which it meets no other one; short rails choose first."""
    lanes: dict[Rail, int] = {}
    for rail in sorted(rails, key=lambda rail: (rail.members[-1] - rail.members[0], rail.members, rail.text)):
        taken = {
            lane
            for other, lane in lanes.items()
            if other.members[0] <= rail.members[-1] and rail.members[0] <= other.members[-1]
        }
        lanes[rail] = next(lane for lane in range(len(rails)) if lane not in taken)
    return lanes


def draw_genome(genome: Genome, *, small: bool = False) -> str:
    """Draw a backbone, first LIV on top: weight sharing on the left, tensor sharing on the right.

    Args:
        genome: What to draw.
        small: Draw at a little over half the size, without the families' names.
    Returns:
        An `<svg>` element.
    """
    size = _SMALL if small else _LARGE
    left, right = assign_lanes(weight_rails(genome)), assign_lanes(tensor_rails(genome))
    # Both sides get at least the room of their heading, so that the stacks of neighbouring drawings look alike.
    least = 1 if small else 2
    x = _MARGIN + max(least * size.lane, _count_lanes(left) * _pitch(left, size)) + 8
    width = x + size.width + 8 + max(least * size.lane, _count_lanes(right) * _pitch(right, size)) + _MARGIN
    top = 14.0 if small else 40.0
    height = top + size.row * len(genome.livs) + (10.0 if small else 24.0)
    middle = x + size.width / 2
    parts = [
        tag("line", x1=middle, x2=middle, y1=top - 10, y2=height - 14 if not small else height - 4, class_="stream")
    ]
    if not small:
        parts += [
            label("tokens", middle, top - 15, "cap", "middle"),
            label("logits", middle, height - 2, "cap", "middle"),
        ]
        if left:
            parts.append(label("weights", x - 8, top - 15, "cap weights", "end"))
        if right:
            parts.append(label("tensors", x + size.width + 8, top - 15, "cap tensors"))
    for position, cls in enumerate(genome.classes):
        parts.append(_draw_liv(position, cls, x, top + size.row * position, size))
    parts += _draw_rails(left, x, -1.0, top, size, "weights")
    parts += _draw_rails(right, x + size.width, 1.0, top, size, "tensors")
    return picture(describe_genome(genome), width, height, *parts, class_=f"genome{size.text}")


def describe_genome(genome: Genome) -> str:
    """Say in words what `draw_genome` shows."""
    names = ", ".join(cls.name for cls in genome.classes)
    said = [f"{len(genome.livs)} LIVs from input to output: {names}."]
    for rail in weight_rails(genome):
        said.append(f"{_name_livs(rail.members)} share featurizer weights ({rail.text}).")
    for rail in tensor_rails(genome):
        groups, readers = rail.text.replace(" ", " and "), rail.members[1:]
        verb = "reuses" if len(readers) == 1 else "reuse"
        said.append(f"{_name_livs(readers)} {verb} {groups} of LIV {rail.members[0]}.")
    return " ".join(said)


def draw_lineage(ancestors: Sequence[Evaluation], titles: Mapping[str, str], numbers: Mapping[str, int]) -> str:
    """Draw a winner's ancestors, one column a generation, with lines from parents to children.

    Args:
        ancestors: The winner first, as `find_ancestors` gives them.
        titles: What a pointer over a genome shows, by hash.
        numbers: Those of the front's members, by hash: who is one has its number, and leads to its own drawing.
    Returns:
        An `<svg>` element.
    """
    generations = sorted({ancestor.generation for ancestor in ancestors})
    columns = {generation: [a for a in ancestors if a.generation == generation] for generation in generations}
    tallest = max(len(column) for column in columns.values())
    step, gap = 44.0, 18.0
    height, width = gap * tallest + 30, step * (len(generations) - 1) + 60
    place = {
        ancestor.genome_hash: (30 + step * column, 14 + gap * (row + 0.5 + (tallest - len(columns[generation])) / 2))
        for column, generation in enumerate(generations)
        for row, ancestor in enumerate(columns[generation])
    }
    parts = []
    for ancestor in ancestors:
        x1, y1 = place[ancestor.genome_hash]
        for x0, y0 in (place[parent] for parent in ancestor.parents if parent in place):
            bend = (x1 - x0) / 2
            parts.append(
                tag("path", d=f"M{x0:.1f} {y0:.1f}C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}")
            )
    for number, ancestor in enumerate(ancestors):
        x, y = place[ancestor.genome_hash]
        title = tag("title", escaped(titles[ancestor.genome_hash]))
        member = numbers.get(ancestor.genome_hash)
        class_ = "self" if number == 0 else "kin" if member is None else "member"
        mark = tag("circle", title, cx=x, cy=y, r=4.5 if member is None else 8.0, class_=class_)
        if member is None:
            parts.append(mark)
        else:
            marks = (mark, label(member, x, y + 3.3, f"number {class_}", "middle"))
            parts.append(tag("a" if number else "g", *marks, **({"href": f"#winner-{member}"} if number else {})))
    for generation in generations:
        name = "baseline" if generation < 0 else str(generation)
        parts.append(label(name, 30 + step * generations.index(generation), height - 2, "cap", "middle"))
    title = f"{len(ancestors) - 1} ancestors by generation, from {generations[0]} to {generations[-1]}."
    return picture(title, width, height, *parts, class_="lineage")


def _draw_liv(position: int, cls: LIVClass, x: float, y: float, size: _Size) -> str:
    name, family = cls.name.partition("[")[0], FAMILIES[cls.family]  # what a LIV has of its own shows under a pointer
    shape = {"x": x, "y": y, "width": size.width, "height": size.box, "rx": size.box / 4}
    parts = [
        tag("title", escaped(f"LIV {position}: {cls.name}, {family}")),
        tag("rect", **shape, class_="fill"),
    ]
    if cls.differential:
        parts.append(tag("rect", **shape, fill="url(#hatch)"))
    baseline = y + size.box / 2 + (3.2 if size is _SMALL else 4.2)
    if size is _SMALL:
        parts.append(label(name, x + size.width / 2, baseline, "name", "middle"))
    else:
        parts += [
            label(position, x + 22, baseline, "index", "end"),
            label(name, x + 31, baseline, "name"),
            label(family, x + size.width - 9, baseline, "family", "end"),
        ]
    return tag("g", *parts, style=f"--fill:var(--liv-{base_class(shown_class(cls))})")


def _count_lanes(lanes: Mapping[Rail, int]) -> int:
    return 1 + max(lanes.values(), default=-1)


def _pitch(lanes: Mapping[Rail, int], size: _Size) -> float:
    """Set lanes closer together where there are many, down to what a letter needs."""
    return min(size.lane, max(0.62 * size.lane, size.room / max(1, _count_lanes(lanes))))


def _draw_rails(lanes: Mapping[Rail, int], edge: float, side: float, top: float, size: _Size, kind: str) -> list[str]:
    """Draw rails beside the boxes whose edge is at `edge`; `side` is -1 left of the stack, 1 right of it."""
    touching: dict[int, list[Rail]] = {}
    for rail in sorted(lanes, key=lambda rail: lanes[rail]):
        for member in rail.members:
            touching.setdefault(member, []).append(rail)

    def port(rail: Rail, member: int) -> float:
        # Several rails at one LIV leave it side by side.
        step = min(_PORT_STEP, (size.box - 4) / len(touching[member]))
        offset = touching[member].index(rail) - (len(touching[member]) - 1) / 2
        return top + size.row * member + size.box / 2 + step * offset

    parts: list[str] = []
    for rail, lane in lanes.items():
        x = edge + side * (_pitch(lanes, size) * (lane + 1) - 2)
        ports = [port(rail, member) for member in rail.members]
        first, last = ports[0], ports[-1]
        radius = min((last - first) / 2, abs(x - edge), 14.0)
        bend = f"{x - side * radius:.1f}"
        parts.append(
            tag(
                "path",
                d=f"M{edge:.1f} {first:.1f}H{bend}Q{x:.1f} {first:.1f} {x:.1f} {first + radius:.1f}"
                f"V{last - radius:.1f}Q{x:.1f} {last:.1f} {bend} {last:.1f}H{edge:.1f}",
                class_=f"rail {kind}",
            )
        )
        parts += [tag("line", x1=float(edge), x2=float(x), y1=y, y2=y, class_=f"rail {kind}") for y in ports[1:-1]]
        for number, y in enumerate(ports):
            if kind == "weights" or number == 0:
                parts.append(tag("circle", cx=float(edge), cy=y, r=size.box / 8, class_=f"stop {kind}"))
            else:
                tip = size.box / 5
                points = f"{edge:.1f},{y:.1f} {edge + tip * 1.5:.1f},{y - tip:.1f} {edge + tip * 1.5:.1f},{y + tip:.1f}"
                parts.append(tag("polygon", points=points, class_=f"stop {kind}"))
        # Labels stand in the longest free stretch of their rail.
        start, end = max(pairwise(ports), key=lambda stretch: stretch[1] - stretch[0])
        parts.append(label(rail.text, x, (start + end) / 2 + 3.5, f"tie {kind}", "middle"))
    return parts


def _name_livs(members: Sequence[int]) -> str:
    return f"LIV{'' if len(members) == 1 else 's'} {', '.join(map(str, members))}"
