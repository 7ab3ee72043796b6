"""Read off a compiled Triton kernel how wide its loads from global memory are, and how many bytes each asks for.

An instruction's width says what one thread takes, not what the tile behind it holds: several warps may load one row of
statistics each, and their many narrow instructions are few bytes. So bytes are counted by tiles, which Triton's last
intermediate form names with the place in the source they stand for, and the instructions of the same place say how wide
they are.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

WIDE = 16
_ITEMS = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}
# Words of AMD's names: `global_load_dwordx4`, `buffer_load_ushort`, `global_load_short_d16_hi`.
_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}

Place = tuple[int, int]
"""Line and column of a load in the source; which file is left out, as one kernel's loads do not share both."""


@dataclass(frozen=True)
class Loads:
    """The loads of a kernel from global memory.

    Attributes:
        count: Instructions.
        wide: Those of them that are 128 bits a thread, or more.
        bytes: Of the tiles that they load, each counted as often as the kernel's text asks for it.
        wide_bytes: Those of them that wide instructions load.
        places: Bytes, and wide bytes, by place in the source.
    """

    count: int
    wide: int
    bytes: int
    wide_bytes: int
    places: Mapping[Place, tuple[int, int]]


def loads_of(asm: Mapping[str, str], backend: str) -> Loads:
    """Read the loads of a kernel that was compiled for "cuda" or "hip"."""
    tiles = _tiles(asm["ttgir"])
    widths: dict[Place, list[int]] = defaultdict(list)
    for place, width in _cuda(asm["ptx"]) if backend == "cuda" else _amd(asm["amdgcn"]):
        widths[place].append(width)
    sizes = re.findall(r'"ttg\.(?:num-warps|threads-per-warp)" = (\d+)', asm["ttgir"])
    threads = math.prod(map(int, sizes))
    places = {}
    for place, found in widths.items():
        # Equal loads of two branches may have become one, which stands where neither did: it counts for all threads.
        asked = tiles[place] if place in tiles else threads * sum(found)
        places[place] = asked, round(asked * sum(width for width in found if width >= WIDE) / sum(found))
    every = [width for found in widths.values() for width in found]
    wide = sum(width >= WIDE for width in every)
    return Loads(len(every), wide, sum(b for b, _ in places.values()), sum(w for _, w in places.values()), places)


def _tiles(ttgir: str) -> dict[Place, int]:
    """Return the bytes that Triton's loads at each place ask for."""
    aliases = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    tiles: dict[Place, int] = defaultdict(int)
    for line in ttgir.splitlines():
        if not re.search(r"= (?:tt\.load|ttg\.async_copy_global_to_local|amd\w*\.buffer_load\w*) ", line):
            continue
        types, _, alias = line.rpartition(" loc(")
        kind = re.search(r" : (?:tensor<((?:\d+x)*)(?:!tt\.ptr<)?|!tt\.ptr<)(\w+)", types)
        if kind is None:
            raise RuntimeError(f"a load of an unknown type: {line.strip()}")
        size = math.prod(int(axis) for axis in (kind[1] or "").split("x")[:-1])
        tiles[_place(alias.rstrip(")"), aliases)] += size * _ITEMS[kind[2]]
    return tiles


def _place(alias: str, aliases: Mapping[str, str]) -> Place:
    """Follow names and inlined calls to where the load itself stands."""
    text = alias
    while not (found := re.match(r'"[^"]*":(\d+):(\d+)', text)):
        inner = re.search(r"#loc\d*", text)
        if inner is None:
            return 0, 0
        text = aliases[inner[0]]
    return int(found[1]), int(found[2])


def _cuda(ptx: str) -> Iterator[tuple[Place, int]]:
    place, within = (0, 0), False
    for line in ptx.splitlines():
        if "inline asm" in line:
            # A load is one of several lines of assembly, and LLVM counts the source's lines on with them.
            within = "begin" in line
        elif at := re.match(r"\s*\.loc\s+\d+\s+(\d+)\s+(\d+)", line):
            place = place if within else (int(at[1]), int(at[2]))
        elif load := re.match(r"\s*(?:@!?%p\d+ )?ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", line):
            yield place, int(load[1] or 1) * int(load[2]) // 8
        elif copy := re.match(r"\s*(?:@!?%p\d+ )?cp\.async\.c[ag]\.\S+ \[[^\]]*\], \[[^\]]*\], (\w+)", line):
            yield place, int(copy[1], 0)


def _amd(text: str) -> Iterator[tuple[Place, int]]:
    place = 0, 0
    for line in text.splitlines():
        if at := re.match(r"\s*\.loc\s+\d+\s+(\d+)\s+(\d+)", line):
            place = int(at[1]), int(at[2])
        elif load := re.match(r"\s*(?:global|buffer|flat)_load_(?:lds_)?(\w+?)(?:_d16\w*)?\s", line):
            yield place, _AMD_WIDTHS.get(load[1], 1)
