"""What the data sheets of GPUs allow, and the least time of a call on one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.work import Work

_LAUNCH_S = 2.5e-6


@dataclass(frozen=True)
class Card:
    """A GPU's data sheet.

    Attributes:
        name: As `torch.cuda.get_device_name` has it, or a part of that.
        bandwidth: Bytes a second.
        matrix: Operations a second of dense matrix products, by dtype.
        vector: Operations a second of the float32 vector units.
    """

    name: str
    bandwidth: float
    matrix: dict[torch.dtype, float]
    vector: float

    @property
    def special(self) -> float:
        """Exponentials a second: a quarter of the lanes of a multiply-add do one."""
        return self.vector / 8


def _matrix(half: float, single: float) -> dict[torch.dtype, float]:
    return {torch.bfloat16: half, torch.float16: half, torch.float32: single}


# NVIDIA's and AMD's data sheets: dense, without sparsity; float32 products in float32, not in TF32.
CARDS = (
    Card("A100", 2.04e12, _matrix(312e12, 19.5e12), 19.5e12),
    Card("H100", 3.35e12, _matrix(989e12, 66.9e12), 66.9e12),
    Card("H200", 4.80e12, _matrix(989e12, 66.9e12), 66.9e12),
    Card("B200", 8.00e12, _matrix(2250e12, 80.0e12), 80.0e12),
    Card("MI300X", 5.30e12, _matrix(1307e12, 163.4e12), 163.4e12),
)


def card_of(device_name: str) -> Card | None:
    """Return the data sheet of a device by the name that torch gives it; None if it is not known."""
    return next((card for card in CARDS if card.name in device_name), None)


def least_seconds(work: Work, dtype: torch.dtype, card: Card, launches: int = 1) -> tuple[float, str]:
    """Return the least time of a call, and what bounds it: "memory", "matrix", "vector" or "launch"."""
    bounds = {
        "memory": work.bytes / card.bandwidth,
        "matrix": work.flops / card.matrix.get(dtype, card.vector),
        "vector": 2 * work.fmas / card.vector + work.exps / card.special,
        "launch": launches * _LAUNCH_S,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return bounds[bound], bound
