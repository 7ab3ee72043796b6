"""Seeing what others take of the processors, and measuring again."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from bench import disturbance
from bench.disturbance import Watch, calmest

needs_stat = pytest.mark.skipif(not disturbance._STAT.exists(), reason="the system does not tell")

_SPIN = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


@needs_stat
def test_another_process_is_seen() -> None:
    other = subprocess.Popen([sys.executable, "-c", _SPIN])
    try:
        time.sleep(0.2)
        watch = Watch()
        time.sleep(0.5)
        share = watch.share()
    finally:
        other.kill()
        other.wait()
    assert share is not None
    assert 0.0 < share <= 1.0


@needs_stat
def test_our_own_work_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"worked": 10.0, "own": 1.0}
    monkeypatch.setattr(disturbance, "_worked_s", lambda: clock["worked"])
    monkeypatch.setattr(disturbance, "_own_s", lambda: clock["own"])
    watch = Watch()
    clock.update(worked=13.0, own=4.0)
    assert watch.share() == 0.0
    clock.update(worked=12.9)  # ticks are coarser than our own clock
    assert watch.share() == 0.0
    clock.update(worked=1e9)
    assert watch.share() == 1.0


def shares(monkeypatch: pytest.MonkeyPatch, *values: float | None) -> None:
    left = iter(values)
    monkeypatch.setattr(Watch, "share", lambda self: next(left))


def test_a_calm_try_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    shares(monkeypatch, 0.3, 0.05, 0.0)
    results = iter("abc")
    assert calmest(lambda: next(results), tries=3, at_most=0.05) == ("b", 0.05)


def test_the_calmest_of_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shares(monkeypatch, 0.3, 0.1, 0.2)
    results = iter("abc")
    assert calmest(lambda: next(results), tries=3, at_most=0.05) == ("b", 0.1)


def test_where_the_system_does_not_tell_there_is_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbance, "_worked_s", lambda: None)
    results = iter("abc")
    assert calmest(lambda: next(results), tries=3, at_most=0.05) == ("a", None)


def test_tries_are_checked() -> None:
    with pytest.raises(ValueError, match=r"tries: needs 1 or more, got 0"):
        calmest(lambda: None, tries=0, at_most=0.05)
