"""How long and how to train: sizes, the learning rate's schedule, AdamW's numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how to train; every field is checked when the value is made.

    The defaults suit a byte model of width 128 and a budget of a few hundred thousand tokens, where the number of steps
    counts most. Tried on the default speeches, Transformer++ of depth 6, one thread, at about 10 s of processor time:
    batches of 2, 4 and 8 sequences of 128 bytes end at perplexity 8.6, 8.3 and 9.2. For `lr` see `peak_rate`.

    Attributes:
        tokens: Training tokens in all; whole steps are taken, so up to one step's worth may be left over.
        seq_len: Tokens in a sequence.
        batch_size: Sequences in an optimizer step.
        accumulation: Parts that a step's batch is cut into, to fit memory; the gradient is the whole batch's.
        lr: Peak learning rate; the default is `peak_rate(128)`.
        warmup_steps: Steps of linear rise to `lr`; None for a tenth of all steps.
        min_lr_ratio: The rate falls along a cosine to this fraction of `lr` at the last step.
        betas: AdamW's decay rates of the first and second moment.
        weight_decay: AdamW's decoupled decay, of matrices alone: see `train`.
        clip: Largest norm of the whole gradient.
        precision: "float32", or "bfloat16" for autocast with float32 weights.
        eval_tokens: Held-out tokens to evaluate on, at most; None for all.
        threads: Threads torch computes with; None leaves torch's setting alone.
    Raises:
        ValueError: a field is out of range, or the fields do not fit together.
    """

    tokens: int = 300_000
    seq_len: int = 128
    batch_size: int = 4
    accumulation: int = 1
    lr: float = 4.8e-3
    warmup_steps: int | None = None
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: Precision = "float32"
    eval_tokens: int | None = 65_536
    threads: int | None = None

    def __post_init__(self) -> None:
        for field in ("tokens", "seq_len", "batch_size", "accumulation", "eval_tokens", "threads"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        for field in ("lr", "clip"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be above 0 and finite, got {getattr(self, field)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be between 0 and 1, got {self.min_lr_ratio}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {self.betas}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f'precision must be "float32" or "bfloat16", got {self.precision!r}')
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation must divide batch_size: {self.batch_size} sequences cannot be cut into "
                f"{self.accumulation} equal parts"
            )
        if self.tokens < self.batch_size * self.seq_len:
            raise ValueError(
                f"tokens must be at least one step's, batch_size x seq_len = {self.batch_size * self.seq_len}, "
                f"got {self.tokens}"
            )
        if self.warmup_steps is not None and not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps must be at least 0 and below the number of steps, {self.steps}, got {self.warmup_steps}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps that `tokens` allows."""
        return self.tokens // (self.batch_size * self.seq_len)

    @property
    def warmup(self) -> int:
        """Steps of warm-up, with the default worked out."""
        return math.ceil(self.steps / 10) if self.warmup_steps is None else self.warmup_steps

    @classmethod
    def paper(
        cls,
        *,
        tokens: int = 1_300_000_000,
        seq_len: int = 4096,
        batch_size: int = 64,
        accumulation: int = 8,
        precision: Precision = "bfloat16",
    ) -> TrainConfig:
        """Return the settings of the STAR paper's searches.

        Source: Thomas et al., "STAR: Synthesis of Tailored Architectures", 2024, arXiv:2411.17800: AdamW with betas
        (0.9, 0.95), weight decay 0.1, peak rate 8e-4 on a cosine, 500 steps of warm-up, clipping at 1.0, 1.3 B tokens
        at length 4096. The batch size and the rate's floor are ours.
        """
        return cls(
            tokens=tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            accumulation=accumulation,
            lr=8e-4,
            warmup_steps=500,
            min_lr_ratio=0.1,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            clip=1.0,
            precision=precision,
            eval_tokens=10_000_000,
        )


def peak_rate(width: int) -> float:
    """Return the peak learning rate for a width: the STAR paper's 8e-4 at width 768, inverse to the width elsewhere.

    That Adam's best rate falls as 1/width is the rule of Yang et al., 2022, arXiv:2203.03466. It held when tried on the
    default speeches, batches of 4 x 128 bytes, depth 6, float32. Perplexity at rates of 2e-3, 4e-3, 8e-3 and 16e-3:
    a Transformer++ of width 64, 200 k tokens: -, 6.4, 6.3, 6.5; of width 128, 100 k tokens: 8.3, 7.7, 8.1, -.
    StripedMamba (width 64) and an LFM2-like layout (width 128) train at 4e-3 and at 8e-3, within 4 % of one another.

    Raises:
        ValueError: `width` is below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return 8e-4 * 768 / width


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of a step, counted from 1: linear up to `lr` at the warm-up's last step, then a cosine down."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
