"""The Triton operators for CUDA and ROCm tensors: which there are, how torch learns of them, how a kernel is launched.

`import star_kernels` does not import triton: an operator's folder holds `triton.py`, which is
imported when one of its operators is first called on a GPU. With TRITON_INTERPRET=1 in the environment the kernels run
on CPU tensors in Triton's interpreter, element by element in numpy: slow, and meant for tests.

A module makes each of its operators with `triton_operator`, and starts kernels through `launch`, which `recording`
turns into a list of what would have been started: so the kernels can be compiled for any GPU on a machine without one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels._tuning import Run, identity, tuner, variants

BACKEND = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OPERATORS: dict[str, tuple[str, ...]] = {
    "memoryless.triton": ("swiglu", "geglu", "reglu", "channel_mix"),
    "norm.triton": ("rms_norm", "add_rms_norm", "rotary"),
    "short_conv.triton": ("causal_conv1d", "causal_conv1d_step", "gated_short_conv", "gated_short_conv_step"),
    "attention.triton": ("attention", "attention_step", "differential_attention"),
    "loss.triton": ("linear_cross_entropy",),
    "long_conv.triton": ("long_conv", "long_conv_step"),
    "recurrence.triton.diagonal": ("diagonal_scan", "diagonal_scan_step", "rg_lru", "rg_lru_step"),
    "recurrence.triton.selective": ("selective_scan", "selective_scan_step"),
    "recurrence.triton.ssd": ("ssd", "ssd_step"),
    "recurrence.triton.linear_attention": ("gated_linear_attention", "gated_linear_attention_step"),
    "recurrence.triton.delta_rule": ("gated_delta_rule", "gated_delta_rule_step"),
}
"""Public operators by the module that serves them with functions of the same names."""

OPTIONS = {"enable_fp_fusion": True}
"""What every kernel is compiled with: Triton 3.9 fuses products and sums unless told, and 3.10 will not."""

Function = Callable[..., Any]


def interpreting() -> bool:
    """Return whether kernels run on the CPU in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unavailable() -> str | None:
    """Say in one clause why there are no Triton operators on this machine; None if there are."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install 'star-arch[gpu]'` brings it"
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    return None


@dataclass(frozen=True)
class Gpu:
    """What a kernel's configuration may depend on.

    Attributes:
        backend: "cuda", or "hip" for AMD's, whose warps have 64 threads and whose threads have up to 512 registers
            where a program has at most 4 warps, 256 where it has 8.
        arch: Compute capability times 10, or AMD's name.
        shared_bytes: Shared memory that one program may have.
    """

    backend: str
    arch: int | str
    shared_bytes: int

    @property
    def matrix(self) -> str:
        """The matrix instruction Triton compiles a product to: "mma.sync", "wgmma", "tcgen05", or AMD's "mfma"."""
        if self.backend == "hip":
            return "mfma"
        # Consumer cards of Blackwell's generation, 120 and 121, have Ampere's.
        return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(int(self.arch) // 10, "mma.sync")

    @property
    def units(self) -> str:
        """Where that takes a product's factors from: "registers", "shared" memory; "native" if float32 is one too."""
        return {"mma.sync": "registers", "mfma": "native"}.get(self.matrix, "shared")


# What tensors of the interpreter and of a recording for no GPU in particular stand for.
_H100 = Gpu("cuda", 90, 227 * 1024)


def gpu_of(tensor: Tensor) -> Gpu:
    """Return the GPU that kernels for this tensor run on."""
    if _recorded is not None or tensor.device.type != "cuda":
        return _recorded_for
    return _gpu(tensor.device.index)


@functools.cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Gpu("hip", properties.gcnArchName.split(":")[0], properties.shared_memory_per_block)
    # torch's type stubs do not know this field.
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu("cuda", 10 * properties.major + properties.minor, shared)


@dataclass(frozen=True)
class Launch:
    """A kernel's start, as `launch` was asked for it.

    Attributes:
        kernel: The function under `triton.jit`.
        grid: Programs along each axis.
        arguments: Every parameter's value by name; a tensor stands for its dtype and alignment.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelining.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None
_recorded_for = _H100


@contextmanager
def recording(gpu: Gpu = _H100) -> Iterator[list[Launch]]:
    """Start no kernel inside, and list those that would have been started.

    CPU tensors stand in for a GPU's: public operators take them with `backend="triton"`, on a machine without a GPU
    too. What they return is not set.

    Args:
        gpu: The one whose kernels are listed; an H100 unless told.

    Raises:
        ValueError: triton is not installed.
    """
    global _recorded, _recorded_for
    if importlib.util.find_spec("triton") is None:
        raise ValueError("recording needs triton, which is not installed")
    before = _recorded, _recorded_for
    _recorded, _recorded_for = [], gpu
    dispatch.declare_backend(BACKEND, device_types=("cuda", "cpu"))
    entries = [(operator, _register(operator, module, ("cpu",))) for module, operator in _modules()]
    try:
        yield _recorded
    finally:
        _recorded, _recorded_for = before
        for operator, entry in entries:
            dispatch.withdraw(operator, entry)
        _declare()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    repeatable: bool = True,
    **constants: Any,
) -> None:
    """Start a kernel on the device of its first tensor; not at all where the grid is empty.

    Args:
        kernel: A function under `triton.jit`.
        grid: Programs along each axis; the first axis may have 2**31 - 1, the others 65,535.
        arguments: Its parameters in order, without those that are `tl.constexpr`.
        num_warps: Warps of a program.
        num_stages: Stages of software pipelining.
        repeatable: Whether starting it twice is as starting it once, so that it may be timed: not where it reads what
            it writes.
        constants: The parameters that are `tl.constexpr`.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        names = kernel.arg_names[: len(arguments)]
        given = {**dict(zip(names, arguments, strict=True)), **constants}
        _recorded.append(Launch(kernel, grid, given, num_warps, num_stages))
        return
    if interpreting():
        _interpret(kernel, grid, arguments, constants, repeatable)
        return
    device = next(one for one in arguments if isinstance(one, Tensor)).device
    default = Run(num_warps, num_stages)
    gpu = _gpu(device.index)
    # Of the arguments, what decides what is compiled, and no size.
    kinds = tuple(one.dtype if isinstance(one, Tensor) else type(one) for one in arguments)
    with torch.cuda.device(device):
        tuner().run(
            (kernel, device.index, default, kinds, *constants.values()),
            lambda: identity(
                f"{kernel.__module__}.{kernel.__name__}", f"{gpu.backend}:{gpu.arch}", default, kinds, constants
            ),
            default,
            lambda run: kernel[grid](*arguments, **run._asdict(), **OPTIONS, **constants),
            lambda: variants(default, 64 if gpu.backend == "hip" else 32) if repeatable else [],
        )


def _interpret(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any], repeatable: bool
) -> None:
    """Run a kernel in Triton's interpreter; tests put something else here that starts what is repeatable twice."""
    del repeatable
    kernel[grid](*arguments, **constants)


def triton_operator(
    name: str,
    function: Function,
    *,
    fake: Function,
    setup_context: Function | None = None,
    backward: Function | None = None,
) -> Function:
    """Make an operator of torch, `star_kernels::triton_<name>`, and return the function to call.

    Args:
        name: The operator's name.
        function: Takes tensors and numbers, starts the kernels and returns new tensors. Its annotations are the schema.
        fake: Takes the same; returns empty tensors like the results.
        setup_context: `(ctx, inputs, output)`, saves what `backward` needs.
        backward: `(ctx, *gradients)`; returns a gradient or None for each argument. Without it the operator refuses to
            be differentiated.
    """
    operator = torch.library.custom_op(f"star_kernels::triton_{name}", function, mutates_args=())
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup_context)
    return operator


def served() -> set[str]:
    """Return the public operators that have Triton kernels."""
    return {operator for _, operator in _modules()}


def _modules() -> list[tuple[str, str]]:
    return [(module, operator) for module, operators in OPERATORS.items() for operator in operators]


def _register(operator: str, module: str, device_types: tuple[str, ...]) -> dispatch.Implementation:
    def load() -> Function:
        function: Function = getattr(importlib.import_module(f"star_kernels.{module}"), operator)
        return function

    dtypes = (*DTYPES, torch.float64) if interpreting() else DTYPES
    return dispatch.register(operator, BACKEND, load, device_types=device_types, dtypes=dtypes)


def _declare() -> None:
    dispatch.declare_backend(BACKEND, device_types=_DEVICES, unavailable=_unavailable())


_DEVICES = ("cuda", "cpu") if interpreting() else ("cuda",)
_declare()
for _module, _operator in _modules():
    _register(_operator, _module, _DEVICES)
