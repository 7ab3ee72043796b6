"""What this machine can do at best, measured with torch's own operators: what a kernel's speed is held against.

A `Ceiling` can be interleaved with kernels (`bench.timing.measure_many`); the functions that return one number measure
once a process, number of threads and device, and take the median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from bench._validation import require_integer, resolve_device
from bench.timing import measure

# The best BLAS size differs by library, dtype and threads: 256 on one thread of a Zen 4 core in float32 (102 GFLOP/s
# against 48 at 2048), 2048 on two.
_MATMUL_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192)}

# A size is the last to be tried if its product takes so long: the next one takes eight times that. On two Zen 3 cores,
# which have no instructions for bfloat16, seven products of 2048 x 2048 took longer than a minute.
_LONG_S = 0.2

# From a second-level cache of one core to several: the elementwise function, not memory, is the limit.
_EXP_ELEMENTS = {"cpu": (1 << 15, 1 << 16, 1 << 18), "cuda": (1 << 24,)}

_FOOTPRINTS = (1 << 18, 1 << 22, 1 << 26)


@dataclass(frozen=True)
class Ceiling:
    """A call that does as much of one thing as the machine can.

    Attributes:
        name: What it is, with its size.
        unit: Unit of `rate`: "B/s", "FLOP/s", "exp/s".
        work: Bytes, floating-point operations or elements of one call.
        run: The call.
    """

    name: str
    unit: str
    work: int
    run: Callable[[], object]

    def rate(self, seconds: float) -> float:
        """Return work a second, for a call that takes `seconds`."""
        if not seconds > 0:
            raise ValueError(f"seconds: needs a number above 0, got {seconds}")
        return self.work / seconds


def copy_ceiling(footprint_bytes: int, *, device: str | torch.device = "cpu") -> Ceiling:
    """Return torch's copy between two float32 tensors, of which half the footprint is read and half written.

    Args:
        footprint_bytes: Bytes read plus bytes written, as a kernel's bytes are counted; at least 8.
        device: Where.

    Raises:
        TypeError: `footprint_bytes` is not an integer.
        ValueError: It is below 8, or `device` is not one that can be timed.
    """
    require_integer("footprint_bytes", footprint_bytes, 8)
    elements = footprint_bytes // 8
    source = torch.ones(elements, device=resolve_device(device))
    target = torch.zeros_like(source)
    return Ceiling(f"copy_{8 * elements}_bytes", "B/s", 8 * elements, lambda: target.copy_(source))


def matmul_ceiling(size: int, dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu") -> Ceiling:
    """Return torch's product of two `size` x `size` matrices, 2 size^3 floating-point operations.

    Raises:
        TypeError: `size` is not an integer, `dtype` not a floating-point dtype.
        ValueError: `size` is below 1, or `device` is not one that can be timed.
    """
    require_integer("size", size, 1)
    _require_floating(dtype)
    target = resolve_device(device)
    # Numbers around 1 / size: no product overflows in float16, none is denormal.
    a, b = (torch.rand(size, size, device=target).div_(size).add_(1 / size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=target)
    return Ceiling(f"matmul_{_short(dtype)}_{size}", "FLOP/s", 2 * size**3, lambda: torch.mm(a, b, out=out))


def best_matmul_ceiling(dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu") -> Ceiling:
    """Return the fastest of several square products, found once a process; see `matmul_ceiling`, also for errors.

    On a CPU those in float32 are tried for the half precisions too: it is what a processor without instructions for
    them can do.
    """
    _require_floating(dtype)
    return _best_matmul(dtype, resolve_device(device), torch.get_num_threads())[0]


def best_exp_ceiling(*, device: str | torch.device = "cpu") -> Ceiling:
    """Return the fastest of `torch.exp` and `torch.exp2` at several sizes, found once a process; see `exp_throughput`.

    Raises:
        ValueError: `device` is not one that can be timed.
    """
    return _best_exp(resolve_device(device), torch.get_num_threads())[0]


def copy_bandwidth(footprint_bytes: int, *, device: str | torch.device = "cpu") -> float:
    """Return bytes read and written a second by a copy with this footprint; see `copy_ceiling`, also for errors."""
    require_integer("footprint_bytes", footprint_bytes, 8)
    return _copy_rate(footprint_bytes, resolve_device(device), torch.get_num_threads())


def matmul_throughput(dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu") -> float:
    """Return operations a second of the best of several square products; see `matmul_ceiling`, also for errors."""
    _require_floating(dtype)
    return _best_matmul(dtype, resolve_device(device), torch.get_num_threads())[1]


def product_rate(dtype: torch.dtype, *, device: str | torch.device = "cpu") -> float:
    """Return operations a second of torch's product of 256 x 256 in this dtype, however slow; errors as there."""
    _require_floating(dtype)
    return _product_rate(dtype, resolve_device(device), torch.get_num_threads())


def exp_throughput(*, device: str | torch.device = "cpu") -> float:
    """Return exponentials a second in float32, out of cache: the best of `torch.exp` and `torch.exp2` at several sizes.

    Both, since exp(x) = exp2(x log2 e) is free to choose: on a Zen 4 core with MKL exp makes 1.2e9 a second and exp2
    3.0e9.

    Raises:
        ValueError: `device` is not one that can be timed.
    """
    return _best_exp(resolve_device(device), torch.get_num_threads())[1]


def fma_throughput(dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu") -> float:
    """Return multiply-adds a second: half of `matmul_throughput`.

    A matrix product is the only one of torch's operators that comes near the processor's rate: `addcmul` loads three
    numbers and stores one for each multiply-add, and makes 7e9 a second where the product makes 51e9 (one Zen 4 core).

    Raises:
        TypeError: `dtype` is not a floating-point dtype.
        ValueError: `device` is not one that can be timed.
    """
    return matmul_throughput(dtype, device=device) / 2


def ceiling_report(*, device: str | torch.device = "cpu") -> dict[str, float]:
    """Measure every ceiling once, which takes some seconds.

    Returns:
        `copy_bytes_per_s_at_<footprint>` for 256 KiB, 4 MiB and 64 MiB; `matmul_flop_per_s_float32` and `_bfloat16`;
        `exp_per_s_float32`; `fma_per_s_float32`; `threads`.

    Raises:
        ValueError: `device` is not one that can be timed.
    """
    report: dict[str, float] = {
        f"copy_bytes_per_s_at_{footprint}": copy_bandwidth(footprint, device=device) for footprint in _FOOTPRINTS
    }
    for dtype in (torch.float32, torch.bfloat16):
        report[f"matmul_flop_per_s_{_short(dtype)}"] = matmul_throughput(dtype, device=device)
    report["exp_per_s_float32"] = exp_throughput(device=device)
    report["fma_per_s_float32"] = fma_throughput(device=device)
    report["threads"] = torch.get_num_threads()
    return report


# The number of threads is in the keys because the rates depend on it.
@cache
def _copy_rate(footprint_bytes: int, device: torch.device, _threads: int) -> float:
    return _rate(copy_ceiling(footprint_bytes, device=device), device)


@cache
def _best_matmul(dtype: torch.dtype, device: torch.device, _threads: int) -> tuple[Ceiling, float]:
    found: list[tuple[Ceiling, float]] = []
    for tried in (dtype, torch.float32) if device.type == "cpu" and dtype.itemsize == 2 else (dtype,):
        for size in _MATMUL_SIZES[device.type]:
            ceiling = matmul_ceiling(size, tried, device=device)
            rate = _rate(ceiling, device)
            found.append((ceiling, rate))
            if ceiling.work / rate > _LONG_S:
                break
    return max(found, key=lambda one: one[1])


@cache
def _product_rate(dtype: torch.dtype, device: torch.device, _threads: int) -> float:
    return _rate(matmul_ceiling(256, dtype, device=device), device)


@cache
def _best_exp(device: torch.device, _threads: int) -> tuple[Ceiling, float]:
    elements = _EXP_ELEMENTS[device.type]
    return _best([ceiling for count in elements for ceiling in _exp_ceilings(count, device)], device)


def _best(ceilings: Sequence[Ceiling], device: torch.device) -> tuple[Ceiling, float]:
    rates = [_rate(ceiling, device) for ceiling in ceilings]
    best = max(range(len(rates)), key=lambda index: rates[index])
    return ceilings[best], rates[best]


def _exp_ceilings(elements: int, device: torch.device) -> list[Ceiling]:
    x = torch.linspace(-8.0, 0.0, elements, device=device)  # decays of a recurrence are exponentials of numbers below 0
    out = torch.empty_like(x)
    return [
        Ceiling(f"exp_{elements}", "exp/s", elements, lambda: torch.exp(x, out=out)),
        Ceiling(f"exp2_{elements}", "exp/s", elements, lambda: torch.exp2(x, out=out)),
    ]


def _rate(ceiling: Ceiling, device: torch.device) -> float:
    with torch.no_grad():
        return ceiling.rate(measure(ceiling.run, warmup=2, min_samples=5, min_seconds=0.1, device=device).median_s)


def _require_floating(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: needs a floating-point dtype, got {dtype!r}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
