"""How a Triton kernel is run on the GPU at hand: the default, what fits its shared memory, or the fastest of several.

Each kernel's module says how many warps and stages it wants. On a GPU whose programs have less shared memory than that
takes, stages are left out until it fits. With `STAR_TUNE=1` in the environment the first call of each kernel, for its
dtypes and compile-time constants, times the neighbours of the default too, and the fastest is kept, on disk as well.

The choice depends on no size of a batch and on no sequence length, so a row's result is the same in any batch.

Environment, read when first needed: `STAR_TUNE=1` allows timing; `STAR_TUNING_FILE` names the file that remembers what
was found instead of `star_kernels/tuning.json` in the user's cache folder. A file that is there is used without
`STAR_TUNE=1` as well.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_ROUNDS = 7


class Run(NamedTuple):
    """How a kernel is run.

    Attributes:
        num_warps: Warps of a program.
        num_stages: Stages of software pipelining.
    """

    num_warps: int
    num_stages: int


def variants(default: Run, threads_of_a_warp: int = 32) -> list[Run]:
    """Return what tuning compares: the default first, then half and twice its warps, and one stage less and more."""
    most = 1024 // threads_of_a_warp
    warps = (w for w in (default.num_warps // 2, 2 * default.num_warps) if 1 <= w <= most)
    stages = (s for s in (default.num_stages - 1, default.num_stages + 1) if s >= 1)
    return [default, *(Run(w, default.num_stages) for w in warps), *(Run(default.num_warps, s) for s in stages)]


def fewer_stages(default: Run) -> list[Run]:
    """Return the default, then itself with ever fewer stages, for a GPU with too little shared memory."""
    return [Run(default.num_warps, stages) for stages in range(default.num_stages, 0, -1)]


def identity(name: str, gpu: str, default: Run, kinds: Iterable[object], constants: Mapping[str, Any]) -> str:
    """Name what a choice is for: kernel, GPU, default, kinds of the arguments (dtypes, Python types), constants."""
    given = ",".join(one.__name__ if isinstance(one, type) else str(one).removeprefix("torch.") for one in kinds)
    fixed = ",".join(f"{key}={value}" for key, value in sorted(constants.items()))
    return f"{name}|{gpu}|{default.num_warps}x{default.num_stages}|{given}|{fixed}"


class Tuner:
    """Choose and remember how kernels are run.

    Args:
        path: The file of what was found; read when first needed.
        timing: Whether what is not known is found out by timing.
        time: Takes a call and returns the seconds that it takes on the device.
        too_big: What the compiler raises where a program takes more than the GPU has.
    """

    def __init__(
        self,
        path: Path,
        timing: bool,
        time: Callable[[Callable[[], object]], float],
        too_big: tuple[type[Exception], ...],
    ) -> None:
        self._path, self._timing, self._time, self._too_big = path, timing, time, too_big
        self._chosen: dict[Hashable, Run] = {}
        self._found = _read(path)

    def run(
        self,
        key: Hashable,
        name: Callable[[], str],
        default: Run,
        start: Callable[[Run], object],
        others: Callable[[], Sequence[Run]],
    ) -> None:
        """Start a kernel by `start(run)`, as was chosen for `key` or, the first time, as is chosen now.

        Args:
            key: What the choice is for, in this process: one look-up a call.
            name: Returns the same in words, for the file; called the first time only.
            default: What the kernel's module asks for.
            start: Starts the kernel.
            others: Returns what to compare, the default among them; nothing where the kernel must be started once only.

        Raises:
            Exception: What the compiler raises where even one stage takes more than the GPU has.
        """
        chosen = self._chosen.get(key)
        if chosen is not None:
            start(chosen)
            return
        label = name()
        found = self._found.get(label)
        if found is None and self._timing and not _capturing() and (compared := others()):
            found = self._fastest(compared, start)
            self._found[label] = found
            _write(self._path, {label: found})
        candidates = fewer_stages(default) if found is None else [found, *fewer_stages(default)]
        for position, one in enumerate(candidates):
            try:
                start(one)
            except self._too_big:
                if position == len(candidates) - 1:
                    raise
                continue
            self._chosen[key] = one
            return

    def _fastest(self, candidates: Sequence[Run], start: Callable[[Run], object]) -> Run:
        """Return the fastest of the candidates that can be compiled and run; the first where none can."""
        times: dict[Run, float] = {}
        for one in candidates:
            # Too big for the GPU, or more than its compiler can do: what is wrong with all of them shows afterwards.
            with contextlib.suppress(Exception):
                times[one] = self._time(functools.partial(start, one))
        return min(times, key=times.__getitem__) if times else candidates[0]


def _capturing() -> bool:
    """Return whether a CUDA graph is being recorded, in which nothing can be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _read(path: Path) -> dict[str, Run]:
    try:
        return {key: Run(*value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # None yet, or one that was cut short: what it held is found again.
        return {}


def _write(path: Path, found: Mapping[str, Run]) -> None:
    """Add to the file, which other processes may be adding to: it is replaced whole, never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**_read(path), **found}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(merged, file, indent=0, sort_keys=True)
    os.replace(file.name, path)


def seconds_on_device(call: Callable[[], object]) -> float:
    """Return the median of some calls' seconds by the device's own clock; the first, which compiles, does not count."""
    call()
    times: list[float] = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


@functools.cache
def tuner() -> Tuner:
    """Return the process's own, as the environment says."""
    from triton.runtime.errors import OutOfResources

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = Path(os.environ.get("STAR_TUNING_FILE", cache / "star_kernels" / "tuning.json"))
    return Tuner(path, os.environ.get("STAR_TUNE") == "1", seconds_on_device, (OutOfResources,))
