"""One random call: the compiled operators against the plain torch definition in float64, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import star_kernels
from tests.fuzz.calls import CALLS, Call
from tests.fuzz.draw import Draw

Outputs = tuple[Tensor, ...]
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float64)
ANY_DTYPE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Loose: what is looked for is a wrong element, not a lost digit; the test suites hold the digits.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# Where even that is too tight, values are badly conditioned: then the error may be this many times what the definition
# changes by in the same dtype, or when its inputs change in their last digit, or the last digit of the largest input:
# gradients that cancel to nothing in the definition, as through a softmax over equal scores, need not do so elsewhere.
CONDITIONING = 30.0


@dataclass(frozen=True)
class Example:
    """A call in some dtypes and memory layouts."""

    operator: str
    leaves: dict[str, Tensor]
    options: dict[str, Any]
    upstream: list[Tensor | None]

    def __str__(self) -> str:
        def describe(value: Any) -> str:
            if not isinstance(value, Tensor):
                return repr(value)
            if not value.is_floating_point() and value.numel() < 20:
                return repr(value.tolist())
            kind = str(value.dtype).removeprefix("torch.")
            return f"{kind}{list(value.shape)} strides {list(value.stride())} offset {value.storage_offset()}"

        lines = [f"  {name}: {describe(value)}" for name, value in {**self.leaves, **self.options}.items()]
        wanted = ", ".join(name for name, leaf in self.leaves.items() if leaf.requires_grad)
        return "\n".join([self.operator, *lines, f"  gradients of: {wanted or 'nothing'}"])


def check_seed(seed: int, operators: list[str], backend: str) -> str:
    """Draw the example of this seed, run it and compare; return the operator that it called. Raises AssertionError."""
    draw = Draw(seed)
    operator = draw.choose(operators)
    call = CALLS[operator](draw, False)
    torch.set_num_threads(draw.choose((1, 1, 1, 1, 2, 3)))
    kind = draw.choose(("compare",) * 8 + ("poison", "misfit"))
    if kind == "misfit":
        check_misfit(call, draw, backend)
        return operator
    if kind == "poison":
        poison(call, draw)
    example = lay_out(call, draw)
    try:
        check_example(example, backend, compare=kind == "compare", again=draw.chance(0.1))
    except Exception as error:
        error.add_note(f"seed {seed}, {kind}: {example}")
        raise
    return operator


def lay_out(call: Call, draw: Draw) -> Example:
    """Choose dtypes and memory layouts, and which gradients are asked for."""
    dtype = draw.choose(DTYPES)
    leaves, differentiate = {}, draw.chance(0.85)
    for name, value in call.tensors.items():
        free = name in call.free or (name.endswith("state") and draw.chance(0.3))
        state = torch.promote_types(dtype, torch.float32)
        own = draw.choose((dtype, *ANY_DTYPE)) if free else state if name.endswith("state") else dtype
        leaf = draw.layout(value.to(own)).detach()
        leaves[name] = leaf.requires_grad_(differentiate and draw.chance(0.85))
    options = {name: draw.layout(one) if isinstance(one, Tensor) else one for name, one in call.options.items()}
    for name, value in call.options.items():
        # Boundaries and lengths must keep their values, which a stride of 0 would change.
        if isinstance(value, Tensor) and not torch.equal(options[name], value):
            options[name] = value
    with torch.no_grad():
        shapes = [one.shape for one in run(call.operator, {n: one.double() for n, one in leaves.items()}, options)]
    upstream = [draw.layout(draw.values(*shape)) if draw.chance(0.85) else None for shape in shapes]
    return Example(call.operator, leaves, options, upstream)


def run(operator: str, tensors: dict[str, Tensor], options: dict[str, Any], backend: str = "reference") -> Outputs:
    result = getattr(star_kernels, operator)(**tensors, **options, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def run_with_gradients(example: Example, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return outputs and the gradients asked for, by name; in the example's own dtypes and memory, or in `dtype`."""
    leaves = example.leaves
    if dtype is not None:
        leaves = {n: one.detach().to(dtype).requires_grad_(one.requires_grad) for n, one in leaves.items()}
    outputs = run(example.operator, leaves, example.options, backend)
    results = {f"output {index}": one.detach() for index, one in enumerate(outputs)}
    pairs = [
        (one, grad.to(one.dtype))
        for one, grad in zip(outputs, example.upstream, strict=True)
        if grad is not None and one.requires_grad
    ]
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    found: tuple[Tensor | None, ...] = (None,) * len(wanted)
    if pairs and wanted:
        found = torch.autograd.grad(
            [one for one, _ in pairs], [leaves[name] for name in wanted], [grad for _, grad in pairs], allow_unused=True
        )
    for name, gradient in zip(wanted, found, strict=True):
        results[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return results


def check_example(example: Example, backend: str, *, compare: bool, again: bool) -> None:
    """Run an example and hold it to the definition, its inputs to what they were, and a second run to the first."""
    memory = {name: storage_bytes(leaf) for name, leaf in example.leaves.items()}
    results = run_with_gradients(example, backend)
    for name, leaf in example.leaves.items():
        assert torch.equal(storage_bytes(leaf), memory[name]), f"the buffer of {name} was written to"
    if again:
        for name, second in run_with_gradients(example, backend).items():
            assert torch.equal(bits(second), bits(results[name])), f"{name} differs in a second run"
    if not compare:
        return
    exact = run_with_gradients(example, "reference", torch.float64)
    assert exact.keys() == results.keys()
    for name, want in exact.items():
        got = results[name]
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
        error, scale = largest_error(got, want)
        tolerance = max(TOLERANCE[got.dtype], TOLERANCE[next(iter(example.leaves.values())).dtype])
        if error > tolerance * scale:
            bound = tolerance * scale + CONDITIONING * conditioning(example, name, want)
            assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}, largest value {scale:.3e}"


def conditioning(example: Example, name: str, want: Tensor) -> float:
    """Return by how much a result changes with the precision and with the last digits of the inputs."""
    first = next(iter(example.leaves.values()))
    epsilon = torch.finfo(torch.promote_types(first.dtype, torch.float32)).eps
    plain = run_with_gradients(example, "reference")[name]
    generator = torch.Generator().manual_seed(0)
    nudged = {}
    for key, leaf in example.leaves.items():
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        nudged[key] = (leaf.detach().double() * (1 + epsilon * noise)).requires_grad_(leaf.requires_grad)
    moved = run_with_gradients(replace(example, leaves=nudged), "reference")[name]
    inputs = [one.detach().double() for one in (*example.leaves.values(), *example.upstream) if one is not None]
    largest = max(one[one.isfinite()].abs().max().item() for one in inputs if one.isfinite().any())
    return max(largest_error(plain, want)[0], largest_error(moved, want)[0], epsilon * largest)


def largest_error(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Return the largest error and the largest value, where the value can be told in the dtype; NaN is infinite
    error."""
    told = want.isfinite() & (want.abs() < torch.finfo(got.dtype).max / 4)
    if not told.any():
        return 0.0, 0.0
    error = (got.double() - want)[told].abs()
    smallest = torch.finfo(got.dtype).smallest_normal
    return error.nan_to_num(nan=float("inf")).max().item(), max(want[told].abs().max().item(), smallest)


def poison(call: Call, draw: Draw) -> None:
    """Put NaN and infinities at random places of random arguments."""
    for name, value in call.tensors.items():
        if draw.chance(0.5):
            bad = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e38], dtype=torch.float64)
            chosen = draw.uniform(0, 1, *value.shape) < draw.choose((0.01, 0.2, 1.0))
            call.tensors[name] = torch.where(chosen, bad[draw.integers(4, *value.shape)], value)


def check_misfit(call: Call, draw: Draw, backend: str) -> None:
    """Hold a call with one argument of another shape or dtype to be served, or refused by ValueError or TypeError."""
    tensors = {name: value.float() for name, value in call.tensors.items()}
    name = draw.choose(list(tensors))
    tensors[name] = misfit(tensors[name], draw)
    try:
        run(call.operator, tensors, call.options, backend)
    except (ValueError, TypeError):
        return
    except Exception as error:
        error.add_note(f"{call.operator} with {name} of shape {tuple(tensors[name].shape)} and {tensors[name].dtype}")
        raise


def misfit(value: Tensor, draw: Draw) -> Tensor:
    """Return a tensor of one element more or less, one axis more or less, or integers."""
    kind = draw.choose(("longer", "shorter", "axis", "flat", "integers", "empty"))
    axis = draw.count(0, value.ndim - 1) if value.ndim else 0
    if kind == "integers":
        return value.nan_to_num().long()
    if kind == "axis" or value.ndim == 0:
        return value.unsqueeze(axis)
    if kind == "flat":
        return value.flatten()
    if kind == "longer":
        return torch.cat([value, value.narrow(axis, 0, min(1, value.shape[axis]))], dim=axis)
    return value.narrow(axis, 0, 0 if kind == "empty" else max(0, value.shape[axis] - 1))


def storage_bytes(x: Tensor) -> Tensor:
    """Copy the whole memory behind a tensor, what lies around a view included."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone()


def bits(x: Tensor) -> Tensor:
    # A single number keeps its stride through a plain clone, which a view of its bytes refuses.
    return x.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) if x.numel() else torch.empty(0)
