"""How much of the processors others take while something is measured.

A thread that waits for another one which is off its core makes an operator of 0.5 ms take 18: on a machine of two
cores, a linter that runs for a second is enough. Whoever measures looks, and measures again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")

_STAT = Path("/proc/stat")

# The fields of a processor's line that are work: user, nice, system, irq, softirq, and steal, which is the host's other
# guests. Idle and waiting for a disk are not; guest and guest_nice are in user and nice.
_WORK = (0, 1, 2, 5, 6, 7)


class Watch:
    """From its making on, the share of the usable processors' time that other processes and the host's guests took.

    The system counts in ticks, mostly of 10 ms: over 0.35 s of two processors one is 1.4 %.
    """

    def __init__(self) -> None:
        self._started = perf_counter()
        self._all = _worked_s()
        self._own = _own_s()

    def share(self) -> float | None:
        """Return the share, 0 to 1; None where the system does not tell (anything but Linux)."""
        worked = _worked_s()
        if worked is None or self._all is None:
            return None
        others = (worked - self._all) - (_own_s() - self._own)
        available = (perf_counter() - self._started) * len(os.sched_getaffinity(0))
        return min(1.0, max(0.0, others / available))


def calmest(measure: Callable[[], T], *, tries: int, at_most: float) -> tuple[T, float | None]:
    """Measure until others took no more than `at_most` meanwhile, or `tries` times.

    What was measured has no say in whether it is measured again, so that this favours no result.

    Args:
        measure: Does it once.
        tries: Most times that it is done, 1 or more.
        at_most: Share of the processors' time, as `Watch.share`.

    Returns:
        The least disturbed result, and others' share during it; None as in `Watch.share`, after a single try.

    Raises:
        ValueError: `tries` below 1.
    """
    if tries < 1:
        raise ValueError(f"tries: needs 1 or more, got {tries}")
    attempts: list[tuple[T, float]] = []
    for _ in range(tries):
        watch = Watch()
        result = measure()
        share = watch.share()
        if share is None:
            return result, None
        attempts.append((result, share))
        if share <= at_most:
            break
    return min(attempts, key=lambda attempt: attempt[1])


def _worked_s() -> float | None:
    """Return the seconds that the usable processors have worked since the start; None without /proc/stat."""
    if not _STAT.exists():
        return None
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (line.split() for line in _STAT.read_text().splitlines())
    ticks = sum(int(fields[1 + index]) for fields in lines if fields and fields[0] in usable for index in _WORK)
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Return the seconds of processor time that this process and its ended children have had."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system
