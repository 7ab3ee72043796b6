"""mamba-ssm's protocol of cached decoding, for the layers that came with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from star_core.layers._state import State
from star_core.liv._base import state_dtype


class InferenceCached(nn.Module):
    """A layer whose states are a short convolution's inputs and a recurrence's memory.

    Beside a `state`, it takes mamba-ssm's `inference_params`: any object with `seqlen_offset`, how many tokens have
    been seen, which the caller counts, and `key_value_memory_dict`, which holds (conv_state, ssm_state) under the
    layer's `layer_idx`. Both are modified in place, without a gradient. conv_state has d_conv columns as in mamba-ssm;
    the first is never read, and left as it is.

    Differs from mamba-ssm in: states that it makes itself are float32 whatever the weights' dtype, and several tokens
    may follow the first ones.
    """

    layer_idx: int | None

    def _mix(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
        """Run the layer on (B, T, d_model), from and into `state`, whose entries are "conv" and "ssm"."""
        raise NotImplementedError

    def _cache_shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of conv_state and ssm_state."""
        raise NotImplementedError

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return zero states for `step`.

        Args:
            batch_size: Sequences.
            max_seqlen: Changes nothing: states do not grow.
            dtype: None for float32 (float64 beside float64 weights).
            kwargs: Change nothing, as in mamba-ssm.

        Returns:
            conv_state (B, channels, d_conv) and ssm_state.
        """
        weight: Tensor = next(self.parameters())
        conv_shape, ssm_shape = self._cache_shapes(batch_size)
        dtype = dtype or state_dtype(weight.dtype)
        return weight.new_zeros(conv_shape, dtype=dtype), weight.new_zeros(ssm_shape, dtype=dtype)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run one token of each row.

        Args:
            hidden_states: (B, 1, d_model).
            conv_state: (B, channels, d_conv); modified in place.
            ssm_state: As from `allocate_inference_cache`; modified in place.

        Returns:
            The output, (B, 1, d_model), and the same two states.

        Raises:
            ValueError: `hidden_states` has another number of tokens than one; a state has another shape.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}, needs (B, 1, d_model)")
        self._check_cache(conv_state, ssm_state, hidden_states.shape[0])
        return self._through(hidden_states, conv_state, ssm_state, None, begun=True), conv_state, ssm_state

    def _cached(self, x: Tensor, inference_params: Any, cu_seqlens: Tensor | None) -> Tensor:
        """Run (B, T, d_model) from and into the states that `inference_params` holds for this layer."""
        if self.layer_idx is None:
            raise ValueError("layer_idx is None, needs the layer's number, under which inference_params holds states")
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        held = inference_params.key_value_memory_dict
        if self.layer_idx not in held:
            held[self.layer_idx] = self.allocate_inference_cache(batch)
        conv_state, ssm_state = held[self.layer_idx]
        self._check_cache(conv_state, ssm_state, batch)
        return self._through(x, conv_state, ssm_state, cu_seqlens, begun=inference_params.seqlen_offset > 0)

    def _through(
        self, x: Tensor, conv_state: Tensor, ssm_state: Tensor, cu_seqlens: Tensor | None, *, begun: bool
    ) -> Tensor:
        state: State = {"conv": conv_state[..., 1:], "ssm": ssm_state} if begun else {}
        y = self._mix(x, state, cu_seqlens)
        conv_state[..., 1:] = state["conv"].detach()
        ssm_state.copy_(state["ssm"].detach())
        return y

    def _check_cache(self, conv_state: Tensor, ssm_state: Tensor, batch: int) -> None:
        shapes = self._cache_shapes(batch)
        for name, held, shape in zip(("conv_state", "ssm_state"), (conv_state, ssm_state), shapes, strict=True):
            if held.shape != shape:
                raise ValueError(f"{name} has shape {tuple(held.shape)}, needs {shape} for {batch} sequences")


def check_one_state(state: State | None, inference_params: Any) -> None:
    """Check that a call names one place for its states."""
    if state is not None and inference_params is not None:
        raise ValueError("state and inference_params are both given, needs at most one")
