"""The peers' signatures: to the letter, and right by the token loops of `oracles`, in the peers' layouts."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from star_kernels import compat
from tests.kernels import oracles
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal, uniform

# The signatures of causal-conv1d 1.7.0, mamba-ssm 2.3.2, flash-linear-attention 0.6.0 and flash-attn 2.8.3.
SIGNATURES = {
    "causal_conv1d_fn": "(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
    "final_states_out=None, activation=None)",
    "causal_conv1d_update": "(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
    "conv_state_indices=None)",
    "selective_scan_fn": "(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
    "return_last_state=False)",
    "selective_state_update": "(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
    "state_batch_indices=None)",
    "mamba_chunk_scan_combined": "(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
    "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
    "return_varlen_states=False)",
    "chunk_gla": "(q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, "
    "cu_seqlens=None, cu_seqlens_cpu=None)",
    "fused_recurrent_gla": "(q, k, v, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False, "
    "reverse=False, state_v_first=False, cu_seqlens=None, **kwargs)",
    "chunk_gated_delta_rule": "(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
    "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, "
    "cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs)",
    "flash_attn_func": "(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False)",
    "flash_attn_varlen_func": "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, block_table=None)",
}


def signature(function: Any) -> str:
    """Write a function's signature without its types."""
    full = inspect.signature(function)
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in full.parameters.values()]
    return str(full.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def test_every_alias_has_its_peers_signature() -> None:
    assert set(compat.__all__) == set(SIGNATURES)
    for name, wanted in SIGNATURES.items():
        assert signature(getattr(compat, name)) == wanted, name


def time_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(one.transpose(1, 2) for one in tensors)


def runs(seq_idx: list[int]) -> list[tuple[int, int]]:
    """Return where the runs of equal numbers begin and end."""
    bounds = [0, *(i for i in range(1, len(seq_idx)) if seq_idx[i] != seq_idx[i - 1]), len(seq_idx)]
    return list(pairwise(bounds))


class TestCausalConv1d:
    x = normal("x", 2, 9, 5)
    weight = normal("weight", 5, 4)
    bias = normal("bias", 5)
    state = normal("state", 2, 5, 3)

    @pytest.mark.parametrize("activation", [None, "silu", "swish"])
    def test_fn(self, activation: str | None) -> None:
        want, want_state = oracles.causal_conv1d(
            self.x, self.weight, self.bias, activation=activation, initial_state=self.state
        )
        (x,) = time_last(self.x)
        y, state = compat.causal_conv1d_fn(x, self.weight, self.bias, None, self.state, True, None, activation)
        assert_close(y, want.transpose(1, 2), "y")
        assert_close(state, want_state, "state")
        alone = compat.causal_conv1d_fn(x, self.weight, self.bias, initial_states=self.state, activation=activation)
        assert isinstance(alone, Tensor)
        assert torch.equal(alone, y)

    def test_fn_fills_the_tensor_for_final_states(self) -> None:
        out = torch.full((2, 5, 3), float("nan"), dtype=torch.float64)
        (x,) = time_last(self.x)
        _, state = compat.causal_conv1d_fn(x, self.weight, return_final_states=True, final_states_out=out)
        assert state is out
        assert torch.equal(out, x[..., -3:])

    def test_fn_returns_states_in_the_dtype_of_x(self) -> None:
        (x,) = time_last(self.x.bfloat16())
        _, state = compat.causal_conv1d_fn(x, self.weight.float(), return_final_states=True)
        assert torch.equal(state, x[..., -3:])

    def test_fn_with_seq_idx(self) -> None:
        index = [[0, 0, 0, 1, 2, 2, 2, 2, -1], [7, 7, 3, 3, 3, 3, 3, -1, -1]]
        leaves = [one.clone().requires_grad_() for one in (self.x, self.weight, self.bias, self.state)]
        other = [one.clone().requires_grad_() for one in (self.x, self.weight, self.bias, self.state)]
        x, weight, bias, state = leaves
        seq_idx = torch.tensor(index, dtype=torch.int32)
        y = compat.causal_conv1d_fn(x.transpose(1, 2), weight, bias, seq_idx, state, activation="silu")
        rows = []
        for row, numbers in enumerate(index):
            parts = []
            for start, stop in runs(numbers):
                held = other[3][row : row + 1] if start == 0 else None
                part, _ = oracles.causal_conv1d(
                    other[0][row : row + 1, start:stop], other[1], other[2], activation="silu", initial_state=held
                )
                parts.append(part * (numbers[start] >= 0))
            rows.append(torch.cat(parts, dim=1))
        want = torch.cat(rows)
        assert_close(y, want.transpose(1, 2), "y")
        dy = normal("dy", *want.shape)
        found = torch.autograd.grad(y, leaves, dy.transpose(1, 2))
        for got, expected in zip(found, torch.autograd.grad(want, other, dy), strict=True):
            assert_close(got, expected, "gradient")

    def test_fn_of_no_token_with_seq_idx(self) -> None:
        y = compat.causal_conv1d_fn(
            self.x.new_zeros(2, 5, 0), self.weight, seq_idx=torch.zeros(2, 0, dtype=torch.int32)
        )
        assert isinstance(y, Tensor)
        assert y.shape == (2, 5, 0)

    @pytest.mark.parametrize("ring", [False, True])
    @pytest.mark.parametrize("room", [3, 5])
    @pytest.mark.parametrize("taps", [1, 4])
    def test_update_equals_one_call(self, taps: int, room: int, ring: bool) -> None:
        """Chunks of 1 (without the time axis), 3, 2, and, without a ring, more tokens than the state holds."""
        weight, steps = self.weight[:, :taps], [1, 3, 2] if ring else [1, 2, 6]
        want, _ = oracles.causal_conv1d(self.x, weight, self.bias, activation="silu")
        state, start = torch.zeros(2, 5, room, dtype=torch.float64), 0
        for length in steps:
            chunk = self.x[:, start : start + length].transpose(1, 2)
            seen = torch.tensor([start, start], dtype=torch.int32) if ring else None
            y = compat.causal_conv1d_update(
                chunk.squeeze(-1) if length == 1 else chunk, state, weight, self.bias, "silu", seen
            )
            if length == 1:
                assert y.shape == (2, 5)
                y = y.unsqueeze(-1)
            assert_close(y, want[:, start : start + length].transpose(1, 2), f"tokens from {start}")
            start += length
            held = functional.pad(self.x[:, :start].transpose(1, 2), (room, 0))[..., -room:]
            if ring:
                held = held[..., [(i - start) % room for i in range(room)]]
            assert torch.equal(state, held)

    def test_update_of_a_longer_chunk_than_the_ring(self) -> None:
        state = torch.zeros(2, 5, 3, dtype=torch.float64)
        (x,) = time_last(self.x)
        y = compat.causal_conv1d_update(x, state, self.weight, cache_seqlens=torch.zeros(2, dtype=torch.int64))
        assert_close(y, oracles.causal_conv1d(self.x, self.weight)[0].transpose(1, 2), "y")
        assert torch.equal(state, x[..., 6:9])  # 9 tokens in a ring of 3: token i lies at i % 3

    def test_update_of_chosen_rows(self) -> None:
        pool = normal("pool", 4, 5, 3).bfloat16()
        before, x = pool.clone(), normal("x", 3, 5)
        rows = torch.tensor([2, -1, 0], dtype=torch.int32)
        y = compat.causal_conv1d_update(x, pool, self.weight, conv_state_indices=rows)
        want = oracles.causal_conv1d(x[:, None], self.weight, initial_state=before[[2, 0, 0]].double())[0][:, 0]
        assert_close(y[[0, 2]], want[[0, 2]], "y")
        assert not y[1].any()
        assert torch.equal(pool[[1, 3]], before[[1, 3]])
        assert torch.equal(pool[[2, 0], :, -1], x[[0, 2]].bfloat16())
        assert torch.equal(pool[[2, 0], :, :2], before[[2, 0], :, 1:])

    def test_update_has_no_gradient(self) -> None:
        state = self.state.clone()
        assert not compat.causal_conv1d_update(self.x[:, 0], state, self.weight.clone().requires_grad_()).requires_grad
        assert not state.requires_grad

    def test_refusals(self) -> None:
        (x,) = time_last(self.x)
        seq_idx = torch.zeros(2, 9, dtype=torch.int32)
        with pytest.raises(NotImplementedError, match="return_final_states with seq_idx"):
            compat.causal_conv1d_fn(x, self.weight, seq_idx=seq_idx, return_final_states=True)
        with pytest.raises(ValueError, match=r"seq_idx has shape \(2, 8\), needs \(B, T\) = \(2, 9\)"):
            compat.causal_conv1d_fn(x, self.weight, seq_idx=seq_idx[:, :8])
        with pytest.raises(TypeError, match=r"seq_idx is torch\.float32"):
            compat.causal_conv1d_fn(x, self.weight, seq_idx=seq_idx.float())
        with pytest.raises(ValueError, match=r"x has shape \(2, 9\), needs 3 axes \(B, D, T\)"):
            compat.causal_conv1d_fn(self.x[..., 0], self.weight)
        with pytest.raises(ValueError, match="activation is 'relu'"):
            compat.causal_conv1d_fn(x, self.weight, activation="relu")
        with pytest.raises(ValueError, match=r"conv_state has room for 2 tokens, needs W - 1 = 3"):
            compat.causal_conv1d_update(self.x[:, 0], self.state[..., :2], self.weight)


class TestGatedLinearAttention:
    q, k = normal("q", 2, 7, 3, 4), normal("k", 2, 7, 3, 4)
    v = normal("v", 2, 7, 3, 5)
    g = -uniform("g", 2, 7, 3, 4)
    state = normal("state", 2, 3, 4, 5)

    @pytest.mark.parametrize("name", ["chunk_gla", "fused_recurrent_gla"])
    @pytest.mark.parametrize("v_first", [False, True])
    def test_matches_the_token_loop(self, name: str, v_first: bool) -> None:
        want, want_state = oracles.gated_linear_attention(
            self.q, self.k, self.v, self.g, scale=0.3, initial_state=self.state
        )
        state = self.state.transpose(2, 3) if v_first else self.state
        options: dict[str, Any] = {"scale": 0.3, "initial_state": state, "state_v_first": v_first}
        o, final = getattr(compat, name)(self.q, self.k, self.v, self.g, output_final_state=True, **options)
        assert_close(o, want, "o")
        assert_close(final, want_state.transpose(2, 3) if v_first else want_state, "state")
        o, final = getattr(compat, name)(self.q, self.k, self.v, self.g, **options)
        assert_close(o, want, "o")
        assert final is None

    def test_without_decay(self) -> None:
        o, _ = compat.fused_recurrent_gla(self.q, self.k, self.v)
        assert_close(o, oracles.gated_linear_attention(self.q, self.k, self.v, torch.zeros_like(self.q))[0], "o")

    def test_reverse(self) -> None:
        backwards = [one.flip(1) for one in (self.q, self.k, self.v, self.g)]
        want, want_state = oracles.gated_linear_attention(*backwards, initial_state=self.state)
        o, state = compat.fused_recurrent_gla(
            self.q, self.k, self.v, self.g, initial_state=self.state, output_final_state=True, reverse=True
        )
        assert_close(o, want.flip(1), "o")
        assert state is not None
        assert_close(state, want_state, "state")

    @pytest.mark.parametrize("reverse", [False, True])
    def test_packed(self, reverse: bool) -> None:
        ends = [0, 3, 3, 7]
        row = [one[:1] for one in (self.q, self.k, self.v, self.g)]
        states = normal("states", 3, 3, 4, 5)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        o, final = compat.fused_recurrent_gla(
            *row, initial_state=states, output_final_state=True, reverse=reverse, cu_seqlens=cu_seqlens
        )
        assert final is not None
        for index, (start, stop) in enumerate(pairwise(ends)):
            part = [one[:, start:stop].flip(1) if reverse else one[:, start:stop] for one in row]
            want, want_state = oracles.gated_linear_attention(*part, initial_state=states[index : index + 1])
            assert_close(o[:, start:stop], want.flip(1) if reverse else want, f"sequence {index}")
            assert_close(final[index : index + 1], want_state, f"state {index}")

    def test_refusals(self) -> None:
        with pytest.raises(NotImplementedError, match="gv is not supported"):
            compat.fused_recurrent_gla(self.q, self.k, self.v, self.g, self.v)
        with pytest.raises(NotImplementedError, match="head_first: not supported"):
            compat.fused_recurrent_gla(self.q, self.k, self.v, head_first=True)
        with pytest.raises(ValueError, match="k has shape"):
            compat.chunk_gla(self.q, self.k[..., :2], self.v, self.g)


class TestGatedDeltaRule:
    q, k = (functional.normalize(normal(name, 2, 7, 2, 4), dim=-1) for name in "qk")
    v = normal("v", 2, 7, 4, 5)
    g, beta = -uniform("g", 2, 7, 4), uniform("beta", 2, 7, 4)
    state = normal("state", 2, 4, 4, 5)

    def oracle(self, q: Tensor, k: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Value head h reads key head h // 2."""
        heads = torch.tensor([0, 0, 1, 1])
        return oracles.gated_delta_rule(q[:, :, heads], k[:, :, heads], self.v, g, beta, initial_state=self.state)

    @pytest.mark.parametrize("v_first", [False, True])
    def test_matches_the_token_loop(self, v_first: bool) -> None:
        want, want_state = self.oracle(self.q, self.k, self.g, self.beta)
        state = self.state.transpose(2, 3) if v_first else self.state
        options: dict[str, Any] = {"initial_state": state, "state_v_first": v_first, "chunk_size": 32}
        o, final = compat.chunk_gated_delta_rule(
            self.q, self.k, self.v, self.g, self.beta, output_final_state=True, **options
        )
        assert final is not None
        assert_close(o, want, "o")
        assert_close(final, want_state.transpose(2, 3) if v_first else want_state, "state")
        assert compat.chunk_gated_delta_rule(self.q, self.k, self.v, self.g, self.beta)[1] is None

    @pytest.mark.parametrize("double", [False, True])
    def test_what_the_kernel_may_do_first(self, double: bool) -> None:
        raw_q, raw_k, raw_beta, raw_g = 3 * self.q, 0.1 * self.k, 4 * self.beta - 2, 3 * self.g
        A_log, dt_bias = normal("A_log", 4), normal("dt_bias", 4)
        o, _ = compat.chunk_gated_delta_rule(
            raw_q,
            raw_k,
            self.v,
            raw_g,
            raw_beta,
            initial_state=self.state,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=double,
            use_gate_in_kernel=True,
            A_log=A_log,
            dt_bias=dt_bias,
        )
        q, k = (one / (one.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for one in (raw_q, raw_k))
        g = -A_log.exp() * oracles.softplus(raw_g + dt_bias)
        assert_close(o, self.oracle(q, k, g, (2 if double else 1) * torch.sigmoid(raw_beta))[0], "o")

    def test_packed_equals_separate(self) -> None:
        row = [one[:1] for one in (self.q, self.k, self.v, self.g, self.beta)]
        o, _ = compat.chunk_gated_delta_rule(*row, cu_seqlens=torch.tensor([0, 3, 7]))
        for start, stop in ((0, 3), (3, 7)):
            part, _ = compat.chunk_gated_delta_rule(*(one[:, start:stop] for one in row))
            assert_close(o[:, start:stop], part, "o")

    def test_refusals(self) -> None:
        arguments = (self.q, self.k, self.v, self.g, self.beta)
        with pytest.raises(NotImplementedError, match="cp_context is not supported"):
            compat.chunk_gated_delta_rule(*arguments, cp_context=object())
        with pytest.raises(NotImplementedError, match="transpose_state_layout: not supported"):
            compat.chunk_gated_delta_rule(*arguments, transpose_state_layout=True)
        with pytest.raises(ValueError, match="allow_neg_eigval is True, needs use_beta_sigmoid_in_kernel"):
            compat.chunk_gated_delta_rule(*arguments, allow_neg_eigval=True)
        with pytest.raises(ValueError, match="A_log is None"):
            compat.chunk_gated_delta_rule(*arguments, use_gate_in_kernel=True)
        with pytest.raises(ValueError, match=r"A_log has shape \(3,\), needs \(HV,\)"):
            compat.chunk_gated_delta_rule(*arguments, use_gate_in_kernel=True, A_log=torch.zeros(3))
        with pytest.raises(ValueError, match="q has 2 heads or groups, needs a divisor of 3, those of v"):
            compat.chunk_gated_delta_rule(self.q, self.k, self.v[:, :, :3], self.g, self.beta)


class TestFlashAttention:
    q, k, v = normal("q", 2, 5, 4, 6), normal("k", 2, 8, 2, 6), normal("v", 2, 8, 2, 3)

    @pytest.mark.parametrize(
        ("options", "meaning"),
        [
            ({}, {"causal": False}),
            ({"causal": True}, {}),
            ({"causal": True, "softmax_scale": 0.3, "softcap": 2.0}, {"scale": 0.3, "softcap": 2.0}),
            ({"causal": True, "window_size": (2, 0)}, {"window": 3}),
            ({"causal": True, "window_size": (2, 4)}, {"window": 3}),
            ({"window_size": (2, 0), "deterministic": True}, {"window": 3}),
            ({"window_size": (-1, 0)}, {}),
            ({"causal": True, "window_size": (0, 0)}, {"window": 1}),
        ],
        ids=str,
    )
    def test_options(self, options: dict[str, Any], meaning: dict[str, Any]) -> None:
        want = oracles.attention(self.q, self.k, self.v, **meaning)
        assert_close(compat.flash_attn_func(self.q, self.k, self.v, **options), want, "o")

    def test_varlen(self) -> None:
        q, k, v = self.q.flatten(0, 1), self.k.flatten(0, 1), self.v.flatten(0, 1)
        bounds_q, bounds_k = [0, 4, 4, 10], [0, 7, 9, 16]
        cu_q, cu_k = (torch.tensor(one, dtype=torch.int32) for one in (bounds_q, bounds_k))
        o = compat.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7, causal=True, window_size=(3, 0))
        assert o.shape == (10, 4, 3)
        for (q0, q1), (k0, k1) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
            want = oracles.attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], window=4)
            assert_close(o[q0:q1], want[0], f"queries from {q0}")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dropout_p": 0.1}, "dropout_p is 0.1: dropout is not supported"),
            ({"alibi_slopes": torch.ones(4)}, "alibi_slopes is not supported"),
            ({"return_attn_probs": True}, "return_attn_probs is not supported"),
            ({"window_size": (2, 2)}, r"window_size is \(2, 2\)"),
            ({"window_size": (2, -1)}, r"window_size is \(2, -1\)"),
            ({"window_size": (-1, 1)}, r"window_size is \(-1, 1\)"),
        ],
    )
    def test_refused_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(NotImplementedError, match=message):
            compat.flash_attn_func(self.q, self.k, self.v, **options)

    def test_varlen_refusals(self) -> None:
        cu = torch.tensor([0, 5])
        q, k, v = self.q[0], self.k[0, :5], self.v[0, :5]
        with pytest.raises(NotImplementedError, match="block_table is not supported"):
            compat.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, block_table=cu)
        with pytest.raises(ValueError, match=r"q has shape \(2, 5, 4, 6\), needs 3 axes \(T, Hq, D\)"):
            compat.flash_attn_varlen_func(self.q, k, v, cu, cu, 5, 5)
