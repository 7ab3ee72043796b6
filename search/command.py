"""The command line of the search, `python -m search.run`."""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.harness import machine
from search.data import Corpus, DataError, load_corpus
from search.driver import search
from search.evaluation import Evaluation
from search.front import is_feasible, sentence_without_front
from search.optimizers import make_optimizer
from search.options import Parser, UsageError
from search.ranking import Ranking, Term
from search.report import LiveReport, print_front
from search.report_metrics import format_seconds
from search.result_cache import ResultCache
from search.settings import (
    MOVABLE,
    OBJECTIVES,
    OPTIMIZERS,
    PRESETS,
    RUNG_FACTOR,
    WORKERS,
    Settings,
    SettingsError,
)
from search.start import NAMES, read_starts
from search.store import RunFolderError, Store, read_json, write_json
from search.view import View
from search.workers import Workers, make_workers
from star_core.genome import LEVELS

RUNS = Path("runs")
"""Where run folders go unless `--out` says otherwise."""


def parser() -> Parser:
    """Return the parser; options that are not given are absent from what it returns, so that presets and
    `--resume` fill them."""
    made = Parser(
        "python -m search.run",
        "Evolve sequence models for perplexity and for measured latency and memory on this machine.",
    )
    option = made.add_argument
    option("--preset", choices=list(PRESETS), help="settings to begin with (default: laptop)")
    option("--objectives", type=_names, metavar="A,B", help=f"two to five of: {', '.join(OBJECTIVES)}")
    option(
        "--budget",
        type=_names,
        action="extend",
        metavar="TERM",
        help="what every winner keeps, such as 'parameters<=2e6' or 'decode_ms_per_token<=2,perplexity<=9', on any "
        "name that --objectives knows; genomes that break a limit on parameters or cache_bytes are not trained "
        "(repeatable)",
    )
    option(
        "--epsilon",
        type=float,
        metavar="X",
        help="fraction up to which two measured times can count as equal, so that noise decides less (default: 0.02)",
    )
    option(
        "--optimizer",
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}, or the name of one of nevergrad's that mutates, such as RecMixES "
        "(default: nsga2)",
    )
    option("--population", type=int, metavar="N", help="genomes in a generation")
    option("--generations", type=int, metavar="N", help="generations, the initial one included")
    option("--depth", type=int, metavar="N", help="LIVs in a genome")
    option("--level", choices=list(LEVELS), help="how deep to mutate (default: backbone, the paper's space)")
    option("--width", type=int, metavar="N", help="width of the residual stream")
    option("--head-dim", type=int, metavar="N", help="channels of an attention head")
    option("--tokens", type=int, metavar="N", help="training tokens of each candidate")
    option("--seq-len", type=int, metavar="N", help="training length in tokens, and context of the measurements")
    option("--batch-size", type=int, metavar="N", help="sequences in a training step")
    option("--learning-rate", type=float, metavar="X", help="peak learning rate")
    option(
        "--rungs",
        type=int,
        metavar="N",
        help=f"successive halving: train a generation for 1/{RUNG_FACTOR}^(N-1) of the steps, its best third for "
        f"{RUNG_FACTOR} times as many, and so on (default: 1, all to the end)",
    )
    option(
        "--asynchronous",
        action="store_true",
        help="no generations: whoever has a place free begins the next candidate, or a higher rung of an earlier one; "
        "for clusters, and for trainings of very different length; not repeatable, unlike a search with generations",
    )
    option(
        "--inherit",
        action="store_true",
        help="begin a child's training with its parents' weights where it is built alike: cheaper, and biased, since "
        "descendants train longer than newcomers; keeps the weights of all candidates until the search is over",
    )
    option(
        "--probe-steps",
        type=int,
        metavar="N",
        help="stop a training whose loss after N steps is not below what the frequencies of tokens alone would give "
        "(default: 0, never; about a quarter of the steps is good)",
    )
    option(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text, JSON lines or Parquet files, folders, or a data set's name (default: State of the Union speeches)",
    )
    option(
        "--start",
        action="append",
        metavar="NAME",
        help=f"begin with these genomes: of {', '.join(NAMES)} by name, or of a winner or a folder of transformers' by "
        "path (repeatable, or with commas)",
    )
    option(
        "--final-seeds",
        type=int,
        metavar="N",
        help="train and measure the final front again with N other seeds; front.json and the report get mean and "
        "deviation (default: 0)",
    )
    option(
        "--cache",
        metavar="PATH",
        help="take results of the same genome, text, settings and seed from this file, and leave new ones there; "
        "runs may share it (times are this machine's own)",
    )
    option("--out", type=Path, metavar="DIR", help="run folder (default: a new one in runs/)")
    option("--resume", action="store_true", help="go on with the run in --out, or with the newest in runs/")
    option("--seed", type=int, metavar="N", help="seed of the evolution and of every training")
    option(
        "--workers",
        choices=WORKERS,
        help="evaluate each candidate in a fresh process (default), all in this one, or on the machines of a cluster",
    )
    option("--ray-address", metavar="HOST:PORT", help="the Ray cluster (default: Ray is started on this machine)")
    option("--gpus-per-task", type=float, metavar="N", help="GPUs of each candidate on a cluster (default: 0)")
    option(
        "--slurm",
        type=_names,
        action="extend",
        metavar="KEY=VALUE",
        help="what SLURM is asked for, such as partition=gpu,account=lab (repeatable, or with commas)",
    )
    option("--jobs", type=int, metavar="N", help="candidates trained at once (default: the number of cores)")
    option("--measure-threads", type=int, metavar="N", help="threads of the measured model; 0 for torch's own number")
    option("--measure-seconds", type=float, metavar="X", help="time for measuring one candidate's latency and memory")
    option("--timeout-seconds", type=float, metavar="X", help="longest time for training one candidate")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a search; return the exit code: 0, 2 where something was asked that can't be done, 130 where it was
    interrupted."""
    console = Console()
    complain = Console(stderr=True)
    root: Path | None = None
    try:
        given = parser().given(argv)
        if "cache" in given:
            given["cache"] = str(Path(given["cache"]).absolute())
        if "budget" in given:
            given["budget"] = _terms(given["budget"])
        resume = given.pop("resume", False)
        root = given.pop("out", None) or (_newest_run() if resume else _new_run(given.get("preset", "laptop")))
        if resume:
            _resume(root, given, console)
        else:
            _begin(root, _settings(given), console)
    except (SettingsError, RunFolderError, DataError) as error:
        complain.print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)
        return 2
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"the disk is full; every finished evaluation is safe: free some space and add --resume --out {root}"
        elif isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | FileExistsError):
            what = f"{error.filename}: {error.strerror}"
        else:
            raise
        complain.print(f"error: {what}", soft_wrap=True, highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        hint = f"interrupted; go on with: python -m search.run --resume --out {root}"
        complain.print(hint, soft_wrap=True, highlight=False, markup=False)
        return 130
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _terms(texts: Sequence[str]) -> list[str]:
    """Write the terms of a budget in the one way that a run compares them in, each once."""
    try:
        return list(dict.fromkeys(str(Term.parse(text)) for text in texts))
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def _settings(given: dict[str, Any]) -> Settings:
    changes: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    preset = PRESETS[changes.pop("preset", "laptop")]
    if "start" in changes:
        depth = dataclasses.replace(preset, depth=changes.get("depth", preset.depth)).depth
        changes["start"] = read_starts(changes["start"], depth)
    return dataclasses.replace(preset, **changes)


def _new_run(preset: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return RUNS / f"{preset}-{stamp}"


def _newest_run() -> Path:
    runs = sorted(RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UsageError(f"--resume: no run in {RUNS}/; name its folder with --out")
    return runs[-1].parent


def _begin(root: Path, settings: Settings, console: Console) -> None:
    """Start a new run; nothing is written before settings and data are known to be good."""
    if (root / "config.json").exists():
        raise RunFolderError(f"{root}: already holds a run; add --resume to go on with it, or choose another --out")
    make_optimizer(settings)
    corpus = load_corpus(settings.data or None)
    corpus.check(settings.seq_len)
    if settings.cache is not None:
        ResultCache(Path(settings.cache), corpus.fingerprint).close()
    with closing(make_workers(settings)) as workers, Store(root) as store:
        corpus.save(store.work)
        config = {
            **settings.to_json(),
            "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size},
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
        }
        write_json(root / "config.json", config)
        _go(settings, store, workers, corpus, console)


def _resume(root: Path, given: dict[str, Any], console: Console) -> None:
    """Go on with a run, whose settings must be those it began with where any are given."""
    config = read_json(root / "config.json")
    if not isinstance(config, dict):
        raise RunFolderError(f"{root / 'config.json'}: needs a JSON object, got {type(config).__name__}")
    settings = Settings.from_json(config)
    if "start" in given:
        given["start"] = read_starts(given["start"], settings.depth)
    moved = {name: given.pop(name) for name in MOVABLE if name in given}
    for name, value in given.items():
        asked, stored = tuple(value) if isinstance(value, list) else value, getattr(settings, name)
        if asked != stored:
            option = "--" + name.replace("_", "-")
            raise RunFolderError(f"{root}: began with {option} {_shown(stored)}, and can't go on with {_shown(asked)}")
    settings = _moved(settings, moved)
    with closing(make_workers(settings)) as workers, Store(root) as store:
        corpus = Corpus.load(store.work)
        if corpus.fingerprint != config["corpus"]["fingerprint"]:
            raise RunFolderError(f"{store.work}: the saved text is not the one that the run began with")
        if moved:
            write_json(root / "config.json", config | settings.to_json())
        _go(settings, store, workers, corpus, console)


def _moved(settings: Settings, moved: dict[str, Any]) -> Settings:
    """Return the settings of a run that goes on elsewhere; a cluster's own do not go along to another kind."""
    if moved.get("workers", settings.workers) != settings.workers:
        moved = {"ray_address": None, "slurm": (), **moved}
    changes: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in moved.items()}
    return dataclasses.replace(settings, **changes)


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _go(settings: Settings, store: Store, workers: Workers, corpus: Corpus, console: Console) -> None:
    """Search and show; then the table, the page, and where everything is."""
    started = time.monotonic()
    console.print(
        f"{settings.preset}: {settings.generations} generations of {settings.population} genomes "
        f"of {settings.depth} LIVs, width {settings.width}; {settings.tokens:,} tokens of {corpus.name} each; "
        f"minimising {', '.join(settings.objectives)}"
        f"{' within ' + ', '.join(settings.budget) if settings.budget else ''}; in {store.root}",
        soft_wrap=True,
        highlight=False,
    )

    report = LiveReport(store.root)

    def on_generation() -> None:
        # Whoever survives may become a parent, and not only the front does.
        store.keep_front(settings.ranking, delete=not settings.inherit)
        report.update()

    with View(settings, console) as view:
        search(settings, store, workers, view, on_generation)
    store.keep_front(settings.ranking)
    report.write()
    print_front(store.root, console)
    console.print(_gain(store.evaluations(), settings.ranking), highlight=False)
    console.print(
        f"{format_seconds(time.monotonic() - started)}. "
        f"Report: {store.root / 'report.html'}   trained winners: {store.best}/",
        soft_wrap=True,
        highlight=False,
    )


def _gain(evaluations: Sequence[Evaluation], ranking: Ranking) -> str:
    """Say what evolution gained in perplexity over the initial population, among what keeps the budget."""
    scored = [e for e in evaluations if is_feasible(e, ranking)]
    initial = [e.metrics["perplexity"] for e in scored if e.generation == 0]
    if not scored:
        return sentence_without_front(evaluations, ranking)
    if not initial:
        return "No genome of the initial population could be evaluated, or none keeps the budget."
    best = min(e.metrics["perplexity"] for e in scored)
    return f"Best perplexity {best:.3f}; the initial population's best was {min(initial):.3f}."
