"""Products of float32 in bfloat16 parts: what GPUs run, which the interpreter's kernels otherwise replace by numpy."""

from __future__ import annotations

import pytest
import torch

from star_kernels import _triton

if not _triton.interpreting():
    pytest.skip("kernels run on the CPU with TRITON_INTERPRET=1 alone", allow_module_level=True)

import triton
import triton.language as tl

from star_kernels._triton_math import split_product


@triton.jit
def _multiply(a, b, c, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    where = i[:, None] * SIZE + i[None, :]
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    tl.store(c + where, split_product(tl.load(a + where), tl.load(b + where), acc))


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_are_as_exact_as_float32(first: torch.dtype, second: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(32, 32, generator=generator).to(first)
    b = (torch.randn(32, 32, generator=generator) * 100).to(second)
    c = torch.empty(32, 32)
    _multiply[(1,)](a, b, c, SIZE=32)
    exact = a.double() @ b.double()
    bound = a.double().abs() @ b.double().abs() * 2.0**-23
    assert ((c - exact).abs() <= bound).all()


def test_what_is_not_finite_stays_in_its_row_or_column() -> None:
    a, b, c = torch.ones(32, 32), torch.ones(32, 32), torch.empty(32, 32)
    a[3, 5], b[2, 7] = float("nan"), float("nan")
    _multiply[(1,)](a, b, c, SIZE=32)
    hit = torch.zeros(32, 32, dtype=torch.bool)
    hit[3], hit[:, 7] = True, True
    assert c[hit].isnan().all()
    assert torch.equal(c[~hit], torch.full((32 * 32 - 63,), 32.0))
