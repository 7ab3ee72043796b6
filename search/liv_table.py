"""What the compiled operators give to each LIV class: a training step and a decoding step, plain torch beside them.

    python -m search.liv_table [--width 256] [--tokens 512] [--batch 8] [--decode 64] [--classes 1,5] [--seconds 3]
                               [--json PATH] [--markdown PATH]

Each class is one LIV in a language model over bytes: embedding, norms and loss are in the time, as they are in a
search's. Both models are the same weights, timed in turns; one calls every operator with `backend="reference"`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.harness import machine, measure_model
from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome import POOL, LIVGenes
from star_kernels import backends
from star_kernels.dispatch import use_backend

_METRICS = ("train_ms_per_step", "decode_ms_per_token", "peak_memory_bytes")


@dataclass(frozen=True)
class Line:
    """One class.

    Attributes:
        liv_class: 1 to 17.
        name: As the paper writes it.
        train_ms: A training step with the operators that serve by default.
        train_reference_ms: With `reference`.
        train_speedup: The latter over the former, the median over rounds.
        decode_ms: A token at batch 1.
        decode_reference_ms: With `reference`.
        decode_speedup: As above.
        peak_bytes: Largest sum of live tensors of a training step.
        peak_reference_bytes: With `reference`.
    """

    liv_class: int
    name: str
    train_ms: float
    train_reference_ms: float
    train_speedup: float
    decode_ms: float
    decode_reference_ms: float
    decode_speedup: float
    peak_bytes: float
    peak_reference_bytes: float


class ReferenceModel(nn.Module):
    """A language model whose operators are all served by `reference`, to be measured beside the model itself."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Return logits, as the model does."""
        with use_backend("reference"):
            logits: Tensor = self.model(tokens, cache)
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, as the model does; its backward is the reference's too."""
        with use_backend("reference"):
            return self.model.loss(tokens, targets)

    def new_cache(self, batch_size: int, max_length: int) -> Any:
        """Allocate the model's cache."""
        return self.model.new_cache(batch_size, max_length)


def measure_classes(
    classes: Sequence[int], *, width: int, tokens: int, batch: int, decode: int, seconds: float
) -> Iterator[Line]:
    """Measure classes one by one.

    Args:
        classes: Out of 1 to 17.
        width: Of the residual stream; a multiple of 128, for heads of 32 with keys repeated four times.
        tokens: Of a training sequence; decoding starts after `tokens` - `decode` of them.
        batch: Sequences of a training step.
        decode: Steps after each prompt.
        seconds: Sampling time of a class.

    Raises:
        ValueError: a class does not exist, or `width` does not fit.
    """
    for number in classes:
        if number not in POOL:
            raise ValueError(f"classes: {number} is no LIV class, needs 1 to {len(POOL)}")
        genome = Genome((LIVGenes(number, 1, 1, 1, 1),))
        model = LanguageModel(genome, ModelConfig(width=width, time_scale=tokens), seed=0)
        found = measure_model(
            model,
            ReferenceModel(model),
            batch_size=batch,
            seq_len=tokens,
            decode_tokens=decode,
            which=_METRICS,
            seconds=seconds,
            max_seconds=300.0,
        )
        train, decoding = found["train_ms_per_step"], found["decode_ms_per_token"]
        speedups = [1 / found[f"{name}_ratio"] for name in _METRICS]
        yield Line(
            liv_class=number,
            name=POOL[number].name,
            train_ms=train,
            train_reference_ms=train * speedups[0],
            train_speedup=speedups[0],
            decode_ms=decoding,
            decode_reference_ms=decoding * speedups[1],
            decode_speedup=speedups[1],
            peak_bytes=found["peak_memory_bytes"],
            peak_reference_bytes=found["peak_memory_bytes"] * speedups[2],
        )


_HEAD = (
    "class",
    "LIV",
    "training step",
    "plain torch",
    "faster",
    "decoding step",
    "plain torch",
    "faster",
    "memory",
    "plain torch",
)


def cells(line: Line) -> tuple[str, ...]:
    """Write a line's cells, in the order of the table's head."""
    return (
        str(line.liv_class),
        line.name,
        f"{line.train_ms:.3g} ms",
        f"{line.train_reference_ms:.3g} ms",
        f"{line.train_speedup:.3g} x",
        f"{line.decode_ms:.3g} ms",
        f"{line.decode_reference_ms:.3g} ms",
        f"{line.decode_speedup:.3g} x",
        f"{line.peak_bytes / 1e6:.1f} MB",
        f"{line.peak_reference_bytes / 1e6:.1f} MB",
    )


def as_markdown(lines: Sequence[Line], title: str) -> str:
    """Write the table."""
    rules = ["---" if name == "LIV" else "---:" for name in _HEAD]
    rows = [_HEAD, rules, *(cells(line) for line in lines)]
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m search.liv_table", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=256, metavar="N")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="of a training sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of a training step (%(default)s)")
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="steps after each prompt (%(default)s)")
    parser.add_argument("--classes", default=",".join(map(str, POOL)), metavar="N,N", help="default: all")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="sampling time of a class")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table")
    options = parser.parse_args(arguments)
    described = machine()
    served = [name for name, status in backends().items() if status.available and name != "reference"]
    title = (
        f"{described['processor']}, {described['threads']} threads, torch {torch.__version__}, "
        f"operators of {', '.join(served) or 'reference'}; width {options.width}, {options.batch} x {options.tokens} "
        f"tokens, decoding at batch 1"
    )
    console = Console()
    lines: list[Line] = []
    try:
        for line in measure_classes(
            [int(number) for number in options.classes.split(",")],
            width=options.width,
            tokens=options.tokens,
            batch=options.batch,
            decode=options.decode,
            seconds=options.seconds,
        ):
            lines.append(line)
            console.print("  ".join(cells(line)), style="dim", highlight=False)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    table = Table(title=title, title_justify="left")
    for name in _HEAD:
        table.add_column(name, justify="left" if name == "LIV" else "right")
    for line in lines:
        table.add_row(*cells(line))
    console.print(table)
    if options.json is not None:
        content = {"machine": described, "title": title, "lines": [asdict(line) for line in lines]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(as_markdown(lines, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
