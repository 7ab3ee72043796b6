"""The settings of a search: presets, checks, and their place in config.json."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from search.ranking import COUNTED_BEFORE, Ranking, Term, contradiction
from search.train_config import Precision, TrainConfig, peak_rate
from star_core import Genome, ModelConfig
from star_core.genome import LEVELS, Level

TRAINED = ("perplexity", "bits_per_byte", "parameters", "cache_bytes")
MEASURED = ("prefill_ms", "decode_ms_per_token", "train_ms_per_step", "peak_memory_bytes")
OBJECTIVES = (*TRAINED, *MEASURED, *(f"{name}_ratio" for name in MEASURED))
"""What can be minimised. Names carry their units; `_ratio` is to Transformer++ of the same depth and width,
measured interleaved."""


RUNG_FACTOR = 3
"""A rung trains so many times as long as the one below, and one candidate in so many goes on to it."""

WORKERS = ("processes", "inline", "ray", "slurm")
"""Where candidates are evaluated; the last two need their extra."""

MOVABLE = ("workers", "jobs", "ray_address", "slurm")
"""What may be another where a run goes on: it decides where candidates are evaluated, and nothing else."""

OPTIMIZERS = ("nsga2", "random", "ga")
"""The search's own optimizers; any of nevergrad's that takes genomes goes by its name there."""


class SettingsError(ValueError):
    """A setting that no search can run with; its text is one sentence for the person who typed it."""


def at_rung(whole: int, rung: int, rungs: int) -> int:
    """Return how much of a whole training, in steps or tokens, is done at the end of a rung, from 0, of so many."""
    shrunk: int = RUNG_FACTOR ** (rungs - 1 - rung)
    return whole // shrunk


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a search does; two runs with equal settings on equal data evaluate the same genomes.

    Attributes:
        preset: Name of the preset that these settings began with.
        objectives: Two to five of `OBJECTIVES`, minimised together.
        optimizer: One of `OPTIMIZERS`, or the name of one of nevergrad's.
        population: Genomes that survive a generation, and genomes asked for in each.
        generations: Generations, the initial one included.
        depth: LIVs in a genome; above backbone level at most.
        width: Width of the residual stream; above backbone level at most.
        head_dim: Channels of an attention head.
        tokens: Training tokens of each candidate.
        seq_len: Training length; also the context of `cache_bytes` and of the prefill measurement.
        batch_size: Sequences in a training step.
        accumulation: Parts that a training step's batch is cut into, to fit memory.
        learning_rate: Peak rate of AdamW; None takes `search.train.peak_rate` of the width.
        warmup_steps: Steps of linear warm-up; None takes a tenth of all.
        rungs: With 2 or more, successive halving: a generation trains a part of its steps, the best third of it three
            times as many, and so on up to all of them at the last rung. 1 trains every candidate to the end.
        asynchronous: Whether there are no generations: whenever a place is free, the next candidate begins, or one goes
            on to its next rung. What is asked then depends on which training ends first.
        inherit: Whether a child begins with its parents' weights where it is built alike; biased, see `search.inherit`.
        probe_steps: After so many steps, a training whose loss is not below what the tokens' frequencies alone would
            give is stopped; 0 for never.
        precision: "float32", or "bfloat16" for autocast in training.
        valid_tokens: Held-out tokens that perplexity is computed on.
        measure_threads: Threads of the measured model; 0 takes torch's own number.
        measure_seconds: Time given to the measurement of one candidate's latency and memory.
        timeout_seconds: Longest life of one candidate's process.
        budget: Terms such as "parameters<=2000000", on any of `OBJECTIVES`, that every winner keeps.
        epsilon: Two values of a timed objective less than this fraction apart can count as equal.
        data: Files, folders or data set names; empty for the embedded corpus.
        final_seeds: Other seeds that the final front is trained and measured again with, each of them once.
        cache: SQLite file of results that runs share; None for none.
        start: Texts of genomes that the initial population begins with.
        seed: Seeds the evolution and, with a genome's hash, each training.
        level: How deep the search mutates: "backbone" is the paper's space; "operator" and "featurizer" add LIVs with
            operators, norms and, the last, feature groups of their own, and models with a width and a depth.
        workers: "processes" (a fresh process for each candidate), "inline" (all in this one), "ray" or "slurm".
        jobs: Candidates trained at once, one thread each; 0 takes the number of cores, and of a cluster all there are.
        ray_address: The Ray cluster, "host:port" or "auto"; None starts Ray on this machine.
        gpus_per_task: GPUs of a candidate on a cluster, which then trains and is measured on the first of them.
        slurm: What SLURM is asked for, such as "partition=gpu": see `search.slurm_workers`.
    """

    preset: str
    population: int
    generations: int
    depth: int
    width: int
    head_dim: int
    tokens: int
    seq_len: int
    batch_size: int
    valid_tokens: int
    measure_seconds: float
    timeout_seconds: float
    accumulation: int = 1
    learning_rate: float | None = None
    warmup_steps: int | None = None
    rungs: int = 1
    asynchronous: bool = False
    inherit: bool = False
    probe_steps: int = 0
    precision: Precision = "float32"
    measure_threads: int = 0
    objectives: tuple[str, ...] = ("perplexity", "decode_ms_per_token_ratio", "cache_bytes")
    optimizer: str = "nsga2"
    budget: tuple[str, ...] = ()
    epsilon: float = 0.02
    data: tuple[str, ...] = ()
    final_seeds: int = 0
    cache: str | None = None
    start: tuple[str, ...] = ()
    seed: int = 0
    level: Level = "backbone"
    workers: str = "processes"
    jobs: int = 0
    ray_address: str | None = None
    gpus_per_task: float = 0.0
    slurm: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.objectives if name not in OBJECTIVES]
        if unknown:
            raise SettingsError(f"objectives: unknown {unknown[0]!r}{nearest(unknown[0], OBJECTIVES)}")
        if not 2 <= len(self.objectives) <= 5 or len(set(self.objectives)) != len(self.objectives):
            raise SettingsError(
                f"objectives: needs two to five different names, got {','.join(self.objectives) or 'none'}"
            )
        self._check_budget()
        if not 0 <= self.epsilon < 1:
            raise SettingsError(f"epsilon: needs a number from 0 to below 1, got {self.epsilon}")
        if self.level not in LEVELS:
            raise SettingsError(f"level: unknown {self.level!r}{nearest(self.level, LEVELS)}")
        self._check_workers()
        for name, least in (
            ("population", 4),
            ("generations", 1),
            ("depth", 2),
            ("seq_len", 8),
            ("batch_size", 1),
            ("accumulation", 1),
            ("valid_tokens", 1),
            ("measure_threads", 0),
            ("probe_steps", 0),
            ("rungs", 1),
            ("final_seeds", 0),
            ("jobs", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise SettingsError(f"{name}: needs at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "measure_seconds", "timeout_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(f"{name}: needs a finite number above 0, got {value}")
        if self.batch_size % self.accumulation:
            raise SettingsError(
                f"accumulation: needs a divisor of batch_size = {self.batch_size}, got {self.accumulation}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise SettingsError(f"head_dim: needs an even number, got {self.head_dim}")
        if self.tokens < self.batch_size * self.seq_len:
            raise SettingsError(
                f"tokens: needs at least one batch of {self.batch_size} x {self.seq_len} = "
                f"{self.batch_size * self.seq_len} tokens, got {self.tokens}"
            )
        if RUNG_FACTOR ** (self.rungs - 1) > self.steps:
            raise SettingsError(
                f"rungs: needs a step at the lowest of them, {RUNG_FACTOR} times as many at each next one and the "
                f"{self.steps} steps of a training at the last, got {self.rungs}"
            )
        if self.inherit and self.cache is not None:
            raise SettingsError("inherit: can't go with a cache: a result then depends on the parents' weights")
        if self.probe_steps > self.steps:
            raise SettingsError(
                f"probe_steps: needs at most the {self.steps} steps of a training, got {self.probe_steps}"
            )
        if len(self.start) > self.population:
            raise SettingsError(f"start: needs at most population = {self.population} genomes, got {len(self.start)}")
        for text in self.start:
            if (depth := len(Genome.parse(text))) != self.depth:
                raise SettingsError(f"start: needs genomes of depth = {self.depth} LIVs, got one of {depth}, {text}")
        if self.width < 1 or self.width % (4 * self.head_dim):
            raise SettingsError(
                f"width: needs a multiple of 4 heads of {self.head_dim} = {4 * self.head_dim}, got {self.width}"
            )

    def _check_workers(self) -> None:
        if self.workers not in WORKERS:
            raise SettingsError(f"workers: needs one of {', '.join(WORKERS)}, got {self.workers!r}")
        if not 0 <= self.gpus_per_task < math.inf:
            raise SettingsError(f"gpus_per_task: needs a finite number of at least 0, got {self.gpus_per_task}")
        owners = {"ray_address": ("ray",), "slurm": ("slurm",), "gpus_per_task": ("ray", "slurm")}
        for name, kinds in owners.items():
            if getattr(self, name) and self.workers not in kinds:
                raise SettingsError(f"{name}: needs workers = {' or '.join(kinds)}, got {self.workers!r}")
        if self.inherit and self.workers == "ray":
            raise SettingsError("inherit: needs workers that see the run folder, where parents' weights are, got 'ray'")

    def _check_budget(self) -> None:
        try:
            terms = self.terms
        except ValueError as error:
            raise SettingsError(str(error)) from error
        for term in terms:
            if term.metric not in OBJECTIVES:
                raise SettingsError(f"budget: unknown {term.metric!r}{nearest(term.metric, OBJECTIVES)}")
        if (pair := contradiction(terms)) is not None:
            raise SettingsError(f"budget: no genome can keep both {pair[0]} and {pair[1]}")

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the budget."""
        return tuple(Term.parse(text) for text in self.budget)

    @property
    def counted(self) -> bool:
        """Whether a term of the budget is decided before anything is trained."""
        return any(term.metric in COUNTED_BEFORE for term in self.terms)

    @property
    def ranking(self) -> Ranking:
        """How candidates are compared."""
        return Ranking(self.objectives, self.terms, self.epsilon, self.rungs)

    @property
    def steps(self) -> int:
        """Training steps of each candidate."""
        return self.tokens // (self.batch_size * self.seq_len)

    @property
    def rung_steps(self) -> tuple[int, ...]:
        """Training steps at which each rung ends, lowest first; the last one's are all."""
        return tuple(at_rung(self.steps, rung, self.rungs) for rung in range(self.rungs))

    @property
    def timed(self) -> bool:
        """Whether something is measured, and not only counted or trained: an objective or a term of the budget."""
        names = (*self.objectives, *(term.metric for term in self.terms))
        return any(name.removesuffix("_ratio") in MEASURED for name in names)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """Return the sizes of every model of the search."""
        return ModelConfig(width=self.width, head_dim=self.head_dim, vocab_size=vocab_size, time_scale=self.seq_len)

    @property
    def device(self) -> str:
        """Where a candidate's weights are: "cuda" if it has a GPU, else "cpu"."""
        return "cuda" if self.gpus_per_task else "cpu"

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    def train_config(self) -> TrainConfig:
        """Return how every candidate is trained."""
        return TrainConfig(
            tokens=self.tokens,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            lr=peak_rate(self.width) if self.learning_rate is None else self.learning_rate,
            warmup_steps=None if self.warmup_steps is None else min(self.warmup_steps, self.steps - 1),
            precision=self.precision,
            eval_tokens=self.valid_tokens,
            threads=1,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """Read what `to_json` wrote; keys of config.json that are not settings are left alone.

        A run from before there were ties goes on without them.

        Raises:
            SettingsError: A setting is missing or out of range.
        """
        names = {field.name for field in fields(cls)}
        chosen: dict[str, Any] = {"epsilon": 0.0} | {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in names
        }
        try:
            return cls(**chosen)
        except TypeError as error:
            raise SettingsError(f"config.json: {error}") from error


_LAPTOP = Settings(
    preset="laptop",
    population=12,
    generations=5,
    depth=8,
    width=64,
    head_dim=16,
    tokens=131_072,
    seq_len=128,
    batch_size=8,
    valid_tokens=32_768,
    measure_seconds=1.6,
    measure_threads=1,
    timeout_seconds=300.0,
)
# Thomas et al. 2024, section 4 and appendix: 24 LIVs of width 768, 1.3 B tokens a candidate at length 4096,
# population 16, 18 generations,
# AdamW peak 8e-4 after 500 steps; the 1 B scale has 48 LIVs of width 2048 and trains on 40 B tokens.
_PAPER_125M = replace(
    _LAPTOP,
    preset="paper-125m",
    population=16,
    generations=18,
    depth=24,
    width=768,
    head_dim=64,
    tokens=1_300_000_000,
    seq_len=4096,
    batch_size=64,
    accumulation=8,
    warmup_steps=500,
    precision="bfloat16",
    valid_tokens=4_194_304,
    measure_seconds=60.0,
    measure_threads=0,
    timeout_seconds=7 * 86_400.0,
)
PRESETS: Mapping[str, Settings] = {
    "laptop": _LAPTOP,
    "smoke": replace(
        _LAPTOP,
        preset="smoke",
        population=4,
        generations=2,
        depth=4,
        tokens=16_384,
        seq_len=64,
        valid_tokens=4_096,
        measure_seconds=0.4,
    ),
    "paper-125m": _PAPER_125M,
    "paper-1b": replace(
        _PAPER_125M, preset="paper-1b", depth=48, width=2048, tokens=40_000_000_000, timeout_seconds=60 * 86_400.0
    ),
}


def nearest(name: str, known: tuple[str, ...]) -> str:
    """Return "; did you mean X?" or the list of what is known, for the end of a message."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; needs one of {', '.join(known)}"
