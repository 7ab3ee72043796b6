"""LFM2's gated short convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from star_core.acceleration._short_conv import convolve_gated
from star_core.acceleration._states import masked
from star_core.layers._state import State, check_input, depthwise, is_step
from star_kernels import gated_short_conv, gated_short_conv_step
from star_kernels.compat._sequences import find_sequences


class Lfm2ShortConv(nn.Module):
    """LFM2's gated short convolution, with the constructor and the parameters of transformers' Lfm2ShortConv.

    y = out_proj(C * conv(B * x)), where B, C and x are the thirds of in_proj's output.

    Source: Liquid AI, "LFM2", 2025, arXiv 2511.23404. Differs from transformers' code in: a call with `seq_idx` or
    `cu_seqlens` keeps packed sequences apart on every device.

    Args:
        config: Anything with `hidden_size`, `conv_L_cache` (the taps) and `conv_bias`, as transformers' Lfm2Config.
        layer_idx: Key of this layer in a cache of transformers.

    Raises:
        ValueError: `conv_L_cache` is below 1.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        if config.conv_L_cache < 1:
            raise ValueError(f"config.conv_L_cache is {config.conv_L_cache}, needs >= 1")
        self.config, self.layer_idx = config, layer_idx
        self.conv_kernel_size, self.bias = config.conv_L_cache, config.conv_bias
        self.hidden_size: int = config.hidden_size
        self.conv = depthwise(self.hidden_size, self.conv_kernel_size, self.bias)
        self.in_proj = nn.Linear(self.hidden_size, 3 * self.hidden_size, bias=self.bias)
        self.out_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=self.bias)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: (B, T, D).
            cache: transformers' cache, read and updated.
            attention_mask: (B, T), 0 for padding, whose inputs are zeroed.
            seq_idx: The sequence of each token, (B, T), int32 or int64; a sequence's tokens are adjacent.
                Not read where `cu_seqlens` says the same.
            cu_seqlens: Boundaries of packed sequences, (S + 1,), with B == 1.
            state: What to continue from and write to; an empty dict starts. Its entry: "conv", the last gated inputs,
                (S, D, taps - 1), float32.
            kwargs: What a model of transformers hands to all its layers. Of it, `cu_seq_lens_q` is read as
                `cu_seqlens`, so that packed sequences are apart without `seq_idx`; the rest changes nothing.

        Returns:
            y: As hidden_states.

        Raises:
            ValueError: `hidden_states` has another shape; a `cache` is given beside another state or beside packed
                sequences, or a `state` beside `seq_idx`.
        """
        check_input("hidden_states", hidden_states, self.hidden_size)
        if cu_seqlens is None and seq_idx is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        arguments = {"state": state, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        given = [name for name, one in arguments.items() if one is not None]
        if cache is not None and given:
            raise ValueError(f"cache is given beside {given[0]}, needs to be alone: it has one sequence a row")
        if state is not None and seq_idx is not None:
            raise ValueError("state is given beside seq_idx, needs cu_seqlens to tell whose state is held")
        shape = hidden_states.shape
        if seq_idx is not None and cu_seqlens is None and seq_idx.numel():
            cu_seqlens = find_sequences(seq_idx, hidden_states, (shape[0], shape[1])).cu_seqlens
            hidden_states = masked(hidden_states, attention_mask).reshape(1, -1, self.hidden_size)
            attention_mask = None
        gate_in, gate_out, x = self.in_proj(masked(hidden_states, attention_mask)).chunk(3, dim=-1)
        if cache is not None:
            y = convolve_gated(self, x, gate_in, gate_out, cache)
        else:
            y = self._convolve(x, gate_in, gate_out, state, cu_seqlens)
        out: Tensor = self.out_proj(y).view(shape)
        return out

    def _convolve(
        self, x: Tensor, gate_in: Tensor, gate_out: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        weight, bias = self.conv.weight.squeeze(1), self.conv.bias
        if state is not None and is_step(x, state, cu_seqlens):
            rows = (x[:, 0], gate_in[:, 0], gate_out[:, 0])
            row, state["conv"] = gated_short_conv_step(state["conv"], *rows, weight, bias)
            return row.unsqueeze(1)
        held = None if state is None else state.get("conv")
        y, final = gated_short_conv(x, gate_in, gate_out, weight, bias, initial_state=held, cu_seqlens=cu_seqlens)
        if state is not None:
            state["conv"] = final
        return y
