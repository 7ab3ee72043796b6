"""The two model operators through torch: registration, compilation, layouts, threads; and what the loader offers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels
from star_kernels import _native

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no compiled operators: {_native.reason()}")

CASES: dict[str, Callable[..., Tensor]] = {
    "swiglu": star_kernels.swiglu,
    "geglu": star_kernels.geglu,
    "reglu": star_kernels.reglu,
    "rms_norm": star_kernels.rms_norm,
}


def arguments(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    second = shape[-1:] if name == "rms_norm" else shape
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in (shape, second)]


def outputs_and_gradients(function: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    leaves = [arg.detach().requires_grad_() for arg in args]
    y = function(*leaves)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 3, 60), (5, 130), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = arguments(name, shape, dtype)
    assert star_kernels.which(name, *args) == "cpp"
    actual = outputs_and_gradients(CASES[name], args)
    oracle = outputs_and_gradients(lambda *a: CASES[name](*a, backend="reference"), [arg.double() for arg in args])
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for one, other in zip(actual, oracle, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    assert torch.autograd.gradcheck(CASES[name], arguments(name, (4, 5), torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    extra = (1e-6,) if name == "rms_norm" else ()
    torch.library.opcheck(getattr(torch.ops.star_kernels, name).default, (*arguments(name, (3, 20)), *extra))


def test_compiled_block_breaks_no_graph_and_is_traced_once_for_all_lengths() -> None:
    def block(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return star_kernels.swiglu(gate, star_kernels.rms_norm(x, weight))

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for length in (3, 5, 17, 64, 129):
        x, weight = arguments("rms_norm", (2, length, 32), seed=length)
        gate = torch.randn(2, length, 32)
        actual = outputs_and_gradients(compiled, [x, weight, gate])
        assert_same_bits(actual, outputs_and_gradients(block, [x, weight, gate]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", CASES)
def test_layout_of_the_inputs_changes_no_bit(name: str) -> None:
    x, other = (arg.detach() for arg in arguments(name, (6, 4, 33)))
    expected = outputs_and_gradients(CASES[name], [x, other])
    padded = torch.full((6, 4, 70), float("nan"))
    padded[..., 2:68:2] = x
    shifted = torch.full((x.numel() + 1,), float("nan"))
    shifted[1:] = x.flatten()
    layouts = {
        "every second of a NaN buffer": padded[..., 2:68:2],
        "storage offset 1": shifted[1:].view(x.shape),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last axis not last in memory": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    for layout in layouts.values():
        assert_same_bits(outputs_and_gradients(CASES[name], [layout, other]), expected)


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_a_sum_has_zero_strides(name: str) -> None:
    args = arguments(name, (3, 4, 10))
    expanded = torch.autograd.grad(CASES[name](*args).sum(), args)
    dense = torch.autograd.grad(CASES[name](*args), args, torch.ones(3, 4, 10))
    assert_same_bits(list(expanded), list(dense))


@pytest.mark.parametrize("name", CASES)
def test_threads_change_no_bit(name: str) -> None:
    args = arguments(name, (600, 257))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(CASES[name], args))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("name", CASES)
def test_row_alone_equals_row_in_batch(name: str) -> None:
    x, other = (arg.detach() for arg in arguments(name, (50, 37)))
    whole = CASES[name](x, other)
    for row in (0, 17, 49):
        alone = CASES[name](x[row : row + 1], other if name == "rms_norm" else other[row : row + 1])
        assert_same_bits([alone[0]], [whole[row]])


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameter_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = arguments("rms_norm", (9, 20), dtype)
    weight = weight.detach().to(weight_dtype)
    y, dx, dweight = outputs_and_gradients(star_kernels.rms_norm, [x, weight])
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, weight_dtype)
    same = outputs_and_gradients(star_kernels.rms_norm, [x, weight.float()])
    assert_same_bits([y, dx, dweight], [same[0], same[1], same[2].to(weight_dtype)])


def test_offsets_of_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    # Filled with NaN, as other tests want it, the gap would cost 4 GB.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 16), (2**31, 1))
    far.copy_(torch.linspace(-1, 1, 32).reshape(2, 16))
    assert_same_bits([star_kernels.swiglu(far, far)], [star_kernels.swiglu(far.clone(), far.clone())])


def test_autocast_leaves_the_dtypes_alone() -> None:
    x, weight = arguments("rms_norm", (3, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert star_kernels.rms_norm(x, weight).dtype == torch.float32
        assert star_kernels.rms_norm(x.bfloat16(), weight).dtype == torch.bfloat16


def test_functional_transforms() -> None:
    gate, up = (arg.detach() for arg in arguments("swiglu", (3, 8)))
    gradient = torch.func.grad(lambda g: star_kernels.swiglu(g, up).sum())(gate)
    leaf = gate.clone().requires_grad_()
    assert_same_bits([gradient], [torch.autograd.grad(star_kernels.swiglu(leaf, up).sum(), leaf)[0]])


def test_second_derivative_is_refused() -> None:
    gate, up = arguments("swiglu", (3, 8))
    (first,) = torch.autograd.grad(star_kernels.swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(NotImplementedError, match="swiglu_backward has no derivative"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("swiglu", (torch.ones(3), torch.ones(4)), "up must have the shape and dtype of gate"),
        ("swiglu", (torch.ones(3), torch.ones(3).double()), "up must have the shape and dtype of gate"),
        ("swiglu", (torch.ones(3).int(), torch.ones(3).int()), "dtype must be float32, bfloat16 or float64"),
        ("rms_norm", (torch.ones(2, 3), torch.ones(2), 1e-6), "weight must be"),
    ],
)
def test_operators_refuse_what_the_public_functions_never_pass(name: str, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.star_kernels, name)(*args)


def test_unknown_operator_name() -> None:
    with pytest.raises(ValueError, match="name 'none' is no operator of the compiled library"):
        _native.native_operator("none", fake=lambda x: x)


def test_parameter_gradient_of_no_row_is_zero() -> None:
    _, weight = arguments("rms_norm", (0, 5))
    star_kernels.rms_norm(torch.empty(0, 5), weight).sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()
