"""Functional kernels for every layer class of the search space; needs torch alone."""

from star_kernels.attention import attention, attention_step, differential_attention
from star_kernels.dispatch import backends, which
from star_kernels.long_conv import long_conv, long_conv_step
from star_kernels.loss import linear_cross_entropy
from star_kernels.memoryless import channel_mix, geglu, reglu, swiglu
from star_kernels.norm import add_rms_norm, rms_norm, rotary
from star_kernels.recurrence import (
    diagonal_scan,
    diagonal_scan_step,
    gated_delta_rule,
    gated_delta_rule_step,
    gated_linear_attention,
    gated_linear_attention_step,
    rg_lru,
    rg_lru_step,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)
from star_kernels.short_conv import causal_conv1d, causal_conv1d_step, gated_short_conv, gated_short_conv_step

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_step",
    "backends",
    "causal_conv1d",
    "causal_conv1d_step",
    "channel_mix",
    "diagonal_scan",
    "diagonal_scan_step",
    "differential_attention",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "gated_short_conv",
    "gated_short_conv_step",
    "geglu",
    "linear_cross_entropy",
    "long_conv",
    "long_conv_step",
    "reglu",
    "rg_lru",
    "rg_lru_step",
    "rms_norm",
    "rotary",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "swiglu",
    "which",
]
