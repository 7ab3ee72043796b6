"""The definitions again, written as slow loops over tokens that autograd differentiates: what every backend is held to.

Nothing here is shared with the package. All functions take the public functions' arguments, any floating dtype, and
compute in the dtype that they are given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps=eps), total


def rotary(x: Tensor, positions: Tensor, *, base: float = 10000.0, interleaved: bool = False) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = torch.tensor([base ** (-i / half) for i in range(half)], dtype=x.dtype)
    angles = positions.to(x.dtype)[..., None, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    if interleaved:
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], half, 2).contiguous()) * turn
        return torch.view_as_real(turned).flatten(-2)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    batch, queries, heads, width = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    factor = 1 / math.sqrt(width) if scale is None else scale
    k, v = (torch.stack([one[:, :, h // group] for h in range(heads)], dim=1) for one in (k, v))
    rows = []
    for i in range(queries):
        position = i + keys - queries
        seen = [j for j in range(keys) if not causal or (j <= position and (window is None or j > position - window))]
        if not seen:
            rows.append(q.new_zeros(batch, heads, v.shape[3]))
            continue
        first, end = seen[0], seen[-1] + 1
        scores = (k[:, :, first:end] @ q[:, i].unsqueeze(-1)).squeeze(-1) * factor
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        top = scores.detach().amax(-1, keepdim=True)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks.unsqueeze(-1) - top)
        rows.append(((weights / total).unsqueeze(2) @ v[:, :, first:end]).squeeze(2))
    return torch.stack(rows, dim=1) if rows else q.new_zeros(batch, 0, heads, v.shape[3])


def differential_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    first = attention(q1, k1, v, causal=causal, window=window, scale=scale)
    second = attention(q2, k2, v, causal=causal, window=window, scale=scale)
    return first - lam.unsqueeze(-1) * second


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    taps = weight.shape[1]
    state = x.new_zeros(batch, width, taps - 1) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        window = torch.cat([state, x[:, t].unsqueeze(-1)], dim=-1)
        y = sum(window[..., w] * weight[:, w] for w in range(taps))
        if bias is not None:
            y = y + bias
        outputs.append(y * torch.sigmoid(y) if activation else y)
        state = window[..., 1:]
    return (torch.stack(outputs, dim=1) if outputs else x), state


def gated_short_conv(
    x: Tensor,
    gate_in: Tensor,
    gate_out: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y, state = causal_conv1d(gate_in * x, weight, bias, initial_state=initial_state)
    return gate_out * y, state


def long_conv(
    x: Tensor,
    filter: Tensor,
    *,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    u = x if gate_in is None else gate_in * x
    outputs = []
    for t in range(x.shape[1]):
        y = sum(filter[:, j] * u[:, t - j] for j in range(min(t + 1, filter.shape[1])))
        outputs.append(y if skip is None else y + skip * u[:, t])
    y = torch.stack(outputs, dim=1) if outputs else u
    return y if gate_out is None else gate_out * y


def diagonal_scan(decay: Tensor, x: Tensor, *, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    h = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        h = decay[:, t] * h + x[:, t]
        outputs.append(h)
    return (torch.stack(outputs, dim=1) if outputs else x), h


def rg_lru(
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    log_lambda: Tensor,
    *,
    c: float = 8.0,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    log_a = c * torch.sigmoid(recurrence_gate) * log_lambda
    driven = torch.sqrt(-torch.expm1(2 * log_a)) * torch.sigmoid(input_gate) * x
    return diagonal_scan(torch.exp(log_a), driven, initial_state=initial_state)


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    per_group = width // B.shape[2]
    group_of = torch.tensor([d // per_group for d in range(width)], dtype=torch.int64)
    step = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        step = softplus(step)
    h = x.new_zeros(batch, width, A.shape[1]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        inward, outward = B[:, t, group_of], C[:, t, group_of]
        h = torch.exp(step[:, t, :, None] * A) * h + step[:, t, :, None] * inward * x[:, t, :, None]
        outputs.append((h * outward).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else x
    if D is not None:
        y = y + D * x
    return (y if z is None else y * z * torch.sigmoid(z)), h


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = x.shape
    per_group = heads // B.shape[2]
    group_of = torch.tensor([h // per_group for h in range(heads)], dtype=torch.int64)
    step = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        step = softplus(step)
    state = x.new_zeros(batch, heads, width, B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        inward, outward = B[:, t, group_of], C[:, t, group_of]
        decay = torch.exp(step[:, t] * A)[..., None, None]
        state = decay * state + (step[:, t, :, None] * x[:, t])[..., None] * inward[:, :, None, :]
        outputs.append((state * outward[:, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else x
    if D is not None:
        y = y + D[:, None] * x
    return (y if z is None else y * z * torch.sigmoid(z)), state


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = q.shape
    factor = 1 / math.sqrt(width) if scale is None else scale
    state = v.new_zeros(batch, heads, width, v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        state = torch.exp(log_decay[:, t])[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(-2) * factor)
    return (torch.stack(outputs, dim=1) if outputs else v), state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = q.shape
    factor = 1 / math.sqrt(width) if scale is None else scale
    state = v.new_zeros(batch, heads, width, v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        state = torch.exp(log_decay[:, t])[..., None, None] * state
        held = (k[:, t, :, :, None] * state).sum(-2)
        written = beta[:, t, :, None] * (v[:, t] - held)
        state = state + k[:, t, :, :, None] * written[:, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(-2) * factor)
    return (torch.stack(outputs, dim=1) if outputs else v), state


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.where(gate > 0, gate, torch.zeros_like(gate)) * up


def channel_mix(x: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim == 1:
        return x * weight
    blocks = weight.unsqueeze(0) if weight.ndim == 2 else weight
    return torch.cat([part @ block.T for part, block in zip(x.chunk(len(blocks), -1), blocks, strict=True)], dim=-1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The dense formula with torch's own loss as the authority on its arguments."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten().long(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    ).view(targets.shape if reduction == "none" else ())
