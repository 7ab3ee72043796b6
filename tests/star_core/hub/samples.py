"""A small model with every family and every way of sharing, and padded prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_core.hub import StarConfig, StarForCausalLM

VOCAB = 40
SIZES: dict[str, Any] = {"width": 32, "head_dim": 8, "vocab_size": VOCAB, "time_scale": 16}
# Every family, shared featurizers and tensors, a differential class.
GENOME = "1.1.1.1.4-5.1.2.1.1-5.1.2.1.1-8.1.1.1.1-9.1.1.1.1-1.1.1.1.4-16.1.1.1.1"


def make(genome: str = GENOME, seed: int = 0, **options: Any) -> StarForCausalLM:
    torch.manual_seed(seed)
    return StarForCausalLM(StarConfig(genome=genome, **SIZES, **options)).eval()


def prompts(batch: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]])
