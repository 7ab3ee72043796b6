"""Measure models of transformers with and without `star_core.accelerate`, interleaved.

    python -m bench.accelerate [ARCHITECTURE ...] [--metrics prefill decode train] [--tokens 1024] [--once mamba]
        [--output STEM]

Ratios are the untouched model's time over the accelerated one's: above 1, the accelerated model is faster. Needs the
extra `hub`. What is measured is stored after every architecture, so that a run that ends early leaves what it has.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Self

import torch
from torch import Tensor, nn

from bench.accelerate_models import ARCHITECTURES, LARGE, Size, build
from bench.hardware import machine, short_name
from bench.models import measure_model
from bench.results import now, versions

_METRICS = {"prefill": "prefill_ms", "decode": "decode_ms_per_token", "train": "train_ms_per_step"}

_DECODE_TOKENS = 32

_SLOW_TRAINING = ("mamba", "falcon_mamba", "jamba")
_SLOW_TRAINING_TOKENS = 256
"""transformers trains Mamba-1 in a loop whose time grows with the square of the tokens: 407 s a step at 1,024."""

_MAX_SECONDS = 3600.0


@dataclass(frozen=True)
class Line:
    """One architecture's time in one use.

    Attributes:
        architecture: A key of `ARCHITECTURES`.
        metric: "prefill", "decode", "train", or "train, once" for a single step.
        tokens: Of a prompt (for decoding, of prompt and steps together) or of a training sequence.
        ours_ms: Median of the accelerated model.
        theirs_ms: The untouched model's, from it and the ratio.
        ratio: theirs / ours in the same round, the median.
        ratio_low: 20th percentile of it.
        ratio_high: 80th percentile of it.
    """

    architecture: str
    metric: str
    tokens: int
    ours_ms: float
    theirs_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


class _Measured:
    """A model of transformers as `measure_model` takes one."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, tokens: Tensor, cache: Any = None) -> Tensor:
        # As `generate` calls it: logits of the last token alone.
        logits: Tensor = self._model(tokens, cache=cache, use_cache=cache is not None, logits_to_keep=1).logits
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss that the model itself takes from its tokens; it shifts them itself."""
        loss: Tensor = self._model(tokens, labels=tokens, use_cache=False).loss
        return loss

    def new_cache(self, batch_size: int, max_length: int) -> Any:
        """Return transformers' growing cache."""
        import transformers

        if hasattr(self._model, "_setup_cache"):  # RecurrentGemma keeps a part of it in itself.
            weight = next(self.parameters())
            self._model._setup_cache(self._model.config, batch_size, weight.device, weight.dtype)
        return transformers.DynamicCache(config=self._model.config)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights."""
        weights: Iterator[nn.Parameter] = self._model.parameters()
        return weights

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation."""
        self._model.train(mode)
        return self


def measure_architecture(
    name: str, size: Size = LARGE, *, metrics: Sequence[str] = tuple(_METRICS), tokens: int = 1024, seconds: float = 6.0
) -> tuple[list[Line], str]:
    """Compare one architecture's accelerated model with the untouched one.

    Args:
        name: A key of `ARCHITECTURES`.
        size: Of the model.
        metrics: What to measure.
        tokens: Of a prompt and of a training sequence, except where transformers' training is too slow for that.
        seconds: Sampling time of each metric, apart from warm-up; at least 7 rounds are taken.

    Returns:
        A line for each metric, and the acceleration report as text.
    """
    from star_core import accelerate

    untouched = build(name, size)
    accelerated = copy.deepcopy(untouched)
    report = str(accelerate(accelerated))
    lines = []
    for metric in metrics:
        length = min(tokens, _SLOW_TRAINING_TOKENS) if metric == "train" and name in _SLOW_TRAINING else tokens
        key = _METRICS[metric]
        found = measure_model(
            _Measured(accelerated),
            _Measured(untouched),
            batch_size=1,
            seq_len=length,
            decode_tokens=min(_DECODE_TOKENS, max(2, length - 1)),
            which=(key, f"{key}_ratio"),
            vocab_size=size.vocab_size,
            seconds=seconds,
            max_seconds=_MAX_SECONDS,
        )
        # measure_model's ratio is ours / theirs.
        low, middle, high = (1 / found[f"{key}_ratio{which}"] for which in ("_p80", "", "_p20"))
        lines.append(Line(name, metric, length, found[key], found[key] * middle, middle, low, high))
    return lines, report


def train_once(name: str, size: Size = LARGE, *, tokens: int = 1024) -> Line:
    """Time a single training step of the untouched model beside the median of three accelerated ones.

    For what transformers trains too slowly to be repeated; a step of few tokens goes before both.

    Args:
        name: A key of `ARCHITECTURES`.
        size: Of the model.
        tokens: Of the training sequence.
    """
    from star_core import accelerate

    untouched = build(name, size)
    accelerated = copy.deepcopy(untouched)
    accelerate(accelerated)
    data = torch.randint(size.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    for model in (accelerated, untouched):
        _train_step(model, data[:, :32])
    ours_ms = median(_train_step(accelerated, data) for _ in range(3))
    theirs_ms = _train_step(untouched, data)
    ratio = theirs_ms / ours_ms
    return Line(name, "train, once", tokens, ours_ms, theirs_ms, ratio, ratio, ratio)


def _train_step(model: Any, tokens: Tensor) -> float:
    """Return the milliseconds of a loss and its gradients."""
    model.train()
    started = perf_counter()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    taken = 1000 * (perf_counter() - started)
    model.zero_grad()
    return taken


def markdown(lines: Sequence[Line], title: str) -> str:
    """Return the table as text."""
    head = ["| architecture | use | tokens | untouched, ms | accelerated, ms | ratio | 20 to 80 % |"]
    head.append("|---|---|---:|---:|---:|---:|---:|")
    rows = [
        f"| {one.architecture} | {one.metric} | {one.tokens} | {one.theirs_ms:.1f} | {one.ours_ms:.1f} "
        f"| {one.ratio:.2f} | {one.ratio_low:.2f} to {one.ratio_high:.2f} |"
        for one in lines
    ]
    return "\n".join([f"# {title}", "", *head, *rows, ""])


def _title(size: Size) -> str:
    described = machine()
    return (
        f"star_core.accelerate on {described['processor']}, {described['threads']} threads, {versions()}: "
        f"width {size.width}, {size.layers} layers, {size.vocab_size} tokens, float32, batch 1"
    )


def _store(stem: Path, size: Size, lines: Sequence[Line], reports: dict[str, str], seconds: float) -> None:
    import transformers

    content = {
        "machine": machine(),
        "date": now(),
        "versions": f"{versions()}, transformers {transformers.__version__}",
        "size": asdict(size),
        "seconds": seconds,
        "lines": [asdict(one) for one in lines],
        "reports": reports,
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(lines, _title(size)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.accelerate", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("architectures", nargs="*", help=f"default: all of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--metrics", nargs="+", choices=list(_METRICS), default=list(_METRICS))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=LARGE.vocab_size)
    parser.add_argument("--seconds", type=float, default=6.0, help="sampling time of each number")
    parser.add_argument("--once", nargs="+", default=[], metavar="NAME", help="add a single training step at --tokens")
    parser.add_argument("--output", type=Path, help="without suffix; default: bench/results/DATE-MACHINE-accelerate")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.architectures if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"architectures: needs some of {', '.join(ARCHITECTURES)}, got {', '.join(unknown)}")
    names = options.architectures or list(ARCHITECTURES)
    if left_out := [name for name in options.once if name not in names]:
        parser.error(f"--once: needs some of {', '.join(names)}, got {', '.join(left_out)}")
    default = Path(__file__).parent / "results" / f"{now()[:10]}-{short_name()}-accelerate"
    stem: Path = options.output or default
    size = replace(LARGE, vocab_size=options.vocab_size)
    try:
        import transformers
    except ImportError:
        print("transformers is not installed; it comes with the extra `hub`", file=sys.stderr)
        return 2
    # It says for every module that its compiled package is missing.
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    lines: list[Line] = []
    reports: dict[str, str] = {}
    for name in names:
        found, reports[name] = measure_architecture(
            name, size, metrics=options.metrics, tokens=options.tokens, seconds=options.seconds
        )
        if name in options.once:
            found.append(train_once(name, size, tokens=options.tokens))
        lines += found
        for one in found:
            print(f"{name:18} {one.metric:12} {one.tokens:5} tokens  x {one.ratio:.2f}", flush=True)
        _store(stem, size, lines, reports, options.seconds)
    print(markdown(lines, _title(size)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
