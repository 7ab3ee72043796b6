"""Attention over more than one tile: lengths past the block sizes, the mask's edges inside tiles, threads, graphs.

The conformance suite's sequences fit one tile of the compiled operator (64 queries by 128 keys, 512 rows to a block).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import _native, _triton, attention, attention_step, differential_attention
from tests.kernels.checks import assert_close, call, gradients, same
from tests.kernels.samples import normal

pytestmark = pytest.mark.skipif(
    not _native.available() and not _triton.interpreting(), reason="neither a compiled library nor Triton's interpreter"
)
compiled_alone = pytest.mark.skipif(_triton.interpreting(), reason="is about the compiled library")

TILED = "triton" if _triton.interpreting() else "cpp"
NAN = float("nan")

# Tq, Tk, Hq, Hk, D, Dv, options
SHAPES: dict[str, tuple[int, int, int, int, int, int, dict[str, Any]]] = {
    "two blocks": (650, 650, 2, 1, 8, 8, {}),
    "one past a tile": (129, 129, 2, 2, 16, 16, {}),
    "window inside a tile": (300, 300, 2, 1, 8, 16, {"window": 37}),
    "window over tiles": (400, 400, 1, 1, 8, 8, {"window": 200, "softcap": 3.0}),
    "few queries": (5, 300, 4, 2, 8, 8, {}),
    "more queries than keys": (300, 140, 2, 2, 8, 8, {}),
    "no mask": (70, 270, 2, 1, 8, 8, {"causal": False}),
    "odd widths": (131, 131, 3, 1, 130, 67, {"scale": -0.2}),
    "values past one register panel": (66, 66, 1, 1, 1, 600, {}),
}


def inputs(queries: int, keys: int, heads: int, key_heads: int, width: int, value_width: int) -> dict[str, Tensor]:
    return {
        "q": normal("q", 2, queries, heads, width),
        "k": normal("k", 2, keys, key_heads, width),
        "v": normal("v", 2, keys, key_heads, value_width),
    }


def leaves(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: one.detach().to(dtype).requires_grad_() for name, one in tensors.items()}


def paired(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Turn q, k, v into the arguments of differential attention."""
    q, k, v = (tensors[name] for name in "qkv")
    both = {"q1": q, "k1": k, "q2": q.flip(1), "k2": k.roll(1, 1), "v": v, "lam": normal("lam", q.shape[2])}
    return leaves(both, dtype)


def every_operator(tensors: dict[str, Tensor], dtype: torch.dtype) -> list[tuple[str, dict[str, Tensor]]]:
    return [("attention", leaves(tensors, dtype)), ("differential_attention", paired(tensors, dtype))]


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape: str, sinks: bool) -> None:
    *sizes, options = SHAPES[shape]
    tensors = inputs(*sizes) | ({"sinks": normal("sinks", sizes[2])} if sinks else {})
    own, exact = leaves(tensors), leaves(tensors)
    (o,), (want,) = (call("attention", one, x, options) for one, x in ((TILED, own), ("reference", exact)))
    assert_close(o, want, "o", 1e-12)
    found, expected = gradients((o,), own), gradients((want,), exact)
    for name in own:
        assert_close(found[name], expected[name], f"gradient of {name}", 1e-10)


@pytest.mark.parametrize("shape", [name for name, one in SHAPES.items() if "softcap" not in one[-1]])
def test_differential_matches_the_reference(shape: str) -> None:
    *sizes, options = SHAPES[shape]
    own, exact = paired(inputs(*sizes)), paired(inputs(*sizes))
    (o,), (want,) = (call("differential_attention", one, x, options) for one, x in ((TILED, own), ("reference", exact)))
    assert_close(o, want, "o", 1e-12)
    found, expected = gradients((o,), own), gradients((want,), exact)
    for name in own:
        assert_close(found[name], expected[name], f"gradient of {name}", 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", ["two blocks", "window inside a tile", "odd widths"])
def test_lower_precisions_stay_close(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    *sizes, options = SHAPES[shape]
    for operator, own in every_operator(inputs(*sizes), dtype):
        exact = {name: one.detach().double().requires_grad_() for name, one in own.items()}
        (o,), (want,) = call(operator, TILED, own, options), call(operator, "reference", exact, options)
        assert_close(o, want, "o", tolerance)
        dy = (normal("dy", *o.shape).to(dtype),)
        found, expected = gradients((o,), own, dy), gradients((want,), exact, (dy[0].double(),))
        for name in own:
            assert_close(found[name], expected[name], f"{operator}: gradient of {name}", tolerance)


@compiled_alone
@pytest.mark.parametrize("key_heads", [1, 3])
@pytest.mark.parametrize("window", [None, 70])
def test_threads_do_not_change_a_bit(key_heads: int, window: int | None) -> None:
    """One head makes the backward run in two passes where there are two threads, and in one pass on one thread."""
    tensors = {name: one[:1] for name, one in inputs(300, 300, 2 * key_heads, key_heads, 16, 16).items()}
    for operator, own in every_operator(tensors, torch.float32):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            (o,) = call(operator, TILED, own, {"window": window})
            results.append({"o": o, **gradients((o,), own)})
        for name, one in results[0].items():
            assert torch.equal(one, results[1][name]), f"{operator}: {name}"


def test_a_row_alone_is_bit_equal() -> None:
    for operator, own in every_operator(inputs(200, 200, 2, 1, 16, 16), torch.float32):
        alone = {n: one.detach()[1:] if n != "lam" else one.detach() for n, one in own.items()}
        alone = {n: one.requires_grad_() for n, one in alone.items()}
        (o,), (o_alone,) = call(operator, TILED, own, {}), call(operator, TILED, alone, {})
        dy = normal("dy", *o.shape).float()
        assert torch.equal(o[1:], o_alone)
        found, found_alone = gradients((o,), own, (dy,)), gradients((o_alone,), alone, (dy[1:],))
        for name in own:
            if name != "lam":
                assert torch.equal(found[name][1:], found_alone[name]), f"{operator}: {name}"


@pytest.mark.parametrize("at", [0, 63, 64, 130, 199])
@pytest.mark.parametrize("window", [None, 40])
def test_nan_moves_forward_only(at: int, window: int | None) -> None:
    tensors = {name: one[:1] for name, one in inputs(200, 200, 2, 1, 8, 8).items()}
    for operator, own in every_operator(tensors, torch.float32):
        (clean,) = call(operator, TILED, own, {"window": window})
        dy = normal("dy", *clean.shape).float()
        dy[:, at:] = 0
        want = gradients((clean,), own, (dy,))
        for name in own:
            if name == "lam":
                continue
            value = own[name].detach().clone()
            value[:, at] = NAN
            poisoned = {**own, name: value.requires_grad_()}
            (o,) = call(operator, TILED, poisoned, {"window": window})
            assert same(o[:, :at], clean[:, :at]), f"{operator}: {name}"
            assert o[:, at].isnan().any(), f"{operator}: {name}"
            if window is not None:
                assert same(o[:, at + window :], clean[:, at + window :]), f"{operator}: {name}"
            # What reads token `at` has no gradient: the earlier queries' gradient is what it was.
            query = "q" if operator == "attention" else "q1"
            found = gradients((o,), poisoned, (dy,))
            assert same(found[query][:, :at], want[query][:, :at]), f"{operator}: {name}"


@pytest.mark.parametrize("at", [0, 70, 199])
def test_nan_gradient_reaches_no_later_key(at: int) -> None:
    tensors = {name: one[:1] for name, one in inputs(200, 200, 2, 1, 8, 8).items()}
    for operator, own in every_operator(tensors, torch.float32):
        (o,) = call(operator, TILED, own, {})
        dy = normal("dy", *o.shape).float()
        want = gradients((o,), own, (dy,))
        poisoned = dy.clone()
        poisoned[:, at] = NAN
        found = gradients((o,), own, (poisoned,))
        for name in own:
            if name == "lam":
                continue
            later = slice(at + 1, None)
            assert same(found[name][:, later], want[name][:, later]), f"{operator}: {name}"
            if name.startswith("q"):
                assert same(found[name][:, :at], want[name][:, :at]), f"{operator}: {name}"


def test_packed_sequences_over_tiles() -> None:
    ends = torch.tensor([0, 0, 1, 140, 140, 333, 400, 400])
    packing = {"cu_seqlens_q": ends, "cu_seqlens_k": ends.int()}
    tensors = {name: one[:1] for name, one in inputs(400, 400, 2, 1, 8, 8).items()}
    for operator, own in every_operator(tensors, torch.float64):
        exact = {name: one.detach().clone().requires_grad_() for name, one in own.items()}
        (o,), (want,) = call(operator, TILED, own, packing), call(operator, "reference", exact, packing)
        assert_close(o, want, "o", 1e-12)
        found, expected = gradients((o,), own), gradients((want,), exact)
        for name in own:
            assert_close(found[name], expected[name], f"{operator}: gradient of {name}", 1e-10)


def test_scores_of_ten_thousand_keep_their_gradient() -> None:
    """A log-sum-exp rounded to float32 would put an error of 5e-4 into every weight."""
    tensors = {name: one[:1] for name, one in inputs(150, 150, 1, 1, 8, 8).items()}
    own, exact = leaves(tensors, torch.float32), leaves(tensors)
    exact = {name: own[name].detach().double().requires_grad_() for name in exact}
    options = {"scale": 3000.0}
    (o,), (want,) = call("attention", TILED, own, options), call("attention", "reference", exact, options)
    sharp = (
        torch.softmax(3000.0 * (exact["q"][0, :, 0] @ exact["k"][0, :, 0].T).detach().tril(), -1).amax(-1) > 1 - 1e-9
    )
    assert sharp.sum() > 100
    assert (o - want).abs()[0, sharp].max() < 1e-5


@pytest.mark.parametrize("held", [513, 1100, 2048])
@pytest.mark.parametrize("window", [None, 600])
def test_step_joins_the_parts_of_a_long_cache(held: int, window: int | None) -> None:
    tensors = inputs(1, 2048, 4, 2, 24, 20)
    q, k, v = tensors["q"][:, 0], tensors["k"], tensors["v"]
    step = {"q": q, "k": k, "v": v, "sinks": normal("sinks", 4)}
    options = {"window": window, "length": held}
    (o,), (want,) = (call("attention_step", one, step, options) for one in (TILED, "reference"))
    assert_close(o, want, "o", 1e-12)
    single = {name: one.float() for name, one in step.items()}
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(call("attention_step", TILED, single, options)[0])
    assert_close(results[0], want, "o", 2e-6)
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0, "scale": -0.7}], ids=["plain", "all"])
def test_step_gradients_match_the_reference(options: dict[str, Any]) -> None:
    tensors = inputs(1, 40, 4, 2, 7, 5) | {"sinks": normal("sinks", 4)}
    tensors["q"] = tensors["q"][:, 0]
    own, exact = leaves(tensors), leaves(tensors)
    options = {**options, "length": torch.tensor([33, 0])}
    (o,), (want,) = (call("attention_step", one, x, options) for one, x in ((TILED, own), ("reference", exact)))
    found, expected = gradients((o,), own), gradients((want,), exact)
    for name in own:
        assert_close(found[name], expected[name], f"gradient of {name}", 1e-11)


@compiled_alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    tensors = leaves(inputs(5, 5, 4, 2, 8, 6), dtype)
    q, k, v = tensors.values()
    q2, k2 = (one.detach().flip(1).requires_grad_() for one in (q, k))
    sinks, lam = normal("sinks", 4).float().requires_grad_(), normal("lam", 4).to(dtype).requires_grad_()
    ends, lengths = torch.tensor([0, 2, 5]), torch.tensor([5, 2])
    ops = torch.ops.star_kernels
    packed = [one.detach()[:1].requires_grad_() for one in (q, k, v)]
    torch.library.opcheck(ops.attention.default, (q, k, v, sinks, None, None, True, 3, 0.4, 2.0))
    torch.library.opcheck(ops.attention.default, (*packed, None, ends, ends, True, 0, 0.4, 0.0))
    torch.library.opcheck(ops.differential_attention.default, (q, k, q2, k2, v, lam, None, None, True, 0, 0.4))
    newest = q.detach()[:, 0].requires_grad_()
    torch.library.opcheck(ops.attention_step.default, (newest, k, v, sinks, None, 4, 0, 0.4, 0.0))
    torch.library.opcheck(ops.attention_step.default, (newest, k, v, None, lengths, -1, 2, 0.4, 2.0))


@compiled_alone
def test_compiled_graphs_hold_every_operator() -> None:
    """One graph without a break, forward and backward, for five lengths."""
    sinks, lam = normal("sinks", 4).float(), normal("lam", 4).float()

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = attention(q, k, v, window=4, sinks=sinks) + differential_attention(q, k, q.flip(1), k, v, lam)
        newest = attention_step(q[:, -1], k, v, length=q.shape[1])
        return o.sum() + newest.square().sum()

    torch._dynamo.reset()
    traced = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5, 8, 70, 130):
        own, exact = (leaves(inputs(tokens, tokens, 4, 2, 8, 8), torch.float32) for _ in range(2))
        got, want = traced(**own), block(**exact)
        assert_close(got, want, "loss", 1e-6)
        got.backward()
        want.backward()
        for name in own:
            assert_close(own[name].grad, exact[name].grad, f"gradient of {name}", 1e-5)


@compiled_alone
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("cu_seqlens must run from 0 to T", {"ends": torch.tensor([0, 2, 9])}),
        ("cu_seqlens must rise", {"ends": torch.tensor([0, 6, 2, 5])}),
        ("k must be", {"k": torch.zeros(1, 5, 2, 7)}),
        ("v must be", {"v": torch.zeros(1, 4, 2, 8)}),
        ("the heads of k must divide", {"k": torch.zeros(1, 5, 3, 8), "v": torch.zeros(1, 5, 3, 8)}),
        ("one dtype", {"v": torch.zeros(1, 5, 2, 8).double()}),
        ("sinks must be", {"sinks": torch.zeros(3)}),
    ],
)
def test_the_operator_refuses_what_the_public_function_would(message: str, change: dict[str, Tensor]) -> None:
    """A compiled graph calls the operator without the Python checks: it must not read out of bounds."""
    x = {"q": torch.zeros(1, 5, 4, 8), "k": torch.zeros(1, 5, 2, 8), "v": torch.zeros(1, 5, 2, 8)}
    x = {**x, "sinks": torch.zeros(4), "ends": torch.tensor([0, 5]), **change}
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.star_kernels.attention(x["q"], x["k"], x["v"], x["sinks"], x["ends"], x["ends"], True, 0, 1.0, 0.0)


@compiled_alone
@pytest.mark.parametrize("lengths", [torch.tensor([6]), torch.tensor([-1])])
def test_the_step_refuses_lengths_outside_the_cache(lengths: Tensor) -> None:
    with pytest.raises((ValueError, RuntimeError), match="length must be from 0 to the cache's size"):
        attention_step(torch.zeros(1, 4, 8), torch.zeros(1, 5, 2, 8), torch.zeros(1, 5, 2, 8), length=lengths)
