"""The matrix multiply of tiles against float64: shapes, strides, operands inside larger buffers."""

from typing import Any

import numpy as np
import pytest
import torch

SHAPES = [(1, 1, 1), (1, 64, 64), (3, 5, 7), (8, 32, 16), (9, 33, 17), (64, 64, 64), (63, 65, 130), (100, 60, 300)]
LAYOUTS = ["rows", "columns", "every-second", "flipped-rows"]


def matrix(rng: np.random.Generator, rows: int, columns: int, layout: str) -> np.ndarray:
    """Return a matrix of the given layout cut out of a buffer that is NaN everywhere else."""
    shape = (columns + 3, rows + 5) if layout == "columns" else (rows + 3, 2 * columns + 5)
    buffer = np.full(shape, np.nan, np.float32)
    if layout == "columns":
        view = buffer[1 : columns + 1, 2 : rows + 2].T
    elif layout == "every-second":
        view = buffer[1 : rows + 1, 1 : 2 * columns + 1 : 2]
    else:
        view = buffer[2 : rows + 2, 3 : columns + 3]
    view[:] = rng.standard_normal((rows, columns))
    return view[::-1] if layout == "flipped-rows" else view


def to_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_product_matches_float64(probe: Any, shape: tuple[int, int, int], a_layout: str, b_layout: str) -> None:
    m, n, k = shape
    rng = np.random.default_rng(m * n * k)
    a, b = matrix(rng, m, k, a_layout), matrix(rng, k, n, b_layout)
    c = np.full((m, n), np.nan, np.float32)
    probe.gemm(a, b, c)
    # One chain of k fused multiply-adds an element: at most k roundings of at most the sum of magnitudes.
    bound = 6e-8 * k * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)) + 1e-30
    assert (np.abs(c - a.astype(np.float64) @ b.astype(np.float64)) <= bound).all()


def test_large_product_crosses_every_block(probe: Any) -> None:
    rng = np.random.default_rng(0)
    m, n, k = (400, 530, 270) if probe.name != "plain" else (100, 530, 270)
    a, b = matrix(rng, m, k, "rows"), matrix(rng, k, n, "columns")
    c = np.full((m, n), np.nan, np.float32)
    probe.gemm(a, b, c)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), atol=2e-4)


def test_accumulate_adds_to_what_is_there(probe: Any) -> None:
    rng = np.random.default_rng(1)
    a, b = matrix(rng, 20, 300, "rows"), matrix(rng, 300, 40, "rows")
    start = rng.standard_normal((20, 40)).astype(np.float32)
    c = start.copy()
    probe.gemm(a, b, c, accumulate=True)
    np.testing.assert_allclose(c, start + a.astype(np.float64) @ b.astype(np.float64), atol=1e-4)


@pytest.mark.parametrize(("accumulate", "expected"), [(False, 0.0), (True, 2.0)])
def test_empty_sum_is_zero(probe: Any, accumulate: bool, expected: float) -> None:
    c = np.full((3, 5), 2.0, np.float32)
    probe.gemm(np.empty((3, 0), np.float32), np.empty((0, 5), np.float32), c, accumulate)
    assert (c == expected).all()


def test_row_does_not_depend_on_its_neighbours(probe: Any) -> None:
    rng = np.random.default_rng(2)
    a, b = matrix(rng, 37, 70, "rows"), matrix(rng, 70, 45, "columns")
    whole = np.empty((37, 45), np.float32)
    probe.gemm(a, b, whole)
    for row in (0, 7, 8, 31, 35, 36):
        alone = np.empty((1, 45), np.float32)
        probe.gemm(a[row : row + 1], b, alone)
        np.testing.assert_array_equal(alone[0], whole[row])


@pytest.mark.parametrize("transposed", [False, True], ids=["AB", "ABt"])
def test_bfloat16_operands_are_widened_exactly(probe: Any, transposed: bool) -> None:
    rng = np.random.default_rng(3)
    a = rng.integers(-8, 8, (19, 50)).astype(np.float32)  # products and sums are exact
    b = rng.integers(-8, 8, (50, 35)).astype(np.float32)
    b_bits = to_bf16(b.T).T if transposed else to_bf16(b)
    c = np.empty((19, 35), np.float32)
    probe.gemm(to_bf16(a), b_bits, c)
    np.testing.assert_array_equal(c, a @ b)
