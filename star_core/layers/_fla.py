"""What the layers of flash-linear-attention have in common: their call, their cache, and their norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.layers._state import State, check_input, convolve, depthwise
from star_core.liv.featurizer import HeadNorm
from star_core.ragged import Ragged, attention_mask_of
from star_kernels import rms_norm, swiglu

_CONVOLVED = ("q", "k", "v")


class GatedHeadNorm(HeadNorm):
    """RMS norm of each head, and the gate after it where one is given.

    Args:
        width: Channels of a head.
        eps: Added to the mean square.
        affine: Whether there is a weight.
        sigmoid: Whether the gate goes through a sigmoid, not through silu.
    """

    def __init__(self, width: int, eps: float, *, affine: bool = True, sigmoid: bool = False) -> None:
        super().__init__(width, eps)
        self.affine, self.sigmoid = affine, sigmoid
        if not affine:
            self.register_parameter("weight", None)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise x, (..., width), and multiply by the activated gate, of the same shape."""
        normed = super().forward(x) if self.affine else rms_norm(x, x.new_ones(x.shape[-1:]), eps=self.eps)
        if gate is None:
            return normed
        return normed * torch.sigmoid(gate) if self.sigmoid else swiglu(gate, normed)


class FlaLayer(nn.Module):
    """A layer that is called as those of fla.layers are.

    Beside a `state`, it takes fla's cache as `past_key_values`: any object with a length, `[layer_idx]` and `update`.
    What it puts there is its own, so that one cache serves one kind of layer from prefill to the last step: the
    recurrent state is (S, H, K, V), and each state of a short convolution (S, D, W - 1).
    """

    hidden_size: int
    layer_idx: int | None
    use_short_conv: bool

    def _mix(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
        """Run the layer on (B, T, hidden_size), from and into `state`."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        *,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """Run the layer.

        Args:
            hidden_states: (B, T, hidden_size).
            attention_mask: 0 for padding, (B, T) or longer, of which the last T columns count. Padded tokens are left
                out, and their outputs are 0. Not read beside `cu_seqlens`.
            past_key_values: fla's cache, read where it holds this layer.
            use_cache: Whether to update it.
            output_attentions: Must be False: there is no attention map.
            cu_seqlens: Boundaries of packed sequences, (S + 1,), with B == 1.
            state: What to continue from and write to; an empty dict starts. Its entries: "recurrent", (S, H, K, V),
                and "conv_q", "conv_k" and "conv_v", (S, D, W - 1), where there are convolutions; all float32.
            kwargs: What a model of fla hands to all its layers; changes nothing.

        Returns:
            y: As hidden_states; None; `past_key_values`.

        Raises:
            ValueError: `hidden_states` or `attention_mask` has another shape; `output_attentions` is asked for; two
                states are given, or a cache without a `layer_idx`.
        """
        check_input("hidden_states", hidden_states, self.hidden_size)
        if output_attentions:
            raise ValueError("output_attentions is True, needs False: the layer has no attention map")
        if past_key_values is not None:
            if state is not None:
                raise ValueError("state and past_key_values are both given, needs at most one")
            state = self._read(past_key_values)
        batch, length, _ = hidden_states.shape
        x, ragged = hidden_states, None
        if attention_mask is not None and cu_seqlens is None:
            if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, needs (B, T) = {(batch, length)}, or more"
                    " tokens before the last T"
                )
            mask = attention_mask_of(attention_mask[:, attention_mask.shape[1] - length :], (batch, length), x.device)
            ragged = Ragged.pack(mask, None)
            x, cu_seqlens = ragged.gather(x), ragged.cu_seqlens
        y = self._mix(x, state, cu_seqlens)
        if past_key_values is not None and use_cache and state is not None:
            past_key_values.update(
                recurrent_state=state["recurrent"],
                conv_state=tuple(state[f"conv_{name}"] for name in _CONVOLVED) if self.use_short_conv else None,
                layer_idx=self.layer_idx,
                offset=length,
            )
        return y if ragged is None else ragged.scatter(y, (batch, length)), None, past_key_values

    def _read(self, past_key_values: Any) -> State:
        if self.layer_idx is None:
            raise ValueError("layer_idx is None, needs the layer's number, under which past_key_values holds states")
        if len(past_key_values) <= self.layer_idx:
            return {}
        held = past_key_values[self.layer_idx]
        state: State = {"recurrent": held["recurrent_state"]}
        if self.use_short_conv:
            state |= {f"conv_{name}": one for name, one in zip(_CONVOLVED, held["conv_state"], strict=True)}
        return state

    def _make_convolutions(self, widths: tuple[int, int, int], taps: int, bias: bool) -> None:
        for name, width in zip(_CONVOLVED, widths, strict=True):
            self.add_module(f"{name}_conv1d", depthwise(width, taps, bias))

    def _project(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, *, activated: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, beyond their convolutions; without those, through a silu if `activated`."""
        made = []
        for name in _CONVOLVED:
            one = self.get_submodule(f"{name}_proj")(x)
            if self.use_short_conv:
                conv = self.get_submodule(f"{name}_conv1d")
                assert isinstance(conv, nn.Conv1d)
                one = convolve(one, conv, activation="silu", state=state, name=f"conv_{name}", cu_seqlens=cu_seqlens)
            made.append(F.silu(one) if activated and not self.use_short_conv else one)
        return made[0], made[1], made[2]
