"""The vector functions against float64, over every exponent of float32; conversions bit by bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

Reference = Callable[[np.ndarray], np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    z = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, z) / (1 + z)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * torch.erfc(torch.from_numpy(x * -np.sqrt(0.5))).numpy()


def normal_density(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)


# name: (float64 reference, bound in ULP)
FUNCTIONS: dict[str, tuple[Reference, float]] = {
    "exp": (np.exp, 1.1),
    "expm1": (np.expm1, 1.5),
    "log": (np.log, 1.0),
    "log1p": (np.log1p, 1.7),
    "sigmoid": (sigmoid, 2.5),
    "softplus": (softplus, 2.0),
    "tanh": (np.tanh, 2.6),
    "silu": (lambda x: x * sigmoid(x), 3.5),
    "normal_cdf": (normal_cdf, 5.5),
    "normal_density": (normal_density, 3.0),
}


def sample() -> np.ndarray:
    """Return 2,000 values of each sign and exponent, denormals included, and a grid over where functions bend."""
    rng = np.random.default_rng(1)
    bits = (np.arange(255, dtype=np.uint32)[:, None] << 23) | rng.integers(0, 1 << 23, (255, 2000), dtype=np.uint32)
    special = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 88.72283, 88.7229, -87.33655, -103.97, -104.0]
    parts = [bits.view(np.float32), (bits | 0x80000000).view(np.float32), np.linspace(-110, 110, 400_001)]
    return np.concatenate([np.ravel(part).astype(np.float32) for part in [*parts, special]])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_stays_within_its_ulp_bound(probe: Any, name: str) -> None:
    function, bound = FUNCTIONS[name]
    x = sample()
    if name == "silu":
        x = x[x > -87.3]
    if name.startswith("normal") and probe.name == "plain":
        x = x[np.abs(x) < 1]  # the C library's float32 erfc takes x / sqrt(2) rounded, which the tails magnify
    y = probe.unary(name, x)
    with np.errstate(all="ignore"):
        expected = function(x.astype(np.float64))
        rounded = expected.astype(np.float32)
        unit = np.spacing(np.abs(rounded)).astype(np.float64)
        errors = np.abs(y - expected) / unit
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(y[~finite], rounded[~finite])
    worst = np.argmax(np.where(finite, errors, 0))
    assert errors[worst] <= bound, f"{name}({x[worst]!r}) = {y[worst]!r}, needs {expected[worst]!r}"
    assert not np.isnan(y[finite]).any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_and_infinity(probe: Any, name: str) -> None:
    function = FUNCTIONS[name][0]
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, np.nan], np.float32)
    if name == "silu":
        x = x[:3]  # silu(-inf) is -inf * 0 in every library
    with np.errstate(all="ignore"):
        expected = function(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(probe.unary(name, x), expected)


@pytest.mark.parametrize("name", ["exp", "sigmoid", "normal_cdf"])
def test_result_does_not_depend_on_the_place_in_a_vector(probe: Any, name: str) -> None:
    x = np.linspace(-3, 3, 67, dtype=np.float32)
    whole = probe.unary(name, x)
    for length in range(1, 40):
        np.testing.assert_array_equal(probe.unary(name, np.ascontiguousarray(x[-length:])), whole[-length:])


def test_every_bfloat16_widens_exactly(probe: Any) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(probe.from_bf16(bits).view(np.uint32), expected.view(np.uint32))


def test_bfloat16_rounds_to_nearest_even(probe: Any) -> None:
    rng = np.random.default_rng(2)
    exact = np.arange(0, 0x7F80, dtype=np.uint32) << 16
    halfway = exact | 0x8000
    near = [exact, halfway, halfway - 1, halfway + 1, rng.integers(0, 0x7F800000, 100_003, dtype=np.uint32)]
    x = np.concatenate([part | sign for part in near for sign in (np.uint32(0), np.uint32(0x80000000))]).view(
        np.float32
    )
    expected = torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(probe.to_bf16(x), expected)


def test_bfloat16_keeps_nan_and_infinity(probe: Any) -> None:
    bits = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFF800001], np.uint32)
    y = probe.from_bf16(probe.to_bf16(bits.view(np.float32)))
    assert y[0] == np.inf
    assert y[1] == -np.inf
    assert np.isnan(y[2:]).all()


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 15, 16, 17, 63, 1000])
def test_reductions_take_every_lane_once(probe: Any, count: int) -> None:
    # Small integers: any order of summation is exact. The buffer goes on with values that must not be read.
    values = np.random.default_rng(count).integers(-50, 50, count + 40).astype(np.float32)
    values[count:] = np.nan
    assert probe.sum(values[:count]) == values[:count].sum()
    assert probe.max(values[:count]) == (values[:count].max() if count else -np.inf)
