"""Selective linear recurrence: LIV classes Rec-1 and Rec-2."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from star_core.cache import State, StateSpec, read, write
from star_core.liv._base import LIV, Features, OutputProjection, cu_seqlens_of, is_step, state_dtype
from star_core.liv.featurizer import RecurrenceFeaturizer
from star_core.ragged import Ragged
from star_kernels import selective_scan, selective_scan_step


class Recurrence(LIV):
    """y_t = C_t h_t + D x_t, gated by SiLU(z_t), with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t.

    Source: Gu and Dao, Mamba, 2023, arXiv 2312.00752, equations 2 and algorithm 2. "B" and "C" may be reused from an
    earlier LIV.

    Args:
        featurizer: Makes the groups that this LIV computes; may be shared with other LIVs.
        width: Width of the residual stream.
        inner: Channels of the recurrence.
        state_size: State of a channel, N.
        reuse: Of "B" and "C", those that an earlier LIV computes.
    """

    def __init__(
        self, featurizer: RecurrenceFeaturizer, *, width: int, inner: int, state_size: int, reuse: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.inner = inner
        self.state_size = state_size
        self.reuse = frozenset(reuse)
        self.computed = tuple(name for name in ("B", "C") if name not in self.reuse)
        self.D = nn.Parameter(torch.ones(inner))
        self.out = OutputProjection(inner, width)

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. "B" and "C" are [B, T, 1, N]."""
        groups = self.featurizer(x, self.computed, state, ragged)
        shared = {name: groups[name] if name in groups else (reused or {})[name] for name in ("B", "C")}
        A, bias = groups["A"], self.featurizer.dt_bias
        held = None if state is None else read(state, "h")
        if held is not None and is_step(x, state, ragged):
            step = [tensor[:, 0] for tensor in (groups["x"], groups["dt"], shared["B"], shared["C"], groups["z"])]
            y, final = selective_scan_step(
                held, step[0], step[1], A, step[2], step[3], D=self.D, z=step[4], dt_bias=bias, dt_softplus=True
            )
            y = y[:, None]
        else:
            y, final = selective_scan(
                groups["x"],
                groups["dt"],
                A,
                shared["B"],
                shared["C"],
                D=self.D,
                z=groups["z"],
                dt_bias=bias,
                dt_softplus=True,
                initial_state=held,
                cu_seqlens=cu_seqlens_of(ragged),
            )
        if state is not None:
            write(state, "h", final)
        return self.out(y), shared

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The recurrent state and the short convolution's last inputs: the same for any `max_length`."""
        return {
            "conv_x": self.featurizer.conv.state_spec(batch_size),
            "h": StateSpec((batch_size, self.inner, self.state_size), state_dtype(dtype)),
        }
