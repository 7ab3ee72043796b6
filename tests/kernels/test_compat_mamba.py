"""mamba-ssm's signatures, right by the token loops of `oracles`, in mamba-ssm's layouts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import compat
from tests.kernels import oracles
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal, uniform

INDEX = [[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5]]


class TestSelectiveScan:
    u, delta, z = (normal(name, 2, 7, 6) for name in ("u", "delta", "z"))
    A, D, bias = -uniform("A", 6, 3, high=2.0), normal("D", 6), normal("bias", 6)
    grouped = normal("grouped", 2, 7, 2, 3)

    def forms(self, name: str) -> tuple[Tensor, Tensor]:
        """Return B or C in one of the peer's forms, and the same as (B, T, D, N)."""
        if name == "fixed":
            fixed = normal("fixed", 6, 3)
            return fixed, fixed.expand(2, 7, 6, 3)
        if name == "one":
            one = normal("one", 2, 3, 7)
            return one, one.transpose(1, 2)[:, :, None].expand(2, 7, 6, 3)
        return self.grouped.permute(0, 2, 3, 1), self.grouped[:, :, torch.tensor([0, 0, 0, 1, 1, 1])]

    @pytest.mark.parametrize("b_form", ["fixed", "one", "grouped"])
    @pytest.mark.parametrize("c_form", ["fixed", "one", "grouped"])
    def test_forms_of_b_and_c(self, b_form: str, c_form: str) -> None:
        (B, wide_B), (C, wide_C) = self.forms(b_form), self.forms(c_form)
        want, want_state = oracles.selective_scan(
            self.u, self.delta, self.A, wide_B, wide_C, D=self.D, z=self.z, dt_bias=self.bias, dt_softplus=True
        )
        u, delta, z = (one.transpose(1, 2) for one in (self.u, self.delta, self.z))
        y, state = compat.selective_scan_fn(u, delta, self.A, B, C, self.D, z, self.bias, True, True)
        assert_close(y, want.transpose(1, 2), "y")
        assert_close(state, want_state, "state")
        alone = compat.selective_scan_fn(u, delta, self.A, B, C, self.D, z, self.bias, True)
        assert isinstance(alone, Tensor)
        assert torch.equal(alone, y)

    def test_gradients(self) -> None:
        leaves = {
            "u": self.u,
            "delta": self.delta.abs(),
            "A": self.A,
            "B": normal("fixed", 6, 3),
            "C": self.grouped,
        }
        ours, theirs = ({name: one.clone().requires_grad_() for name, one in leaves.items()} for _ in range(2))
        turned = (ours["u"].transpose(1, 2), ours["delta"].transpose(1, 2))
        y, state = compat.selective_scan_fn(
            *turned, ours["A"], ours["B"], ours["C"].permute(0, 2, 3, 1), return_last_state=True
        )
        wide_C = theirs["C"].repeat_interleave(3, dim=2)
        want = oracles.selective_scan(theirs["u"], theirs["delta"], theirs["A"], theirs["B"].expand(2, 7, 6, 3), wide_C)
        dy, dstate = normal("dy", 2, 7, 6), normal("dstate", 2, 6, 3)
        found = torch.autograd.grad([y, state], list(ours.values()), [dy.transpose(1, 2), dstate])
        expected = torch.autograd.grad(want, list(theirs.values()), [dy, dstate])
        for name, got, one in zip(leaves, found, expected, strict=True):
            assert_close(got, one, f"gradient of {name}")

    def test_refusals(self) -> None:
        u, B = self.u.transpose(1, 2), self.forms("one")[0]
        with pytest.raises(NotImplementedError, match="A is complex"):
            compat.selective_scan_fn(u, u, self.A.to(torch.complex128), B, B)
        for options, message in (
            ({"delta": u[..., :2]}, r"delta has shape \(2, 6, 2\), needs \(B, D, T\)"),
            ({"u": self.u[0]}, r"u has shape \(7, 6\), needs 3 axes"),
            ({"z": self.u}, r"z has shape \(2, 7, 6\), needs \(B, D, T\)"),
            ({"delta_bias": self.D[:2]}, r"delta_bias has shape \(2,\), needs \(D,\)"),
            ({"B": self.A[:2]}, r"B has shape \(2, 3\), needs \(D, N\) = \(6, 3\)"),
            ({"C": self.D}, r"C has shape \(6,\), needs 4 axes \(D, N\), \(B, N, T\) or \(B, G, N, T\)"),
        ):
            arguments = {"u": u, "delta": u, "A": self.A, "B": B, "C": B, **options}
            with pytest.raises(ValueError, match=message):
                compat.selective_scan_fn(**arguments)


class TestStateUpdate:
    """Two rows, 4 heads of 3 channels in 2 groups, states of 5; without heads, 12 channels in one group."""

    x, dt, z = (normal(name, 2, 4, 3) for name in ("x", "dt", "z"))
    A, D, bias = -uniform("A", 4, 3, 5, high=2.0), normal("D", 4, 3), normal("bias", 4, 3)
    B, C = normal("B", 2, 2, 5), normal("C", 2, 2, 5)
    state = normal("state", 2, 4, 3, 5)

    def oracle(self, x: Tensor, dt: Tensor, z: Tensor, state: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, new_state = oracles.selective_scan(
            *(one.reshape(2, 1, 12) for one in (x, dt)),
            parameters["A"].reshape(12, 5),
            parameters["B"][:, None],
            parameters["C"][:, None],
            D=parameters["D"].reshape(12),
            z=z.reshape(2, 1, 12),
            dt_bias=parameters["bias"].reshape(12),
            dt_softplus=True,
            initial_state=state.reshape(2, 12, 5),
        )
        return y.view(x.shape), new_state.view(state.shape)

    @pytest.mark.parametrize("form", ["heads", "one number a head", "no heads"])
    def test_matches_the_scan(self, form: str) -> None:
        x, dt, z, state = self.x, self.dt, self.z, self.state
        given = {"A": self.A, "B": self.B, "C": self.C, "D": self.D, "bias": self.bias}
        if form == "one number a head":
            given |= {"A": self.A[:, :1, :1].expand(4, 3, 5)}
            given |= {"D": self.D[:, :1].expand(4, 3), "bias": self.bias[:, :1].expand(4, 3)}
            dt = dt[..., :1].expand(2, 4, 3)
        elif form == "no heads":
            x, dt, z, state = x.flatten(1), dt.flatten(1), z.flatten(1), state.flatten(1, 2)
            given = {
                name: one.flatten(0, 1) if name in ("A", "D", "bias") else one[:, :1] for name, one in given.items()
            }
        want, want_state = self.oracle(x, dt, z, state, **given)
        B, C = (one[:, 0] if form == "no heads" else one for one in (given["B"], given["C"]))
        held = state.clone()
        y = compat.selective_state_update(held, x, dt, given["A"], B, C, given["D"], z, given["bias"], True)
        assert_close(y, want, "y")
        assert_close(held, want_state, "state")

    def test_chosen_rows(self) -> None:
        pool = normal("pool", 5, 4, 3, 5).float()
        before, rows = pool.clone(), torch.tensor([3, 0], dtype=torch.int32)
        y = compat.selective_state_update(pool, self.x, self.dt, self.A, self.B, self.C, state_batch_indices=rows)
        held = before[[3, 0]].clone()
        assert torch.equal(y, compat.selective_state_update(held, self.x, self.dt, self.A, self.B, self.C))
        assert torch.equal(pool[[3, 0]], held)
        assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])

    def test_has_no_gradient(self) -> None:
        state = self.state.clone()
        A = self.A.clone().requires_grad_()
        assert not compat.selective_state_update(state, self.x, self.dt, A, self.B, self.C).requires_grad
        assert not state.requires_grad

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r"x has shape \(2, 4, 3\), needs 2 axes \(B, D\)"):
            compat.selective_state_update(self.state[:, 0], self.x, self.dt, self.A, self.B, self.C)
        with pytest.raises(ValueError, match=r"A has shape \(4, 3\), needs 3 axes \(H, P, N\)"):
            compat.selective_state_update(self.state, self.x, self.dt, self.A[..., 0], self.B, self.C)


class TestChunkScan:
    x, z = normal("x", 2, 7, 4, 3), normal("z", 2, 7, 4, 3)
    dt, A, D, bias = normal("dt", 2, 7, 4), -uniform("A", 4), normal("D", 4), normal("bias", 4)
    B, C = normal("B", 2, 7, 2, 5), normal("C", 2, 7, 2, 5)
    state = normal("state", 2, 4, 3, 5)

    def call(self, **options: Any) -> Any:
        return compat.mamba_chunk_scan_combined(self.x, self.dt, self.A, self.B, self.C, 256, **options)

    def oracle(self, dt: Tensor, rows: slice, tokens: slice, **options: Any) -> tuple[Tensor, Tensor]:
        x, dt, B, C, z = (one[rows, tokens] for one in (self.x, dt, self.B, self.C, self.z))
        return oracles.ssd(x, dt, self.A, B, C, z=z, **options)

    def test_matches_the_token_loop(self) -> None:
        options: dict[str, Any] = {"D": self.D, "dt_bias": self.bias, "dt_softplus": True}
        every = slice(None)
        want, want_state = self.oracle(self.dt, every, every, initial_state=self.state, **options)
        y, state = self.call(z=self.z, initial_states=self.state, return_final_states=True, **options)
        assert_close(y, want, "y")
        assert_close(state, want_state, "state")
        assert torch.equal(self.call(z=self.z, initial_states=self.state, **options), y)

    @pytest.mark.parametrize("gated", [False, True])
    def test_skip_of_each_channel(self, gated: bool) -> None:
        D, z = normal("D", 4, 3), self.z if gated else None
        want, _ = oracles.ssd(self.x, self.dt.abs(), self.A, self.B, self.C)
        want = want + D * self.x
        want = want if z is None else want * torch.nn.functional.silu(z)
        y = compat.mamba_chunk_scan_combined(self.x, self.dt.abs(), self.A, self.B, self.C, 64, D=D, z=z)
        assert_close(y, want, "y")
        with pytest.raises(ValueError, match=r"D has shape \(4, 2\), needs \(H,\) or \(H, P\) = \(4, 3\)"):
            self.call(D=D[:, :2])

    @pytest.mark.parametrize("softplus", [False, True])
    @pytest.mark.parametrize("limit", [None, (0.2, 0.9)])
    def test_limits_of_the_step_size(self, softplus: bool, limit: tuple[float, float] | None) -> None:
        """Unless softplus keeps them above 0 anyway, step sizes below 0 count as 0."""
        step = self.dt + self.bias
        step = oracles.softplus(step) if softplus else step
        step = step.clamp(min=0.0) if limit is None else step.clamp(*limit)
        every = slice(None)
        want, _ = self.oracle(step, every, every, D=self.D)
        options: dict[str, Any] = {} if limit is None else {"dt_limit": limit}
        assert_close(self.call(D=self.D, z=self.z, dt_bias=self.bias, dt_softplus=softplus, **options), want, "y")

    def test_seq_idx(self) -> None:
        seq_idx = torch.tensor(INDEX, dtype=torch.int32)
        y, final = self.call(
            z=self.z, dt_softplus=True, initial_states=self.state, seq_idx=seq_idx, return_final_states=True
        )
        for row, start, stop in ((0, 0, 3), (0, 3, 5), (0, 5, 7), (1, 0, 7)):
            chosen = slice(row, row + 1)
            held = self.state[chosen] if start == 0 else None
            want, state = self.oracle(self.dt, chosen, slice(start, stop), dt_softplus=True, initial_state=held)
            assert_close(y[chosen, start:stop], want, f"row {row} from {start}")
            if stop == 7:
                assert_close(final[chosen], state, f"state of row {row}")

    def test_states_of_each_sequence(self) -> None:
        """cu_seqlens may hold empty sequences, of which seq_idx knows nothing."""
        x, dt, B, C = (one[:1] for one in (self.x, self.dt.abs(), self.B, self.C))
        seq_idx, ends = torch.tensor(INDEX[:1], dtype=torch.int32), [0, 0, 3, 5, 7, 7]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        y, final, states = compat.mamba_chunk_scan_combined(
            x,
            dt,
            self.A,
            B,
            C,
            256,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=True,
            return_varlen_states=True,
        )
        for index, (start, stop) in enumerate(pairwise(ends)):
            want = oracles.ssd(*(one[:, start:stop] for one in (x, dt)), self.A, B[:, start:stop], C[:, start:stop])
            assert_close(y[:, start:stop], want[0], f"sequence {index}")
            assert_close(states[index : index + 1], want[1], f"state {index}")
        assert torch.equal(final[0], states[3])

    def test_no_token_at_all(self) -> None:
        arguments = [one[:1, :0] for one in (self.x, self.dt, self.B, self.C)]
        x, dt, B, C = arguments
        y, final, states = compat.mamba_chunk_scan_combined(
            x,
            dt,
            self.A,
            B,
            C,
            256,
            seq_idx=torch.zeros(1, 0, dtype=torch.int32),
            cu_seqlens=torch.zeros(3, dtype=torch.int32),
            return_final_states=True,
            return_varlen_states=True,
        )
        assert y.shape == (1, 0, 4, 3)
        assert not final.any()
        assert states.shape == (2, 4, 3, 5)
        assert not states.any()

    def test_refusals(self) -> None:
        seq_idx, cu_seqlens = torch.tensor(INDEX, dtype=torch.int32), torch.tensor([0, 3, 5, 7, 14])
        for options in (
            {"cu_seqlens": cu_seqlens},
            {"seq_idx": seq_idx},
            {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx, "initial_states": self.state},
        ):
            with pytest.raises(NotImplementedError, match="return_varlen_states without seq_idx and cu_seqlens"):
                self.call(return_varlen_states=True, **options)
        with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 4, 14\], needs the boundaries of seq_idx"):
            self.call(return_varlen_states=True, seq_idx=seq_idx, cu_seqlens=torch.tensor([0, 4, 14]))
        with pytest.raises(ValueError, match=r"seq_idx has shape \(1, 7\), needs \(B, T\) = \(2, 7\)"):
            self.call(seq_idx=seq_idx[:1])
