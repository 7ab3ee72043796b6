"""causal-conv1d's functions."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels._validation import check_first
from star_kernels.compat._sequences import find_sequences
from star_kernels.short_conv import causal_conv1d, causal_conv1d_step


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `causal_conv1d` with causal-conv1d's signature.

    Args:
        x: (B, D, T).
        weight: (D, W).
        bias: (D,).
        seq_idx: The sequence of each token, (B, T), int32 or int64; a sequence's tokens are adjacent. Negative where a
            token is padding, which gives zeros.
        initial_states: For the first sequence of each row, (B, D, W - 1).
        return_final_states: Whether to return the states too; not with `seq_idx`.
        final_states_out: (B, D, W - 1), written to, and returned as the states.
        activation: None, "silu" or "swish".

    Returns:
        y (B, D, T), alone or with the final states (B, D, W - 1), in x.dtype.

    Raises:
        NotImplementedError: `return_final_states` with `seq_idx`, which the peer refuses too; else as `causal_conv1d`.
    """
    check_first("x", x, 3, "(B, D, T)")
    tokens = x.transpose(1, 2)
    if seq_idx is None or x.numel() == 0:
        y, final = causal_conv1d(tokens, weight, bias, activation=activation, initial_state=initial_states)
        if not return_final_states:
            return y.transpose(1, 2)
        return y.transpose(1, 2), final.to(x.dtype) if final_states_out is None else final_states_out.copy_(final)
    if return_final_states:
        raise NotImplementedError("return_final_states with seq_idx is not supported")
    batch, width, length = x.shape
    sequences = find_sequences(seq_idx, x, (batch, length))
    y, _ = causal_conv1d(
        tokens.reshape(1, batch * length, width),
        weight,
        bias,
        activation=activation,
        initial_state=sequences.spread(initial_states),
        cu_seqlens=sequences.cu_seqlens,
    )
    return y.view(batch, length, width).transpose(1, 2).masked_fill((seq_idx < 0).unsqueeze(1), 0.0)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Run `causal_conv1d` on the next tokens and keep them in `conv_state`; as in causal-conv1d, without a gradient.

    Args:
        x: (B, D) or (B, D, T).
        conv_state: The last L >= W - 1 inputs, newest last, (B, D, L); modified.
        weight: (D, W).
        bias: (D,).
        activation: None, "silu" or "swish".
        cache_seqlens: Tokens seen so far, (B,): `conv_state` is then a ring, in which token i lies at i % L.
        conv_state_indices: The row of `conv_state` that belongs to each row of x, (B,); negative for a row of padding,
            which gives zeros and changes no state.

    Returns:
        y: As x.

    Raises:
        ValueError: `conv_state` has too little room; else as `causal_conv1d`.
    """
    chunk = x.unsqueeze(-1) if x.ndim == 2 else x
    check_first("x", chunk, 3, "(B, D) or (B, D, T)")
    check_first("conv_state", conv_state, 3, "(B, D, L)")
    length, history, room = chunk.shape[2], weight.shape[1] - 1, conv_state.shape[2]
    if room < history:
        raise ValueError(f"conv_state has room for {room} tokens, needs W - 1 = {history} or more")
    padding = None if conv_state_indices is None else conv_state_indices < 0
    rows = None if conv_state_indices is None else conv_state_indices.clamp(min=0).long()
    state = conv_state if rows is None else conv_state[rows]
    if cache_seqlens is None:
        past = state[..., room - history :]
        new_state = torch.cat([state, chunk.to(state.dtype)], dim=2)[..., length:]
    else:
        kept = min(length, room)
        past = state.gather(2, _places(cache_seqlens, -history, 0, state))
        newest = chunk[..., length - kept :].to(state.dtype)
        new_state = state.scatter(2, _places(cache_seqlens, length - kept, length, state), newest)
    if length == 1:
        y = causal_conv1d_step(past, chunk[..., 0], weight, bias, activation=activation)[0].unsqueeze(-1)
    else:
        y = causal_conv1d(chunk.transpose(1, 2), weight, bias, activation=activation, initial_state=past)[0]
        y = y.transpose(1, 2)
    if rows is None or padding is None:
        conv_state.copy_(new_state)
    else:
        conv_state[rows[~padding]] = new_state[~padding]
        y = y.masked_fill(padding.view(-1, 1, 1), 0.0)
    return y.squeeze(-1) if x.ndim == 2 else y


def _places(seen: Tensor, start: int, stop: int, state: Tensor) -> Tensor:
    """Return where tokens seen + start .. seen + stop - 1 lie in a ring (B, D, L), as an index (B, D, stop - start)."""
    tokens = seen.long().unsqueeze(1) + torch.arange(start, stop, device=state.device)
    return (tokens % state.shape[2]).unsqueeze(1).expand(-1, state.shape[1], -1)
