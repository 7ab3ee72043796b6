"""The compiled normalisations, rotations and channel mixes where their work is cut up, and over threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import star_kernels
from tests.kernels.checks import assert_rule, gradients, upstream
from tests.kernels.samples import integers, normal

pytestmark = pytest.mark.skipif(
    not star_kernels.backends()["cpp"].available, reason=f"cpp: {star_kernels.backends()['cpp'].reason}"
)

Call = Callable[[dict[str, Tensor], str], tuple[Tensor, ...]]

CASES: dict[str, tuple[dict[str, tuple[int, ...]], Call]] = {
    "rms_norm": (
        {"x": (3, 67, 130), "weight": (130,)},
        lambda one, backend: (star_kernels.rms_norm(one["x"], one["weight"], backend=backend),),
    ),
    "add_rms_norm": (
        {"x": (250, 77), "residual": (250, 77), "weight": (77,)},
        lambda one, backend: star_kernels.add_rms_norm(one["x"], one["residual"], one["weight"], backend=backend),
    ),
    "rotary": (
        {"x": (2, 70, 3, 40)},
        lambda one, backend: (star_kernels.rotary(one["x"], torch.arange(70) * 7, backend=backend),),
    ),
    "rotary_interleaved": (
        {"x": (2, 70, 3, 38)},
        lambda one, backend: (
            star_kernels.rotary(one["x"], integers("positions", 2, 70, high=3000), interleaved=True, backend=backend),
        ),
    ),
    "diagonal": (
        {"x": (300, 130), "weight": (130,)},
        lambda one, backend: (star_kernels.channel_mix(one["x"], one["weight"], backend=backend),),
    ),
    "grouped": (
        {"x": (1100, 60), "weight": (3, 20, 20)},
        lambda one, backend: (star_kernels.channel_mix(one["x"], one["weight"], backend=backend),),
    ),
    "grouped_wide": (
        {"x": (300, 260), "weight": (2, 130, 130)},
        lambda one, backend: (star_kernels.channel_mix(one["x"], one["weight"], backend=backend),),
    ),
}


def _run(name: str, backend: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    shapes, call = CASES[name]
    leaves = {key: normal(key, *shape).float().to(dtype).requires_grad_() for key, shape in shapes.items()}
    outputs = call(leaves, backend)
    return outputs, gradients(outputs, leaves, tuple(one.float().to(one.dtype) for one in upstream(outputs)))


@pytest.mark.parametrize("name", CASES)
def test_float32_matches_the_definition_on_any_threads(name: str) -> None:
    outputs, found = _run(name, "cpp", torch.float32)
    exact, want = _run(name, "reference", torch.float64)
    plain, rough = _run(name, "reference", torch.float32)
    for index, got in enumerate(outputs):
        assert_rule(got, exact[index], plain[index], f"output {index}", 2.0, 16.0)
    for key, got in found.items():
        assert_rule(got, want[key], rough[key], f"gradient of {key}", 3.0, 16.0)
    torch.set_num_threads(1)
    again, found_again = _run(name, "cpp", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert all(torch.equal(found[key], found_again[key]) for key in found)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("position", [0.0, 1.0, -3.0, 4096.0, 131071.0, 1048577.0, 3.0e7])
def test_rotation_keeps_float32_accuracy_at_any_position(position: float, interleaved: bool) -> None:
    """The angle is not rounded to float32 first: at position 131,071 that alone would be off by 0.004."""
    x = normal("x", 1, 1, 2, 64).float()
    options = {"positions": torch.tensor([position], dtype=torch.float64), "interleaved": interleaved}
    y = star_kernels.rotary(x, **options, backend="cpp")
    want = star_kernels.rotary(x.double(), **options, backend="reference")
    assert (y.double() - want).abs().max() < 1e-6


def test_nan_position_turns_its_own_token_alone() -> None:
    x = normal("x", 1, 3, 2, 8).float()
    y = star_kernels.rotary(x, torch.tensor([1.0, float("nan"), 2.0]), backend="cpp")
    clean = star_kernels.rotary(x, torch.tensor([1.0, 0.0, 2.0]), backend="cpp")
    assert torch.equal(y[:, ::2], clean[:, ::2])
    assert y[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_few_rows_of_a_grouped_mix_equal_many(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = normal("x", 20, 2 * 37).to(dtype), normal("weight", 2, 37, 37).to(weight_dtype)
    many = star_kernels.channel_mix(x, weight, backend="cpp")
    for rows in (1, 3):
        assert torch.equal(star_kernels.channel_mix(x[5 : 5 + rows], weight, backend="cpp"), many[5 : 5 + rows])


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.float64)],
)
def test_add_rms_norm_takes_any_pair_of_dtypes(dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
    x = normal("x", 4, 20).to(dtype).requires_grad_()
    residual = normal("residual", 4, 20).to(residual_dtype).requires_grad_()
    weight = normal("weight", 20).float()
    found = []
    for backend in ("cpp", "reference"):
        y, total = star_kernels.add_rms_norm(x, residual, weight, backend=backend)
        assert (y.dtype, total.dtype) == (dtype, residual_dtype)
        found.append((y, total, *torch.autograd.grad((y.float() * total.float()).sum(), (x, residual))))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert torch.allclose(got.double(), want.double(), rtol=2e-2, atol=2e-2)


def test_only_the_sum_of_add_rms_norm_is_differentiated() -> None:
    x, residual = (normal(name, 3, 8).float().requires_grad_() for name in ("x", "residual"))
    _, total = star_kernels.add_rms_norm(x, residual, torch.ones(8), backend="cpp")
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))
    assert torch.equal(residual.grad, torch.ones(3, 8))


LARGE: dict[str, Call] = {
    "rms_norm": lambda one, backend: (star_kernels.rms_norm(one["x"], one["w"], backend=backend),),
    "add_rms_norm": lambda one, backend: star_kernels.add_rms_norm(one["x"], one["r"], one["w"], backend=backend),
    "rotary": lambda one, backend: (
        star_kernels.rotary(one["x"].unflatten(-1, (8, 128)), torch.arange(520), backend=backend),
    ),
    "rotary_interleaved": lambda one, backend: (
        star_kernels.rotary(one["x"].unflatten(-1, (8, 128)), torch.arange(520), interleaved=True, backend=backend),
    ),
    "swiglu": lambda one, backend: (star_kernels.swiglu(one["x"], one["r"], backend=backend),),
    "diagonal": lambda one, backend: (star_kernels.channel_mix(one["x"], one["w"], backend=backend),),
}


@pytest.mark.parametrize("name", LARGE)
def test_outputs_written_past_the_caches_are_the_same(name: str) -> None:
    """A call of 32 MB and more writes past the caches; one of its rows alone does not."""
    tensors = {"x": normal("x", 8, 520, 1024).float(), "r": normal("r", 8, 520, 1024).float()}
    results = []
    for part in (slice(None), slice(3, 4)):
        leaves = {key: one[part].clone().requires_grad_() for key, one in tensors.items()}
        outputs = LARGE[name]({**leaves, "w": normal("w", 1024).float()}, "cpp")
        found = gradients(outputs, leaves, tuple(one.detach().flip(-1) for one in outputs))
        results.append((*outputs, *found.values()))
    for whole, alone in zip(*results, strict=True):
        assert torch.equal(whole[3:4], alone)
