"""Draw what T looks like for each family of layers: `python docs/pictures.py` writes docs/pictures/*.svg.

Each picture is a T that was computed for 14 tokens, one channel, from features drawn at random: rows are the tokens
that are written, columns those that are read. Depth of colour is the root of |T_ij| against the largest of the picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

TOKENS = 14
CELL = 16
MARGIN = 26
FOLDER = Path(__file__).parent / "pictures"

Matrix = list[list[float]]
Vectors = list[list[float]]

STYLE = """
  svg { --ink: #171a21; --soft: #565d6b; --page: #ffffff; --grid: #e3e5e9; --plus: #1d4ed8; --minus: #c2410c; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e8ebf0; --soft: #a3adbb; --page: #0e1116; --grid: #262d37; --plus: #7aa7ff; --minus: #ff8552; }
  }
  text { font: 12px system-ui, sans-serif; fill: var(--soft); } .page { fill: var(--page); }
  .grid { fill: none; stroke: var(--grid); } .plus { fill: var(--plus); } .minus { fill: var(--minus); }
"""


def _vectors(source: random.Random, size: int) -> Vectors:
    return [[source.uniform(-1.0, 1.0) for _ in range(size)] for _ in range(TOKENS)]


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _lower(entry: Callable[[int, int], float]) -> Matrix:
    """Build the causal T whose entries `entry` gives."""
    return [[entry(i, j) if j <= i else 0.0 for j in range(TOKENS)] for i in range(TOKENS)]


def attention(seed: int = 1) -> Matrix:
    """Softmax attention: every row is positive and sums to 1."""
    source = random.Random(seed)
    q, k = _vectors(source, 4), _vectors(source, 4)
    weights = _lower(lambda i, j: math.exp(2.0 * _dot(q[i], k[j])))
    return [[weight / sum(row) for weight in row] for row in weights]


def differential() -> Matrix:
    """The difference of two softmax attentions."""
    first, second = attention(2), attention(3)
    return _lower(lambda i, j: first[i][j] - second[i][j])


def linear_attention() -> Matrix:
    """Linear attention: of low rank below the diagonal."""
    source = random.Random(4)
    q, k = _vectors(source, 2), _vectors(source, 2)
    return _lower(lambda i, j: _dot(q[i], k[j]))


def recurrence() -> Matrix:
    """A selective recurrence of 4 states: C_i exp(A (s_{j+1} + ... + s_i)) s_j B_j."""
    source = random.Random(5)
    b, c = _vectors(source, 4), _vectors(source, 4)
    steps = [source.uniform(0.05, 0.45) for _ in range(TOKENS)]

    def entry(i: int, j: int) -> float:
        passed = sum(steps[j + 1 : i + 1])
        return sum(c[i][n] * math.exp(-(n + 1) * passed) * steps[j] * b[j][n] for n in range(4))

    return _lower(entry)


def diagonal_recurrence() -> Matrix:
    """A gated linear recurrence of one state: the product of the decays in between."""
    source = random.Random(6)
    decay = [source.uniform(0.45, 0.98) for _ in range(TOKENS)]
    return _lower(lambda i, j: math.prod(decay[j + 1 : i + 1]) * math.sqrt(1.0 - decay[j] ** 2))


def delta_rule() -> Matrix:
    """The gated delta rule: q_i (prod a_l (1 - beta_l k_l k_l^T)) beta_j k_j, keys of length 1."""
    source = random.Random(7)
    q, k = _vectors(source, 4), _vectors(source, 4)
    k = [[x / math.sqrt(_dot(key, key)) for x in key] for key in k]
    decay = [source.uniform(0.8, 1.0) for _ in range(TOKENS)]
    beta = [source.uniform(0.3, 0.9) for _ in range(TOKENS)]

    def entry(i: int, j: int) -> float:
        memory = [beta[j] * x for x in k[j]]
        for t in range(j + 1, i + 1):
            found = _dot(k[t], memory)
            memory = [decay[t] * (m - beta[t] * found * x) for m, x in zip(memory, k[t], strict=True)]
        return _dot(q[i], memory)

    return _lower(entry)


def short_convolution() -> Matrix:
    """A gated convolution with 3 taps: a scaled Toeplitz band."""
    source = random.Random(8)
    taps = [0.9, -0.6, 0.45]
    b, c = ([source.uniform(0.3, 1.0) for _ in range(TOKENS)] for _ in range(2))
    return _lower(lambda i, j: c[i] * taps[i - j] * b[j] if i - j < len(taps) else 0.0)


def long_convolution() -> Matrix:
    """A gated convolution with a filter as long as the sequence: scaled Toeplitz, dense."""
    source = random.Random(9)
    b, c = ([source.uniform(0.5, 1.0) for _ in range(TOKENS)] for _ in range(2))
    return _lower(lambda i, j: c[i] * math.cos(0.75 * (i - j)) * math.exp(-0.12 * (i - j)) * b[j])


def memoryless() -> Matrix:
    """A gated memoryless unit: diagonal."""
    source = random.Random(10)
    gates = [source.uniform(-3.0, 3.0) for _ in range(TOKENS)]
    return _lower(lambda i, j: gates[i] / (1.0 + math.exp(-gates[i])) if i == j else 0.0)


PICTURES: dict[str, Callable[[], Matrix]] = {
    "attention": attention,
    "delta-rule": delta_rule,
    "diagonal-recurrence": diagonal_recurrence,
    "differential": differential,
    "linear-attention": linear_attention,
    "long-convolution": long_convolution,
    "memoryless": memoryless,
    "recurrence": recurrence,
    "short-convolution": short_convolution,
}


def draw(name: str) -> str:
    """Return the picture `name` as SVG."""
    matrix = PICTURES[name]()
    largest = max(abs(value) for row in matrix for value in row)
    side = TOKENS * CELL
    size = side + MARGIN + 6
    title = (PICTURES[name].__doc__ or name).partition(":")[0].rstrip(".")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" height="{size}" '
        f'role="img"><title>T of: {title}</title><style>{STYLE}</style>',
        f'<rect class="page" width="{size}" height="{size}" rx="4"/>',
        f'<text x="{MARGIN}" y="{MARGIN - 9}">j, read →</text>',
        f'<text transform="translate({MARGIN - 9} {MARGIN + 76}) rotate(-90)">← i, written</text>',
    ]
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            depth = round(math.sqrt(abs(value) / largest), 2)
            if depth:
                parts.append(
                    f'<rect class="{"plus" if value > 0 else "minus"}" x="{MARGIN + j * CELL}" y="{MARGIN + i * CELL}" '
                    f'width="{CELL - 1}" height="{CELL - 1}" fill-opacity="{depth}"/>'
                )
    parts.append(f'<rect class="grid" x="{MARGIN - 0.5}" y="{MARGIN - 0.5}" width="{side}" height="{side}"/></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        (FOLDER / f"{name}.svg").write_text(draw(name), encoding="utf-8")


if __name__ == "__main__":
    main()
