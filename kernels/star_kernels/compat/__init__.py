"""The peers' own signatures as thin aliases: change one import, and a program written for them runs on these operators.

    causal-conv1d 1.7             causal_conv1d_fn, causal_conv1d_update
    mamba-ssm 2.3                 selective_scan_fn, selective_state_update, mamba_chunk_scan_combined
    flash-linear-attention 0.6    chunk_gla, fused_recurrent_gla, chunk_gated_delta_rule
    flash-attn 2.8                flash_attn_func, flash_attn_varlen_func

Names, order and defaults of the parameters are the peers', and so are shapes, what is returned and what is written in
place. Hints to the peers' kernels change nothing: `chunk_size`, `chunk_indices`, `cu_seqlens_cpu`, `max_seqlen_q`,
`max_seqlen_k`, and `deterministic`, which these operators always are. An option without a counterpart raises
NotImplementedError by name; unfit shapes, dtypes and values raise as in the operator behind. Sizes, dtypes and devices
are those of the operators, so that some calls are served that the peers refuse. Where a peer puts time last, results
lie in memory with time before the channels, whatever the layout of the inputs.
"""

from star_kernels.compat._causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from star_kernels.compat._flash_attn import flash_attn_func, flash_attn_varlen_func
from star_kernels.compat._flash_linear_attention import chunk_gated_delta_rule, chunk_gla, fused_recurrent_gla
from star_kernels.compat._mamba_ssm import mamba_chunk_scan_combined, selective_scan_fn, selective_state_update

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "fused_recurrent_gla",
    "mamba_chunk_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]
