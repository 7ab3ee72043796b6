"""Rivals from other packages, where they are installed: their torch code that runs on a CPU, and Liger's GPU kernels.

Other packages' GPU kernels for operators of ours are backends, which the suite times as such. A package that is not
there, or that fails to import, has no rows. Nothing here is a dependency.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from torch import Tensor

from bench.peers import Function, Peer


def installed_peers(operator: str) -> tuple[Peer, ...]:
    """Return an operator's rivals from the packages that import here."""
    candidates = _CANDIDATES.get(operator, ())
    return tuple(peer for peer, module, name in candidates if _found(module, name) is not None)


@cache
def _found(module: str, name: str) -> Function | None:
    try:
        function: Function | None = getattr(importlib.import_module(module), name, None)
    except Exception:
        # Not installed, or broken: a package built for another torch may raise anything.
        return None
    return function


def _call(module: str, name: str) -> Function:
    function = _found(module, name)
    assert function is not None  # only found ones are offered
    return function


_FLA_GLA = ("fla.ops.gla.naive", "naive_recurrent_gla")
_FLA_DELTA = ("fla.ops.gated_delta_rule.naive", "naive_chunk_gated_delta_rule")
_TRANSFORMERS_DELTA = ("transformers.models.qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule")
_MAMBA_SCAN = ("mamba_ssm.ops.selective_scan_interface", "selective_scan_ref")
_CONV = ("causal_conv1d.causal_conv1d_interface", "causal_conv1d_ref")


def _fla_gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Any:
    return _call(*_FLA_GLA)(q, k, v, log_decay)[0]


def _fla_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Any:
    return _call(*_FLA_DELTA)(q=q, k=k, v=v, g=log_decay, beta=beta)[0]


def _transformers_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Any:
    return _call(*_TRANSFORMERS_DELTA)(q, k, v, g=log_decay, beta=beta)[0]


def _mamba_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool = False,
) -> Any:
    u, delta, gate = (one.transpose(1, 2) for one in (x, dt, z))
    inward, outward = (one.permute(0, 2, 3, 1) for one in (B, C))
    scan = _call(*_MAMBA_SCAN)
    y = scan(u, delta, A, inward, outward, D=D, z=gate, delta_bias=dt_bias, delta_softplus=dt_softplus)
    return y.transpose(1, 2)


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None) -> Any:
    return _call(*_CONV)(x.transpose(1, 2), weight, bias, activation=activation).transpose(1, 2)


# Liger's functions, which take their arguments by position: a norm's are eps, what is added to the weight, the rounding
# (as Llama's), and whether a gradient may overwrite what came in, which a second call in a row would not survive.
_LIGER = "liger_kernel.transformers.functional"
_LIGER_NORM = (1e-6, 0.0, "llama", False)


def _liger_rms_norm(x: Tensor, weight: Tensor) -> Any:
    return _call(_LIGER, "liger_rms_norm")(x, weight, *_LIGER_NORM)


def _liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return _call(_LIGER, "liger_fused_add_rms_norm")(x, residual, weight, *_LIGER_NORM)


def _liger_swiglu(gate: Tensor, up: Tensor) -> Any:
    return _call(_LIGER, "liger_swiglu")(gate, up)


def _liger_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    loss = _call(_LIGER, "liger_fused_linear_cross_entropy")
    return loss(hidden.flatten(0, -2), weight, targets.flatten())


_CANDIDATES: dict[str, tuple[tuple[Peer, str, str], ...]] = {
    "gated_linear_attention": ((Peer("fla", _fla_gated_linear_attention), *_FLA_GLA),),
    "gated_delta_rule": (
        (Peer("fla", _fla_gated_delta_rule), *_FLA_DELTA),
        (Peer("transformers", _transformers_gated_delta_rule), *_TRANSFORMERS_DELTA),
    ),
    "selective_scan": ((Peer("mamba-ssm", _mamba_selective_scan), *_MAMBA_SCAN),),
    "causal_conv1d": ((Peer("causal-conv1d", _causal_conv1d), *_CONV),),
    "rms_norm": ((Peer("liger", _liger_rms_norm), _LIGER, "liger_rms_norm"),),
    "add_rms_norm": ((Peer("liger", _liger_add_rms_norm), _LIGER, "liger_fused_add_rms_norm"),),
    "swiglu": ((Peer("liger", _liger_swiglu), _LIGER, "liger_swiglu"),),
    "linear_cross_entropy": ((Peer("liger", _liger_linear_cross_entropy), _LIGER, "liger_fused_linear_cross_entropy"),),
}
