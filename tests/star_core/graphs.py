"""Stand-ins for a CUDA graph on any device: what a step does, as a list of calls, and their replay without Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# What takes a number or a shape from values, or brings values from the host: neither can be captured.
FORBIDDEN = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::lift_fresh", "aten::masked_select", "aten::nonzero",
    "aten::repeat_interleave.Tensor", "aten::_unique2",
}  # fmt: skip
_READS = ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist")


@contextmanager
def no_reads() -> Iterator[None]:
    """Refuse to give values of tensors to Python, as CUDA does while it captures."""

    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\na value is read")

    kept = {name: getattr(Tensor, name) for name in _READS}
    for name in _READS:
        setattr(Tensor, name, refuse)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Tensor, name, method)


@dataclass
class Call:
    """One call of an operator of torch."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def name(self) -> str:
        """Its name with its overload, as "aten::add.Tensor"."""
        schema = self.function._schema
        return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


class Recorder(TorchDispatchMode):
    """List every call of an operator, and keep what each one overwrites as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = kwargs.get(argument.name, args[position] if position < len(args) else None)
                if isinstance(written, Tensor):
                    self.before.append((written, written.clone()))
        output = func(*args, **kwargs)
        self.calls.append(Call(func, args, kwargs, output))
        return output

    def undo(self) -> None:
        """Put back what was overwritten."""
        for written, value in reversed(self.before):
            written.copy_(value)

    def frozen(self, static: Mapping[int, str]) -> list[tuple[Any, ...]]:
        """Return what a graph would freeze of each call: operator, numbers, shapes, and addresses that last.

        Args:
            static: Names of storages that outlive a step, by their address.
        """

        def describe(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            held = static.get(one.untyped_storage().data_ptr())
            return held, one.storage_offset() if held else None, one.dtype, tuple(one.shape), one.stride()

        return [
            (call.name, *(describe(leaf) for leaf in tree_flatten((call.args, call.kwargs))[0])) for call in self.calls
        ]


class ReplayedCalls:
    """A `Graph` that does what it recorded call by call, with the tensors and numbers of the recording.

    As on a GPU, no line of the step's Python runs again: what it would decide anew stays as it was.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.replays = 0

    def warm_up(self, step: Callable[[], None]) -> None:
        step()

    def capture(self, step: Callable[[], None]) -> None:
        recorder = Recorder()
        try:
            with no_reads(), recorder:
                step()
        finally:
            recorder.undo()
        self.calls = recorder.calls
        found = FORBIDDEN & {call.name for call in self.calls}
        if found:
            raise RuntimeError(f"operations not permitted when stream is capturing: {sorted(found)}")

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            again = call.function(*call.args, **call.kwargs)
            for old, new in zip(tree_flatten(call.output)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RerunSteps:
    """A `Graph` that runs the step again on each replay and holds it to what the first replay did."""

    def __init__(self, static: Callable[[], Mapping[int, str]]) -> None:
        self._static = static
        self.first: list[tuple[Any, ...]] | None = None
        self.replays = 0

    def warm_up(self, step: Callable[[], None]) -> None:
        step()

    def capture(self, step: Callable[[], None]) -> None:
        self._step = step

    def replay(self) -> None:
        self.replays += 1
        recorder = Recorder()
        with no_reads(), recorder:
            self._step()
        frozen = recorder.frozen(self._static())
        if self.first is None:
            self.first = frozen
        assert not FORBIDDEN & {name for name, *_ in frozen}
        for old, new in zip(self.first, frozen, strict=True):
            assert old == new
