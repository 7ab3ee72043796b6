"""What the search's driver costs beside its workers, and how a long log opens and is reported on.

    python -m bench.search_driver [--evaluations 1000] [--rows 100000] [--profile]

Results are made up, so that nothing is trained. The first figure is the driver's seconds an evaluation: asking,
logging, telling, the front and the report as the command line keeps them, at five objectives and a population of 100.
The second is of a log with so many rows, five objectives and curves of 64 points: opening it for writing, keeping the
front for the first time, and writing the report.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from bench.hardware import machine
from search.driver import search
from search.evaluate import Outcome, Task
from search.evaluation import Evaluation, Status
from search.report import LiveReport, write_report
from search.settings import Settings
from search.store import Store, write_json
from search.view import View
from search.workers import Progress
from star_core.genome import random_genome
from tests.search.fake_workers import FakeWorkers, fake_settings
from tests.search.invented import invented

OBJECTIVES = ("perplexity", "parameters", "cache_bytes", "decode_ms_per_token_ratio", "peak_memory_bytes_ratio")
DEPTH = 8
DISTINCT = 500  # genomes that the rows of a long log are made of


class Clocked(FakeWorkers):
    """Adds up the seconds that the workers take, so that they are not counted as the driver's."""

    seconds = 0.0
    cpu_seconds = 0.0

    def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
        """See `search.workers.Workers`."""
        results = super().run(tasks, jobs, progress)
        while True:
            started, cpu_started = time.perf_counter(), time.process_time()
            result = next(results, None)
            self.seconds += time.perf_counter() - started
            self.cpu_seconds += time.process_time() - cpu_started
            if result is None:
                return
            yield result


def driver_cost(evaluations: int, population: int = 100) -> dict[str, float]:
    """Run a search of so many evaluations; return the driver's seconds, in all and in milliseconds an evaluation.

    Processor time is beside the clock's, since a commit waits for the disk, and other work for the processor.
    """
    settings = fake_settings(
        population=population, generations=max(1, evaluations // population), depth=DEPTH, objectives=OBJECTIVES
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        workers = Clocked()
        with Store(root) as store, View(settings, Console(quiet=True)) as view:
            write_json(root / "config.json", settings.to_json())
            report = LiveReport(root)

            def on_generation() -> None:
                store.keep_front(settings.ranking)
                report.update()

            started, cpu_started = time.perf_counter(), time.process_time()
            search(settings, store, workers, view, on_generation)
            cpu_seconds = time.process_time() - cpu_started - workers.cpu_seconds
            seconds = time.perf_counter() - started - workers.seconds
            done = len(store.evaluations())
    return {
        "evaluations": done,
        "driver_seconds": seconds,
        "driver_ms_per_evaluation": 1000 * seconds / done,
        "driver_cpu_ms_per_evaluation": 1000 * cpu_seconds / done,
    }


def log_cost(rows: int) -> dict[str, float]:
    """Write a log of so many rows; return the seconds that opening it, keeping its front and reporting on it take."""
    settings = fake_settings(population=100, generations=rows // 100, depth=DEPTH, objectives=OBJECTIVES)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_json(root / "config.json", settings.to_json())
        with Store(root) as store:
            store.add(*_made_up(rows, settings))
        clock = time.perf_counter()
        with Store(root) as store:
            store.find("nothing")
            opened = time.perf_counter() - clock
            clock = time.perf_counter()
            front = store.keep_front(settings.ranking)
            kept = time.perf_counter() - clock
        clock = time.perf_counter()
        page = write_report(root)
        reported = time.perf_counter() - clock
        size = (root / "run.db").stat().st_size
        return {
            "rows": rows,
            "log_bytes": size,
            "front": len(front),
            "open_seconds": opened,
            "keep_front_seconds": kept,
            "report_seconds": reported,
            "report_bytes": page.stat().st_size,
        }


def _made_up(rows: int, settings: Settings) -> Iterator[Evaluation]:
    rng = np.random.default_rng(0)
    genomes = [str(random_genome(rng, DEPTH).canonical()) for _ in range(min(rows, DISTINCT))]
    metrics = [invented(genome) for genome in genomes]
    for row in range(rows):
        which = row % len(genomes)
        scale = np.exp(rng.normal(0, 0.2, len(metrics[which]))).tolist()
        yield Evaluation(
            genome=genomes[which],
            genome_hash=f"{row:016x}",
            status=Status.OK,
            seed=row,
            generation=row // settings.population,
            metrics={name: value * by for (name, value), by in zip(metrics[which].items(), scale, strict=True)},
            seconds=10.0,
            parents=(f"{max(0, row - 100):016x}", f"{max(0, row - 150):016x}"),
            curve=tuple((step, 5.0 - step / 50) for step in range(64)),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description="What the search's driver costs, and how a long log opens.")
    parser.add_argument("--evaluations", type=int, default=1000, help="of the search (default: 1000)")
    parser.add_argument("--rows", type=int, default=100_000, help="of the long log (default: 100000); 0 leaves it out")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, by function")
    options = parser.parse_args(argv)
    results = {"machine": machine(), "driver": _profiled(lambda: driver_cost(options.evaluations), options.profile)}
    if options.rows:
        results["log"] = _profiled(lambda: log_cost(options.rows), options.profile)
    print(json.dumps(results, indent=2))


def _profiled(measure: Callable[[], dict[str, float]], wanted: bool) -> dict[str, float]:
    if not wanted:
        return measure()
    profile = cProfile.Profile()
    result = profile.runcall(measure)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
    return result


if __name__ == "__main__":
    main()
