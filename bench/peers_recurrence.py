"""The recurrences' rivals in plain torch: token by token, and in the forms that do the most in one operator.

* "loop" is the definition, which reads token t as `x[:, t]`: its backward adds a whole tensor of zeros for each token.
  "unbound" is the same loop over tensors that are cut into tokens once, which is no slower than any other form at
  D 256.
* Diagonal ones in blocks: a scan of about sqrt(T) steps over all blocks at once, one over the blocks, and one product
  that joins them. The number of operators grows with sqrt(T), and each element is touched a fixed number of times; the
  doubling scan (Hillis and Steele, 1986) touches it log T times and took 6 times as long under autograd (B 8, T 512,
  D 256, one thread).
* Matrix-valued ones in chunks of matrix products: Dao and Gu, 2024, arXiv 2405.21060, section 6; Yang et al., 2023,
  arXiv 2312.06635, section 4; Yang et al., 2024, arXiv 2412.06464, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case
from bench.peers import Function, Peer

CHUNK = 64


def blocked_scan(decay: Tensor, x: Tensor) -> Tensor:
    """Run h_t = decay_t h_{t-1} + x_t along axis 1 of two tensors that broadcast, in blocks."""
    length = x.shape[1]
    block = max(1, math.isqrt(length))
    missing = -length % block
    if missing:
        padding = (0, 0) * (x.ndim - 2) + (0, missing)
        decay, x = F.pad(decay, padding), F.pad(x, padding)
    decays, inputs = torch.unflatten(decay, 1, (-1, block)).unbind(2), torch.unflatten(x, 1, (-1, block)).unbind(2)
    h, product = inputs[0], decays[0]
    states, products = [h], [product]
    for a_t, x_t in zip(decays[1:], inputs[1:], strict=True):
        h = torch.addcmul(x_t, a_t, h)
        product = product * a_t
        states.append(h)
        products.append(product)
    start = torch.zeros_like(h[:, 0])
    starts = []
    for last, kept in zip(h.unbind(1), product.unbind(1), strict=True):
        starts.append(start)
        start = torch.addcmul(last, kept, start)
    joined = torch.addcmul(torch.stack(states, 2), torch.stack(products, 2), torch.stack(starts, 1).unsqueeze(2))
    return joined.flatten(1, 2)[:, :length]


def unbound_scan(decay: Tensor, x: Tensor) -> Tensor:
    """Run the same token by token, over tensors that are cut into tokens before."""
    h = torch.zeros_like(x[:, 0])
    states = []
    for a_t, x_t in zip(decay.unbind(1), x.unbind(1), strict=True):
        h = torch.addcmul(x_t, a_t, h)
        states.append(h)
    return torch.stack(states, 1)


def diagonal_scan(decay: Tensor, x: Tensor) -> Tensor:
    """Scan in blocks."""
    return blocked_scan(decay, x)


def diagonal_scan_unbound(decay: Tensor, x: Tensor) -> Tensor:
    """Scan token by token, cut before."""
    return unbound_scan(decay, x)


def diagonal_scan_loop(decay: Tensor, x: Tensor) -> Tensor:
    """Scan token by token."""
    h = torch.zeros_like(x[:, 0])
    states = []
    for t in range(x.shape[1]):
        h = decay[:, t] * h + x[:, t]
        states.append(h)
    return torch.stack(states, 1)


def rg_lru_terms(x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor) -> tuple[Tensor, Tensor]:
    """Return the RG-LRU's decays and inputs."""
    log_a = 8.0 * torch.sigmoid(recurrence_gate) * log_lambda
    return torch.exp(log_a), torch.sqrt(-torch.expm1(2 * log_a)) * (torch.sigmoid(input_gate) * x)


def rg_lru(x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor) -> Tensor:
    """Run the RG-LRU in blocks."""
    return blocked_scan(*rg_lru_terms(x, recurrence_gate, input_gate, log_lambda))


def rg_lru_unbound(x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor) -> Tensor:
    """Run it token by token, cut before."""
    return unbound_scan(*rg_lru_terms(x, recurrence_gate, input_gate, log_lambda))


def rg_lru_loop(x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor) -> Tensor:
    """Run it token by token."""
    return diagonal_scan_loop(*rg_lru_terms(x, recurrence_gate, input_gate, log_lambda))


def _selective_terms(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor, dt_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return decays and inputs, (B, T, D, N)."""
    step = dt + dt_bias
    if dt_softplus:
        step = F.softplus(step)
    inward = B.repeat_interleave(x.shape[2] // B.shape[2], 2)
    return torch.exp(step.unsqueeze(-1) * A), (step * x).unsqueeze(-1) * inward


def _selective_output(h: Tensor, x: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    grouped = torch.unflatten(h, 2, (C.shape[2], -1))
    y = (grouped @ C.unsqueeze(-1)).flatten(2)
    return torch.addcmul(y, x, D) * F.silu(z)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool = False,
) -> Tensor:
    """Scan all states in blocks."""
    return _selective_output(blocked_scan(*_selective_terms(x, dt, A, B, dt_bias, dt_softplus)), x, C, D, z)


def selective_scan_unbound(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool = False,
) -> Tensor:
    """Scan token by token, decays and inputs of all tokens made and cut before."""
    return _selective_output(unbound_scan(*_selective_terms(x, dt, A, B, dt_bias, dt_softplus)), x, C, D, z)


def selective_scan_loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool = False,
) -> Tensor:
    """Scan token by token."""
    step = dt + dt_bias
    if dt_softplus:
        step = F.softplus(step)
    per_group = x.shape[2] // B.shape[2]
    h = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[1]):
        inward, outward = B[:, t].repeat_interleave(per_group, 1), C[:, t].repeat_interleave(per_group, 1)
        h = torch.exp(step[:, t].unsqueeze(-1) * A) * h + (step[:, t] * x[:, t]).unsqueeze(-1) * inward
        outputs.append((h * outward).sum(-1))
    return torch.addcmul(torch.stack(outputs, 1), x, D) * F.silu(z)


def _chunks(x: Tensor) -> Tensor:
    """Cut (B, T, H, K) into (B, H, T/Q, Q, K), padded with zeros."""
    return torch.unflatten(F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK)), 1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)


def _unchunk(x: Tensor, length: int) -> Tensor:
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


def _states_at_starts(kept: Tensor, added: Tensor) -> Tensor:
    """Return the state at each chunk's start, (B, H, T/Q, ...), from what a chunk keeps and what it adds."""
    state = torch.zeros_like(added[:, :, 0])
    starts = []
    for kept_c, added_c in zip(kept.unbind(2), added.unbind(2), strict=True):
        starts.append(state)
        state = torch.addcmul(added_c, kept_c, state)
    return torch.stack(starts, 2)


def _decays_between(log_decay: Tensor) -> Tensor:
    """Return exp of the sums over the tokens between, (..., Q, Q), from (..., Q)."""
    total = log_decay.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=log_decay.device).tril()
    return torch.exp((total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~later, float("-inf")))


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool = False,
) -> Tensor:
    """Run Mamba-2's scan in chunks of matrix products."""
    step = dt + dt_bias
    if dt_softplus:
        step = F.softplus(step)
    group = x.shape[2] // B.shape[2]
    values, logs = _chunks(x * step.unsqueeze(-1)), _chunks((step * A).unsqueeze(-1)).squeeze(-1)
    inward, outward = _chunks(B), _chunks(C)
    scores = (outward @ inward.transpose(-1, -2)).repeat_interleave(group, 1)
    inward, outward = inward.repeat_interleave(group, 1), outward.repeat_interleave(group, 1)
    between, since_start = _decays_between(logs), logs.cumsum(-1).exp().unsqueeze(-1)
    within = (scores * between) @ values
    added = inward.transpose(-1, -2) @ (values * between[..., -1, :].unsqueeze(-1))
    starts = _states_at_starts(since_start[..., -1:, :], added)
    y = _unchunk(torch.addcmul(within, since_start, outward @ starts), x.shape[1])
    return torch.addcmul(y, x, D.unsqueeze(-1)) * F.silu(z)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Run it in chunks, decays divided out of the keys: exact enough only for the mild decays that are timed here."""
    q_c, k_c, v_c, logs = (_chunks(one) for one in (q, k, v, log_decay))
    total = logs.cumsum(-2)
    queries = q_c * total.exp() * q.shape[-1] ** -0.5
    scores = (queries @ (k_c * torch.exp(-total)).transpose(-1, -2)).tril()
    last = total[..., -1:, :]
    added = (k_c * torch.exp(last - total)).transpose(-1, -2) @ v_c
    starts = _states_at_starts(last.exp().transpose(-1, -2), added)
    return _unchunk(scores @ v_c + queries @ starts, q.shape[1])


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Run it in chunks; what a chunk writes solves a triangular system."""
    q_c, k_c, v_c = (_chunks(one) for one in (q * q.shape[-1] ** -0.5, k, v))
    logs, strength = (_chunks(one.unsqueeze(-1)) for one in (log_decay, beta))
    between, since_start = _decays_between(logs.squeeze(-1)), logs.cumsum(-2).exp()
    system = ((k_c * strength) @ k_c.transpose(-1, -2) * between).tril(-1)
    sides = torch.cat([v_c * strength, k_c * (strength * since_start)], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    fresh, recalled = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores = (q_c @ k_c.transpose(-1, -2)) * between
    inward = (k_c * between[..., -1, :].unsqueeze(-1)).transpose(-1, -2)
    state = torch.zeros_like(inward[:, :, 0] @ fresh[:, :, 0])
    outputs = []
    parts = (scores, q_c * since_start, inward, since_start[..., -1:, :], fresh, recalled)
    for scores_c, queries_c, inward_c, kept_c, fresh_c, recalled_c in zip(*(one.unbind(2) for one in parts)):  # noqa: B905
        written = fresh_c - recalled_c @ state
        outputs.append(queries_c @ state + scores_c @ written)
        state = kept_c * state + inward_c @ written
    return _unchunk(torch.stack(outputs, 2), q.shape[1])


def _loop_ends(case: Case) -> bool:
    """Tell whether a loop's backward, which writes T tensors as large as x, takes seconds and not minutes."""
    s = case.sizes
    return s["B"] * s["T"] ** 2 * s["D"] < 2 * 10**9


def _in_float32(name: str, function: Function, applies: Callable[[Case], bool] = lambda case: True) -> Peer:
    """Offer a rival that widens half precision first, as the layers that use such code do: decays need it."""

    def widened(**arguments: Any) -> Tensor:
        half = next(value.dtype for value in arguments.values() if isinstance(value, Tensor))
        wide = {
            key: value.to(torch.promote_types(value.dtype, torch.float32)) if isinstance(value, Tensor) else value
            for key, value in arguments.items()
        }
        y: Tensor = function(**wide)
        return y.to(half)

    return Peer(name, widened, applies)


RECURRENCE_PEERS: dict[str, tuple[Peer, ...]] = {
    "diagonal_scan": (
        _in_float32("eager", diagonal_scan),
        _in_float32("unbound", diagonal_scan_unbound),
        _in_float32("loop", diagonal_scan_loop, _loop_ends),
    ),
    "rg_lru": (
        _in_float32("eager", rg_lru),
        _in_float32("unbound", rg_lru_unbound),
        _in_float32("loop", rg_lru_loop, _loop_ends),
    ),
    "selective_scan": (
        _in_float32("eager", selective_scan),
        _in_float32("unbound", selective_scan_unbound),
        _in_float32("loop", selective_scan_loop, _loop_ends),
    ),
    "ssd": (_in_float32("eager", ssd),),
    "gated_linear_attention": (_in_float32("eager", gated_linear_attention),),
    "gated_delta_rule": (_in_float32("eager", gated_delta_rule),),
}
"""Of each recurrence, its rivals."""
