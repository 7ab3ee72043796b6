"""The compiled diagonal recurrences beyond the conformance suite: sizes above a block and a task, threads, torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels
from star_kernels import _native
from tests.kernels.samples import normal, uniform

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no compiled operators: {_native.reason()}")

Arguments = dict[str, Any]
OPERATORS = ("diagonal_scan", "rg_lru", "selective_scan")
TIMED = ("x", "decay", "recurrence_gate", "input_gate", "dt", "B", "C", "z")


@pytest.fixture(autouse=True)
def _poisoned_native_memory() -> Iterator[None]:
    _native.set_nan_fill(True)
    yield
    _native.set_nan_fill(False)


def arguments(
    operator: str,
    batch: int,
    length: int,
    width: int,
    groups: int = 1,
    states: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Build leaves for an operator; states stay float32 at least."""
    shape = (batch, length, width)
    if operator == "diagonal_scan":
        values = {"decay": uniform("decay", *shape, low=-1.0), "x": normal("x", *shape)}
    elif operator == "rg_lru":
        values = {name: normal(name, *shape) for name in ("x", "recurrence_gate", "input_gate")}
        values["log_lambda"] = uniform("log_lambda", width, low=-0.7, high=-0.01)
    else:
        values = {name: normal(name, *shape) for name in ("x", "dt", "z")}
        values |= {name: normal(name, batch, length, groups, states) for name in ("B", "C")}
        values |= {"D": normal("D", width), "dt_bias": normal("dt_bias", width)}
        values["A"] = -uniform("A", width, states, high=2.0)
    rest = (states,) if operator == "selective_scan" else ()
    values["initial_state"] = normal("state", batch, width, *rest)
    wide = torch.promote_types(dtype, torch.float32)
    return {name: one.to(wide if "state" in name else dtype).requires_grad_() for name, one in values.items()}


def options(operator: str) -> Arguments:
    return {"dt_softplus": True} if operator == "selective_scan" else {}


def run(operator: str, tensors: Arguments, **rest: Any) -> list[Tensor]:
    """Return the outputs and every gradient."""
    leaves = {name: one.detach().requires_grad_() for name, one in tensors.items()}
    y, state = getattr(star_kernels, operator)(**leaves, **options(operator), **rest)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    gradients = torch.autograd.grad([y, state], list(leaves.values()), [weights, torch.ones_like(state)])
    return [y.detach(), state.detach(), *gradients]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# (B, T, D, G, N): above one block of 64 tokens, above one task of 64 and of 128 channels, groups narrower than a vector
# and not a multiple of one, every number of states in registers and their remainders.
SIZES = [
    (2, 130, 20, 2, 1),
    (1, 200, 70, 1, 2),
    (1, 65, 150, 3, 3),
    (1, 3, 1100, 1, 2),
    (2, 64, 33, 11, 7),
    (1, 70, 5, 1, 0),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_large_sizes_match_the_reference(operator: str, size: tuple[int, int, int, int, int]) -> None:
    tensors = arguments(operator, *size, dtype=torch.float64)
    assert star_kernels.which(operator, tensors["x"]) == "cpp"
    exact = run(operator, tensors, backend="reference")
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        cast = {name: one.detach().to(dtype) for name, one in tensors.items()}
        for got, want in zip(run(operator, cast, backend="cpp"), exact, strict=True):
            scale = want.abs().max().item() if want.numel() else 1.0
            torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("decay", [(-0.01, -0.001), (-1.0, 0.0)], ids=["near one", "any"])
def test_rg_lru_sums_the_gradient_of_log_lambda_as_well_as_plain_torch(decay: tuple[float, float]) -> None:
    """Each channel's is a sum over tokens that may cancel: its error is measured in roundings of the absolute terms.

    The two ways round independently, so a single sum tells nothing: the root mean square of 500 does.
    """
    tensors = arguments("rg_lru", 1, 257, 500)
    tensors["log_lambda"] = uniform("log_lambda", 500, low=decay[0], high=decay[1]).float()
    exact = run("rg_lru", {name: one.detach().double() for name, one in tensors.items()}, backend="reference")
    # Token by token, the gate's gradient is the parameter's times log_lambda (1 - gate).
    gate = tensors["recurrence_gate"].detach().double().sigmoid()
    terms = exact[3] / (tensors["log_lambda"].double() * (1 - gate))
    roundings = terms.abs().sum((0, 1)) * torch.finfo(torch.float32).eps
    ours, plain = (
        ((run("rg_lru", tensors, backend=one)[5] - exact[5]) / roundings).square().mean().sqrt()
        for one in ("cpp", "reference")
    )
    assert ours < 1.25 * plain + 0.1, f"{ours:.2f} roundings of the terms, plain torch {plain:.2f}"
    assert ours < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_threads_change_no_bit(operator: str, dtype: torch.dtype) -> None:
    tensors = arguments(operator, 3, 150, 270, states=6, dtype=dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(operator, tensors))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_row_alone_and_a_cut_sequence_give_the_same_bits(operator: str) -> None:
    tensors = {name: one.detach() for name, one in arguments(operator, 3, 150, 37).items()}
    function, extra = getattr(star_kernels, operator), options(operator)
    y, state = function(**tensors, **extra)
    alone = {n: one[1:2] if n in TIMED or n == "initial_state" else one for n, one in tensors.items()}
    assert_same_bits(list(function(**alone, **extra)), [y[1:2], state[1:2]])
    first = {n: one[:, :70] if n in TIMED else one for n, one in tensors.items()}
    y_first, carried = function(**first, **extra)
    rest = {n: one[:, 70:] if n in TIMED else one for n, one in tensors.items()} | {"initial_state": carried}
    y_rest, last = function(**rest, **extra)
    assert_same_bits([torch.cat([y_first, y_rest], 1), last], [y, state])


@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_sequences_over_several_blocks(operator: str) -> None:
    """Sequences that begin on, before and after a multiple of 64 tokens, with empty ones among them."""
    ends = [0, 0, 64, 70, 70, 200, 203, 300, 300]
    count = len(ends) - 1
    tensors = {name: one.detach() for name, one in arguments(operator, 1, ends[-1], 21).items()}
    tensors["initial_state"] = arguments(operator, count, 1, 21)["initial_state"].detach()
    y, states, *found = run(operator, tensors, cu_seqlens=torch.tensor(ends))
    gradients = dict(zip(tensors, found, strict=True))
    # The same as a batch of one for each sequence: bit-equal outputs, gradients up to the order of sums.
    leaves = {name: one.clone().requires_grad_() for name, one in tensors.items()}
    parts = []
    for s, (start, stop) in enumerate(pairwise(ends)):
        own = {n: one[:, start:stop] if n in TIMED else one for n, one in leaves.items()}
        own["initial_state"] = leaves["initial_state"][s : s + 1]
        parts.append(getattr(star_kernels, operator)(**own, **options(operator)))
    y_apart, states_apart = torch.cat([one for one, _ in parts], 1), torch.cat([one for _, one in parts])
    assert_same_bits([y_apart.detach(), states_apart.detach()], [y, states])
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    torch.autograd.backward([y_apart, states_apart], [weights, torch.ones_like(states)])
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradients[name], leaf.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("grad", ["y", "final_state"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradient_of_one_output_alone(operator: str, grad: str) -> None:
    tensors = arguments(operator, 2, 70, 9, dtype=torch.float64)
    results = []
    for backend in ("cpp", "reference"):
        leaves = {name: one.detach().requires_grad_() for name, one in tensors.items()}
        outputs = getattr(star_kernels, operator)(**leaves, **options(operator), backend=backend)
        chosen = outputs[0 if grad == "y" else 1].sum()
        results.append(torch.autograd.grad(chosen, list(leaves.values()), allow_unused=True))
    for name, got, want in zip(tensors, *results, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-9, atol=1e-9, msg=name)


def test_log_decays_of_minus_infinity_reset_the_state() -> None:
    """A = -inf is a decay of 0: each token stands alone, and no gradient but that of A is lost."""
    tensors = {name: one.detach() for name, one in arguments("selective_scan", 1, 80, 18, states=2).items()}
    tensors["A"] = torch.full_like(tensors["A"], float("-inf"))
    y, state = star_kernels.selective_scan(**tensors, dt_softplus=True)
    step = torch.nn.functional.softplus(tensors["dt"] + tensors["dt_bias"])
    inner = step * tensors["x"] * (tensors["B"] * tensors["C"]).sum(-1)
    want = (inner + tensors["D"] * tensors["x"]) * torch.nn.functional.silu(tensors["z"])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert state.isfinite().all()


def test_activations_of_different_dtypes_are_not_rounded() -> None:
    """float32 step sizes beside bfloat16 values: as if the values had been float32 all along."""
    tensors = {name: one.detach() for name, one in arguments("selective_scan", 2, 70, 20).items()}
    for name in ("x", "B"):
        tensors[name] = tensors[name].bfloat16()
    tensors["D"] = tensors["D"].half()
    wide = {name: one.float() for name, one in tensors.items()}
    mixed, plain = run("selective_scan", tensors), run("selective_scan", wide)
    assert [one.dtype for one in mixed[2:]] == [one.dtype for one in tensors.values()]
    assert_same_bits(mixed[:2], [plain[0].bfloat16(), plain[1]])
    step = {n: one[:, 0] if n in TIMED else one for n, one in tensors.items() if n != "initial_state"}
    state = tensors["initial_state"]
    y, _ = star_kernels.selective_scan_step(state, **step, dt_softplus=True)
    y_wide, _ = star_kernels.selective_scan_step(state, **{n: v.float() for n, v in step.items()}, dt_softplus=True)
    assert_same_bits([y], [y_wide.bfloat16()])


@pytest.mark.parametrize("operator", OPERATORS)
def test_wide_steps_equal_one_token_of_the_scan(operator: str) -> None:
    """More channels than a task takes, and threads at work."""
    tensors = {name: one.detach() for name, one in arguments(operator, 3, 1, 700, groups=7, states=18).items()}
    y, state = getattr(star_kernels, operator)(**tensors, **options(operator))
    token = {n: one[:, 0] if n in TIMED else one for n, one in tensors.items() if n != "initial_state"}
    step = getattr(star_kernels, f"{operator}_step")
    y_step, new_state = step(tensors["initial_state"], **token, **options(operator))
    torch.testing.assert_close(y_step, y[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_state, state, rtol=1e-5, atol=1e-5)


def raw_calls() -> dict[str, tuple[Any, ...]]:
    """One call of each operator of the library, by position."""
    scan, lru, ssm = (arguments(one, 2, 70, 20, groups=2 if one == "selective_scan" else 1) for one in OPERATORS)
    token = {n: one[:, 0].detach().requires_grad_() for n, one in (scan | lru | ssm).items() if n in TIMED}
    state = ssm["initial_state"]
    parameters = (ssm["D"], ssm["z"], ssm["dt_bias"])
    return {
        "diagonal_scan": (scan["decay"], scan["x"], scan["initial_state"], None, True),
        "diagonal_scan_step": (scan["initial_state"], token["decay"], token["x"]),
        "rg_lru": (*(lru[n] for n in ("x", "recurrence_gate", "input_gate", "log_lambda")), 8.0, None, None, True),
        "rg_lru_step": (
            lru["initial_state"], token["x"], token["recurrence_gate"], token["input_gate"], lru["log_lambda"], 8.0
        ),
        "selective_scan": (*(ssm[n] for n in ("x", "dt", "A", "B", "C")), *parameters, True, state, None, True),
        "selective_scan_step": (
            state, token["x"], token["dt"], ssm["A"], token["B"], token["C"], ssm["D"], None, ssm["dt_bias"], True
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", raw_calls())
def test_opcheck(name: str) -> None:
    _native.set_nan_fill(False)  # opcheck compares with torch's own empty tensors
    torch.library.opcheck(getattr(torch.ops.star_kernels, name).default, raw_calls()[name])


def test_compiled_block_breaks_no_graph_and_is_traced_once_for_all_lengths() -> None:
    def block(tensors: Arguments) -> Tensor:
        y, state = star_kernels.selective_scan(**tensors, dt_softplus=True)
        h, _ = star_kernels.rg_lru(y, tensors["x"], tensors["z"], -tensors["D"].abs())
        out, _ = star_kernels.diagonal_scan(h.sigmoid(), y)
        return out.sum() + state.sum()

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for length in (33, 64, 65, 130, 300):
        tensors = arguments("selective_scan", 2, length, 20, groups=2)
        leaves = list(tensors.values())
        got = torch.autograd.grad(compiled(tensors), leaves)
        assert_same_bits(list(got), list(torch.autograd.grad(block(tensors), leaves)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_functional_transforms(operator: str) -> None:
    """Through torch.func as through autograd."""
    tensors = {name: one.detach() for name, one in arguments(operator, 1, 130, 6).items()}

    def loss(x: Tensor) -> Tensor:
        y: Tensor = getattr(star_kernels, operator)(**(tensors | {"x": x}), **options(operator))[0]
        return (y * y).sum()

    leaf = tensors["x"].clone().requires_grad_()
    assert_same_bits([torch.func.grad(loss)(tensors["x"])], list(torch.autograd.grad(loss(leaf), leaf)))


def test_backward_without_kept_states_computes_them() -> None:
    calls = raw_calls()
    for name, gradient in (("diagonal_scan", True), ("rg_lru", True), ("selective_scan", True)):
        operator, args = getattr(torch.ops.star_kernels, name), calls[name]
        backward = getattr(torch.ops.star_kernels, f"{name}_backward")
        with torch.no_grad():
            y, _, kept = operator(*args)
            assert operator(*args[:-1], not gradient)[2].numel() == 0
            with_states = backward(torch.ones_like(y), None, *args[:-1], kept)
            without = backward(torch.ones_like(y), None, *args[:-1], kept.new_empty(0))
        assert_same_bits(list(without), list(with_states))


X, RATES, STATE = torch.ones(1, 5, 4), torch.ones(4, 3), torch.ones(1, 4, 3)
GROUPS = torch.ones(1, 5, 2, 3)
NO_OPTIONS = (None, None, None, False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops: ops.diagonal_scan(X, X[..., :3], None, None, False), "one dtype"),
        (lambda ops: ops.diagonal_scan(X, X, None, torch.tensor([0, 6]), False), "cu_seqlens must rise from 0 to T"),
        (lambda ops: ops.diagonal_scan(X, X, None, torch.tensor([0, 4, 3, 5]), False), "cu_seqlens must rise"),
        (lambda ops: ops.diagonal_scan(X, X, torch.ones(2, 4), None, False), "a state has the wrong shape"),
        (lambda ops: ops.diagonal_scan(X, X, torch.ones(4), None, False), "a state has the wrong number of axes"),
        (lambda ops: ops.diagonal_scan_backward(X, None, X, X, None, None, torch.ones(3)), "kept must hold"),
        (lambda ops: ops.rg_lru(X, X, X, torch.ones(3), 8.0, None, None, False), r"needs \(D,\)"),
        (lambda ops: ops.diagonal_scan_step(torch.ones(1, 3), X[:, 0], X[:, 0]), r"must be \(B, D\)"),
        (lambda ops: ops.rg_lru_step(X[:, 0], X[:, 0], X[:, 0], X[0], torch.ones(4), 8.0), "the gates must have"),
        (
            lambda ops: ops.selective_scan(X, X, RATES, GROUPS, GROUPS[:, :4], *NO_OPTIONS, None, None, False),
            "C must have the shape of B",
        ),
        (
            lambda ops: ops.selective_scan(X, X, RATES[:3], GROUPS, GROUPS, *NO_OPTIONS, None, None, False),
            r"A must be \(D, N\)",
        ),
        (
            lambda ops: ops.selective_scan_step(STATE, X[:, 0], X[:, 0], RATES, GROUPS[:, 0], GROUPS[0], *NO_OPTIONS),
            "do not fit together",
        ),
    ],
)  # fmt: skip
def test_operators_refuse_what_the_public_functions_never_pass(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ops.star_kernels)
