"""What the tests of the native layer share: every library that this processor can run, loaded without torch."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from star_kernels import _native

ISAS = ["avx512", "avx2", "neon", "plain"]


class Probe:
    """The plain C entry points of one library."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.name = name
        size, pointer = ctypes.c_int64, ctypes.c_void_p
        self._unary = library.star_probe_unary
        self._unary.argtypes, self._unary.restype = [ctypes.c_char_p, pointer, pointer, size], ctypes.c_bool
        self._to_bf16, self._from_bf16 = library.star_probe_to_bf16, library.star_probe_from_bf16
        self._sum, self._max = library.star_probe_sum, library.star_probe_max
        for function in (self._to_bf16, self._from_bf16):
            function.argtypes, function.restype = [pointer, pointer, size], None
        for function in (self._sum, self._max):
            function.argtypes, function.restype = [pointer, size], ctypes.c_float
        operand = [pointer, size, size]
        self._gemm, self._gemm_bf16 = library.star_probe_gemm, library.star_probe_gemm_bf16
        for function in (self._gemm, self._gemm_bf16):
            function.argtypes = [size, size, size, *operand, *operand, pointer, ctypes.c_bool]
            function.restype = None

    def unary(self, name: str, x: np.ndarray) -> np.ndarray:
        y = np.full_like(x, np.nan)
        assert self._unary(name.encode(), x.ctypes.data, y.ctypes.data, x.size), f"no function {name}"
        return y

    def to_bf16(self, x: np.ndarray) -> np.ndarray:
        y = np.empty(x.shape, np.uint16)
        self._to_bf16(x.ctypes.data, y.ctypes.data, x.size)
        return y

    def from_bf16(self, x: np.ndarray) -> np.ndarray:
        y = np.empty(x.shape, np.float32)
        self._from_bf16(x.ctypes.data, y.ctypes.data, x.size)
        return y

    def sum(self, x: np.ndarray) -> float:
        return float(self._sum(x.ctypes.data, x.size))

    def max(self, x: np.ndarray) -> float:
        return float(self._max(x.ctypes.data, x.size))

    def gemm(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, accumulate: bool = False) -> None:
        """C = or += A B, where A and B are float32, or bfloat16 as uint16, of any strides, and C is contiguous."""
        function: Callable[..., None] = self._gemm if a.dtype == np.float32 else self._gemm_bf16
        strides = [stride // array.itemsize for array in (a, b) for stride in array.strides]
        left, right = [a.ctypes.data, *strides[:2]], [b.ctypes.data, *strides[2:]]
        function(a.shape[0], b.shape[1], a.shape[1], *left, *right, c.ctypes.data, accumulate)


def runnable() -> list[str]:
    """Name the libraries that this processor can run: those no wider than the one the loader took."""
    if not _native.available():
        return []
    taken = ISAS.index(_native.isa())
    return [isa for isa in ISAS[taken:] if (_native.folder() / f"star_{isa}.so").exists()]


@pytest.fixture(scope="session", params=runnable() or ["none"])
def probe(request: pytest.FixtureRequest) -> Probe:
    """One library after the other."""
    if request.param == "none":
        pytest.skip(f"no compiled operators: {_native.reason()}")
    return Probe(request.param, ctypes.CDLL(str(_native.folder() / f"star_{request.param}.so")))
