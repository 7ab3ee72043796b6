"""Measured time, memory and ceilings: what the search and the kernel benchmarks take their numbers from.

`bench.harness` is the public list.
"""
