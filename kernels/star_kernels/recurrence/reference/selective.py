"""The selective scan of Mamba-1 in plain torch, with a hand-written gradient.

The state is laid out (G, N, D/G): broadcasts and sums then run along contiguous channels. Time goes in chunks whose
states stay in cache and are computed again in backward, so that no (B, T, D, N) tensor is ever held. Decays are taken
as exp2(dt A log2 e): on one AVX-512 core 0.3 ns an element where torch.exp takes 0.8, and 11 where it underflows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from star_kernels._numerics import accumulator, apply, over_sequences

CHUNK_ELEMENTS = 2**19
"""State elements held at once: 2 MB in float32, 16 tokens at B 16, D 128, N 16, where 4 and 32 tokens are slower."""

LONGEST_CHUNK = 64

SOFTPLUS_LINEAR_ABOVE = 40.0
"""From here softplus(x) = x: exp(-40) = 4e-18 is below half an ulp of 40 in float64."""


class _SelectiveScan(torch.autograd.Function):
    """y_t = sum_n C_tn h_tn with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, over time-major tensors of one dtype.

    x, dt (T, B, G, 1, E); rates A (G, N, E); B, C (T, B, G, N, 1); state (B, G, N, E). Returns y (T, B, G, 1, E) and
    the final state.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, rates: Tensor, inward: Tensor, outward: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x)
        starts = []
        parts = _chunks(x.shape[0], state.numel())
        states = x.new_empty(parts[0].stop, *state.shape)
        decay = torch.empty_like(states)
        for part in parts:
            starts.append(state)
            h, _ = _states(x[part], dt[part], rates, inward[part], state, decay, states)
            state = h[-1].clone()
            torch.matmul(outward[part].transpose(-1, -2), h, out=y[part])
        ctx.save_for_backward(x, dt, rates, inward, outward, *starts)
        ctx.parts = parts
        return y, state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, dt, rates, inward, outward, *starts = ctx.saved_tensors
        dy = dy.contiguous()
        dx, ddt = torch.empty_like(x), torch.empty_like(x)
        dinward, doutward = torch.empty_like(inward), torch.empty_like(outward)
        drates = torch.zeros_like(rates)
        carry = dstate
        states = x.new_empty(ctx.parts[0].stop, *dstate.shape)
        decay, pulls, buffer = torch.empty_like(states), torch.empty_like(states), torch.empty_like(states)
        for part, start in zip(reversed(ctx.parts), reversed(starts), strict=True):
            x_c, dt_c = x[part], dt[part]
            h, a = _states(x_c, dt_c, rates, inward[part], start, decay, states)
            torch.matmul(h, dy[part].transpose(-1, -2), out=doutward[part])
            # pull_t = dL/dh_t = dy_t C_t + a_{t+1} pull_{t+1}
            pull = torch.mul(outward[part], dy[part], out=pulls[: len(h)])
            pull_rows, a_rows = pull.unbind(0), a.unbind(0)
            pull_rows[-1].add_(carry)
            for t in range(len(pull_rows) - 1, 0, -1):
                pull_rows[t - 1].addcmul_(a_rows[t], pull_rows[t])
            carry = a_rows[0] * pull_rows[0]
            through_input = torch.matmul(inward[part].transpose(-1, -2), pull)
            torch.matmul(pull, (dt_c * x_c).transpose(-1, -2), out=dinward[part])
            # dL/d(dt A) = pull_t a_t h_{t-1}
            slope = a.mul_(pull)
            slope[1:].mul_(h[:-1])
            slope[0].mul_(start)
            torch.mul(through_input, dt_c, out=dx[part])
            torch.sum(torch.mul(slope, rates, out=buffer[: len(h)]), -2, keepdim=True, out=ddt[part])
            ddt[part].addcmul_(through_input, x_c)
            drates += torch.mul(slope, dt_c, out=buffer[: len(h)]).sum((0, 1))
        return dx, ddt, drates, dinward, doutward, carry


def _chunks(length: int, state_elements: int) -> list[slice]:
    size = max(1, min(LONGEST_CHUNK, CHUNK_ELEMENTS // max(state_elements, 1)))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _states(
    x: Tensor, dt: Tensor, rates: Tensor, inward: Tensor, start: Tensor, decay: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill `states` with h_t and `decay` with exp(dt_t A) for one chunk; returns the parts that were filled."""
    length = x.shape[0]
    a = torch.mul(dt, rates * math.log2(math.e), out=decay[:length]).exp2_()
    h = torch.mul(inward, dt * x, out=states[:length])
    previous = start
    for a_t, h_t in zip(a.unbind(0), h.unbind(0), strict=True):
        previous = h_t.addcmul_(a_t, previous)
    return h, a


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.selective_scan`."""
    acc = accumulator(x.dtype)
    wide_x, step = x.to(acc), step_sizes(dt, dt_bias, dt_softplus, acc)

    def run(x: Tensor, step: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return _scan(x, step, A.to(acc), B, C, state)

    packed = (wide_x, step, B.to(acc), C.to(acc))
    if cu_seqlens is None:
        y, final_state = run(*packed, initial_state)
    else:
        y, final_state = over_sequences(run, packed, initial_state, cu_seqlens)
    if D is not None:
        y = torch.addcmul(y, wide_x, D.to(acc))
    if z is not None:
        y = y * functional.silu(z.to(acc))
    return y.to(x.dtype), final_state


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.selective_scan_step`."""
    acc = accumulator(x.dtype)
    batch, width = x.shape
    groups, size = B.shape[1:]
    wide_x, step = x.to(acc), step_sizes(dt, dt_bias, dt_softplus, acc)
    per_channel = (batch, groups, width // groups, 1)
    inward = B.to(acc).unsqueeze(2)
    decay = torch.exp(step.unsqueeze(-1) * A.to(acc))
    driven = ((step * wide_x).view(per_channel) * inward).view(batch, width, size)
    h = torch.addcmul(driven, decay, state.to(acc))
    y = (h.view(batch, groups, width // groups, size) @ C.to(acc).unsqueeze(-1)).view(batch, width)
    if D is not None:
        y = torch.addcmul(y, wide_x, D.to(acc))
    if z is not None:
        y = y * functional.silu(z.to(acc))
    return y.to(x.dtype), h


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, acc: torch.dtype) -> Tensor:
    """Return dt with its bias and softplus, in the accumulation dtype."""
    step = dt.to(acc)
    if dt_bias is not None:
        step = step + dt_bias.to(acc)
    return functional.softplus(step, threshold=SOFTPLUS_LINEAR_ABOVE) if dt_softplus else step


def _scan(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    groups, size = B.shape[2:]
    per_group = width // groups
    if length == 0:
        return x, x.new_zeros(batch, width, size) if state is None else state.to(x.dtype).clone()

    def per_channel(one: Tensor) -> Tensor:
        return one.transpose(0, 1).reshape(length, batch, groups, 1, per_group).contiguous()

    def per_state(one: Tensor) -> Tensor:
        return one.transpose(0, 1).contiguous().unsqueeze(-1)

    rates = A.view(groups, per_group, size).transpose(1, 2).contiguous()
    if state is None:
        start = x.new_zeros(batch, groups, size, per_group)
    else:
        start = state.to(x.dtype).view(batch, groups, per_group, size).transpose(2, 3).contiguous()
    y, final = apply(_SelectiveScan, per_channel(x), per_channel(step), rates, per_state(B), per_state(C), start)
    final_state = final.transpose(2, 3).reshape(batch, width, size)
    return y.view(length, batch, width).transpose(0, 1).contiguous(), final_state
