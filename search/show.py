"""Show a genome: `python -m search.show GENOME` prints its LIVs, its parameters, work and cache, and draws it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from search.operations import mixing_flops
from search.report_drawing import draw_genome
from search.report_svg import tag
from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome import Residual, describe
from star_core.genome.decode import takes_ffn

_RESIDUALS = {
    Residual.PRE_NORM: "",
    Residual.POST_NORM: "post-norm",
    Residual.SANDWICH: "sandwich norm",
    Residual.PARALLEL: "parallel to the next",
}


@dataclass(frozen=True)
class Account:
    """What a model takes, batch 1.

    Attributes:
        parameters: Shared ones counted once.
        projection_flops: Floating-point operations for one token in all maps of channels, the output layer included.
        mixing_flops: For one token with a context of so many before it, in the mixing of tokens.
        cache_bytes: Of the decoding state for so many tokens.
    """

    parameters: int
    projection_flops: int
    mixing_flops: dict[int, int]
    cache_bytes: dict[int, int]


def account(genome: Genome, config: ModelConfig, contexts: Sequence[int]) -> Account:
    """Count what a genome's model takes to decode one token.

    A multiplication and an addition are two operations. Maps of channels are counted as they run; token mixing by
    formula, `mixing_flops`; norms, gates and activations, a few operations a channel, are left out.

    Args:
        genome: Valid.
        config: The model's sizes, as `LanguageModel` takes them.
        contexts: Numbers of tokens before the one that is counted.
    Raises:
        ValueError: The genome does not fit the sizes.
    """
    model = LanguageModel(genome, config, seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64))
    return Account(
        model.num_parameters(),
        int(counter.get_total_flops()),
        {length: sum(mixing_flops(cls, model.config, length) for cls in genome.classes) for length in contexts},
        {length: model.cache_bytes(1, length) for length in contexts},
    )


def in_words(genome: Genome, config: ModelConfig, contexts: Sequence[int]) -> str:
    """Describe a genome and what its model takes, in lines for a terminal."""
    sizes = config.with_sizes(genome.sizes)
    lines = [describe(genome)]
    placed = [f"LIV {i} {_RESIDUALS[cls.residual]}" for i, cls in enumerate(genome.classes) if _RESIDUALS[cls.residual]]
    if placed:
        lines.append("norms: " + ", ".join(placed))
    ffn = f", feed-forward {sizes.ffn_width}" if sizes.ffn_width and any(map(takes_ffn, genome.classes)) else ""
    lines.append(f"width {sizes.width}, heads of {sizes.head_dim}{ffn}, {sizes.vocab_size} tokens known")
    counted = account(genome, config, contexts)
    lines.append(f"{counted.parameters:,} parameters, {counted.projection_flops:,} FLOPs a token in maps of channels")
    rows = [("context", "FLOPs a token in mixing", "cache bytes")]
    rows += [(f"{n:,}", f"{counted.mixing_flops[n]:,}", f"{counted.cache_bytes[n]:,}") for n in contexts]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def as_svg(genome: Genome) -> str:
    """Draw a genome as a picture that stands alone, with the report's colours."""
    styles = "".join(
        (files("search") / "templates" / name).read_text(encoding="utf-8") for name in ("palette.css", "report.css")
    )
    line = tag("line", x1=1, x2=1, y1=0, y2=6, style="stroke:var(--hatch);stroke-width:1.6")
    sizes = {"width": 6, "height": 6, "patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
    hatch = tag("pattern", line, id="hatch", **sizes)
    head, end, rest = draw_genome(genome).partition(">")
    return f"{head}{end}<style>{styles.replace('<', '&lt;')}</style><defs>{hatch}</defs>{rest}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m search.show", description=__doc__.split("\n", 1)[0])
    parser.add_argument("genome", metavar="GENOME", help="its text, such as 11111-91111")
    parser.add_argument("--width", type=int, default=128, metavar="N", help="width of the model (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=32, metavar="N", help="channels of a head (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=256, metavar="N", help="tokens known (%(default)s)")
    parser.add_argument("--contexts", default="128,1024,8192", metavar="N,N", help="context lengths (%(default)s)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it there")
    options = parser.parse_args(arguments)
    try:
        genome = Genome.parse(options.genome)
        contexts = [int(text) for text in options.contexts.split(",")]
        if min(contexts) < 1:
            raise ValueError(f"contexts: are {options.contexts}, need numbers from 1")
        config = ModelConfig(width=options.width, head_dim=options.head_dim, vocab_size=options.vocab_size)
        print(in_words(genome, config, contexts))
        if options.svg is not None:
            options.svg.write_text(as_svg(genome), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
