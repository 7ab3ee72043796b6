"""The measuring instruments in one place.

* `measure`, `measure_many`: time, interleaved with a reference or with any number of rivals.
* `peak_tensor_bytes`, `resident_bytes_fresh_process`: memory.
* `measure_model`: prefill, decoding, a training step and its memory, of one language model against another.
* `copy_ceiling` and its like, `ceiling_report`: what this machine can do at best.
* `machine`: which machine that was.
"""

from bench._validation import MeasurementError
from bench.ceilings import (
    Ceiling,
    best_exp_ceiling,
    best_matmul_ceiling,
    ceiling_report,
    copy_bandwidth,
    copy_ceiling,
    exp_throughput,
    fma_throughput,
    matmul_ceiling,
    matmul_throughput,
)
from bench.hardware import machine
from bench.memory import peak_tensor_bytes, resident_bytes_fresh_process
from bench.models import METRICS, OBJECTIVES, CausalLanguageModel, measure_model
from bench.timing import Measurement, Provider, measure, measure_many

__all__ = [
    "METRICS",
    "OBJECTIVES",
    "CausalLanguageModel",
    "Ceiling",
    "Measurement",
    "MeasurementError",
    "Provider",
    "best_exp_ceiling",
    "best_matmul_ceiling",
    "ceiling_report",
    "copy_bandwidth",
    "copy_ceiling",
    "exp_throughput",
    "fma_throughput",
    "machine",
    "matmul_ceiling",
    "matmul_throughput",
    "measure",
    "measure_many",
    "measure_model",
    "peak_tensor_bytes",
    "resident_bytes_fresh_process",
]
