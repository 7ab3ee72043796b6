"""flash-linear-attention's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from star_kernels._numerics import accumulator
from star_kernels._validation import check_first, check_groups, check_shape
from star_kernels.recurrence import gated_delta_rule, gated_linear_attention

# The peer's: 1 / sqrt(sum of squares + this).
_L2_NORM_EPS = 1e-6


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run `gated_linear_attention` with flash-linear-attention's signature.

    Args:
        q: (B, T, H, K).
        k: (B, T, H, K).
        v: (B, T, H, V).
        g: Natural logarithm of the decay, (B, T, H, K).
        scale: Factor of q; None for K^(-1/2).
        initial_state: (S, H, K, V), or (S, H, V, K) with `state_v_first`.
        output_final_state: Whether to return the state.
        state_v_first: Whether states lie with V before K.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), with B == 1.
        cu_seqlens_cpu: Changes nothing.

    Returns:
        o (B, T, H, V), and the final state as `initial_state`, or None.

    Raises:
        ValueError, TypeError: As `gated_linear_attention`.
    """
    state = _turn(initial_state, state_v_first)
    o, final = gated_linear_attention(q, k, v, g, scale=scale, initial_state=state, cu_seqlens=cu_seqlens)
    return o, _turn(final, state_v_first) if output_final_state else None


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run `gated_linear_attention` with the signature of flash-linear-attention's recurrent form.

    Args:
        q: (B, T, H, K).
        k: (B, T, H, K).
        v: (B, T, H, V).
        gk: Natural logarithm of the keys' decay, (B, T, H, K); None for no decay.
        gv: None: a decay of the values is not supported.
        scale: Factor of q; None for K^(-1/2).
        initial_state: (S, H, K, V), or (S, H, V, K) with `state_v_first`.
        output_final_state: Whether to return the state.
        reverse: Whether to run from the last token of each sequence to its first.
        state_v_first: Whether states lie with V before K.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), with B == 1.
        **kwargs: None: the peer's deprecated names are not supported.

    Returns:
        o (B, T, H, V), and the final state as `initial_state`, or None.

    Raises:
        NotImplementedError: `gv` or another keyword; else as `gated_linear_attention`.
    """
    _refuse(kwargs)
    if gv is not None:
        raise NotImplementedError("gv is not supported: the decay is by key channel")
    state = _turn(initial_state, state_v_first)
    decay = k.new_zeros(()).expand(k.shape) if gk is None else gk
    if reverse:
        # A packed row read backwards holds the sequences in reverse order too.
        q, k, v, decay = (one.flip(1) for one in (q, k, v, decay))
        if cu_seqlens is not None:
            state = None if state is None else state.flip(0)
            cu_seqlens = cu_seqlens[-1] - cu_seqlens.flip(0)
    o, final = gated_linear_attention(q, k, v, decay, scale=scale, initial_state=state, cu_seqlens=cu_seqlens)
    if reverse:
        o, final = o.flip(1), final if cu_seqlens is None else final.flip(0)
    return o, _turn(final, state_v_first) if output_final_state else None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run `gated_delta_rule` with flash-linear-attention's signature.

    Args:
        q: (B, T, H, K).
        k: (B, T, H, K).
        v: (B, T, HV, V), H divides HV; value head h reads key head h // (HV / H).
        g: Natural logarithm of the decay, (B, T, HV).
        beta: (B, T, HV).
        scale: Factor of q; None for K^(-1/2).
        initial_state: (S, HV, K, V), or (S, HV, V, K) with `state_v_first`.
        output_final_state: Whether to return the state.
        use_qk_l2norm_in_kernel: Whether to divide each q and k by its Euclidean norm first.
        use_beta_sigmoid_in_kernel: Whether beta goes through a sigmoid first.
        allow_neg_eigval: Whether to double that sigmoid; needs `use_beta_sigmoid_in_kernel`.
        state_v_first: Whether states lie with V before K.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), with B == 1.
        cu_seqlens_cpu: Changes nothing.
        chunk_indices: Changes nothing.
        cp_context: None: a sequence over several devices is not supported.
        **kwargs: `use_gate_in_kernel`, with which g becomes -exp(A_log) softplus(g + dt_bias), `A_log` (HV,) and
            `dt_bias` (HV,) or None; `chunk_size`, which changes nothing.

    Returns:
        o (B, T, HV, V), and the final state as `initial_state`, or None.

    Raises:
        NotImplementedError: `cp_context` or an unknown keyword; ValueError: HV is no multiple of H, `allow_neg_eigval`
            without `use_beta_sigmoid_in_kernel`, or `use_gate_in_kernel` without `A_log`; else as `gated_delta_rule`.
    """
    use_gate, A_log, dt_bias = (kwargs.pop(name, None) for name in ("use_gate_in_kernel", "A_log", "dt_bias"))
    kwargs.pop("chunk_size", None)
    _refuse(kwargs)
    if cp_context is not None:
        raise NotImplementedError("cp_context is not supported")
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval is True, needs use_beta_sigmoid_in_kernel too")
    for name, value, layout in (("q", q, "(B, T, H, K)"), ("k", k, "(B, T, H, K)"), ("v", v, "(B, T, HV, V)")):
        check_first(name, value, 4, layout)
    wide = accumulator(q.dtype)
    if use_gate:
        if A_log is None:
            raise ValueError("A_log is None, needs (HV,) with use_gate_in_kernel")
        check_shape("A_log", A_log, v.shape[2:3], "(HV,)", q)
        raw = g.to(wide) if dt_bias is None else g.to(wide) + dt_bias.to(wide)
        g = -A_log.to(wide).exp() * functional.softplus(raw)
    if use_qk_l2norm_in_kernel:
        q, k = (_normalise(one) for one in (q, k))
    if use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta.to(wide)) * (2.0 if allow_neg_eigval else 1.0)
    heads, value_heads = q.shape[2], v.shape[2]
    if heads != value_heads:
        check_groups("q", heads, "v", value_heads)
        q, k = (one.repeat_interleave(value_heads // one.shape[2], dim=2) for one in (q, k))
    state = _turn(initial_state, state_v_first)
    o, final = gated_delta_rule(q, k, v, g, beta, scale=scale, initial_state=state, cu_seqlens=cu_seqlens)
    return o, _turn(final, state_v_first) if output_final_state else None


def _turn(state: Tensor | None, v_first: bool) -> Tensor | None:
    return state.transpose(-1, -2) if v_first and state is not None else state


def _normalise(x: Tensor) -> Tensor:
    values = x.to(accumulator(x.dtype))
    return (values * torch.rsqrt(values.square().sum(-1, keepdim=True) + _L2_NORM_EPS)).to(x.dtype)


def _refuse(keywords: dict[str, Any]) -> None:
    if keywords:
        raise NotImplementedError(f"{', '.join(sorted(keywords))}: not supported")
