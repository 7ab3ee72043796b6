"""Linear recurrences with input-dependent decays, each with its one-token step."""

from star_kernels.recurrence._diagonal import diagonal_scan, diagonal_scan_step, rg_lru, rg_lru_step
from star_kernels.recurrence._matrix_memory import (
    gated_delta_rule,
    gated_delta_rule_step,
    gated_linear_attention,
    gated_linear_attention_step,
)
from star_kernels.recurrence._state_space import selective_scan, selective_scan_step, ssd, ssd_step

__all__ = [
    "diagonal_scan",
    "diagonal_scan_step",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "rg_lru",
    "rg_lru_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
]
