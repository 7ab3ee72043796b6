"""Attention with rotary positions, and DiffLlama's differential attention."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from star_core.acceleration._rules import Arguments, Forward, Offer, Rule, class_name, lacks, or_original, original
from star_kernels import attention, attention_step, differential_attention, rms_norm, rotary

# What the attention that is replaced here reads and calls: an original that does more is another one.
_KNOWN_NAMES = frozenset({
    "shape", "head_dim", "view", "transpose", "update", "layer_idx", "get_interface", "config",
    "_attn_implementation", "training", "attention_dropout", "scaling", "reshape", "contiguous", "getattr",
    "sliding_window", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "q_norm", "k_norm", "q_layernorm",
    "k_layernorm", "key_multiplier", "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward",
    "Callable", "rotary_emb", "torch", "chunk", "sigmoid",
})  # fmt: skip

_DIFFERENTIAL_NAMES = frozenset({
    "groupnorm", "lambda_init", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "torch", "chunk", "repeat",
    "cat", "exp", "sum", "float32", "to", "dtype",
})  # fmt: skip

_KNOWN_ROTARY_SETTINGS = frozenset({"rope_type", "rope_theta", "partial_rotary_factor"})

# Arguments with which torch's attention, as transformers calls it, does something that `attention` here does not.
_NEEDS_TORCH = ("position_bias", "is_causal", "s_aux")


def attention_forward(gated: bool, windowed: bool) -> Forward:
    """Return the forward for attention with rotary positions, with torch's attention where there is a mask.

    Args:
        gated: Whether the query's projection also gives a gate of the output, as Qwen3-Next's does.
        windowed: Whether the original names its window to what attends.
    """

    @or_original
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        positions = kwargs.get("position_ids")
        rotates = position_embeddings is not None or hasattr(self, "rotary_emb")
        if positions is None or not rotates:
            return _original(self, hidden_states, position_embeddings, attention_mask, cache, kwargs)
        q, k, v = _heads(self, hidden_states)
        # Heads of queries and of the gate alternate.
        q, gate = q.reshape(*q.shape[:2], -1, 2, self.head_dim).unbind(-2) if gated else (q, None)
        q, k = _normed(self, q, k)
        q, k = _rotate(self, q, positions), _rotate(self, k, positions)
        keys, values = _extended(self, k, v, cache, kwargs)
        if windowed:
            kwargs["sliding_window"] = _window(self)
        o, weights = _attend(self, q, keys, values, attention_mask, kwargs)
        o = o.reshape(*hidden_states.shape[:-1], -1)
        o = o if gate is None else o * torch.sigmoid(gate.flatten(-2))
        return (self.o_proj if hasattr(self, "o_proj") else self.out_proj)(o), weights

    return forward


def _attend(
    self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Attend from q to k and v, all (B, T, H, D), with the kernels where only causality limits what is seen."""
    # Under autocast a norm makes queries and keys wider than values, which torch's attention narrows again.
    if q.dtype == v.dtype and _is_causal_alone(self, q, k, mask, kwargs):
        if q.shape[1] == 1:
            return attention_step(q[:, 0], k, v, scale=self.scaling), None
        return attention(q, k, v, scale=self.scaling), None
    scope = vars(sys.modules[type(self).__module__])
    interface = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(
        self.config._attn_implementation, scope["eager_attention_forward"]
    )
    dropout = self.attention_dropout if self.training and hasattr(self, "attention_dropout") else 0.0
    heads = (one.transpose(1, 2) for one in (q, k, v))
    o, weights = interface(self, *heads, mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return o, weights


@or_original
def differential_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend from (B, T, width) with the difference of two maps; as the original where there is a mask."""
    positions = kwargs.get("position_ids")
    held = 0 if cache is None else cache.get_seq_length(self.layer_idx)
    alone = attention_mask is None and self.config._attn_implementation == "sdpa"
    alone = alone and (held == 0 or hidden_states.shape[1] == 1) and not _needs_torch(kwargs)
    if positions is None or position_embeddings is None or not alone:
        return _original(self, hidden_states, position_embeddings, attention_mask, cache, kwargs)
    q, k, v = _heads(self, hidden_states)
    keys, values = _extended(self, _rotate(self, k, positions), v, cache, kwargs)
    q1, q2 = _rotate(self, q, positions).chunk(2, dim=2)
    k1, k2 = keys.chunk(2, dim=2)
    lam = torch.exp((self.lambda_q1 * self.lambda_k1).sum(dtype=torch.float32))
    lam = lam - torch.exp((self.lambda_q2 * self.lambda_k2).sum(dtype=torch.float32)) + self.lambda_init
    both = torch.cat(values.chunk(2, dim=2), dim=-1)
    o = differential_attention(q1, k1, q2, k2, both, lam, scale=self.scaling)
    factor = o.new_full(o.shape[-1:], 1 - self.lambda_init, dtype=torch.float32)
    o = rms_norm(o, factor, eps=self.groupnorm.eps)
    return self.o_proj(o.reshape(*hidden_states.shape[:-1], -1)), None


def _original(
    self: Any,
    hidden_states: Tensor,
    embeddings: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    output: tuple[Tensor, Tensor | None] = original(
        self, hidden_states, position_embeddings=embeddings, attention_mask=mask, cache=cache, **kwargs
    )
    return output


def _heads(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, (B, T, H, D), as they are projected."""
    q, k, v = (one(x).unflatten(-1, (-1, self.head_dim)) for one in (self.q_proj, self.k_proj, self.v_proj))
    return q, k, v


def _normed(self: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and scale queries and keys as the layer has it."""
    for names in (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm")):
        if hasattr(self, names[0]):
            q, k = getattr(self, names[0])(q), getattr(self, names[1])(k)
    return q, k * self.key_multiplier if hasattr(self, "key_multiplier") else k


def _rotary_settings(self: Any) -> dict[str, Any]:
    settings = getattr(self.config, "rope_parameters", None)
    return settings if isinstance(settings, dict) else {}


def _rotate(self: Any, x: Tensor, positions: Tensor) -> Tensor:
    settings = _rotary_settings(self)
    width = int(self.head_dim * settings.get("partial_rotary_factor", 1.0))
    # transformers gives one row of positions for a whole batch.
    positions = positions[0] if positions.shape[0] == 1 else positions
    if width == self.head_dim:
        return rotary(x, positions, base=settings["rope_theta"])
    return torch.cat([rotary(x[..., :width], positions, base=settings["rope_theta"]), x[..., width:]], dim=-1)


def _extended(self: Any, k: Tensor, v: Tensor, cache: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return keys and values (B, S, H, D) with those of the cache before them, which is extended."""
    if cache is None:
        return k, v
    k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx, kwargs=kwargs)
    return k.transpose(1, 2), v.transpose(1, 2)


def _needs_torch(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in _NEEDS_TORCH)


def _is_causal_alone(self: Any, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Return whether nothing but causality limits what queries see, on a device where the kernels gain."""
    if mask is not None or self.config._attn_implementation != "sdpa" or not q.is_cpu or _needs_torch(kwargs):
        return False
    dropped = self.training and getattr(self, "attention_dropout", 0.0) > 0.0
    return self.is_causal and not dropped and q.shape[1] in (1, k.shape[1])


def _names(module: nn.Module) -> frozenset[str]:
    """Return what a module's own forward reads and calls."""
    return frozenset(inspect.unwrap(type(module).forward).__code__.co_names)


def _names_window(module: nn.Module) -> bool:
    """Return whether a module's own forward gives an argument of that name."""
    constants = inspect.unwrap(type(module).forward).__code__.co_consts
    return any(one == "sliding_window" or (isinstance(one, tuple) and "sliding_window" in one) for one in constants)


def _window(self: Any) -> int | None:
    if hasattr(self, "sliding_window"):
        window: int | None = self.sliding_window
        return window
    return getattr(self.config, "sliding_window", None)


def _applies(module: nn.Module) -> bool:
    name = class_name(module)
    known = all(hasattr(module, one) for one in ("q_proj", "k_proj", "v_proj", "head_dim", "scaling", "config"))
    return name.endswith("Attention") and known and "apply_rotary_pos_emb" in vars(sys.modules[type(module).__module__])


def _offers(module: Any) -> list[Offer] | str:
    is_differential = hasattr(module, "lambda_init")
    unknown = _names(module) - (_KNOWN_NAMES | _DIFFERENTIAL_NAMES if is_differential else _KNOWN_NAMES)
    if unknown:
        return f"its attention does more than the one known here ({', '.join(sorted(unknown))})"
    settings = _rotary_settings(module)
    if settings.get("rope_type") != "default" or "rope_theta" not in settings or set(settings) - _KNOWN_ROTARY_SETTINGS:
        return "its rotary positions are not the plain ones"
    if is_differential:
        reason = lacks(module, "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "groupnorm", "o_proj")
        return reason or [Offer(("rotary", "differential_attention", "rms_norm"), differential_forward)]
    if not hasattr(module, "o_proj") and not hasattr(module, "out_proj"):
        return "it has no output projection known here"
    return [Offer(("rotary", "attention"), attention_forward("sigmoid" in _names(module), _names_window(module)))]


def _probe(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    x = normal(2, 5, module.q_proj.in_features)
    settings = _rotary_settings(module)
    width = int(module.head_dim * settings.get("partial_rotary_factor", 1.0))
    positions = torch.arange(3, 8, device=x.device)[None]
    turns = settings["rope_theta"] ** -(torch.arange(0, width, 2, device=x.device).float() / width)
    angles = torch.cat([positions[..., None].float() * turns] * 2, dim=-1)
    embeddings = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    return (x,), {"position_embeddings": embeddings, "attention_mask": None, "position_ids": positions}


RULE = Rule(_applies, _offers, _probe)
