"""Results made up from a genome, for searches that train nothing."""

from __future__ import annotations

import hashlib

from star_core.genome import POOL, Genome


def invented(genome: str) -> dict[str, float]:
    """Return metrics that are the same for the same genome, in any process: all that training and measuring give."""
    digest = hashlib.sha256(genome.encode()).digest()
    parts = [int.from_bytes(digest[4 * i : 4 * i + 4], "big") / 2**32 for i in range(8)]
    families = [POOL[liv.liv_class].family for liv in Genome.parse(genome).livs]
    attention = families.count("attention") / len(families)
    metrics = {
        "perplexity": 6 + 2 * parts[0] - attention,
        "bits_per_byte": 2.5 + parts[0],
        "parameters": 1e6 * (1 + parts[1] + attention),
        "cache_bytes": 1e4 * (1 + parts[2] + 4 * attention),
        "peak_memory_bytes": 1e7 * (1 + parts[3]),
        "peak_memory_bytes_ratio": 1 + parts[3],
    }
    for place, name in enumerate(("prefill_ms", "decode_ms_per_token", "train_ms_per_step"), start=4):
        metrics |= {name: 1 + parts[place], f"{name}_ratio": 0.5 + parts[place]}
    return metrics
