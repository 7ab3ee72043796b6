"""The compiled CPU operators: load the library this processor can run, and tell torch about its operators.

The build puts one library for each instruction set into `_lib`; the best one that the processor runs is loaded. It
links to nothing of torch: it looks torch's stable C functions up in the torch that is imported, so one build serves
every torch >= 2.10.

An operator's folder holds `cpu*.cpp` and `cpu*.py`. The latter call `native_operator` for each operator of the former
and hand the public ones to the dispatcher with `serve`.

Environment, read once: `STAR_KERNELS_ISA` takes the named library instead of the best (avx512, avx2, plain, neon);
`STAR_KERNELS_LIBRARIES` names another folder to load from, such as a sanitizer build.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from star_kernels import dispatch

__all__ = ["available", "folder", "isa", "library", "native_operator", "reason", "serve", "set_nan_fill"]

BACKEND = "cpp"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_FOLDER = Path(os.environ.get("STAR_KERNELS_LIBRARIES", Path(__file__).parent / "_lib"))

Function = Callable[..., Any]


class _UnavailableError(Exception):
    """Why there are no compiled operators, in one clause."""


def _candidates() -> list[Path]:
    """List the libraries that this processor can run, best first."""
    wanted = os.environ.get("STAR_KERNELS_ISA")
    if wanted is not None:
        names = [wanted]
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        # torch names the best instruction set that it would use itself. NEON and plain code run on every processor of
        # their family.
        names = ["neon", "plain"]
        if "AVX2" in capability:
            names.insert(0, "avx2")
        elif "AVX512" in capability or "AVX10" in capability:
            names[:0] = ["avx512", "avx2"]
    return [path for name in names if (path := _FOLDER / f"star_{name}.so").exists()]


def _load() -> ctypes.CDLL:
    """Load a library and bind it to torch. Raises _UnavailableError."""
    candidates = _candidates()
    if not candidates:
        recorded = _FOLDER / "not_built.txt"
        if recorded.exists():
            raise _UnavailableError(f"not built: {recorded.read_text().strip()}")
        wanted = os.environ.get("STAR_KERNELS_ISA", "this processor")
        raise _UnavailableError(f"{_FOLDER} holds no library for {wanted}; `pip install -e .` builds them")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        loaded = ctypes.CDLL(str(candidates[0]))
        host = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
    except OSError as error:
        raise _UnavailableError(f"the library could not be loaded: {error}") from error
    for name in ("star_isa", "star_parts", "star_schema", "star_bind", "star_register"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.star_schema.argtypes = [ctypes.c_int64]
    loaded.star_bind.argtypes = [ctypes.c_void_p]
    loaded.star_set_nan_fill.argtypes = [ctypes.c_bool]
    missing = loaded.star_bind(host._handle)
    if missing is not None:
        raise _UnavailableError(f"torch {torch.__version__} has no {missing.decode()}, needs torch >= 2.10")
    return loaded


def _register(loaded: ctypes.CDLL, registry: Any) -> set[str]:
    """Define every operator of the library and its C++ kernel; return their names. Raises _UnavailableError."""
    names: set[str] = set()
    # Any strides are accepted, and outputs are contiguous whatever the inputs' layout: the compiler may choose it.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
    while (schema := loaded.star_schema(len(names))) is not None:
        name, signature = schema.decode().split("(", 1)
        names.add(name)
        registry.define(f"{name}({signature}", tags=tags)
        # The same kernel without a gradient: a call that needs none saves the 4.5 us of a Python autograd kernel.
        registry.define(f"{name}.raw({signature}", tags=tags)
        registry.impl(f"{name}.raw", torch.library.fallthrough_kernel, "Autograd")
    refused = loaded.star_register()
    if refused is not None:
        raise _UnavailableError(f"torch {torch.__version__} refused to register {refused.decode()}")
    return names


_registry: Any = torch.library.Library("star_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
_library: ctypes.CDLL | None = None
_reason = ""
_names: set[str] = set()
try:
    _library = _load()
    _names = _register(_library, _registry)
except _UnavailableError as error:
    _library, _reason = None, str(error)


def available() -> bool:
    """Return whether the compiled operators are loaded."""
    return _library is not None


def reason() -> str:
    """Return why the compiled operators are not loaded; empty if they are."""
    return _reason


def library() -> ctypes.CDLL:
    """Return the loaded library, for its plain C entry points.

    Raises:
        RuntimeError: there is none.
    """
    if _library is None:
        raise RuntimeError(f"the compiled operators are not available: {_reason}")
    return _library


def folder() -> Path:
    """Return the folder that the libraries lie in, one for each instruction set."""
    return _FOLDER


def isa() -> str:
    """Name the instruction set of the loaded library: avx512, avx2, neon or plain; empty if none is loaded."""
    return "" if _library is None else str(_library.star_isa().decode())


def set_nan_fill(on: bool) -> None:
    """Fill the compiled operators' new tensors with NaN first, for tests: an element that no kernel wrote shows."""
    library().star_set_nan_fill(on)


def native_operator(
    name: str,
    *,
    fake: Function,
    setup_context: Function | None = None,
    backward: Function | None = None,
) -> Function:
    """Complete a C++ operator for torch and return the function that calls it at the least cost.

    `torch.ops.star_kernels.<name>` gets a fake (shapes and dtypes without data) and a gradient; an operator without
    `backward`, such as another's backward, refuses to be differentiated. The returned function takes the operator's
    arguments by position. While torch.compile or torch.export traces, it calls that operator; otherwise a call that
    needs no gradient goes straight to the C++ kernel (1.7 us against 6.1 us), and one that does goes through an
    autograd Function (16 us less, forward and backward together, than torch.library's own wrapper).

    Args:
        name: The operator's name in its C++ schema.
        fake: Takes the operator's arguments; returns empty tensors like its results, contiguous.
        setup_context: `(ctx, inputs, output)`, as in torch.library.register_autograd; saves what `backward` needs.
        backward: `(ctx, *gradients)`; returns a gradient or None for each argument, calling a native backward operator.

    Raises:
        ValueError: the library has no operator of that name.
    """
    if name not in _names:
        known = ", ".join(sorted(_names))
        raise ValueError(f"name {name!r} is no operator of the compiled library, needs one of: {known}")
    qualified = f"star_kernels::{name}"
    overloads = getattr(torch.ops.star_kernels, name)
    traced: Function = overloads.default
    # The overload's own call is one more Python frame (0.2 us).
    raw: Function = overloads.raw._op
    torch.library.register_fake(qualified, fake, lib=_registry)
    torch.library.register_fake(f"{qualified}.raw", _on_one_device(name, fake), lib=_registry)
    setup_context = setup_context or _save_nothing
    backward = backward or _refuse_gradient(name)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_registry)
    apply, apply_in_transform = _autograd_functions(name, raw, setup_context, backward)

    is_compiling = torch.compiler.is_compiling
    is_grad_enabled = torch.is_grad_enabled
    any_requires_grad = torch._C._any_requires_grad
    transforms_active = torch._C._are_functorch_transforms_active

    def call(*args: Any) -> Any:
        if is_compiling():
            return traced(*args)
        if is_grad_enabled() and any_requires_grad(*args):
            return apply_in_transform(*args) if transforms_active() else apply(*args)
        return raw(*args)

    call.__name__ = call.__qualname__ = name
    return call


def _autograd_functions(
    name: str, raw: Function, setup_context: Function, backward: Function
) -> tuple[Function, Function]:
    """Make the operator's autograd Function twice: the fast form, and the one that torch.func's transforms accept.

    The latter costs 20 us more a call; torch.library's wrapper is not of that form and fails under torch.func.grad.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = raw(*args)
        setup_context(ctx, args, output)
        return output

    def forward_alone(*args: Any) -> Any:
        return raw(*args)

    shared = {"backward": staticmethod(backward)}
    separate = {"forward": staticmethod(forward_alone), "setup_context": staticmethod(setup_context)}
    bases = (torch.autograd.Function,)
    fast: Any = type(f"star_kernels_{name}", bases, {"forward": staticmethod(forward), **shared})
    transformable: Any = type(f"star_kernels_{name}_transformable", bases, {**separate, **shared})
    return fast.apply, transformable.apply


def _on_one_device(name: str, fake: Function) -> Function:
    """Let a fake refuse tensors of several devices: one on "meta" among real ones would make the whole result empty."""

    def checked(*args: Any) -> Any:
        devices = {one.device for one in args if isinstance(one, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(f"{name} got tensors on {', '.join(sorted(map(str, devices)))}, needs them on one device")
        return fake(*args)

    return checked


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """Stand in for the context of an operator without a gradient."""


def _refuse_gradient(name: str) -> Function:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"star_kernels::{name} has no derivative: compiled operators have first ones only")

    return backward


def serve(operator: str, function: Function, dtypes: Iterable[torch.dtype] = DTYPES, *, checks: bool = False) -> None:
    """Let the dispatcher serve a public operator's CPU calls with `function`, which takes what its reference takes.

    Args:
        operator: The public operator's name.
        function: What serves it.
        dtypes: The first tensor's dtypes that it takes.
        checks: Whether it refuses by itself whatever the operator's check refuses, as `dispatch.register` says.
    """
    dispatch.register(operator, BACKEND, lambda: function, device_types=("cpu",), dtypes=dtypes, checks=checks)


def _register_folders(loaded: ctypes.CDLL) -> None:
    """Import every `cpu*.py` of the operator folders that the library was built from."""
    for folder_name in loaded.star_parts().decode().split():
        for path in sorted((Path(__file__).parent / folder_name).glob("cpu*.py")):
            importlib.import_module(f"star_kernels.{folder_name}.{path.stem}")


dispatch.declare_backend(BACKEND, device_types=("cpu",), unavailable=_reason or None)
if _library is not None:
    _register_folders(_library)
