"""Attention as a recurrence with a matrix for a state: linear attention, gated linear attention, gated delta rule."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from star_core.cache import State, StateSpec, read, write
from star_core.liv._base import (
    LIV,
    Features,
    OutputProjection,
    cu_seqlens_of,
    init_linear_,
    is_step,
    state_dtype,
    with_reused,
)
from star_core.liv.featurizer import HeadNorm, init_step_sizes_
from star_core.liv.groups import GroupFeaturizer
from star_core.ragged import Ragged
from star_kernels import (
    gated_delta_rule,
    gated_delta_rule_step,
    gated_linear_attention,
    gated_linear_attention_step,
)

_LEAST_NORMED = 4
_DECAY_RANK = 16
_DECAY_TEMPERATURE = 16.0


class LinearAttention(LIV):
    """y_i = norm(sum_j (q_i . k_j) v_j / sqrt(K)) over the tokens up to i, as a recurrence whose state is the sum of
    k_j v_j^T.

    Source: Katharopoulos et al., Transformers are RNNs, 2020, arXiv 2006.16236; the norm of each head in place of a
    denominator: Qin et al., The Devil in Linear Transformer, 2022, arXiv 2210.10340, section 4.1. Feature maps of q and
    k are the featurizer's nonlinearities. "k" and "v" may be reused from an earlier LIV.

    Args:
        featurizer: Makes the groups that this LIV computes; may be shared with other LIVs.
        width: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads; a divisor of `heads`.
        key_dim: Channels of a head of queries and keys.
        value_dim: Channels of a head of values.
        gated: Whether the output is multiplied by the group "z".
        reuse: Of "k" and "v", those that an earlier LIV computes.
        norm_eps: Added to the mean square in the norm of the output.
    """

    def __init__(
        self,
        featurizer: GroupFeaturizer,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        gated: bool = False,
        reuse: Collection[str] = (),
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.heads = {"q": (heads, key_dim), "k": (kv_heads, key_dim), "v": (kv_heads, value_dim)}
        self.gated = gated
        self.reuse = frozenset(reuse)
        names = ("q", "k", "v", "z") if gated else ("q", "k", "v")
        self.computed = tuple(name for name in names if name not in self.reuse)
        # A norm of one channel would leave its sign alone: small heads are normed together.
        self.normed = value_dim if value_dim >= _LEAST_NORMED else heads * value_dim
        self.norm = HeadNorm(self.normed, norm_eps)
        self.out = OutputProjection(heads * value_dim, width)

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. "k" and "v" are [B, T, kv_heads, channels], of the tokens of this call alone."""
        groups = self.featurizer(x, self.computed, state, ragged)
        gate = groups.pop("z", None)
        groups = {name: group.unflatten(-1, self.heads[name]) for name, group in groups.items()}
        shared = with_reused(groups, reused, ("k", "v"))
        copies = self.heads["q"][0] // self.heads["k"][0]
        k, v = (one if copies == 1 else one.repeat_interleave(copies, dim=2) for one in shared.values())
        arguments = self._arguments(x, groups["q"], k, v)
        held = None if state is None else read(state, "memory")
        if held is not None and is_step(x, state, ragged):
            o, final = self._step(held, *(one[:, 0] for one in arguments))
            o = o[:, None]
        else:
            o, final = self._scan(arguments, held, cu_seqlens_of(ragged))
        if state is not None:
            write(state, "memory", final)
        y = self.norm(torch.unflatten(o.flatten(-2), -1, (-1, self.normed))).flatten(-2)
        return self.out(y if gate is None else y * gate), shared

    def _arguments(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Return what the recurrence takes, each [B, T, ...]; here no decay at all."""
        return q, k, v, torch.zeros_like(q)

    def _scan(
        self, arguments: tuple[Tensor, ...], held: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = arguments
        return gated_linear_attention(q, k, v, log_decay, initial_state=held, cu_seqlens=cu_seqlens)

    def _step(self, held: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = arguments
        return gated_linear_attention_step(held, q, k, v, log_decay)

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The matrix of each head and the short convolutions' last inputs: the same for any `max_length`."""
        (heads, key_dim), (_, value_dim) = self.heads["q"], self.heads["v"]
        memory = StateSpec((batch_size, heads, key_dim, value_dim), state_dtype(dtype))
        return self.featurizer.state_spec(self.computed, batch_size) | {"memory": memory}


class GatedLinearAttention(LinearAttention):
    """Linear attention whose memory decays by key channel and token.

    Source: Yang et al., Gated Linear Attention, 2023, arXiv 2312.06635, section 4.4: log decays are a map of rank 16 of
    the input, through logsigmoid(.) / 16. The output gate of the source is the group "z".

    Args: as `LinearAttention`.
    """

    def __init__(self, featurizer: GroupFeaturizer, *, width: int, heads: int, key_dim: int, **options: object) -> None:
        super().__init__(featurizer, width=width, heads=heads, key_dim=key_dim, **options)  # type: ignore[arg-type]
        self.decay_in = nn.Parameter(torch.empty(min(_DECAY_RANK, width), width))
        self.decay_out = nn.Parameter(torch.empty(heads * key_dim, min(_DECAY_RANK, width)))
        self.decay_bias = nn.Parameter(torch.zeros(heads * key_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of the decays."""
        init_linear_(self.decay_in)
        init_linear_(self.decay_out)

    def _arguments(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        decay = F.linear(F.linear(x, self.decay_in), self.decay_out, self.decay_bias)
        log_decay = F.logsigmoid(decay.to(state_dtype(decay.dtype))) / _DECAY_TEMPERATURE
        return q, k, v, torch.unflatten(log_decay, -1, self.heads["q"])


class GatedDeltaRule(LinearAttention):
    """Linear attention that decays by head and replaces what its memory held for a key.

    Source: Yang et al., Gated Delta Networks, 2024, arXiv 2412.06464, section 3.4: queries and keys of length one; the
    share replaced is a sigmoid, and the decay Mamba-2's, exp(-exp(A_log) softplus(a + dt_bias)).

    Args: as `LinearAttention`.
    """

    def __init__(self, featurizer: GroupFeaturizer, *, width: int, heads: int, **options: object) -> None:
        super().__init__(featurizer, width=width, heads=heads, **options)  # type: ignore[arg-type]
        self.select = nn.Parameter(torch.empty(2 * heads, width))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        for parameter in (self.dt_bias, self.A_log):
            # decay would pull every time constant to the same
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights; rates of decay uniform in 1 .. 16, and step sizes as a selective recurrence's."""
        init_linear_(self.select)
        init_step_sizes_(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(1.0, 16.0).log_()

    def _arguments(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        a, b = F.linear(x, self.select).chunk(2, dim=-1)
        wide = state_dtype(a.dtype)
        log_decay = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)
        unit_q, unit_k = (F.normalize(one, dim=-1, eps=1e-6) for one in (q, k))
        return unit_q, unit_k, v, log_decay, torch.sigmoid(b)

    def _scan(
        self, arguments: tuple[Tensor, ...], held: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, beta = arguments
        return gated_delta_rule(q, k, v, log_decay, beta, initial_state=held, cu_seqlens=cu_seqlens)

    def _step(self, held: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, beta = arguments
        return gated_delta_rule_step(held, q, k, v, log_decay, beta)
