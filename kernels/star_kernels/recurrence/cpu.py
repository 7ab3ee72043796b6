"""The compiled recurrences: those with a diagonal state, and those with a matrix state."""

from star_kernels.recurrence import _cpu_diagonal, _cpu_matrix

__all__ = ["_cpu_diagonal", "_cpu_matrix"]
