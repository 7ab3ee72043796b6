"""Attention, differential attention and the step against a cache."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import star_kernels
from tests.kernels import oracles
from tests.kernels.checks import Case, assert_close, call, gradients
from tests.kernels.conformance import PackedConformance
from tests.kernels.samples import normal


def projections(batch: int, queries: int, keys: int, sizes: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Build q, k, v for (Hq, Hk, D, Dv)."""
    heads, key_heads, width, value_width = sizes
    return {
        "q": normal("q", batch, queries, heads, width),
        "k": normal("k", batch, keys, key_heads, width),
        "v": normal("v", batch, keys, key_heads, value_width),
    }


class _Packed(PackedConformance):
    def packing(self, cu_seqlens: Tensor) -> dict[str, Any]:
        return {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}


class TestAttention(_Packed):
    operator = "attention"
    masks_products = True
    timed = ("q", "k", "v")
    axes = ({"q": 3, "k": 3}, {"v": 3}, {"q": 1}, {"k": 1, "v": 1}, {"q": 2, "sinks": 0})
    lanes: ClassVar[dict[str, int]] = {"q": 2, "k": 2, "v": 2, "sinks": 0}
    lane_variant = 1  # a head of keys for each of queries
    variants = 7
    lengths = (1, 2, 3, 17, 33)
    long_lengths = (130,)  # the oracle is quadratic

    def case(self, batch: int, length: int, variant: int) -> Case:
        sizes = ((4, 2, 8, 8), (3, 3, 7, 5), (6, 2, 4, 8), (1, 1, 1, 1), (4, 1, 8, 8), (5, 5, 16, 16), (4, 2, 8, 8))
        options: dict[str, Any] = (
            {},
            {"window": 4, "softcap": 2.0},
            {"scale": 0.7, "softcap": 3.0},
            {"window": 1},
            {"window": 5},
            {"causal": False},
            {"window": 100},
        )[variant]
        tensors = projections(batch, length, length, sizes[variant])
        if variant in (1, 6):
            tensors["sinks"] = normal("sinks", sizes[variant][0])
        return Case(tensors, options)

    @pytest.mark.parametrize("causal", [True, False])
    def test_matches_torch(self, backend: str, causal: bool) -> None:
        tensors = projections(2, 19, 19, (4, 2, 8, 8))
        q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            want = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        (o,) = call("attention", backend, tensors, {"causal": causal})
        assert_close(o, want.transpose(1, 2), "o", 1e-12)

    @pytest.mark.parametrize(("queries", "keys"), [(3, 10), (1, 10), (10, 3), (5, 0), (0, 5), (4, 5)])
    @pytest.mark.parametrize(
        "options",
        [{}, {"window": 2}, {"causal": False}, {"softcap": 2.0}],
        ids=["plain", "window", "full", "softcap"],
    )
    @pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
    def test_mask_is_aligned_bottom_right(
        self, backend: str, queries: int, keys: int, options: dict[str, Any], sinks: bool
    ) -> None:
        """The last query is the last key's; a query before the first key sees nothing and gives zeros."""
        case = Case(projections(2, queries, keys, (4, 2, 8, 6)) | ({"sinks": normal("sinks", 4)} if sinks else {}))
        leaves, exact = case.leaves(torch.float64), case.leaves(torch.float64)
        (o,), want = self.run(backend, leaves, options), oracles.attention(**exact, **options)
        assert_close(o, want, "o")
        if options.get("causal", True) and queries > keys:
            assert torch.equal(o[:, : queries - keys], torch.zeros(2, queries - keys, 4, 6).double())
        found, expected = gradients((o,), leaves), gradients((want,), exact)
        for name in leaves:
            assert_close(found[name], expected[name], f"gradient of {name}", 1e-9)

    def test_packed_queries_and_keys_of_different_lengths(self, backend: str) -> None:
        tensors = projections(1, 6, 11, (4, 2, 8, 8))
        ends_q, ends_k = [0, 2, 2, 5, 6], [0, 5, 8, 8, 11]
        packing = {"cu_seqlens_q": torch.tensor(ends_q), "cu_seqlens_k": torch.tensor(ends_k)}
        (o,) = self.run(backend, tensors, packing)
        for i in range(4):
            q = tensors["q"][:, ends_q[i] : ends_q[i + 1]]
            k, v = (tensors[name][:, ends_k[i] : ends_k[i + 1]] for name in "kv")
            assert_close(o[:, ends_q[i] : ends_q[i + 1]], oracles.attention(q, k, v), f"sequence {i}")

    def test_query_heads_read_their_group(self, backend: str) -> None:
        """Hk = 2 under 4 query heads means key heads 0, 0, 1, 1."""
        v = torch.tensor([10.0, 20.0]).view(1, 1, 2, 1)
        (o,) = call("attention", backend, {"q": torch.ones(1, 1, 4, 1), "k": torch.ones(1, 1, 2, 1), "v": v}, {})
        assert torch.equal(o.flatten(), torch.tensor([10.0, 10.0, 20.0, 20.0]))

    @pytest.mark.parametrize("scale", [1e4, 0.0])
    def test_extreme_scores(self, backend: str, scale: float) -> None:
        tensors = {name: one.float() for name, one in projections(1, 9, 9, (2, 2, 4, 4)).items()}
        (o,) = self.run(backend, tensors, {"scale": scale})
        assert_close(o, oracles.attention(**{n: one.double() for n, one in tensors.items()}, scale=scale), "o", 1e-5)

    def test_other_heads_do_not_see_a_nan(self, backend: str) -> None:
        tensors = {name: one.float() for name, one in projections(1, 9, 9, (4, 2, 8, 8)).items()}
        (clean,) = self.run(backend, tensors, {})
        for name, kept in (("q", [0, 2, 3]), ("k", [0, 1]), ("v", [0, 1])):
            value = tensors[name].clone()
            value[:, 4, 1] = float("nan")
            (o,) = self.run(backend, {**tensors, name: value}, {})
            assert torch.equal(o[:, :, kept], clean[:, :, kept]), name
            assert torch.equal(o[:, :4], clean[:, :4]), name

    def test_nan_left_of_the_window_is_forgotten(self, backend: str) -> None:
        tensors = {name: one.float() for name, one in projections(1, 9, 9, (2, 2, 8, 8)).items()}
        (clean,) = self.run(backend, tensors, {"window": 3})
        value = tensors["v"].clone()
        value[:, 2] = float("nan")
        (o,) = self.run(backend, {**tensors, "v": value}, {"window": 3})
        assert o[:, 2:5].isnan().all()
        assert torch.equal(o[:, 5:], clean[:, 5:])


class TestDifferentialAttention(_Packed):
    operator = "differential_attention"
    masks_products = True
    timed = ("q1", "k1", "q2", "k2", "v")
    axes = (
        {"q1": 3, "k1": 3, "q2": 3, "k2": 3},
        {"v": 3},
        {"q1": 1, "q2": 1},
        {"k1": 1, "k2": 1, "v": 1},
        {"q1": 2, "q2": 2},
    )
    lanes: ClassVar[dict[str, int]] = {"q1": 2, "k1": 2, "q2": 2, "k2": 2, "v": 2, "lam": 0}
    lane_variant = 1  # a head of keys for each of queries
    variants = 3
    lengths = (1, 2, 17)
    long_lengths = (65,)

    def case(self, batch: int, length: int, variant: int) -> Case:
        heads, key_heads, width, value_width = ((4, 2, 4, 8), (3, 3, 5, 5), (4, 1, 8, 4))[variant]
        tensors = {
            "q1": normal("q1", batch, length, heads, width),
            "k1": normal("k1", batch, length, key_heads, width),
            "q2": normal("q2", batch, length, heads, width),
            "k2": normal("k2", batch, length, key_heads, width),
            "v": normal("v", batch, length, key_heads, value_width),
            "lam": normal("lam", heads) if variant else torch.tensor(0.8, dtype=torch.float64),
        }
        return Case(tensors, ({}, {"window": 3, "scale": 0.5}, {"causal": False})[variant])

    def test_equal_maps_cancel(self, backend: str) -> None:
        tensors = self.case(2, 9, 0).tensors
        same = {**tensors, "q2": tensors["q1"], "k2": tensors["k1"], "lam": torch.ones((), dtype=torch.float64)}
        (o,) = self.run(backend, same, {})
        assert_close(o, torch.zeros_like(o), "o", 1e-13)


class TestAttentionStep:
    """One query against a cache, held to the last row of `attention`."""

    OPTIONS = ({}, {"window": 3}, {"softcap": 2.0, "scale": 0.5}, {"window": 4, "softcap": 2.0})

    @pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "softcap", "both"])
    @pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
    def test_matches_the_last_row_for_any_length(self, backend: str, options: dict[str, Any], sinks: bool) -> None:
        tensors = projections(3, 1, 12, (4, 2, 8, 6)) | ({"sinks": normal("sinks", 4)} if sinks else {})
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        step = {**tensors, "q": q[:, 0]}
        lengths = torch.tensor([12, 0, 5])
        (ragged,) = call("attention_step", backend, step, {**options, "length": lengths})
        for row, length in enumerate(lengths.tolist()):
            extra = {"sinks": tensors["sinks"]} if sinks else {}
            held = slice(row, row + 1), slice(0, length)
            want = oracles.attention(q[row : row + 1], k[held], v[held], **options, **extra)
            assert_close(ragged[row], want[0, 0], f"row {row}")
            (even,) = call("attention_step", backend, step, {**options, "length": length})
            assert_close(even[row], want[0, 0], f"row {row}, one length for all")
        (full,) = call("attention_step", backend, step, options)
        assert_close(full, oracles.attention(q, k, v, **options, **extra)[:, 0], "whole cache")

    @pytest.mark.parametrize("held", [5, torch.tensor([5, 2])], ids=["int", "tensor"])
    def test_cache_beyond_the_length_is_never_read(self, backend: str, held: int | Tensor) -> None:
        tensors = projections(2, 1, 9, (4, 2, 8, 8))
        step = {**tensors, "q": tensors["q"][:, 0]}
        (want,) = call("attention_step", backend, step, {"length": held})
        dirty = {name: one.clone() for name, one in step.items()}
        for row, end in enumerate([5, 5] if isinstance(held, int) else held.tolist()):
            dirty["k"][row, end:] = float("nan")
            dirty["v"][row, end:] = float("inf")
        (o,) = call("attention_step", backend, dirty, {"length": held})
        assert torch.equal(o, want)

    def test_decoding_equals_prefill(self, backend: str) -> None:
        tensors = projections(2, 10, 10, (4, 2, 8, 8))
        (want,) = call("attention", backend, tensors, {"window": 4})
        for t in range(10):
            step = {**tensors, "q": tensors["q"][:, t]}
            (o,) = call("attention_step", backend, step, {"window": 4, "length": t + 1})
            assert_close(o, want[:, t], f"token {t}", 1e-12)

    def test_gradcheck(self, backend: str) -> None:
        tensors = projections(2, 1, 4, (2, 1, 3, 2))
        inputs = [tensors["q"][:, 0].clone(), tensors["k"], tensors["v"], normal("sinks", 2)]

        def step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
            return call("attention_step", backend, {"q": q, "k": k, "v": v, "sinks": sinks}, {"length": 3})

        assert torch.autograd.gradcheck(step, [one.requires_grad_() for one in inputs])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_dtypes_and_empty_batch(self, backend: str, dtype: torch.dtype) -> None:
        tensors = {name: one.to(dtype) for name, one in projections(2, 1, 7, (4, 2, 8, 6)).items()}
        (o,) = call("attention_step", backend, {**tensors, "q": tensors["q"][:, 0]}, {})
        assert o.dtype == dtype
        want = oracles.attention(**{name: one.double() for name, one in tensors.items()})[:, 0]
        assert_close(o, want, "o", 2 * torch.finfo(dtype).eps)
        empty = {name: one[:0] for name, one in tensors.items()}
        for length in (None, torch.zeros(0, dtype=torch.int64)):
            (none,) = call("attention_step", backend, {**empty, "q": empty["q"][:, 0]}, {"length": length})
            assert none.shape == (0, 4, 6)


Q, K = torch.zeros(2, 5, 4, 8), torch.zeros(2, 6, 2, 8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"q has shape \(5, 4, 8\), needs 4 axes \(B, Tq, Hq, D\)", {"q": Q[0]}),
        (ValueError, r"k has shape \(2, 6, 2, 7\), needs \(B, Tk, Hk, D\) = \(2, 6, 2, 8\)", {"k": K[..., :7]}),
        (ValueError, r"v has shape \(2, 5, 2, 8\), needs \(B, Tk, Hk, Dv\) = \(2, 6, 2, 8\)", {"v": K[:, :5]}),
        (TypeError, r"v is torch\.float64, needs torch\.float32, the dtype of q", {"v": K.double()}),
        (TypeError, r"k is torch\.int64, needs float16", {"k": K.long()}),
        (ValueError, "k has 3 heads or groups, needs a divisor of 4", {"k": K.new_zeros(2, 6, 3, 8), "v": "k"}),
        (ValueError, "window is 0, needs >= 1", {"window": 0}),
        (ValueError, "window needs causal=True", {"window": 3, "causal": False}),
        (ValueError, r"softcap is 0\.0, needs a number > 0", {"softcap": 0.0}),
        (ValueError, r"sinks has shape \(2,\), needs \(Hq,\) = \(4,\)", {"sinks": torch.zeros(2)}),
        (ValueError, "cu_seqlens_k is None, needs boundaries too", {"cu_seqlens_q": torch.tensor([0, 5])}),
        (ValueError, "cu_seqlens_q is None, needs boundaries too", {"cu_seqlens_k": torch.tensor([0, 5])}),
        (
            ValueError,
            r"cu_seqlens_k has shape \(3,\), needs \(2,\), the shape of cu_seqlens_q",
            {
                "q": Q[:1],
                "k": K[:1],
                "v": K[:1],
                "cu_seqlens_q": torch.tensor([0, 5]),
                "cu_seqlens_k": torch.tensor([0, 3, 6]),
            },
        ),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    call_arguments = {"q": Q, "k": K, "v": K, **arguments}
    if isinstance(call_arguments["v"], str):
        call_arguments["v"] = call_arguments["k"]
    with pytest.raises(error, match=message):
        star_kernels.attention(**call_arguments)


def test_bad_differential_arguments_are_named() -> None:
    lam = torch.zeros(())
    with pytest.raises(ValueError, match=r"q2 has shape \(2, 4, 4, 8\), needs .*the shape of q1"):
        star_kernels.differential_attention(Q, K, Q[:, :4], K, K, lam)
    with pytest.raises(ValueError, match=r"k2 has shape \(2, 5, 2, 8\), needs .*the shape of k1"):
        star_kernels.differential_attention(Q, K, Q, K[:, :5], K, lam)
    with pytest.raises(TypeError, match=r"k2 is torch\.float64"):
        star_kernels.differential_attention(Q, K, Q, K.double(), K, lam)
    with pytest.raises(ValueError, match=r"lam has shape \(2,\), needs \(Hq,\), or \(\) for one number = \(4,\)"):
        star_kernels.differential_attention(Q, K, Q, K, K, torch.zeros(2))
    with pytest.raises(TypeError, match="lam is float"):
        star_kernels.differential_attention(Q, K, Q, K, K, 0.5)
    with pytest.raises(TypeError, match=r"lam is torch\.int64"):
        star_kernels.differential_attention(Q, K, Q, K, K, torch.tensor(1))


def test_bad_step_arguments_are_named() -> None:
    q = Q[:, 0]
    with pytest.raises(ValueError, match=r"q has shape \(2, 5, 4, 8\), needs 3 axes \(B, Hq, D\)"):
        star_kernels.attention_step(Q, K, K)
    with pytest.raises(ValueError, match="length is 7, needs 0 <= length <= S == 6"):
        star_kernels.attention_step(q, K, K, length=7)
    with pytest.raises(ValueError, match=r"length has shape \(3,\), needs \(B,\) = \(2,\)"):
        star_kernels.attention_step(q, K, K, length=torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError, match=r"length is torch\.float32, needs torch\.int32 or torch\.int64"):
        star_kernels.attention_step(q, K, K, length=torch.zeros(2))
    with pytest.raises(ValueError, match=r"sinks has shape \(2,\), needs \(Hq,\) = \(4,\)"):
        star_kernels.attention_step(q, K, K, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="window is 0"):
        star_kernels.attention_step(q, K, K, window=0)
    with pytest.raises(ValueError, match="softcap is -1"):
        star_kernels.attention_step(q, K, K, softcap=-1)
