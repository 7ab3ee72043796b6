"""Compile a Triton kernel for a GPU that need not be here, and read off the binary what it will cost there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.loads import loads_of
from star_kernels._triton import OPTIONS, Gpu, Launch

_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}

_CUDA_MATRIX = {"tcgen05.mma": "tcgen05", "wgmma.mma": "wgmma", "mma.sync": "mma.sync"}


@dataclass(frozen=True)
class Target:
    """A kind of GPU, with the limits that decide how many programs one of its multiprocessors holds at a time.

    Attributes:
        name: As tables show it.
        backend: "cuda" or "hip".
        arch: Compute capability times 10, or AMD's name.
        card: The one of `bench.cards` whose data sheet says what binds there.
        warp: Threads of a warp.
        warps: Warps that a multiprocessor holds.
        registers: 32-bit registers of a multiprocessor.
        granule: Registers of a thread are given out in multiples of this.
        shared: Bytes of shared memory that a multiprocessor gives to programs.
        most_shared: Bytes of shared memory that one program may have.
    """

    name: str
    backend: str
    arch: int | str
    card: str
    warp: int
    warps: int
    registers: int
    granule: int
    shared: int
    most_shared: int

    @property
    def gpu(self) -> Gpu:
        """What the operators' host code is told of it."""
        return Gpu(self.backend, self.arch, self.most_shared)


# CUDA C++ programming guide, table of technical specifications; AMD CDNA 3 instruction set guide (four SIMDs of eight
# waves; 512 registers a lane, vector and accumulation registers together).
TARGETS = (
    Target("sm_80", "cuda", 80, "A100", 32, 64, 65536, 8, 164 * 1024, 163 * 1024),
    Target("sm_90", "cuda", 90, "H100", 32, 64, 65536, 8, 228 * 1024, 227 * 1024),
    Target("sm_100", "cuda", 100, "B200", 32, 64, 65536, 8, 228 * 1024, 227 * 1024),
    Target("gfx942", "hip", "gfx942", "MI300X", 64, 32, 4 * 512 * 64, 8, 64 * 1024, 64 * 1024),
)


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel costs.

    Attributes:
        registers: Of a thread (vector and accumulation registers together on AMD).
        spill_bytes: Of a thread, written to memory for want of registers.
        shared_bytes: Of a program.
        occupancy: Share of the warps that a multiprocessor could hold, in percent.
        loads: Load instructions from global memory.
        wide_loads: Those of them that are 128 bits a thread.
        load_bytes: Bytes of the tiles that these load, see `bench.loads`.
        wide_bytes: Those of them that wide instructions load.
        matrix: The matrix instructions' name; empty if there are none.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: int
    loads: int
    wide_loads: int
    load_bytes: int
    wide_bytes: int
    matrix: str


def source_of(launch: Launch) -> Any:
    """Return what Triton would compile for this launch: it takes numbers that are 1 or multiples of 16 as known."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name)
        fixed = parameter.is_constexpr or value is None
        if fixed or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        signature[parameter.name] = _type_of(value)
        aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def identity(launch: Launch) -> str:
    """Name what is compiled for a launch: launches of one name need one binary."""
    source = source_of(launch)
    attributes = sorted(source.attrs)
    parts = launch.kernel.__name__, source.signature, source.constants, attributes, launch.num_warps, launch.num_stages
    return repr(parts)


def compile_for(launch: Launch, target: Target) -> Binary:
    """Compile a launch's kernel.

    Raises:
        Exception: as Triton's compiler; what it says is its own.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **OPTIONS}
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    compiled = triton.compile(source_of(launch), target=gpu, options=options)
    if target.backend == "cuda":
        registers, spills = _cuda_usage(compiled.asm["cubin"])
        matrix = _first(compiled.asm["ptx"], _CUDA_MATRIX)
    else:
        registers, spills = _amd_usage(compiled.asm["amdgcn"])
        matrix = _first(compiled.asm["amdgcn"], {"v_mfma": "mfma"})
    shared = int(compiled.metadata.shared)
    occupancy = occupancy_of(target, launch.num_warps, registers, shared)
    found = loads_of(compiled.asm, target.backend)
    loads = found.count, found.wide, found.bytes, found.wide_bytes
    return Binary(registers, spills, shared, occupancy, *loads, matrix)


def occupancy_of(target: Target, warps: int, registers: int, shared: int) -> int:
    """Return the percentage of a multiprocessor's warps that programs of this size fill."""
    rounded = max(target.granule, -(-registers // target.granule) * target.granule)
    by_registers = target.registers // (rounded * target.warp * warps)
    by_shared = target.shared // shared if shared else target.warps
    programs = min(target.warps // warps, by_registers, by_shared)
    return 100 * programs * warps // target.warps


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no usage: {printed[:200]}")
    return int(usage[1]), int(usage[2])


def _amd_usage(text: str) -> tuple[int, int]:
    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    # What is written to memory. The counts of spilled registers hold others too: a scalar register goes to a lane of a
    # vector register first, a vector register to an accumulation register.
    return number("vgpr_count") + number("agpr_count"), number("private_segment_fixed_size")


def _first(text: str, names: Mapping[str, str]) -> str:
    return next((name for pattern, name in names.items() if pattern in text), "")
