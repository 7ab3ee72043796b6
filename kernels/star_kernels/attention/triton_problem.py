"""The host's side of the Triton attention: shapes and options as the kernels take them, tiles, and what is started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from star_kernels._operands import wide
from star_kernels._triton import gpu_of, launch
from star_kernels._triton_math import accumulator, next_power_of_2
from star_kernels.attention.triton_backward import backward_keys, backward_queries
from star_kernels.attention.triton_forward import forward


@dataclass(frozen=True)
class Problem:
    """One call's shapes, options and boundaries, as the kernels take them.

    Attributes:
        q: Queries of one map or of both, (B, Tq, Hq, D).
        k: Keys of the same maps, (B, Tk, Hk, D).
        v: Values (B, Tk, Hk, E).
        ends: Boundaries of packed queries and keys, or None.
        lengths: (B,), keys that each row holds; None for all.
        causal: Whether a query sees no later key.
        window: Keys that a query sees; 0 for all.
        scale: Factor of the scores.
        softcap: Bound of the scores; 0 for none.
    """

    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: Tensor
    ends: tuple[Tensor, Tensor] | None
    lengths: Tensor | None
    causal: bool
    window: int
    scale: float
    softcap: float

    @property
    def sequences(self) -> int:
        """How many packed sequences there are; 0 where none are packed."""
        return 0 if self.ends is None else self.ends[0].shape[0] - 1

    def grid(self, tokens: int, heads: int, block: int) -> tuple[int, int]:
        """Return how many programs there are, and how many of them for a head: no sequence shares a tile of tokens."""
        blocks = triton.cdiv(tokens, block) + self.sequences
        return self.q[0].shape[0] * heads * blocks, blocks

    def tensors(self) -> tuple[Tensor, ...]:
        """Return q1, q2, k1, k2, v; one map stands for both where there is one."""
        return self.q[0], self.q[-1], self.k[0], self.k[-1], self.v

    def boundaries(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the boundaries of queries and keys, and the rows' lengths."""
        ends_q, ends_k = self.ends or (None, None)
        return ends_q, ends_k, self.lengths

    def counts(self, blocks: int) -> tuple[int, ...]:
        """Return the kernels' arguments from `queries` to `group`."""
        batch, queries, heads, _ = self.q[0].shape
        keys, key_heads = self.k[0].shape[1:3]
        return queries, keys, self.sequences, blocks, self.window, batch * queries * heads, heads, heads // key_heads

    def units(self) -> tuple[float, float]:
        """Return the exponent of 2 to a unit of score, and the factor inside the softcap's tanh."""
        if self.softcap:
            return self.softcap / math.log(2), self.scale / self.softcap
        return abs(self.scale) / math.log(2), 0.0

    def constants(self) -> dict[str, Any]:
        """Return what every kernel takes as `tl.constexpr`."""
        width, value_width = self.q[0].shape[3], self.v.shape[3]
        return {
            "MAPS": len(self.q),
            "CAUSAL": self.causal,
            "WINDOW": self.window > 0,
            "CAP": self.softcap > 0,
            "FLIP": self.scale < 0 and not self.softcap,
            "PACKED": self.ends is not None,
            "RAGGED": self.lengths is not None,
            "NATIVE": gpu_of(self.v).units == "native",
            "ACC": accumulator(self.v),
            "D": width,
            "E": value_width,
            "BLOCK_D": next_power_of_2(width, 16),
            "BLOCK_E": next_power_of_2(value_width, 16),
        }

    def tiles(self, kind: str) -> dict[str, Any]:
        """Return the default tile and how it is run; `kind` is "forward", "queries" or "keys"."""
        widest, gpu = next_power_of_2(max(self.q[0].shape[3], self.v.shape[3]), 16), gpu_of(self.v)
        size, maps, width = self.v.element_size(), len(self.q), max(64, min(widest, 512))
        kinds = _BY_MATRIX.get((gpu.matrix, size, maps, width), _TILES[size, maps, width])
        block_q, block_k, warps, stages = kinds[_KINDS.index(kind)]
        tiles = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
        if kind != "forward":
            tiles["SLICE"] = _SLICE if size >= 4 and width >= 128 and gpu.units != "native" else widest
        return tiles


# Channels of a float32 factor's three parts that the backward holds at once where heads are wide: of 128, every warp
# would hold 96 registers a thread for 16 rows, and twice that for two factors.
_SLICE = 32

# Queries and keys of a tile, warps and stages, forward, for dq, and for dk and dv; by bytes of an element (8 is the
# interpreter's alone), maps, and the widest of D and E. Factors of float32 take more registers than those of 16 bits,
# in three parts or whole, so their tiles are small. On sm_90 a tile of 64 rows that 8 warps share is held twice.
_TILES: dict[tuple[int, int, int], tuple[tuple[int, int, int, int], ...]] = {
    (2, 1, 64): ((128, 32, 8, 2), (128, 32, 8, 2), (16, 64, 4, 3)),
    (2, 1, 128): ((64, 32, 4, 2), (64, 32, 4, 2), (16, 64, 8, 2)),
    (2, 1, 256): ((64, 16, 8, 2), (64, 16, 8, 2), (16, 32, 8, 2)),
    (2, 1, 512): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    (2, 2, 64): ((64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 8, 2)),
    (2, 2, 128): ((128, 16, 8, 2), (64, 32, 8, 2), (16, 32, 8, 2)),
    (2, 2, 256): ((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    (2, 2, 512): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    (4, 1, 64): ((64, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    (4, 1, 128): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    **{(4, 1, width): ((16, 16, 8, 1),) * 3 for width in (256, 512)},
    **{(4, 2, width): ((16, 16, 8, 1),) * 3 for width in (64, 128, 256, 512)},
    **{(8, maps, width): ((64, 64, 4, 1),) * 3 for maps in (1, 2) for width in (64, 128, 256, 512)},
}
# Those that depend on the matrix instruction, by `Gpu.matrix` before the rest. 32 x 64 in 16 bits are 16 bytes for each
# thread of AMD's 4 warps, 8 where there are 8.
_BY_MATRIX: dict[tuple[str, int, int, int], tuple[tuple[int, int, int, int], ...]] = {
    ("mfma", 2, 1, 64): ((128, 32, 4, 2), (128, 32, 8, 2), (16, 64, 4, 3)),
    ("mma.sync", 4, 1, 64): ((64, 16, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    ("mma.sync", 4, 1, 128): ((32, 16, 8, 1), (64, 32, 8, 1), (16, 64, 8, 1)),
    ("mma.sync", 4, 2, 128): ((16, 16, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
    ("wgmma", 4, 1, 64): ((64, 16, 4, 1), (64, 16, 4, 1), (16, 64, 8, 1)),
    ("wgmma", 4, 1, 128): ((16, 32, 8, 1), (64, 32, 8, 1), (16, 32, 8, 1)),
    ("wgmma", 4, 2, 128): ((16, 16, 8, 1), (64, 32, 8, 1), (16, 32, 8, 1)),
    ("tcgen05", 4, 1, 64): ((128, 32, 8, 2), (64, 32, 8, 2), (16, 64, 8, 1)),
    ("tcgen05", 4, 1, 128): ((16, 32, 8, 1), (128, 32, 8, 1), (32, 64, 8, 1)),
    ("tcgen05", 4, 2, 128): ((16, 16, 8, 1), (128, 32, 8, 1), (16, 64, 8, 1)),
}
_KINDS = ("forward", "queries", "keys")


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for one in tensors for stride in one.stride()]


def _head_stride(parameter: Tensor | None) -> int:
    """Return the step from a head's number to the next; 0 where one number is for all, or there is none."""
    return parameter.stride(0) if parameter is not None and parameter.ndim else 0


def run_forward(problem: Problem, lam: Tensor | None, sinks: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """Return o, the rows' maxima and inverse sums, and each map's unrounded output if it is to be kept."""
    q, v, maps = problem.q[0], problem.v, len(problem.q)
    batch, queries, heads, _ = q.shape
    o = torch.empty(batch, queries, heads, v.shape[3], dtype=q.dtype, device=q.device)
    stats = torch.empty(maps, 2, batch, heads, queries, dtype=wide(q), device=q.device)
    kept = torch.empty((maps if keep else 0, *o.shape), dtype=wide(q), device=q.device)
    if o.numel():
        tiles = problem.tiles("forward")
        programs, blocks = problem.grid(queries, heads, tiles["BLOCK_Q"])
        launch(
            forward, (programs,), *problem.tensors(), lam, sinks, *problem.boundaries(), o, kept, stats,
            *_strides(*problem.tensors()), _head_stride(lam), _head_stride(sinks), *problem.counts(blocks),
            *problem.units(), SINKS=sinks is not None, KEEP=keep, PRECISE=(maps == 2 or keep) and v.element_size() == 2,
            **problem.constants(), **tiles,
        )  # fmt: skip
    return o, stats, kept


def run_backward(
    problem: Problem, do: Tensor, lam: Tensor | None, sinks: Tensor | None, o: Tensor, stats: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """Return dq and dk of each map, dv, delta (MAPS, B, H, T) and what each row's sink receives (B, H, T)."""
    q, k, v = problem.q[0], problem.k[0], problem.v
    batch, queries, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    make = torch.empty if do.numel() else torch.zeros
    dq = tuple(make(q.shape, dtype=q.dtype, device=q.device) for _ in problem.q)
    dk = tuple(make(k.shape, dtype=k.dtype, device=k.device) for _ in problem.k)
    dv = make(v.shape, dtype=v.dtype, device=v.device)
    delta = make(len(problem.q), batch, heads, queries, dtype=stats.dtype, device=q.device)
    pull = make((batch, heads, queries) if sinks is not None else 0, dtype=stats.dtype, device=q.device)
    tensors = (*problem.tensors(), do)
    # A row of few channels may cancel in all of them, and what 16-bit weights lose is then much of it.
    precise = v.element_size() == 2 and min(q.shape[3], v.shape[3]) <= 32
    if do.numel():
        tiles = problem.tiles("queries")
        programs, blocks = problem.grid(queries, heads, tiles["BLOCK_Q"])
        launch(
            backward_queries, (programs,), *tensors, lam, sinks, *problem.boundaries(), o, stats, delta, pull,
            dq[0], dq[-1], *_strides(*tensors), _head_stride(lam), _head_stride(sinks), *problem.counts(blocks),
            *problem.units(), problem.scale, SINKS=sinks is not None, PRECISE=precise, **problem.constants(), **tiles,
        )  # fmt: skip
        tiles = problem.tiles("keys")
        programs, blocks = problem.grid(keys, key_heads, tiles["BLOCK_K"])
        launch(
            backward_keys, (programs,), *tensors, lam, *problem.boundaries(), stats, delta, dk[0], dk[-1], dv,
            *_strides(*tensors), _head_stride(lam), *problem.counts(blocks), *problem.units(), problem.scale,
            PRECISE=precise, **problem.constants(), **tiles,
        )  # fmt: skip
    return dq, dk, dv, delta, pull
