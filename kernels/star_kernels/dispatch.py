"""Say who serves a call: the registry of implementations behind every public operator.

An operator is one definition with several implementations. `reference` (plain torch) serves every device and floating
dtype; compiled implementations register for the device types and dtypes that they serve, and are preferred there in
order of registration. Each (device type, dtype, backend) is resolved once; then it is one dictionary look-up.

A compiled backend joins in two steps, from a module named in `PROVIDERS`, which is imported when an operator is first
resolved and so costs `import star_kernels` nothing:

    declare_backend("cpp", device_types=("cpu",), unavailable=None)         # or the reason why it is not there
    register("rms_norm", "cpp", load, device_types=("cpu",), dtypes=(torch.float32, torch.bfloat16))

`load` takes no argument and returns the implementation; it is called when the implementation is first needed. An
implementation takes the positional arguments that the operator's public function passes on, which are those of the
function of the same name in the operator's `reference.py`, already validated.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROVIDERS: list[str] = ["star_kernels._native", "star_kernels._triton", "star_kernels._installed"]
"""Modules that register compiled implementations when imported; a missing one is skipped."""

REFERENCE = "reference"

Function = Callable[..., Any]


class BackendStatus(NamedTuple):
    """Whether a backend can serve on this machine, and in words why it can or cannot."""

    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Implementation:
    """One backend's way to serve one operator."""

    backend: str
    device_types: frozenset[str]
    dtypes: frozenset[torch.dtype]
    load: Callable[[], Function]
    checks: bool


@dataclass(frozen=True, slots=True)
class _Backend:
    name: str
    device_types: frozenset[str]
    unavailable: str | None


_backends: dict[str, _Backend] = {}
_operators: dict[str, Operator] = {}
_implementations: dict[str, list[Implementation]] = {}
_discovered: set[str] = set()
_preferred: str | None = None


class Operator:
    """A public operator's entry in the registry.

    Args:
        name: The public function's name.
        reference: The definition in plain torch, which serves any device and floating dtype.
        check: Takes what `reference` takes and raises for what does not fit, for operators that are called with `run`.
    """

    __slots__ = ("_check", "_checking", "_reference", "_served", "name")

    def __init__(self, name: str, reference: Function, check: Function | None = None) -> None:
        self.name = name
        self._reference = reference
        self._check = check or _nothing_to_check
        self._served: dict[tuple[str, torch.dtype, str | None], tuple[str, Function]] = {}
        self._checking: dict[tuple[torch.dtype, str | None], Function] = {}
        _operators[name] = self

    def run(self, first: Tensor, backend: str | None, *args: Any) -> Any:
        """Check the arguments and serve the call; `first` is the tensor whose device and dtype decide.

        Compiled operators that check their arguments themselves are called at once, and `check` finds words for what
        they refuse: to check first takes 3 of the 7 us that a decoding step of 16 channels took.
        """
        if not torch.compiler.is_compiling():
            key = (getattr(first, "dtype", None), _preferred if backend is None else backend)
            function = self._checking.get(key)  # type: ignore[arg-type]
            if function is not None and first.is_cpu:
                try:
                    return function(*args)
                except Exception:
                    self._check(*args)
                    raise
        self._check(*args)
        return self.serve(first, backend)(*args)

    def serve(self, tensor: Tensor, backend: str | None) -> Function:
        """Return the function that serves a call whose first tensor is `tensor`; `backend` is honoured or refused."""
        key = (tensor.device.type, tensor.dtype, _preferred if backend is None else backend)
        if torch.compiler.is_compiling() or key not in self._served:
            _resolve(self.name, *key)
        return self._served[key][1]

    def resolve(self, device_type: str, dtype: torch.dtype, backend: str | None) -> tuple[str, Function]:
        """Return the name and the function of what serves this device type and dtype.

        Raises:
            ValueError: `backend` is unknown, not available here, or does not serve this operator, device or dtype.
        """
        key = (device_type, dtype, backend)
        if key not in self._served:
            discover()
            chosen = self._choose(device_type, dtype, backend)
            if chosen is None:
                self._served[key] = REFERENCE, _without_autocast(self._reference)
            else:
                self._served[key] = chosen.backend, chosen.load()
                if chosen.checks and device_type == "cpu":
                    self._checking[dtype, backend] = self._served[key][1]
        return self._served[key]

    def forget(self) -> None:
        """Drop what was resolved, so that a new registration is seen."""
        self._served.clear()
        self._checking.clear()

    def _choose(self, device_type: str, dtype: torch.dtype, backend: str | None) -> Implementation | None:
        """Return who serves; None for the reference."""
        if backend is None:
            for candidate in _implementations.get(self.name, ()):
                usable = _backends[candidate.backend].unavailable is None
                if usable and device_type in candidate.device_types and dtype in candidate.dtypes:
                    return candidate
            self._warn_of_reference(device_type, dtype)
        elif backend != REFERENCE:
            return self._requested(device_type, dtype, backend)
        return None

    def _requested(self, device_type: str, dtype: torch.dtype, backend: str) -> Implementation:
        if backend not in _backends:
            known = ", ".join([REFERENCE, *sorted(_backends)])
            raise ValueError(f"backend={backend!r} is unknown; it must be one of: {known}")
        reason = _backends[backend].unavailable
        if reason is not None:
            raise ValueError(f"backend={backend!r} is not available: {reason}")
        own = [one for one in _implementations.get(self.name, ()) if one.backend == backend]
        if not own:
            raise ValueError(f"backend={backend!r} does not implement {self.name}")
        for candidate in own:
            if device_type in candidate.device_types and dtype in candidate.dtypes:
                return candidate
        served = "; ".join(
            f"{', '.join(sorted(str(one) for one in entry.dtypes))} on {', '.join(sorted(entry.device_types))}"
            for entry in own
        )
        raise ValueError(
            f"backend={backend!r} does not serve {self.name} for {dtype} on {device_type}; it serves {served}"
        )

    def _warn_of_reference(self, device_type: str, dtype: torch.dtype) -> None:
        expected = sorted(one.name for one in _backends.values() if device_type in one.device_types)
        if expected:
            unserved = f"does not serve {self.name} for {dtype}"
            reasons = "; ".join(f"{name}: {_backends[name].unavailable or unserved}" for name in expected)
            warnings.warn(
                f"star_kernels.{self.name} is served by reference on {device_type} for {dtype} ({reasons})",
                RuntimeWarning,
                stacklevel=_callers_level(),
            )


def _callers_level() -> int:
    """Return the stacklevel, for a warning of this function's caller, of the first frame outside this package."""
    level, frame = 0, sys._getframe(1)
    while frame is not None:
        level += 1
        if not frame.f_globals.get("__name__", "").startswith("star_kernels"):
            break
        frame = frame.f_back  # type: ignore[assignment]
    return level


def _nothing_to_check(*args: Any) -> None:
    """Stand in for the check of an operator whose public function checks for itself."""


def _resolve(operator: str, device_type: str, dtype: torch.dtype, backend: str | None) -> str:
    """Resolve by name. torch.compile calls this while it traces and takes the answer for a constant."""
    return _operators[operator].resolve(device_type, dtype, backend)[0]


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, which takes over a second.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _without_autocast(reference: Function) -> Function:
    """Keep autocast out of a reference: each states its own precision, and float32 states must stay float32."""

    def serve(first: Tensor, *rest: Any) -> Any:
        device_type = first.device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return reference(first, *rest)
        return reference(first, *rest)

    return serve


def declare_backend(name: str, *, device_types: Iterable[str], unavailable: str | None = None) -> None:
    """Make a backend known.

    Args:
        name: What users pass as `backend=`.
        device_types: The torch device types on which users may expect it ("cpu", "cuda").
        unavailable: Why it cannot serve on this machine, in one clause; None when it can.
    """
    _backends[name] = _Backend(name, frozenset(device_types), unavailable)
    _forget_all()


def register(
    operator: str,
    backend: str,
    load: Callable[[], Function],
    *,
    device_types: Iterable[str],
    dtypes: Iterable[torch.dtype],
    checks: bool = False,
) -> Implementation:
    """Add a declared backend's implementation of an operator, preferred after those registered before it; return it.

    Args:
        operator: The operator's name.
        backend: A backend that `declare_backend` has made known.
        load: Called without arguments on first use; returns the implementation.
        device_types: Device types of the first tensor that it serves.
        dtypes: Dtypes of the first tensor that it serves.
        checks: Whether it refuses, with any exception and before it reads or writes a value, whatever the operator's
            own check refuses; it is then called without that check.

    Raises:
        ValueError: the backend was not declared, or the operator does not exist.
    """
    if backend not in _backends:
        raise ValueError(f"backend {backend!r} is not declared; call declare_backend first")
    if operator not in _operators:
        raise ValueError(f"operator {operator!r} does not exist; it must be one of: {', '.join(sorted(_operators))}")
    entry = Implementation(backend, frozenset(device_types), frozenset(dtypes), load, checks)
    _implementations.setdefault(operator, []).append(entry)
    _operators[operator].forget()
    return entry


def withdraw(operator: str, entry: Implementation) -> None:
    """Take back what `register` added."""
    _implementations[operator].remove(entry)
    _operators[operator].forget()


def discover() -> None:
    """Import the modules of `PROVIDERS` that exist and were not imported yet."""
    for name in PROVIDERS:
        if name not in _discovered:
            _discovered.add(name)
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)


def backends() -> dict[str, BackendStatus]:
    """List every backend with whether it is available on this machine, and why it is or is not."""
    discover()
    table = {REFERENCE: BackendStatus(True, "plain torch, any device and floating dtype")}
    for backend in _backends.values():
        devices = ", ".join(sorted(backend.device_types))
        available = backend.unavailable is None
        table[backend.name] = BackendStatus(available, backend.unavailable or f"compiled, serves {devices} tensors")
    return table


def which(op: str, *tensors: Tensor) -> str:
    """Name the backend that would serve a call of operator `op` on these tensors.

    Args:
        op: The public function's name, such as "rms_norm".
        tensors: The call's tensors in order; the first one's device and dtype decide.

    Raises:
        ValueError: `op` does not exist or no tensor is given.
    """
    if op not in _operators:
        raise ValueError(f"op {op!r} does not exist; it must be one of: {', '.join(sorted(_operators))}")
    if not tensors:
        raise ValueError("tensors is empty; which() needs at least the call's first tensor")
    return _operators[op].resolve(tensors[0].device.type, tensors[0].dtype, _preferred)[0]


def serving(op: str, tensor: Tensor) -> list[str]:
    """List the backends that can serve operator `op` here for a first tensor like this, the preferred one first.

    Raises:
        ValueError: `op` does not exist.
    """
    which(op, tensor)
    entries = _implementations.get(op, ())
    names = (
        one.backend
        for one in entries
        if _backends[one.backend].unavailable is None
        and tensor.device.type in one.device_types
        and tensor.dtype in one.dtypes
    )
    return [*dict.fromkeys(names), REFERENCE]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let one backend serve every call of the block that names none, as `backend=name` would.

    It holds for the whole process, other threads included: meant for measurements of whole models and for tests. The
    backward pass of what was computed inside is the same backend's, wherever it runs.

    Args:
        name: "reference", or a backend that `backends()` calls available.

    Raises:
        ValueError: `name` is unknown or not available here. Inside, a call that `name` does not serve is refused.
    """
    global _preferred
    discover()
    if name != REFERENCE and name not in _backends:
        raise ValueError(
            f"name {name!r} is no backend; it must be one of: {', '.join([REFERENCE, *sorted(_backends)])}"
        )
    if name != REFERENCE and (reason := _backends[name].unavailable) is not None:
        raise ValueError(f"name {name!r} is not available: {reason}")
    before, _preferred = _preferred, name
    try:
        yield
    finally:
        _preferred = before


def _forget_all() -> None:
    for operator in _operators.values():
        operator.forget()
