"""The one-token steps' rivals in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers import Peer
from bench.peers_recurrence import rg_lru_terms


def attention_step(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Attend from one query to the cache, the heads of a group as rows of one product."""
    if window is not None:
        k, v = k[:, -window:], v[:, -window:]
    rows = torch.unflatten(q, 1, (k.shape[2], -1))
    weights = torch.softmax(rows @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5, -1)
    return (weights @ v.transpose(1, 2)).flatten(1, 2)


def sdpa_step(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Do it with torch's fused operator."""
    if window is not None:
        k, v = k[:, -window:], v[:, -window:]
    o: Tensor = F.scaled_dot_product_attention(
        q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=q.shape[1] != k.shape[2]
    )
    return o.squeeze(2)


def _conv_step(state: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    window = torch.cat([state, x.unsqueeze(-1)], -1)
    return (window * weight).sum(-1), window[..., 1:]


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve one token."""
    y, new_state = _conv_step(state, x, weight)
    if bias is not None:
        y = y + bias
    return (y if activation is None else F.silu(y)), new_state


def gated_short_conv_step(
    state: Tensor, x: Tensor, gate_in: Tensor, gate_out: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gate, convolve and gate one token."""
    y, new_state = _conv_step(state, gate_in * x, weight)
    return gate_out * y, new_state


def long_conv_step(
    state: Tensor, x: Tensor, filter: Tensor, gate_in: Tensor, gate_out: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """Meet the whole history with the filter."""
    u = gate_in * x
    history = torch.cat([state, u.unsqueeze(1)], 1)
    y = torch.einsum("btd,dt->bd", history, filter[:, : history.shape[1]].flip(-1))
    return gate_out * (y + skip * u), history[:, max(0, history.shape[1] - filter.shape[1] + 1) :]


def diagonal_scan_step(state: Tensor, decay: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scan one token."""
    h = torch.addcmul(x, decay, state)
    return h, h


def rg_lru_step(
    state: Tensor, x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the RG-LRU on one token."""
    decay, driven = rg_lru_terms(x, recurrence_gate, input_gate, log_lambda)
    return diagonal_scan_step(state, decay, driven)


def _step_size(dt: Tensor, dt_bias: Tensor, dt_softplus: bool) -> Tensor:
    return F.softplus(dt + dt_bias) if dt_softplus else dt + dt_bias


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run Mamba-1's scan on one token."""
    step = _step_size(dt, dt_bias, dt_softplus)
    per_group = x.shape[1] // B.shape[1]
    inward, outward = (one.repeat_interleave(per_group, 1) if B.shape[1] > 1 else one for one in (B, C))
    h = torch.addcmul((step * x).unsqueeze(-1) * inward, torch.exp(step.unsqueeze(-1) * A), state)
    return torch.addcmul((h * outward).sum(-1), x, D) * F.silu(z), h


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run Mamba-2's scan on one token."""
    step = _step_size(dt, dt_bias, dt_softplus)
    per_group = x.shape[1] // B.shape[1]
    inward, outward = (one.repeat_interleave(per_group, 1) if B.shape[1] > 1 else one for one in (B, C))
    driven = (x * step.unsqueeze(-1)).unsqueeze(-1) * inward.unsqueeze(-2)
    h = torch.addcmul(driven, torch.exp(step * A).unsqueeze(-1).unsqueeze(-1), state)
    y = (h * outward.unsqueeze(-2)).sum(-1)
    return torch.addcmul(y, x, D.unsqueeze(-1)) * F.silu(z), h


def gated_linear_attention_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Run gated linear attention on one token."""
    memory = torch.addcmul(k.unsqueeze(-1) * v.unsqueeze(-2), log_decay.exp().unsqueeze(-1), state)
    return ((q * q.shape[-1] ** -0.5).unsqueeze(-2) @ memory).squeeze(-2), memory


def gated_delta_rule_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule on one token."""
    memory = state * log_decay.exp()[..., None, None]
    written = beta.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ memory).squeeze(-2))
    memory = torch.addcmul(memory, k.unsqueeze(-1), written.unsqueeze(-2))
    return ((q * q.shape[-1] ** -0.5).unsqueeze(-2) @ memory).squeeze(-2), memory


STEP_PEERS: dict[str, tuple[Peer, ...]] = {
    "attention_step": (Peer("eager", attention_step), Peer("sdpa", sdpa_step)),
    "causal_conv1d_step": (Peer("eager", causal_conv1d_step),),
    "gated_short_conv_step": (Peer("eager", gated_short_conv_step),),
    "long_conv_step": (Peer("eager", long_conv_step),),
    "diagonal_scan_step": (Peer("eager", diagonal_scan_step),),
    "rg_lru_step": (Peer("eager", rg_lru_step),),
    "selective_scan_step": (Peer("eager", selective_scan_step),),
    "ssd_step": (Peer("eager", ssd_step),),
    "gated_linear_attention_step": (Peer("eager", gated_linear_attention_step),),
    "gated_delta_rule_step": (Peer("eager", gated_delta_rule_step),),
}
"""Of each one-token step, its rivals."""
