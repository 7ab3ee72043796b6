"""Known backbones as genomes: what the search is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from star_core.genome._text import whole_number
from star_core.genome.backbone import Genome
from star_core.genome.genes import LIVGenes

_ATTENTION, _GQA, _RECURRENCE, _SHORT_CONV, _MEMORYLESS = 1, 3, 5, 7, 9


def transformer_pp(depth: int) -> Genome:
    """Return Transformer++: softmax attention (SA-1) and SwiGLU (GMemless) in turn.

    Source: the paper's baseline; Touvron et al., LLaMA, 2023, arXiv 2302.13971.

    Args:
        depth: LIVs, from 2: mixers are at even positions (from 0), SwiGLU at odd ones.
    Raises:
        ValueError: `depth` is below 2.
    """
    return _interleave([_ATTENTION] * _mixers(depth), depth)


def gqa_transformer_pp(depth: int) -> Genome:
    """Return Transformer++ with grouped-query attention, k and v repeated 4 times (SA-3). Ours: the paper's baseline
    has none.

    Args and errors as of `transformer_pp`.
    """
    return _interleave([_GQA] * _mixers(depth), depth)


def striped_mamba(depth: int) -> Genome:
    """Return StripedMamba: recurrence (Rec-1) and SwiGLU, with attention (SA-1) for one mixer in six, evenly spread.

    Source: the paper's baseline. Of two or more mixers at least one is attention, and at least one a recurrence.

    Args and errors as of `transformer_pp`.
    """
    count = _mixers(depth)
    stripes = max(1, round(count / 6)) if count > 1 else 0
    mixers = [_RECURRENCE] * count
    for stripe in range(stripes):
        mixers[int((stripe + 0.5) * count / stripes)] = _ATTENTION
    return _interleave(mixers, depth)


def lfm2(depth: int) -> Genome:
    """Return a backbone like LFM2's: gated short convolutions (GConv-1) and SwiGLU, with a few grouped-query
    attentions (SA-3).

    In the first 9/16 of the mixers every third is attention, thereafter every second one. At 16 mixers (32 LIVs) these
    are mixers 2, 5, 8, 10, 12 and 14 from 0, as in LFM2-1.2B; of two or more mixers at least the last is attention.

    Source: Liquid AI, LFM2, 2025, the published layer types. Differs from it in: attention has no norm of queries and
    keys.

    Args and errors as of `transformer_pp`.
    """
    count = _mixers(depth)
    switch = round(count * 9 / 16)
    mixers = [
        _GQA if (index % 3 == 2 if index < switch else (index - switch) % 2 == 1) else _SHORT_CONV
        for index in range(count)
    ]
    if count > 1 and _GQA not in mixers:
        mixers[-1] = _GQA
    return _interleave(mixers, depth)


BASELINES: Mapping[str, Callable[[int], Genome]] = MappingProxyType(
    {
        "Transformer++": transformer_pp,
        "GQA Transformer++": gqa_transformer_pp,
        "StripedMamba": striped_mamba,
        "LFM2-like": lfm2,
    }
)
"""The baselines by the names that tables and figures give them."""


def _mixers(depth: int) -> int:
    depth = whole_number(depth, "depth")
    if depth < 2:
        raise ValueError(f"depth: is {depth}, needs at least 2 LIVs, a mixer and a SwiGLU")
    return (depth + 1) // 2


def _interleave(mixers: list[int], depth: int) -> Genome:
    """Put a SwiGLU after each mixer, and cut to `depth` LIVs: an odd depth ends with a mixer."""
    classes = [liv_class for mixer in mixers for liv_class in (mixer, _MEMORYLESS)]
    return Genome(tuple(LIVGenes(liv_class) for liv_class in classes[:depth]))
