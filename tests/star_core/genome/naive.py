"""Validity and decoding of genomes, written out by hand with no code of the package: what tests hold it against."""

ATTENTION, RECURRENCE, CONVOLUTION = {1, 2, 3, 4, 10, 11, 12, 13}, {5, 6, 14, 15}, {7, 8, 16, 17}
GROUPS = (
    dict.fromkeys(ATTENTION, ("q", "k", "v"))
    | dict.fromkeys(RECURRENCE, ("x", "z", "dt", "B", "C"))
    | dict.fromkeys(CONVOLUTION, ("v", "B", "C", "K"))
    | {9: ("gate", "value")}
)
KEY_REPEATS = {1: 1, 2: 1, 3: 4, 4: 2}
STATE_SIZES = {5: 16, 6: 2}

Row = tuple[int, int, int, int, int]


def named(row: Row) -> tuple[str, ...]:
    """Feature groups that the strategy of a LIV names."""
    liv_class, strategy = row[0], row[4]
    pair = ("k", "v") if liv_class in ATTENTION else ("B", "C") if liv_class in RECURRENCE else ("B", "K")
    return {1: (), 2: pair[:1], 3: pair[1:], 4: pair}[strategy]


def alone_valid(row: Row) -> bool:
    liv_class, _, featurizer_strategy, _, feature_strategy = row
    return (
        1 <= liv_class <= 17
        and featurizer_strategy in (1, 2)
        and feature_strategy in ((1,) if liv_class == 9 else (1, 2, 3, 4))
    )


def together_valid(a: Row, b: Row) -> bool:
    """Whether two LIVs, each valid alone, may be in one genome."""
    if a[2] == b[2] == 2 and a[1] == b[1] and a[0] != b[0]:
        return False
    if a[3] != b[3] or a[4] == 1 or b[4] == 1:
        return True
    if not any(a[0] in family and b[0] in family for family in (ATTENTION, RECURRENCE, CONVOLUTION)):
        return False
    if (a[0] > 9) != (b[0] > 9):
        return False
    plain_a, plain_b = (row[0] - 9 if row[0] > 9 else row[0] for row in (a, b))
    for name in set(named(a)) & set(named(b)):
        if a[0] in ATTENTION and KEY_REPEATS[plain_a] != KEY_REPEATS[plain_b]:
            return False
        if a[0] in RECURRENCE and STATE_SIZES[plain_a] != STATE_SIZES[plain_b]:
            return False
        if name == "K" and plain_a != plain_b:
            return False
    return True


def valid(rows: list[Row]) -> bool:
    return all(map(alone_valid, rows)) and all(
        together_valid(a, b) for index, a in enumerate(rows) for b in rows[:index]
    )


def network(rows: list[Row]) -> tuple[object, ...]:
    """Return what a valid genome computes: for each LIV its class, and each feature group as an expression.

    An expression says whose weights are applied to whose input. The weights of a sharing group are called after its
    first LIV. The filter K is a function of weights alone; who has featurizer weights in common has it in common.
    """

    def shares_weights(i: int) -> list[int]:
        return [j for j, row in enumerate(rows) if rows[i][2] == 2 and row[2] == 2 and row[1] == rows[i][1]] or [i]

    def weights(i: int) -> int:
        return min(shares_weights(i))

    def source(i: int, name: str) -> int:
        if name not in named(rows[i]):
            return i
        if name == "K" and len(shares_weights(i)) > 1:
            return i
        return min(
            j
            for j, row in enumerate(rows)
            if row[3] == rows[i][3] and name in named(row) and not (name == "K" and len(shares_weights(j)) > 1)
        )

    described = []
    for i, row in enumerate(rows):
        expressions = {}
        for name in GROUPS[row[0]]:
            origin = source(i, name)
            expressions[name] = (weights(origin),) if name == "K" else (weights(origin), origin)
        described.append((row[0], tuple(expressions.items())))
    return tuple(described)
