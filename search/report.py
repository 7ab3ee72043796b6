"""What a person sees of a run: `report.html`, the table of the front, and the same table in a terminal.

python -m search.report RUN                          # write report.html anew and print the front
python -m search.report RUN RUN ... [--html FILE]    # compare runs; a page with hypervolume over training tokens
python -m search.report RUN --optuna sqlite:///study.db
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from search.comparison import compare_runs, terminal_comparison
from search.comparison_page import render_comparison
from search.front import sentence_without_front
from search.optuna_export import export_study
from search.report_data import read_run
from search.report_page import render_page
from search.report_scatter import write_front_image
from search.report_table import FrontRow, rows_of, terminal_table

__all__ = ["FrontRow", "LiveReport", "front_table", "print_front", "write_front_image", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder: one page that works offline, at any moment of a run.

    Args:
        run_dir: A run folder with `config.json` and `run.db`; without `front.json` the log gives the front.
    Returns:
        The path of the page. An older page is replaced only once the new one is complete.
    Raises:
        ValueError: the run folder cannot be read (see `search.report_data.read_run`).
        OSError: the page cannot be written.
    Cost: about 5 MB of disk, nearly all of it plotly's script; 1 s for 1000 evaluations on one core.
    """
    run = read_run(Path(run_dir))
    path = run.directory / "report.html"
    partial = path.with_suffix(".html.new")
    partial.write_text(render_page(run), encoding="utf-8")
    partial.replace(path)
    return path


class LiveReport:
    """Keeps `report.html` of a running search up to date without holding the search up.

    Args:
        run_dir: The run folder.
        share: Part of the search's time that may go into writing the page, 0 to 1.
    """

    def __init__(self, run_dir: Path, share: float = 0.05) -> None:
        self.run_dir, self.share = run_dir, share
        self._next = time.monotonic()

    def update(self) -> None:
        """Write the page, unless it was written a short while ago for what that took."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write the page."""
        started = time.monotonic()
        write_report(self.run_dir)
        ended = time.monotonic()
        self._next = ended + (ended - started) / self.share


def front_table(run_dir: Path) -> list[FrontRow]:
    """List the front, sorted by the first objective, and then the baselines in the order of the log.

    Raises:
        ValueError: the run folder cannot be read.
    """
    return rows_of(read_run(Path(run_dir)))


def print_front(run_dir: Path, console: Console) -> None:
    """Print the front beside the baselines, with units in the header and the best of each column marked.

    Raises:
        ValueError: the run folder cannot be read.
    """
    run = read_run(Path(run_dir))
    if not run.front:
        console.print(sentence_without_front(run.candidates, run.ranking), soft_wrap=True, highlight=False)
    if run.front or run.baselines:
        console.print(terminal_table(run))


def main(argv: Sequence[str] | None = None) -> int:
    """Report on one run, or compare several; return the exit code: 0, or 2 where something was asked that can't be
    done."""
    parser = argparse.ArgumentParser(prog="python -m search.report", description="Report on a run, or compare several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--html", type=Path, metavar="FILE", help="where to write the comparison as a page")
    parser.add_argument("--optuna", metavar="URL", help="write each run into this Optuna storage, as a study")
    options = parser.parse_args(argv)
    console = Console()
    try:
        runs = [read_run(path) for path in options.runs]
        if len(runs) > 1 or options.html is not None:
            standings = compare_runs(runs)
            console.print(terminal_comparison(standings))
            if options.html is not None:
                options.html.write_text(render_comparison(standings), encoding="utf-8")
                console.print(f"Comparison: {options.html}", soft_wrap=True, highlight=False)
        else:
            print_front(options.runs[0], console)
            console.print(f"Report: {write_report(options.runs[0])}", soft_wrap=True, highlight=False)
        if options.optuna is not None:
            for run in runs:
                count = export_study(run, options.optuna)
                console.print(f"{count} trials of {run.directory.name} in {options.optuna}", soft_wrap=True)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
