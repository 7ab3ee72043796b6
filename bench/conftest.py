"""What the benchmarks have in common: their options, their grid, and where their numbers go.

A file of benchmarks holds `CASES`; its test is run once for each case and mode with the fixture `record`.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case
from bench.results import Absent, Row, write_results
from bench.suite import Record, Settings, measure_case
from star_kernels.dispatch import use_backend

_LATEST = Path(__file__).parent / "results" / "latest.json"
_ROWS: pytest.StashKey[list[Row]] = pytest.StashKey()
_ABSENT: pytest.StashKey[list[Absent]] = pytest.StashKey()
_LOAD: pytest.StashKey[float] = pytest.StashKey()
_QUICK_SECONDS, _FULL_SECONDS = 0.15, 0.5


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the benchmarks' options."""
    group = parser.getgroup("star benchmarks")
    group.addoption("--quick", action="store_true", help="few cases, forward and backward together alone")
    group.addoption("--star-json", type=Path, default=_LATEST, metavar="PATH", help="result file (%(default)s)")
    group.addoption("--star-seconds", type=float, metavar="S", help="sampling time of a case, all providers together")
    group.addoption("--star-device", default="cpu", metavar="DEVICE", help="cpu or cuda (%(default)s)")
    group.addoption("--star-backend", metavar="NAME", help="measure this backend in place of the best available one")


def pytest_configure(config: pytest.Config) -> None:
    """Start with no rows, and look how busy the machine is without us."""
    config.stash[_ROWS], config.stash[_ABSENT], config.stash[_LOAD] = [], [], os.getloadavg()[0]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a benchmark on each of its file's cases and modes, in a quick run on the quick ones."""
    if "case" not in metafunc.fixturenames:
        return
    quick = metafunc.config.getoption("quick")
    grid = [
        (case, mode)
        for case in metafunc.module.CASES
        for mode in case.modes
        if not quick or ("quick" in case.flags and mode != "fwd")
    ]
    metafunc.parametrize(("case", "mode"), grid, ids=[f"{case.operator}-{mode}-{case.name}" for case, mode in grid])


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Record:
    """Measure a case against its peers, and keep the rows.

    What counts is the interleaved measurement, in `extra_info` and in the project's own file; pytest-benchmark's own
    rounds of our call alone are there for its tools.
    """
    config = request.config
    seconds = config.getoption("star_seconds")
    quick = config.getoption("quick")
    settings = Settings(
        min_seconds=(_QUICK_SECONDS if quick else _FULL_SECONDS) if seconds is None else seconds,
        min_samples=5 if quick else 9,
        device=config.getoption("star_device"),
    )

    backend = config.getoption("star_backend")

    def measure(case: Case, mode: str) -> None:
        with use_backend(backend) if backend else nullcontext():
            outcome = measure_case(case, mode, settings)
        rows, absent = config.stash[_ROWS], config.stash[_ABSENT]
        rows.extend(outcome.rows)
        absent.extend(outcome.absent)
        # After every case: a run that is killed keeps what it has.
        write_results(config.getoption("star_json"), rows, absent, quick=quick, load=config.stash[_LOAD])
        ours = outcome.rows[0]
        benchmark.extra_info.update(
            backend=ours.backend,
            median_s=ours.median_s,
            best_peer=ours.best_peer,
            ratio_to_best_peer=ours.ratio_to_best_peer,
            ratios={row.provider: row.ratio for row in outcome.rows},
            ceiling=ours.ceiling,
            percent_of_ceiling=ours.percent_of_ceiling,
            peak_bytes=ours.peak_bytes,
        )
        chosen = use_backend(backend) if backend else nullcontext()
        with torch.set_grad_enabled(outcome.grad), chosen:
            benchmark.pedantic(  # type: ignore[no-untyped-call]
                outcome.run, rounds=3, iterations=outcome.calls_per_sample
            )

    return measure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say where the numbers are and how to read them."""
    if config.stash[_ROWS]:
        path = config.getoption("star_json")
        terminalreporter.write_line(
            f"{len(config.stash[_ROWS])} rows in {path}; read them: python -m bench.report {path}"
        )
