"""Which machine, and which software, a number was measured with."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

# What decides which code paths torch and the kernels take.
_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve", "sve2",
)  # fmt: skip


def machine() -> dict[str, str | int | list[str]]:
    """Describe the machine as it stands, for a result file.

    Returns:
        `processor` (name), `architecture`, `system`, `cores` (of the machine), `usable_cores` (this process may run
        on), `threads` (torch's), `memory_bytes` (of the machine), `flags` (instruction sets of interest that the
        processor has), `omp_wait_policy` (with more threads than free cores, waiting actively makes an operator of 60
        us take 24 ms, passively 120 us), `torch_capability` (instruction set torch chose), `torch`, `python`, and
        `gpus` (names; empty without CUDA or ROCm).
    """
    info = _cpuinfo()
    present = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count() or 1,
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flags": [flag for flag in _FLAGS if flag in present],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def short_name() -> str:
    """Return the first GPU's name, or the processor's, as part of a file's name: "nvidia-h100-80gb-hbm3"."""
    described = machine()
    gpus = described["gpus"]
    name = str(gpus[0] if isinstance(gpus, list) and gpus else described["processor"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo; empty where there is none (macOS)."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


if __name__ == "__main__":
    print(short_name())
