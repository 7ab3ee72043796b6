"""Bytes: of live tensors during a call, and resident in a process that makes it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.autograd.profiler import profile

from bench._validation import MeasurementError, require_seconds, resolve_device

_KINETO_LOG_LEVEL = "KINETO_LOG_LEVEL"


def peak_tensor_bytes(fn: Callable[[], object], *, device: str | torch.device | None = None) -> int:
    """Return the largest number of tensor bytes that one call of `fn` has allocated and not yet freed at a time.

    On the CPU every allocation and release that reaches torch's allocator is followed by its address: results,
    temporaries inside operators, tensors saved for backward, kernels that allocate through torch. The number is exact,
    in bytes asked for, and the same in every call that does the same. Not seen: memory that a library takes by itself
    (malloc, MKL and oneDNN scratch space), and what threads started by `fn` allocate. Memory that existed before is
    neither counted nor, when `fn` frees it, set off.

    On CUDA it is torch's own peak above what was allocated before, in the caching allocator's blocks of 512 bytes, with
    cuBLAS's workspace if `fn` is the first to need it; memory from before that `fn` frees is set off.

    Args:
        fn: Called once without arguments. Garbage collection rests meanwhile, so that cyclic garbage counts as live.
            What the first call sets up, such as a table cached for ever, counts; call `fn` before to leave it out.
        device: "cpu" or "cuda". Default: CUDA if this process has used it, else the CPU.

    Raises:
        TypeError: `fn` is not callable.
        ValueError: `device` is not one that can be measured.
        MeasurementError: A torch profiler is running already, and would be cancelled by this one.

    Whatever `fn` raises passes through unchanged.
    """
    if not callable(fn):
        raise TypeError(f"fn: needs a callable, got {type(fn).__name__}")
    target = resolve_device(device)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _peak_on_cpu(fn) if target.type == "cpu" else _peak_on_cuda(fn, target)
    finally:
        if enabled:
            gc.enable()


def _peak_on_cuda(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(fn: Callable[[], object]) -> int:
    # torch.profiler.profile would do as well, but its first use imports torch._inductor, which takes 1.3 s.
    if torch._C._autograd._profiler_enabled():
        raise MeasurementError("a torch profiler is running, and only one can")
    with _quiet_kineto(), profile(profile_memory=True) as recorded:
        fn()
    return _largest_sum(_allocations(recorded))


def _allocations(recorded: profile) -> list[tuple[int, int]]:
    """Return (address, bytes) of every allocation, bytes below 0 for a release, in the order they happened."""
    assert recorded.kineto_results is not None  # set when recording ends
    found = []
    pending = list(recorded.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        _, fields = event.typed
        if isinstance(fields, torch._C._profiler._ExtraFields_Allocation) and fields.device.type == "cpu":
            found.append((event.start_time_ns, event.id, fields.ptr, fields.alloc_size))
    found.sort()
    return [(address, size) for _, _, address, size in found]


def _largest_sum(allocations: list[tuple[int, int]]) -> int:
    """Return the largest sum of the blocks held at a time.

    The profiler's own running total is not used: it forgets releases made while it was off, and then takes a new block
    at the same address, allocated before this call, for the old one.
    """
    held: dict[int, int] = {}
    total = largest = 0
    for address, size in allocations:
        if size > 0:
            held[address] = size
            total += size
            largest = max(largest, total)
        else:
            total -= held.pop(address, 0)
    return largest


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keep the profiler from writing progress lines to stderr, unless the user has set what it writes."""
    if _KINETO_LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_KINETO_LOG_LEVEL] = "99"  # read once, at its first start
    try:
        yield
    finally:
        del os.environ[_KINETO_LOG_LEVEL]


def resident_bytes_fresh_process(target: Callable[..., object], *args: object, timeout_seconds: float = 600.0) -> int:
    """Return how far `target(*args)` raises the peak of resident memory of a process started for it.

    The process (spawned, not forked) imports what `target` and `args` need, reads its own peak, calls, and reads its
    peak again. So the interpreter, torch and the arguments are not in the number; code and libraries first touched by
    the call are.

    Args:
        target: A function of a module, so that the other process can import it.
        *args: Its arguments; anything that pickles.
        timeout_seconds: After this the process is ended.

    Raises:
        TypeError: `target` is not callable.
        ValueError: `target` or `args` cannot be pickled, or `timeout_seconds` is out of range.
        MeasurementError: `target` raised, its process died, or `timeout_seconds` were over.
    """
    if not callable(target):
        raise TypeError(f"target: needs a callable, got {type(target).__name__}")
    require_seconds("timeout_seconds", timeout_seconds)
    try:
        payload = pickle.dumps((target, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"target: needs a function of a module and arguments that pickle, got: {error}") from error
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_resident_bytes, args=(payload, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_seconds):
            raise MeasurementError(f"not done after timeout_seconds = {timeout_seconds}")
        outcome = receiver.recv()
    except EOFError:
        process.join(timeout_seconds)
        raise MeasurementError(f"the process died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        process.close()
        receiver.close()
    if isinstance(outcome, str):
        raise MeasurementError(f"target raised in its process:\n{outcome}")
    return int(outcome)


def _report_resident_bytes(payload: bytes, sender: Connection) -> None:
    """Run in the fresh process: send the bytes, or the text of what went wrong."""
    try:
        target, args = pickle.loads(payload)
        before = _peak_resident_bytes()
        target(*args)
        sender.send(_peak_resident_bytes() - before)
    except Exception:
        sender.send(traceback.format_exc())


def _peak_resident_bytes() -> int:
    """Return the peak of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: Linux carries ru_maxrss over from the process that called exec, so a large parent hides a small
        # child.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
