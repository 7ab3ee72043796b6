"""The rivals: the same operators in plain torch, written the way that is fastest there, and torch's own fused ones.

Every function takes the public operator's arguments by name. `torch.compile` of the one named "eager" is a rival too,
made where it is timed. Rivals from other packages are in `bench.peers_installed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case

Function = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """One rival of one operator.

    Attributes:
        name: Of the provider: "eager" is the plain formula at its best, "loop" the token-by-token definition, "sdpa"
            and "conv1d" torch's own operators.
        function: Takes the public operator's arguments and what `prepare` returns, by name.
        applies: Which cases it can serve.
        prepare: Takes the arguments, and makes what a model would keep between calls, such as a mask.
        modes: The modes it can serve.
        compiled: Whether `function` runs under torch.compile.
    """

    name: str
    function: Function
    applies: Callable[[Case], bool] = lambda case: True
    prepare: Callable[..., dict[str, Any]] | None = None
    modes: tuple[str, ...] = ("fwd", "full", "step")
    compiled: bool = False


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise, in float32 inside, as model code writes it out."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise with torch's own operator."""
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add and normalise."""
    total = x + residual
    return rms_norm(total, weight), total


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add, and normalise with torch's own operator."""
    total = x + residual
    return torch_rms_norm(total, weight), total


def rotary_tables(x: Tensor, positions: Tensor, interleaved: bool = False) -> dict[str, Tensor]:
    """Return the cosines and sines that a model keeps, (T, 1, D)."""
    half = x.shape[-1] // 2
    angles = positions.float().unsqueeze(-1) * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return {"cos": wide.cos().unsqueeze(1).to(x.dtype), "sin": wide.sin().unsqueeze(1).to(x.dtype)}


def rotary_from_tables(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate with tables made before."""
    half = x.shape[-1] // 2
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    else:
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


def rotary(x: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate, tables included."""
    return rotary_from_tables(x, positions, interleaved=interleaved, **rotary_tables(x, positions, interleaved))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate with SiLU."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate with GELU."""
    return F.gelu(gate) * up


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate with ReLU."""
    return F.relu(gate) * up


def channel_mix(x: Tensor, weight: Tensor) -> Tensor:
    """Mix channels."""
    if weight.ndim == 1:
        return x * weight
    if weight.ndim == 2:
        return F.linear(x, weight)
    return torch.einsum("...gi,goi->...go", torch.unflatten(x, -1, weight.shape[:2]), weight).flatten(-2)


def causal_mask(queries: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query sees, (T, T)."""
    mask = torch.ones(queries, queries, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def prepare_mask(q: Tensor, window: int | None = None, **_: Any) -> dict[str, Tensor]:
    """Return the mask that a model would keep."""
    return {"mask": causal_mask(q.shape[1], window, q.device)}


def prepare_differential_mask(q1: Tensor, window: int | None = None, **_: Any) -> dict[str, Tensor]:
    """Return the mask that a model would keep."""
    return prepare_mask(q1, window)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend through the whole map."""
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """Attend with torch's fused operator."""
    o: Tensor = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if window is None else mask,
        is_causal=window is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


def prepare_flex(q: Tensor, window: int | None = None, **_: Any) -> dict[str, Any]:
    """Return flex attention's block mask, which a model would keep."""
    from torch.nn.attention.flex_attention import create_block_mask

    reach = q.shape[1] if window is None else window

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - reach)

    return {"blocks": create_block_mask(sees, None, None, q.shape[1], q.shape[1], device=q.device.type)}


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: Any, window: int | None = None) -> Tensor:
    """Attend with torch's flex attention, which skips the blocks that a window excludes."""
    from torch.nn.attention.flex_attention import flex_attention

    o = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=blocks)
    return o.transpose(1, 2)


def differential_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    mask: Tensor,
    window: int | None = None,
) -> Tensor:
    """Attend with the difference of two whole maps, multiplied by the values once."""
    first, second = (
        torch.softmax(
            (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).float().masked_fill(~mask, float("-inf")),
            -1,
        )
        for q, k in ((q1, k1), (q2, k2))
    )
    weights = first - lam.view(-1, 1, 1) * second
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def sdpa_wide(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """Call torch's fused operator once for each map, with the wide values as they are."""
    return sdpa(q1, k1, v) - lam.unsqueeze(-1) * sdpa(q2, k2, v)


def sdpa_split(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """Call it for each map and each part of the values as wide as a key, which its fast path asks for."""
    parts = torch.split(v, q1.shape[-1], -1)
    first, second = (torch.cat([sdpa(q, k, part) for part in parts], -1) for q, k in ((q1, k1), (q2, k2)))
    return first - lam.unsqueeze(-1) * second


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Convolve by one shifted product a tap."""
    taps, length = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = padded[:, :length] * weight[:, 0]
    for w in range(1, taps):
        y = torch.addcmul(y, padded[:, w : w + length], weight[:, w])
    if bias is not None:
        y = y + bias
    return y if activation is None else F.silu(y)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Convolve with torch's own operator, one group a channel."""
    width, taps = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=taps - 1, groups=width)
    y = y[..., : x.shape[1]].transpose(1, 2)
    return y if activation is None else F.silu(y)


def gated_short_conv(x: Tensor, gate_in: Tensor, gate_out: Tensor, weight: Tensor) -> Tensor:
    """Gate, convolve by shifted products, gate."""
    return gate_out * causal_conv1d(gate_in * x, weight)


def gated_conv1d(x: Tensor, gate_in: Tensor, gate_out: Tensor, weight: Tensor) -> Tensor:
    """Gate, convolve with torch's own operator, gate."""
    return gate_out * conv1d(gate_in * x, weight)


def long_conv(x: Tensor, filter: Tensor, gate_in: Tensor, gate_out: Tensor, skip: Tensor) -> Tensor:
    """Convolve by Fourier transforms padded to twice the length."""
    size = 2 * x.shape[1]
    u = gate_in * x
    spectrum = torch.fft.rfft(u.float().transpose(1, 2), n=size) * torch.fft.rfft(filter.float(), n=size)
    y: Tensor = torch.fft.irfft(spectrum, n=size)[..., : x.shape[1]].transpose(1, 2).to(x.dtype)
    return gate_out * (y + skip * u)


def long_conv1d(x: Tensor, filter: Tensor, gate_in: Tensor, gate_out: Tensor, skip: Tensor) -> Tensor:
    """Convolve directly, with torch's own operator."""
    u = gate_in * x
    return gate_out * (conv1d(u, filter.flip(-1)) + skip * u)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Make the logits, then take their loss."""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2).float(), targets.flatten())


def _sdpa_can(case: Case) -> bool:
    return not (case.options.get("with_sinks") or "softcap" in case.options)


DENSE_PEERS: dict[str, tuple[Peer, ...]] = {
    "rms_norm": (Peer("eager", rms_norm), Peer("torch", torch_rms_norm)),
    "add_rms_norm": (Peer("eager", add_rms_norm), Peer("torch", torch_add_rms_norm)),
    "rotary": (Peer("eager", rotary), Peer("tables", rotary_from_tables, prepare=rotary_tables)),
    "swiglu": (Peer("eager", swiglu),),
    "geglu": (Peer("eager", geglu),),
    "reglu": (Peer("eager", reglu),),
    "channel_mix": (Peer("eager", channel_mix),),
    "attention": (
        Peer("eager", attention, prepare=prepare_mask),
        Peer("sdpa", sdpa, applies=_sdpa_can, prepare=prepare_mask),
        Peer(
            "flex",
            flex,
            applies=lambda case: "window" in case.options and "compiled" in case.flags,
            prepare=prepare_flex,
            modes=("fwd",),
            compiled=True,
        ),
    ),
    "differential_attention": (
        Peer("eager", differential_attention, prepare=prepare_differential_mask),
        Peer("sdpa-wide", sdpa_wide),
        Peer("sdpa-split", sdpa_split, applies=lambda case: case.sizes["Dv"] % case.sizes["D"] == 0),
    ),
    "causal_conv1d": (Peer("eager", causal_conv1d), Peer("conv1d", conv1d)),
    "gated_short_conv": (Peer("eager", gated_short_conv), Peer("conv1d", gated_conv1d)),
    "long_conv": (
        Peer("eager", long_conv),
        # Work grows with the square of the length.
        Peer("conv1d", long_conv1d, applies=lambda case: case.sizes["T"] <= 512),
    ),
    "linear_cross_entropy": (Peer("eager", linear_cross_entropy),),
}
"""Of each operator without a recurrence, its rivals."""
