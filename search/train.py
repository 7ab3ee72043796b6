"""The training loop: AdamW, warm-up and cosine, clipping, gradient accumulation; and the held-out loss.

`python -m search.train` trains one genome at scale, over several processes: see `search.train_command`.

On a CPU, training is deterministic to the last bit for the same seed, the same starting weights and the same number of
threads.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import cast

import torch
from torch import Tensor, nn

from search.checkpoint import restore, save
from search.data import Corpus
from search.train_config import Precision, TrainConfig, learning_rate, peak_rate

__all__ = [
    "DeadlineExceeded",
    "Diverged",
    "Flat",
    "TrainConfig",
    "TrainResult",
    "evaluate_loss",
    "learning_rate",
    "peak_rate",
    "train",
]

CURVE_POINTS = 100


class Diverged(ArithmeticError):  # noqa: N818, "the training diverged" is the outcome's name
    """A loss or gradient norm that is no longer a number, or a held-out loss too large to have a perplexity.

    Attributes:
        step: The training step, from 1; 0 for the evaluation on held-out text.
        value: What the loss or norm was.
    """

    def __init__(self, step: int, what: str, value: float) -> None:
        # All arguments go to the base class, so that the exception survives the pickling between processes.
        super().__init__(step, what, value)
        self.step, self.what, self.value = step, what, value

    def __str__(self) -> str:
        return f"the {self.what} is {self.value}" + (f" at step {self.step}" if self.step else "")


class Flat(ArithmeticError):  # noqa: N818, named as the outcome is
    """The loss after the probe's steps is not below what a model that has learnt nothing would have.

    Attributes:
        step: The probe's last step.
        loss: Mean loss over the probe's last quarter, in nats a token.
        bound: What it had to be below.
    """

    def __init__(self, step: int, loss: float, bound: float) -> None:
        super().__init__(step, loss, bound)
        self.step, self.loss, self.bound = step, loss, bound

    def __str__(self) -> str:
        return f"the loss is {self.loss:.3f} nats after {self.step} steps and needs to be below {self.bound:.3f}"


class DeadlineExceeded(TimeoutError):  # noqa: N818, named as the outcome is
    """The deadline passed before the work was done; the message says how far it came."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to; losses in nats a token.

    Attributes:
        steps: Optimizer steps taken, those before a checkpoint among them.
        tokens: Tokens trained on.
        train_loss: Mean loss over the last tenth of the steps: a single step's is mostly noise.
        curve: At most 100 pairs (step, mean loss of the steps since the pair before), steps counted from 1.
        valid_loss: Mean loss on the held-out text.
        perplexity: exp(valid_loss), of a token.
        bits_per_byte: valid_loss in bits, over the bytes that a token stands for.
        seconds: Wall-clock seconds of training and evaluation.
    """

    steps: int
    tokens: int
    train_loss: float
    curve: list[tuple[int, float]]
    valid_loss: float
    perplexity: float
    bits_per_byte: float
    seconds: float


def train(
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    *,
    seed: int,
    deadline: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
    start: str | PathLike[str] | None = None,
    stop: int | None = None,
    keep: str | PathLike[str] | None = None,
    probe: tuple[int, float] | None = None,
) -> TrainResult:
    """Train a language model in place, and evaluate it on the held-out text.

    AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101), with weight decay on matrices alone: not on embeddings
    (`nn.Embedding`, or "embedding" in the parameter's name), nor on what has fewer than two axes (norms, biases), nor
    on parameters with a true attribute `_no_weight_decay`.

    Args:
        model: Has `loss(tokens, targets)`, mean nats a token as a scalar, for int64 [B, T] each. On any device.
        corpus: Its vocabulary fits the model's.
        config: Budget and settings.
        seed: Chooses the batches, and torch's random numbers while training. The caller's generator is left alone.
        deadline: When to give up, on the clock of `time.monotonic`, in seconds.
        on_step: Called after each step with its number, from 1, and its loss; may raise to stop.
        start: Go on from the checkpoint that an earlier call left there with `keep`, for the same model, corpus,
            config and seed.
        stop: Stop after this step, and evaluate; the schedule of the rate stays that of the whole budget. A training
            that stops and goes on ends with the weights of one that did not stop, to the last bit.
        keep: Where to leave a checkpoint after the last step; it appears there once it is whole.
        probe: A step, and a loss in nats: after that step the mean loss of the quarter of the steps before it has to be
            below this loss and below the first step's.
    Raises:
        Diverged: a loss or gradient norm is not finite.
        Flat: the probe failed.
        ValueError: `stop` is not after the checkpoint or beyond the last step; the checkpoint is of another model.
        DeadlineExceeded: the deadline passed.
        DataError: the corpus is too short for `seq_len`.
    Deterministic: on a CPU, to the last bit, for equal seed, weights and threads.
    """
    started = time.monotonic()
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    losses: list[float] = []
    with _threads(config.threads), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.train()
        optimizer = adamw(dict(model.named_parameters()), weight_decays(model), config)
        if start is not None:
            losses = restore(start, model, optimizer)
        done, last = len(losses), config.steps if stop is None else stop
        if not done < last <= config.steps:
            raise ValueError(f"stop must be above {done} and at most {config.steps}, got {last}")
        batches = corpus.batches("train", config.batch_size, config.seq_len, seed, last, skip=done)
        for step, (tokens, targets) in enumerate(batches, done + 1):
            _check_deadline(deadline, f"{step - 1} of {config.steps} training steps")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            loss = accumulate(model, tokens.to(device), targets.to(device), config)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
            check_finite(step, loss, norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            if on_step is not None:
                on_step(step, loss)
            if probe is not None and step == probe[0]:
                _check_probe(losses, probe[1])
        if keep is not None:
            save(keep, model, optimizer, losses)
        valid_loss = evaluate_loss(
            model,
            corpus,
            batch_size=config.batch_size // config.accumulation,
            seq_len=config.seq_len,
            max_tokens=config.eval_tokens,
            precision=config.precision,
            deadline=deadline,
        )
    return make_result(losses, valid_loss, corpus, config, time.monotonic() - started)


def make_result(
    losses: list[float], valid_loss: float, corpus: Corpus, config: TrainConfig, seconds: float
) -> TrainResult:
    """Put together what a training came to: the losses of its steps, and the one on held-out text."""
    tail = losses[-math.ceil(len(losses) / 10) :]
    return TrainResult(
        steps=len(losses),
        tokens=len(losses) * config.batch_size * config.seq_len,
        train_loss=math.fsum(tail) / len(tail),
        curve=_thin(losses),
        valid_loss=valid_loss,
        perplexity=math.exp(valid_loss),
        bits_per_byte=valid_loss / math.log(2) / corpus.bytes_per_token,
        seconds=seconds,
    )


def evaluate_loss(
    model: nn.Module,
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
    precision: Precision = "float32",
    deadline: float | None = None,
) -> float:
    """Return the mean loss in nats a token over the held-out text, in windows of `seq_len` spread evenly over it.

    The model is put into evaluation mode and back. Every window starts without context, so longer ones score lower.

    Raises:
        Diverged: the loss is not a number, or too large for exp(loss) to be one.
        DeadlineExceeded: the deadline passed.
        DataError: the corpus is too short for `seq_len`.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        # no_grad, not inference_mode: a table that the model fills and keeps here must serve in training too.
        with torch.no_grad():
            for tokens, targets in corpus.validation_batches(batch_size, seq_len, max_tokens):
                _check_deadline(deadline, f"training and {count} tokens of the evaluation")
                loss = token_loss(model, tokens.to(device), targets.to(device), precision)
                total += loss.item() * targets.numel()
                count += targets.numel()
    finally:
        model.train(was_training)
    return check_held_out(total / count)


def check_held_out(mean: float) -> float:
    """Return a loss on held-out text.

    Raises:
        Diverged: It is not a number, or too large for exp(loss) to be one.
    """
    if not mean < math.log(torch.finfo(torch.float64).max):
        raise Diverged(0, "loss on held-out text", mean)
    return mean


def weight_decays(model: nn.Module) -> dict[str, bool]:
    """Tell of each parameter, by its first name, whether weights decay in it: see `train`."""
    # Tied weights go by several names, of which any may be the embedding's.
    named = model.named_parameters(remove_duplicate=False)
    embeddings = {id(parameter) for name, parameter in named if "embedding" in name.split(".")}
    embeddings |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: not (parameter.ndim < 2 or id(parameter) in embeddings or getattr(parameter, "_no_weight_decay", False))
        for name, parameter in model.named_parameters()
    }


def adamw(parameters: Mapping[str, nn.Parameter], decays: Mapping[str, bool], config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over parameters by name: those that decay before those that do not.

    Sharded and whole ones are groups apart, since no fused step takes both.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((not decays[name], type(parameter.data) is Tensor), []).append(parameter)
    filled = [{"params": groups[key], "weight_decay": 0.0 if key[0] else config.weight_decay} for key in sorted(groups)]
    # Fused: one step of 28 tensors (width 64) takes 0.28 ms on one thread where foreach takes 0.67, a plain loop 0.90;
    # of 37 tensors (width 128) 0.54, 2.0 and 2.2.
    return torch.optim.AdamW(filled, lr=config.lr, betas=config.betas, fused=True)


def _check_probe(losses: list[float], bound: float) -> None:
    tail = losses[-math.ceil(len(losses) / 4) :]
    mean, bound = math.fsum(tail) / len(tail), min(bound, losses[0])
    if not mean < bound:
        raise Flat(len(losses), mean, bound)


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise `Diverged` if the loss or the gradient norm of a step is not a number."""
    for what, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise Diverged(step, what, value)


def accumulate(model: nn.Module, tokens: Tensor, targets: Tensor, config: TrainConfig) -> float:
    """Add the gradient of the batch's mean loss to the parameters', a part of the batch at a time; return the loss."""
    total = 0.0
    for part, part_targets in zip(tokens.chunk(config.accumulation), targets.chunk(config.accumulation), strict=True):
        loss = token_loss(model, part, part_targets, config.precision) / config.accumulation
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def token_loss(model: nn.Module, tokens: Tensor, targets: Tensor, precision: Precision) -> Tensor:
    """Return the mean loss in nats a token, under autocast if the precision is "bfloat16"."""
    autocast: AbstractContextManager[object] = nullcontext()
    if precision == "bfloat16":
        autocast = torch.autocast(tokens.device.type, dtype=torch.bfloat16)
    with autocast:
        return cast(Callable[[Tensor, Tensor], Tensor], model.loss)(tokens, targets)


def _check_deadline(deadline: float | None, done: str) -> None:
    if deadline is not None and time.monotonic() > deadline:
        raise DeadlineExceeded(f"the deadline passed with {done} done")


def _thin(losses: list[float]) -> list[tuple[int, float]]:
    """Average the losses over at most `CURVE_POINTS` stretches of nearly equal length."""
    points = min(CURVE_POINTS, len(losses))
    ends = [(i + 1) * len(losses) // points for i in range(points)]
    return [(end, math.fsum(losses[start:end]) / (end - start)) for start, end in zip([0, *ends], ends, strict=False)]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    from search.train_command import main

    sys.exit(main())
