"""Ceilings and the machine's description: structure, counting and caching; no absolute speeds."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import ceilings
from bench.harness import (
    Ceiling,
    best_exp_ceiling,
    best_matmul_ceiling,
    ceiling_report,
    copy_bandwidth,
    copy_ceiling,
    exp_throughput,
    fma_throughput,
    machine,
    matmul_ceiling,
    matmul_throughput,
    measure_many,
)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_MATMUL_SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(ceilings, "_EXP_ELEMENTS", {"cpu": (1 << 12,)})
    monkeypatch.setattr(ceilings, "_FOOTPRINTS", (1 << 12, 1 << 16))
    for cached in (ceilings._copy_rate, ceilings._best_matmul, ceilings._best_exp, ceilings._product_rate):
        cached.cache_clear()


def test_report_holds_every_ceiling() -> None:
    report = ceiling_report()
    assert report.keys() == {
        "copy_bytes_per_s_at_4096",
        "copy_bytes_per_s_at_65536",
        "matmul_flop_per_s_float32",
        "matmul_flop_per_s_bfloat16",
        "exp_per_s_float32",
        "fma_per_s_float32",
        "threads",
    }
    assert all(math.isfinite(value) and value > 0 for value in report.values())
    assert report["threads"] == torch.get_num_threads()
    assert report["fma_per_s_float32"] == report["matmul_flop_per_s_float32"] / 2


def test_each_is_measured_once_for_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter(1e9 * rate for rate in range(1, 100))
    monkeypatch.setattr(ceilings, "_rate", lambda ceiling, device: next(rates))
    assert copy_bandwidth(4096) == copy_bandwidth(4096) == 1e9
    assert copy_bandwidth(8192) == 2e9
    assert matmul_throughput() == matmul_throughput(torch.float32) == 4e9  # the better of two sizes
    assert fma_throughput() == 2e9
    assert best_matmul_ceiling().name == "matmul_float32_128"
    assert exp_throughput() == 6e9  # the better of exp and exp2
    assert best_exp_ceiling().name == "exp2_4096"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert copy_bandwidth(4096) == 7e9


def test_work_is_counted_as_kernels_count_theirs() -> None:
    copy = copy_ceiling(1 << 12)
    assert (copy.work, copy.unit, copy.rate(2.0)) == (4096, "B/s", 2048.0)
    product = matmul_ceiling(32, torch.float64)
    assert (product.work, product.unit, product.name) == (2 * 32**3, "FLOP/s", "matmul_float64_32")
    assert copy_ceiling(15).work == 8  # whole elements


def test_copy_copies_and_product_multiplies() -> None:
    copied = copy_ceiling(1 << 12).run()
    assert isinstance(copied, torch.Tensor)
    assert torch.equal(copied, torch.ones(512))
    product = matmul_ceiling(8, torch.float64).run()
    assert isinstance(product, torch.Tensor)
    assert product.shape == (8, 8)
    assert ((product > 1 / 8) & (product < 4 / 8)).all()  # 8 products between 1/64 and 4/64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_stays_finite(dtype: torch.dtype) -> None:
    product = matmul_ceiling(256, dtype).run()
    assert isinstance(product, torch.Tensor)
    assert product.isfinite().all()
    assert (product > 0).all()


def test_ceiling_is_interleaved_with_kernels() -> None:
    x = torch.ones(1 << 14)
    ceiling = copy_ceiling(2 * x.nbytes)

    def fifty_passes() -> None:
        for _ in range(50):
            x.neg()

    got = measure_many({"kernel": fifty_passes, "ceiling": ceiling.run}, baseline="ceiling", min_seconds=0.02)
    assert got["kernel"].ratio is not None
    assert got["kernel"].ratio > 3


def test_bad_argument_fails_clearly() -> None:
    with pytest.raises(ValueError, match="footprint_bytes: needs at least 8, got 7"):
        copy_bandwidth(7)
    with pytest.raises(TypeError, match="footprint_bytes: needs an integer, got float"):
        copy_ceiling(4096.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size: needs at least 1, got 0"):
        matmul_ceiling(0)
    with pytest.raises(TypeError, match=r"dtype: needs a floating-point dtype, got torch\.int64"):
        matmul_throughput(torch.int64)
    with pytest.raises(ValueError, match="device: needs cpu or cuda, got 'meta'"):
        exp_throughput(device="meta")
    with pytest.raises(ValueError, match="seconds: needs a number above 0, got 0"):
        Ceiling("copy", "B/s", 8, lambda: None).rate(0)


def test_machine_says_what_a_reader_needs() -> None:
    got = json.loads(json.dumps(machine()))
    assert got.keys() == {
        "processor", "architecture", "system", "cores", "usable_cores", "threads", "memory_bytes", "flags",
        "omp_wait_policy", "torch_capability", "torch", "python", "gpus",
    }  # fmt: skip
    assert got["processor"]
    assert 1 <= got["usable_cores"] <= got["cores"]
    assert got["threads"] == torch.get_num_threads()
    assert got["torch"] == torch.__version__
    assert got["memory_bytes"] > 2**28


def test_machine_without_cpuinfo_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.hardware._cpuinfo", dict)
    got = machine()
    assert got["processor"]
    assert got["flags"] == []


def test_a_slow_product_is_the_last_of_its_dtype_and_float32_may_be_the_better(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def rate(ceiling: Ceiling, device: torch.device) -> float:
        tried.append(ceiling.name)
        return 1e6 if "bfloat16" in ceiling.name else 1e9

    monkeypatch.setattr(ceilings, "_rate", rate)
    assert best_matmul_ceiling(torch.bfloat16).name == "matmul_float32_64"
    assert tried == ["matmul_bfloat16_64", "matmul_float32_64", "matmul_float32_128"]
    assert ceilings.product_rate(torch.bfloat16) == 1e6
