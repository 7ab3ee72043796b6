"""Other packages' GPU kernels as backends, where they are installed: flash-attn, causal-conv1d, mamba-ssm and fla.

They are chosen by name (`backend="flash-attn"`) and come after Triton's otherwise. Each takes what its package takes
and says in one sentence what it does not. Nothing here imports a package before a call needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch

Function = Callable[..., Any]
Pair = tuple[Tensor, Tensor]

_MODULES = {"flash-attn": "flash_attn", "causal-conv1d": "causal_conv1d", "mamba-ssm": "mamba_ssm", "fla": "fla"}
_HALF = (torch.bfloat16, torch.float16)
_CHUNK = 256  # tokens of a chunk of Mamba-2, as its package's layers have it


def _peer(backend: str, module: str, name: str) -> Function:
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except Exception as error:
        # A package built for another torch may raise anything when it is imported.
        raise ValueError(f"backend={backend!r} is not available: importing {module} failed: {error}") from error
    return function


def _refuse(backend: str, **unserved: bool) -> None:
    """Refuse what a package has no form for."""
    for what, asked in unserved.items():
        if asked:
            raise ValueError(f"backend={backend!r} does not serve {what.replace('_', ' ')}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Serve `star_kernels.attention` with flash-attn (Dao, 2023, arXiv 2307.08691)."""
    _refuse("flash-attn", sinks=sinks is not None, values_of_another_width=v.shape[-1] != q.shape[-1])
    reach = (-1 if window is None else window - 1, 0 if causal else -1)
    options = {"softmax_scale": scale, "causal": causal, "window_size": reach, "softcap": softcap or 0.0}
    if cu_seqlens_q is None or cu_seqlens_k is None:
        o: Tensor = _peer("flash-attn", "flash_attn", "flash_attn_func")(q, k, v, **options)
        return o
    ends = cu_seqlens_q.int(), cu_seqlens_k.int()
    longest = (int(one.diff().max()) if one.numel() > 1 else 0 for one in ends)
    packed = _peer("flash-attn", "flash_attn", "flash_attn_varlen_func")
    o = packed(q[0], k[0], v[0], *ends, *longest, **options)
    return o.unsqueeze(0)


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int | Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Serve `star_kernels.attention_step` with flash-attn."""
    _refuse("flash-attn", sinks=sinks is not None, values_of_another_width=v.shape[-1] != q.shape[-1])
    held = k.shape[1] if length is None else length.int() if isinstance(length, Tensor) else length
    step = _peer("flash-attn", "flash_attn", "flash_attn_with_kvcache")
    reach = (-1 if window is None else window - 1, 0)
    options = {"softmax_scale": scale, "causal": True, "window_size": reach, "softcap": softcap or 0.0}
    o: Tensor = step(q.unsqueeze(1), k, v, cache_seqlens=held, **options)
    return o.squeeze(1)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Pair:
    """Serve `star_kernels.causal_conv1d` with causal-conv1d, whose states have the activations' dtype."""
    taps = weight.shape[1]
    _refuse("causal-conv1d", packed_sequences=cu_seqlens is not None, other_widths_than_2_to_4=not 2 <= taps <= 4)
    state = None
    if initial_state is not None:
        # It wants the channels of a state next to one another.
        state = initial_state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    convolve = _peer("causal-conv1d", "causal_conv1d", "causal_conv1d_fn")
    y, final_state = convolve(
        x.transpose(1, 2), weight, bias, initial_states=state, return_final_states=True, activation=activation
    )
    return y.transpose(1, 2), final_state.float()


def causal_conv1d_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Pair:
    """Serve `star_kernels.causal_conv1d_step` with causal-conv1d, which moves a state on in place: a copy of ours."""
    _refuse("causal-conv1d", other_widths_than_2_to_4=not 2 <= weight.shape[1] <= 4)
    moved = state.to(x.dtype, copy=True)
    y = _peer("causal-conv1d", "causal_conv1d", "causal_conv1d_update")(x, moved, weight, bias, activation)
    return y, moved.float()


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
) -> Pair:
    """Serve `star_kernels.selective_scan` with mamba-ssm."""
    _refuse("mamba-ssm", packed_sequences=cu_seqlens is not None, an_initial_state=initial_state is not None)
    scan = _peer("mamba-ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    u, delta, gate = (None if one is None else one.transpose(1, 2) for one in (x, dt, z))
    inward, outward = (one.permute(0, 2, 3, 1) for one in (B, C))
    skip, bias = (None if one is None else one.float() for one in (D, dt_bias))
    y, final_state = scan(u, delta, A.float(), inward, outward, skip, gate, bias, dt_softplus, return_last_state=True)
    return y.transpose(1, 2), final_state.float()


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
) -> Pair:
    """Serve `star_kernels.selective_scan_step` with mamba-ssm."""
    return _state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _state_update(state: Tensor, *arguments: Any) -> Pair:
    update = _peer("mamba-ssm", "mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    moved = state.float().clone()
    *tensors, dt_softplus = arguments
    y = update(moved, *tensors, dt_softplus=dt_softplus)
    return y, moved


def ssd(
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
) -> Pair:
    """Serve `star_kernels.ssd` with mamba-ssm."""
    _refuse("mamba-ssm", packed_sequences=cu_seqlens is not None)
    scan = _peer("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    options = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "initial_states": initial_state}
    y, final_state = scan(x, dt, A, B, C, _CHUNK, **options, return_final_states=True)
    return y, final_state.float()


def ssd_step(
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
) -> Pair:
    """Serve `star_kernels.ssd_step` with mamba-ssm, which reads one number a head from axes of stride 0."""
    _, heads, width, size = state.shape

    def by_channel(one: Tensor | None) -> Tensor | None:
        return None if one is None else one.unsqueeze(-1).expand(heads, width)

    rates = A.view(heads, 1, 1).expand(heads, width, size)
    steps = dt.unsqueeze(-1).expand(*dt.shape, width)
    return _state_update(state, x, steps, rates, B, C, by_channel(D), z, by_channel(dt_bias), dt_softplus)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Pair:
    """Serve `star_kernels.gated_linear_attention` with fla."""
    run = _peer("fla", "fla.ops.gla", "chunk_gla")
    options = {"initial_state": initial_state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    o, final_state = run(q, k, v, log_decay, scale=scale, **options)
    return o, final_state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Pair:
    """Serve `star_kernels.gated_delta_rule` with fla."""
    run = _peer("fla", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    options = {"initial_state": initial_state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    o, final_state = run(q, k, v, log_decay, beta, scale=scale, **options)
    return o, final_state


_SERVED: dict[str, tuple[Function, ...]] = {
    "flash-attn": (attention, attention_step),
    "causal-conv1d": (causal_conv1d, causal_conv1d_step),
    "mamba-ssm": (selective_scan, selective_scan_step, ssd, ssd_step),
    "fla": (gated_linear_attention, gated_delta_rule),
}


def _unavailable(backend: str) -> str | None:
    if importlib.util.find_spec(_MODULES[backend]) is None:
        return f"{backend} is not installed"
    return None if torch.cuda.is_available() else "torch sees no CUDA or ROCm device"


def _loader(function: Function) -> Callable[[], Function]:
    return lambda: function


def _register(backend: str) -> None:
    dtypes = _HALF if backend == "flash-attn" else (torch.float32, *_HALF)
    dispatch.declare_backend(backend, device_types=("cuda",), unavailable=_unavailable(backend))
    for function in _SERVED[backend]:
        dispatch.register(function.__name__, backend, _loader(function), device_types=("cuda",), dtypes=dtypes)


for _name in _SERVED:
    _register(_name)
