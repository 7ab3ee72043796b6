"""Made-up run folders for tests of the report: real genomes and a real log, invented numbers.

`python -m tests.search.synthetic_run DIR` writes one to look at.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from search.evaluation import Evaluation, Status
from search.ranking import Ranking
from search.store import Store, write_json
from star_core.genome import BASELINES, POOL, Genome, crossover, mutate, random_genome, repair

OBJECTIVES = ("perplexity", "decode_ms_per_token_ratio", "cache_bytes", "parameters", "peak_memory_bytes_ratio")
FAILURES = (
    (Status.NAN, "loss is nan at step 113"),
    (Status.OOM, "allocation of 3,221,225,472 bytes failed\nTraceback: a long tail that nobody reads"),
    (Status.TIMEOUT, "no result after 300 s"),
    (
        Status.CRASH,
        "RuntimeError: expected <Tensor[2, 64] & float32>, got \"None\" </script><script>alert('x')</script>",
    ),
    (Status.INVALID, "LIV 3 feature_group: recurrence B needs equal expansion"),
)
CHANGES = ("class", "copy", "sharing")  # names of made-up mutations
_SECONDS = 41.0


def write_synthetic_run(
    root: Path,
    *,
    objectives: Sequence[str] = OBJECTIVES[:3],
    generations: int = 5,
    population: int = 16,
    depth: int = 24,
    failing: float = 0.12,
    baselines: bool = True,
    change: Callable[[dict[str, float]], dict[str, float]] = dict,
    seed: int = 0,
) -> Path:
    """Write config.json, run.db, front.json of a search that breeds from its front and so gets better by generation.

    Args:
        root: The run folder, made if missing.
        objectives: What is minimised.
        generations: How many, the initial one included.
        population: Candidates in each.
        depth: LIVs in a genome.
        failing: Share of the candidates that end in one of `FAILURES`, 0 to 1.
        baselines: Whether the four baselines are in the log.
        change: Applied to the metrics of every evaluation.
        seed: Seeds everything.
    """
    rng = np.random.default_rng(seed)
    config = {
        "preset": "laptop",
        "objectives": list(objectives),
        "population": population,
        "generations": generations,
        "depth": depth,
        "width": 128,
        "tokens": 262_144,
        "seq_len": 256,
        "timeout_seconds": 300.0,
        "data": [],
        "seed": seed,
        "corpus": {"name": "made up <for tests & nothing else>", "fingerprint": "0" * 64, "vocab_size": 256},
        "started": "2026-01-01T12:00:00+00:00",
        "machine": {
            "processor": "Imaginary CPU @ 2.0 GHz",
            "architecture": "x86_64",
            "cores": 2,
            "memory_bytes": 16 * 1024**3,
            "flags": ["avx2", "fma"],
            "torch": "2.13.0+cpu",
            "gpus": [],
        },
    }
    with Store(root) as store:
        write_json(root / "config.json", config)
        if baselines:
            for name, make in BASELINES.items():
                store.add(_evaluate(make(depth), -1, rng, 0.0, change, kind="baseline", name=name))
        parents: list[Evaluation] = []
        seen: set[str] = set()
        for generation in range(generations):
            for _ in range(population):
                genome, bred_from, repaired = _breed(parents, depth, rng)
                while genome.hash in seen:
                    genome, bred_from, repaired = random_genome(rng, depth), (), False
                seen.add(genome.hash)
                evaluation = _evaluate(genome, generation, rng, failing, change, parents=bred_from)
                changes = CHANGES[int(genome.hash[0], 16) % len(CHANGES) :] if bred_from else ()
                store.add(replace(evaluation, repaired=repaired, mutations=changes))
            parents = store.keep_front(Ranking(tuple(objectives)))
    return root


def _breed(parents: Sequence[Evaluation], depth: int, rng: np.random.Generator) -> tuple[Genome, tuple[str, ...], bool]:
    """Return a genome, its parents, and whether it had to be repaired."""
    if len(parents) < 2:
        return random_genome(rng, depth), (), False
    a, b = (parents[int(i)] for i in rng.choice(len(parents), 2, replace=False))
    child, _ = crossover(Genome.parse(a.genome), Genome.parse(b.genome), rng)
    mutant = mutate(child, rng, 0.06)
    fixed = repair(mutant, rng)
    return fixed, (a.genome_hash, b.genome_hash), fixed is not mutant


def _evaluate(
    genome: Genome,
    generation: int,
    rng: np.random.Generator,
    failing: float,
    change: Callable[[dict[str, float]], dict[str, float]],
    *,
    kind: str = "candidate",
    name: str | None = None,
    parents: tuple[str, ...] = (),
) -> Evaluation:
    failed = rng.random() < failing
    status, error = FAILURES[int(rng.integers(len(FAILURES)))] if failed else (Status.OK, None)
    metrics = {} if failed else change(_invent_metrics(genome, rng))
    start, end = math.log(256), math.log(metrics.get("perplexity", 9.0)) if metrics else 2.5
    curve = tuple((step, end + (start - end) * math.exp(-step / 12) + 0.02 * float(rng.normal())) for step in range(64))
    return Evaluation(
        genome=str(genome.canonical()),
        genome_hash=genome.hash,
        status=status,
        seed=1,
        generation=generation,
        metrics=metrics,
        seconds=_SECONDS * (0.3 if failed else 1.0),
        error=error,
        kind=kind,
        name=name,
        parents=parents,
        curve=curve,
    )


def _invent_metrics(genome: Genome, rng: np.random.Generator) -> dict[str, float]:
    """Invent numbers that pull against each other as real ones do: attention helps quality and fills the cache."""
    families = [POOL[liv.liv_class].family for liv in genome.livs]
    share = {family: families.count(family) / len(families) for family in set(families)}
    attention, memoryless = share.get("attention", 0.0), share.get("memoryless", 0.0)
    recurrence, long_conv = share.get("recurrence", 0.0), share.get("long_conv", 0.0)
    changes = sum(a != b for a, b in pairwise(families)) / len(families)
    shared = sum(len(sources) for sources in genome.sharing().tensor_source)
    differential = sum(POOL[liv.liv_class].differential for liv in genome.livs) / len(families)
    perplexity = 7.6 - 0.9 * min(changes, 0.75) + 6.0 * (memoryless - 0.3) ** 2 - 1.2 * attention * (1 - attention)
    perplexity -= 0.6 * recurrence + 0.05 * shared
    perplexity *= 1 + 0.01 * float(rng.normal())
    cache = len(families) * (2048.0 + attention * 256 * 256) - 9000.0 * shared
    parameters = len(families) * 66_000.0 * (1 + 0.8 * memoryless + 0.7 * differential) - 8000.0 * shared
    decode = 0.24 * (1 + 0.9 * attention + 0.4 * differential + 1.4 * long_conv) * (1 + 0.03 * float(rng.normal()))
    prefill, train = 40.0 * decode + 6.0 * recurrence, 310.0 * decode + 90.0 * recurrence
    metrics = {
        "perplexity": perplexity,
        "bits_per_byte": math.log2(perplexity),
        "parameters": float(round(parameters)),
        "cache_bytes": float(round(max(cache, 4096.0))),
    }
    for key, value, reference in (
        ("prefill_ms", prefill, 14.0),
        ("decode_ms_per_token", decode, 0.34),
        ("train_ms_per_step", train, 110.0),
    ):
        for suffix, scale in (("", 1.0), ("_ratio", 1 / reference)):
            for percentile, factor in (("", 1.0), ("_p20", 0.96), ("_p80", 1.07)):
                metrics[f"{key}{suffix}{percentile}"] = value * scale * factor
    metrics["peak_memory_bytes"] = 30e6 + 14.0 * parameters + 0.5 * max(cache, 4096.0)
    metrics["peak_memory_bytes_ratio"] = metrics["peak_memory_bytes"] / 60e6
    return metrics


if __name__ == "__main__":
    print(write_synthetic_run(Path(sys.argv[1])))
