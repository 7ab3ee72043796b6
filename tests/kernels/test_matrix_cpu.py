"""The compiled recurrences with a matrix state: sizes past a chunk and a vector, threads, poison, mixed dtypes,
torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels
from star_kernels import _native
from tests.kernels import oracles
from tests.kernels.checks import Case, assert_close, assert_rule, call, gradients, same, upstream
from tests.kernels.samples import normal, uniform

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no compiled operators: {_native.reason()}")

OPERATORS = ("ssd", "gated_linear_attention", "gated_delta_rule")
ONE_HEAD = {"ssd": ("x", "dt", "z"), "gated_linear_attention": ("q", "k", "v", "log_decay")}
ONE_HEAD["gated_delta_rule"] = (*ONE_HEAD["gated_linear_attention"], "beta")
EARLIER_ONLY = {"ssd": ("C", "z"), "gated_linear_attention": ("q",), "gated_delta_rule": ("q",)}
"""Inputs whose gradient at a token depends on that token and earlier ones alone, where the upstream gradient is
fixed."""


def case(operator: str, batch: int, length: int, heads: int = 2, keys: int = 20, values: int = 36) -> Case:
    if operator == "ssd":
        tensors = {
            "x": normal("x", batch, length, heads, values),
            "dt": normal("dt", batch, length, heads) - 1.0,
            "A": -uniform("A", heads, high=2.0),
            "B": normal("B", batch, length, 1, keys),
            "C": normal("C", batch, length, 1, keys),
            "D": normal("D", heads),
            "z": normal("z", batch, length, heads, values),
            "dt_bias": normal("dt_bias", heads),
            "initial_state": normal("state", batch, heads, values, keys),
        }
        return Case(tensors, {"dt_softplus": True})
    k = normal("k", batch, length, heads, keys)
    tensors = {
        "q": normal("q", batch, length, heads, keys),
        "k": k / k.norm(dim=-1, keepdim=True).clamp_min(1e-9),
        "v": normal("v", batch, length, heads, values),
    }
    if operator == "gated_linear_attention":
        tensors["log_decay"] = -uniform("log_decay", batch, length, heads, keys, high=1.0)
    else:
        tensors["log_decay"] = -uniform("log_decay", batch, length, heads, high=0.5)
        tensors["beta"] = uniform("beta", batch, length, heads)
    return Case({**tensors, "initial_state": normal("state", batch, heads, keys, values)})


def run(operator: str, leaves: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    return call(operator, "cpp", leaves, options)


@pytest.mark.parametrize(("tokens", "keys", "values"), [(129, 60, 100), (70, 130, 7), (48, 128, 64), (65, 1, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_error_is_at_most_twice_plain_torch_at_odd_sizes(
    operator: str, dtype: torch.dtype, tokens: int, keys: int, values: int
) -> None:
    torch.set_num_threads(1)  # the token loop's small tensors do not pay for a second
    chosen = case(operator, 1, tokens, 2, keys, values)
    leaves = chosen.leaves(dtype)
    outputs = run(operator, leaves, chosen.options)
    exact_leaves = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    plain_leaves = {name: one.detach().float().requires_grad_() for name, one in leaves.items()}
    oracle = getattr(oracles, operator)
    exact = oracle(**exact_leaves, **chosen.options)
    rough = oracle(**plain_leaves, **chosen.options)
    plain = tuple(one.to(got.dtype) for one, got in zip(rough, outputs, strict=True))
    for index, (got, want, near) in enumerate(zip(outputs, exact, plain, strict=True)):
        assert_rule(got, want, near, f"output {index}", 2.0, 32.0)
    dy = upstream(outputs)
    found = gradients(outputs, leaves, dy)
    want_found = gradients(exact, exact_leaves, tuple(one.double() for one in dy))
    plain_found = gradients(plain, plain_leaves, dy)
    for name, leaf in leaves.items():
        assert_rule(found[name], want_found[name], plain_found[name].to(leaf.dtype), f"d{name}", 3.0, 32.0)


@pytest.mark.parametrize("values", [1, 7, 8, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_step_matches_float64_at_any_number_of_vectors(operator: str, values: int) -> None:
    keys, timeless = 13, ("A", "D", "dt_bias", "initial_state")
    chosen = case(operator, 2, 1, 3, keys, values)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = {name: one.detach() for name, one in chosen.leaves(dtype).items()}
        token = {name: one if name in timeless else one[:, 0] for name, one in leaves.items()}
        state = token.pop("initial_state")
        results.append(call(f"{operator}_step", "cpp", {"state": state, **token}, chosen.options))
    roundings = 2 * (keys + 3)  # of a sum over the keys, and of what is written to the memory
    for got, want in zip(*results, strict=True):
        assert_close(got, want, operator, roundings * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("operator", OPERATORS)
def test_same_bits_for_any_number_of_threads_and_for_a_row_alone(operator: str) -> None:
    chosen = case(operator, 3, 150)
    leaves = chosen.leaves(torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs = run(operator, leaves, chosen.options)
        results.append([*outputs, *gradients(outputs, leaves).values()])
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))
    shared = ("A", "D", "dt_bias")
    alone = {name: one if name in shared else one[1:2].detach().requires_grad_() for name, one in leaves.items()}
    outputs = run(operator, leaves, chosen.options)
    own = run(operator, alone, chosen.options)
    assert all(same(a, b[1:2]) for a, b in zip(own, outputs, strict=True))
    dy = upstream(outputs)
    found, own_found = gradients(outputs, leaves, dy), gradients(own, alone, tuple(one[1:2] for one in dy))
    for name in alone:
        if name not in shared:
            assert same(own_found[name], found[name][1:2]), name


@pytest.mark.parametrize("at", [0, 5, 63, 64, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("operator", OPERATORS)
def test_poison_moves_forward_only_and_stays_in_its_head(operator: str, bad: float, at: int) -> None:
    chosen = case(operator, 1, 130)
    leaves = chosen.leaves(torch.float32)
    clean = run(operator, leaves, chosen.options)
    dy = upstream(clean)
    clean_found = gradients(clean, leaves, dy)
    for name in ONE_HEAD[operator]:
        value = leaves[name].detach().clone()
        value[0, at, 1] = bad
        poisoned = {**leaves, name: value.requires_grad_()}
        outputs = run(operator, poisoned, chosen.options)
        assert same(outputs[0][:, :at], clean[0][:, :at]), name
        assert same(outputs[0][:, :, 0], clean[0][:, :, 0]), name
        assert same(outputs[1][:, 0], clean[1][:, 0]), name
        found = gradients(outputs, poisoned, dy)
        for other in ONE_HEAD[operator]:
            assert same(found[other][:, :, 0], clean_found[other][:, :, 0]), f"{name}, d{other}"
        for other in EARLIER_ONLY[operator]:
            assert same(found[other][:, :at], clean_found[other][:, :at]), f"{name}, d{other} at an earlier token"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("sizes", [(0, 4, 5), (2, 0, 5), (2, 4, 0), (2, 0, 0)])
def test_sizes_of_zero(operator: str, sizes: tuple[int, int, int]) -> None:
    heads, keys, values = sizes
    if operator == "ssd" and heads == 0:
        pytest.skip("groups must divide the heads")
    chosen = case(operator, 2, 70, heads, keys, values)
    leaves = chosen.leaves(torch.float32)
    outputs = run(operator, leaves, {**chosen.options, **({} if operator == "ssd" else {"scale": 1.0})})
    assert all(one.isfinite().all() for one in (*outputs, *gradients(outputs, leaves).values()))
    if keys == 0 and operator != "ssd":
        assert (outputs[0] == 0).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_sequences_longer_than_a_chunk_equal_separate_ones(operator: str) -> None:
    ends = [0, 0, 100, 101, 101, 229, 230, 230]
    chosen = case(operator, 1, ends[-1])
    initial = case(operator, len(ends) - 1, 1).tensors["initial_state"]
    leaves = Case({**chosen.tensors, "initial_state": initial}).leaves(torch.float32)
    outputs = run(operator, leaves, {**chosen.options, "cu_seqlens": torch.tensor(ends)})
    shared = ("A", "D", "dt_bias")
    dy = upstream(outputs)
    found = gradients(outputs, leaves, dy)
    for index in range(len(ends) - 1):
        start, stop = ends[index], ends[index + 1]
        part = {
            name: one.detach() if name in shared else one.detach()[:, start:stop].clone()
            for name, one in leaves.items()
            if name != "initial_state"
        }
        part["initial_state"] = leaves["initial_state"].detach()[index : index + 1]
        part = {name: one.requires_grad_() for name, one in part.items()}
        own = run(operator, part, chosen.options)
        assert same(own[0], outputs[0][:, start:stop])
        assert same(own[1], outputs[1][index : index + 1])
        own_found = gradients(own, part, (dy[0][:, start:stop], dy[1][index : index + 1]))
        for name in part:
            if name == "initial_state":
                assert same(own_found[name], found[name][index : index + 1])
            elif name not in shared:
                assert same(own_found[name], found[name][:, start:stop]), name


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_the_final_state_or_only_the_output_may_be_used(operator: str) -> None:
    chosen = case(operator, 2, 70)
    leaves = chosen.leaves(torch.float64)
    outputs = run(operator, leaves, chosen.options)
    names = list(leaves)
    for used in (0, 1):
        dy = torch.randn_like(outputs[used])
        zero = torch.zeros_like(outputs[1 - used])
        want = gradients(outputs, leaves, (dy, zero) if used == 0 else (zero, dy))
        got = torch.autograd.grad(outputs[used], [leaves[n] for n in names], dy, retain_graph=True, allow_unused=True)
        for name, one in zip(names, got, strict=True):
            assert_close(torch.zeros_like(leaves[name]) if one is None else one, want[name], name, 1e-14)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gates_and_parameters_of_another_dtype(operator: str) -> None:
    """Gates in float16, bfloat16, float32 and float64 beside activations in float32; gradients come back in theirs."""
    chosen = case(operator, 2, 20)
    leaves = {name: one.detach() for name, one in chosen.leaves(torch.float32).items()}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        gates = [
            n for n in ("dt", "A", "B", "C", "D", "z", "dt_bias", "log_decay", "beta", "initial_state") if n in leaves
        ]
        mixed = {name: one.to(dtype if name in gates else one.dtype).requires_grad_() for name, one in leaves.items()}
        plain = {name: one.detach().float().requires_grad_() for name, one in mixed.items()}
        outputs, want = run(operator, mixed, chosen.options), run(operator, plain, chosen.options)
        for got, expected in zip(outputs, want, strict=True):
            assert_close(got, expected, f"output with gates in {dtype}", 1e-6)
        found, want_found = gradients(outputs, mixed), gradients(want, plain)
        for name, leaf in mixed.items():
            assert found[name].dtype == leaf.dtype
            assert_close(found[name], want_found[name], name, 1e-2 if leaf.dtype.itemsize == 2 else 1e-6)


def _raw_arguments(operator: str, batch: int, length: int, dtype: torch.dtype) -> tuple[Any, ...]:
    leaves = case(operator, batch, length).leaves(dtype)
    if operator == "ssd":
        *tensors, state = leaves.values()
        return (*tensors, True, state, None, True)
    *tensors, state = leaves.values()
    return (*tensors, 0.5, state, None, True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator: str) -> None:
    registered = getattr(torch.ops.star_kernels, operator).default
    torch.library.opcheck(registered, _raw_arguments(operator, 2, 70, torch.float32))
    *tensors, option, state, _, _ = _raw_arguments(operator, 2, 1, torch.float32)
    timed = {"A", "D", "dt_bias"}
    names = list(case(operator, 2, 1).tensors)[:-1]
    token = [one.detach() if name in timed else one.detach()[:, 0] for name, one in zip(names, tensors, strict=True)]
    step = getattr(torch.ops.star_kernels, f"{operator}_step").default
    torch.library.opcheck(step, (state, *(one.requires_grad_() for one in token), option))


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_a_graph_break(operator: str) -> None:
    function = getattr(star_kernels, operator)
    chosen = case(operator, 2, 70)
    leaves, compiled_leaves = chosen.leaves(torch.float32), chosen.leaves(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: function(**given, **chosen.options), backend="aot_eager", fullgraph=True)
    want, got = function(**leaves, **chosen.options), compiled(compiled_leaves)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    found, want_found = gradients(got, compiled_leaves), gradients(want, leaves)
    assert all(same(found[name], want_found[name]) for name in leaves)


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_graph_serves_every_length(operator: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    function, options = getattr(star_kernels, operator), case(operator, 2, 3).options
    compiled = torch.compile(
        lambda given: function(**given, **options), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for length in (7, 33, 64, 65, 130):
        leaves = case(operator, 2, length).leaves(torch.float32)
        torch.stack([one.sum() for one in compiled(leaves)]).sum().backward()  # type: ignore[no-untyped-call]
        assert all(torch.isfinite(one.grad).all() for one in leaves.values() if one.grad is not None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_backward_without_kept_states_is_refused(operator: str) -> None:
    arguments = _raw_arguments(operator, 1, 65, torch.float32)
    y, _, kept = getattr(torch.ops.star_kernels, operator)(*arguments[:-1], False)
    assert kept.numel() == 0
    with pytest.raises(ValueError, match="a backward needs the states that a forward with keep=True returns"):
        y.sum().backward()


@pytest.mark.parametrize("bounds", [None, (0, 40, 40, 560, 600)])
def test_ssd_backward_in_windows(bounds: tuple[int, ...] | None) -> None:
    """States of 1 MB in 8 chunks, so that the gradients of a sequence of more than that come in two windows."""
    chosen = case("ssd", 1, 600, heads=8, keys=64, values=64)
    tensors, options = dict(chosen.tensors), dict(chosen.options)
    tensors["B"], tensors["C"] = tensors["B"] / 8, tensors["C"] / 8
    if bounds is not None:
        tensors["initial_state"] = normal("states", len(bounds) - 1, 8, 64, 64)
        options["cu_seqlens"] = torch.tensor(bounds)
    found: list[dict[str, Tensor]] = []
    for backend in ("cpp", "reference"):
        leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
        outputs = call("ssd", backend, leaves, options)
        found.append(gradients(outputs, leaves, upstream(outputs)))
    for name, expected in found[1].items():
        error = (found[0][name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"d{name}: {error:.1e} of the largest"
