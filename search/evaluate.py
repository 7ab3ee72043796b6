"""One candidate in, one typed result out: decode the genome, train it, measure it.

The two halves are apart, since trainings may overlap and measurements of time may not. Memory is counted in bytes that
are the same whatever else runs, and so belongs to the first half. Each half leaves a file behind once it is done,
written in one step, so that a search that was killed between them goes on from there.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import measure_model
from search.data import Corpus
from search.evaluation import Status
from search.inherit import inherit_weights
from search.settings import MEASURED, Settings
from search.store import read_json, write_json
from search.train import DeadlineExceeded, Diverged, Flat, peak_rate, train
from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome.baselines import transformer_pp

DECODED_TOKENS = 32
"""One-token steps in one sample of the decoding measurement."""

PROBE_MARGIN = 0.02
"""How far below the entropy of the tokens' frequencies a loss has to be at the probe, in nats. Tried at the laptop
preset on the default text, whose entropy is 3.038, with the baselines and eight random genomes: after 32 of 128 steps
nine of the twelve had losses from 2.12 to 2.52; three had 3.07 to 3.11, and 2.90, 3.04 and 3.08 after 64."""

COUNTED = ("peak_memory_bytes",)
"""What is measured beside other trainings, since nothing that runs there changes it."""

TIMED = tuple(name for name in MEASURED if name not in COUNTED)
"""What is measured while nothing else runs."""


@dataclass(frozen=True)
class Task:
    """One half of an evaluation, as it is handed to a process.

    Attributes:
        genome: Canonical text.
        genome_hash: Its hash.
        seed: Seeds weights and batches.
        settings: The search's settings.
        work: Folder with the saved corpus, where weights and results go.
        stage: "train" or "measure".
        start: Training: go on after this step, from the checkpoint that is in `work` for it; from the beginning where
            there is none.
        stop: Training: stop after this step, and leave a checkpoint instead of the weights. None trains to the end.
        parents: Hashes of the genomes that weights may be inherited from.
        replica: 0 for the search's own evaluation; above, for a repetition with another seed, which leaves no weights.
    """

    genome: str
    genome_hash: str
    seed: int
    settings: Settings
    work: Path
    stage: str
    start: int | None = None
    stop: int | None = None
    replica: int = 0
    parents: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Which evaluation this is a half of: the genome's hash, and the number of a repetition."""
        return f"{self.genome_hash}+{self.replica}" if self.replica else self.genome_hash

    @property
    def result_path(self) -> Path:
        """Where the result of this half is written."""
        rung = "" if self.stop is None else f"-{self.stop}"
        return self.work / f"{self.name}.{self.stage}{rung}.json"

    def checkpoint_path(self, step: int) -> Path:
        """Where a training that stops after `step` leaves its checkpoint."""
        return self.work / f"{self.genome_hash}.{step}.checkpoint"


@dataclass(frozen=True)
class Outcome:
    """How one half of an evaluation ended.

    `curve` is filled by training alone. `cached`: taken from an earlier run. `inherited`: LIVs that began with a
    parent's weights.
    """

    status: Status
    metrics: dict[str, float]
    seconds: float
    error: str | None = None
    curve: tuple[tuple[int, float], ...] = ()
    cached: bool = False
    inherited: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Outcome:
        """Read what `to_json` returned."""
        curve = tuple((step, loss) for step, loss in values["curve"])
        return cls(**values | {"status": Status(values["status"]), "curve": curve})


def candidate_seed(run_seed: int, genome_hash: str, replica: int = 0) -> int:
    """Return the seed of a candidate's training: the same whenever and wherever it is trained in a run."""
    text = f"{run_seed}:{genome_hash}:{replica}" if replica else f"{run_seed}:{genome_hash}"
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:6], "big")


def run_task(task: Task, report: Callable[[int, float], None] | None = None) -> Outcome:
    """Do one half of an evaluation, write its outcome to `task.result_path`, and return it.

    What goes wrong with the candidate becomes a status. What goes wrong with the machine, a full disk, is raised.

    Args:
        task: What to do.
        report: Called after each training step with its number and loss.
    Raises:
        OSError: The disk is full.
    """
    started = time.monotonic()

    def failed(status: Status, error: BaseException) -> Outcome:
        reason = f"{type(error).__name__}: {error}" if status is Status.CRASH else str(error) or type(error).__name__
        return Outcome(status, {}, time.monotonic() - started, reason)

    work = _train if task.stage == "train" else _measure
    try:
        outcome = work(task, started, report)
    except Diverged as error:
        outcome = failed(Status.NAN, error)
    except Flat as error:
        outcome = failed(Status.FLAT, error)
    except DeadlineExceeded as error:
        outcome = failed(Status.TIMEOUT, error)
    except MemoryError as error:
        outcome = failed(Status.OOM, error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        outcome = failed(Status.CRASH, error)
    except Exception as error:
        # safetensors wraps the operating system's error; torch's CPU allocator raises a plain RuntimeError.
        if "No space left on device" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(task.work)) from error
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        outcome = failed(Status.OOM if out_of_memory else Status.CRASH, error)
    write_json(task.result_path, outcome.to_json())
    return outcome


def count_metrics(genome: Genome, settings: Settings, vocab_size: int) -> dict[str, float]:
    """Return the metrics of `search.ranking.COUNTED_BEFORE` without allocating the model.

    Raises:
        ValueError: The genome does not fit the sizes.
    """
    with torch.device("meta"):
        return _counts(LanguageModel(genome, settings.model_config(vocab_size)), settings)


def _counts(model: LanguageModel, settings: Settings) -> dict[str, float]:
    return {
        "parameters": float(model.num_parameters()),
        "cache_bytes": float(model.cache_bytes(1, settings.seq_len)),
    }


def _model_config(task: Task, corpus: Corpus) -> ModelConfig:
    return task.settings.model_config(corpus.vocab_size)


def _train(task: Task, started: float, report: Callable[[int, float], None] | None) -> Outcome:
    settings = task.settings
    corpus = Corpus.load(task.work)
    try:
        model = LanguageModel(Genome.parse(task.genome), _model_config(task, corpus), seed=task.seed)
        model.to(settings.device)
    except ValueError as error:
        return Outcome(Status.INVALID, {}, time.monotonic() - started, str(error))
    inherited = inherit_weights(model, [_weights_of(task, parent) for parent in task.parents])
    deadline = started + settings.timeout_seconds
    probe = (settings.probe_steps, corpus.unigram_entropy() - PROBE_MARGIN) if settings.probe_steps else None
    config = settings.train_config()
    if settings.learning_rate is None:
        # A genome may decide its width, and the rate goes by that.
        config = dataclasses.replace(config, lr=peak_rate(model.config.width))
    start = None if task.start is None else task.checkpoint_path(task.start)
    result = train(
        model,
        corpus,
        config,
        seed=task.seed,
        deadline=deadline,
        on_step=report,
        start=start if start is not None and start.exists() else None,
        stop=task.stop,
        keep=None if task.stop is None else task.checkpoint_path(task.stop),
        probe=probe,
    )
    metrics = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte, **_counts(model, settings)}
    if settings.timed:
        peak = _peak_bytes(model, settings)
        reference_peak = _reference_peak_bytes(task, _model_config(task, corpus))
        metrics |= {"peak_memory_bytes": peak, "peak_memory_bytes_ratio": peak / reference_peak}
    if task.stop is None and not task.replica:
        weights = task.work / f"{task.genome_hash}.safetensors"
        temporary = weights.with_suffix(".new")
        model.save(temporary)
        temporary.replace(weights)
    seconds = time.monotonic() - started
    return Outcome(Status.OK, metrics, seconds, curve=tuple(result.curve), inherited=inherited)


def _weights_of(task: Task, genome_hash: str) -> Path:
    """Return where the weights of an earlier candidate are: beside the results, or among the best."""
    name = f"{genome_hash}.safetensors"
    return task.work / name if (task.work / name).exists() else task.work.parent / "best" / name


def _measure(task: Task, started: float, report: Callable[[int, float], None] | None) -> Outcome:
    settings = task.settings
    config = _model_config(task, Corpus.load(task.work))
    model = LanguageModel(Genome.parse(task.genome), config, seed=task.seed).to(settings.device)
    reference = LanguageModel(transformer_pp(settings.depth), config, seed=task.seed).to(settings.device)
    seconds = settings.measure_seconds / len(MEASURED)
    metrics = measure_model(model, reference, which=TIMED, seconds=seconds, **_sizes(settings, config))
    return Outcome(Status.OK, metrics, time.monotonic() - started)


def _peak_bytes(model: LanguageModel, settings: Settings) -> float:
    return measure_model(model, None, which=COUNTED, **_sizes(settings, model.config))["peak_memory_bytes"]


def _reference_peak_bytes(task: Task, config: ModelConfig) -> float:
    """Return the reference model's peak, counted once a run: 0.15 s that other candidates need not spend again."""
    path = task.work / "reference.json"
    if not path.exists():
        # Two processes may come here at once: each renames a file of its own, and both hold the same number.
        own = task.work / f"{task.name}.reference.json"
        reference = LanguageModel(transformer_pp(task.settings.depth), config).to(task.settings.device)
        write_json(own, _peak_bytes(reference, task.settings))
        own.replace(path)
    return float(read_json(path))


def _sizes(settings: Settings, config: ModelConfig) -> dict[str, int]:
    return {
        "vocab_size": config.vocab_size,
        "batch_size": settings.batch_size // settings.accumulation,
        "seq_len": settings.seq_len,
        "decode_tokens": DECODED_TOKENS,
    }
