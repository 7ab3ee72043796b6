"""The model card: what a saved folder says about its model to a person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from star_core.genome import describe

if TYPE_CHECKING:
    from star_core.hub.model import StarForCausalLM

MARK = "<!-- written by star_core.hub; delete this line to keep your own changes when the model is saved again -->"
_CACHE_TOKENS = (1024, 8192)


def model_card(model: StarForCausalLM) -> str:
    """Return the README.md of a model: its genome in words, its sizes, its measured numbers where the configuration
    holds some, and how to load it."""
    config = model.config
    genome = config.parsed_genome()
    sizes = [("parameters", f"{model.num_parameters():,}"), ("width", str(config.width))]
    sizes += [("vocabulary", str(config.vocab_size)), ("dtype", str(model.dtype).removeprefix("torch."))]
    for tokens in _CACHE_TOKENS:
        held = sum(
            spec.nbytes for specs in model.model.backbone.state_specs(1, tokens, model.dtype) for spec in specs.values()
        )
        sizes.append((f"decoding state after {tokens} tokens, batch 1", f"{held:,} bytes"))
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- star\n- hybrid\n---",
        MARK,
        f"# STAR {genome.hash}",
        f"A causal language model of {len(genome)} linear input-varying layers, written as the genome `{genome}`.",
        f"## Architecture\n\n```text\n{describe(genome)}\n```",
        "## Sizes\n\n" + _table(sizes),
    ]
    if config.measured:
        rows = [(name, f"{value:.6g}") for name, value in config.measured.items()]
        parts.append("## Measured\n\n" + _table(rows))
    parts.append(
        "## Use\n\n```python\nimport star_core.hub  # registers the model type\nfrom transformers import "
        'AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```'
    )
    return "\n\n".join(parts) + "\n"


def write_card(model: StarForCausalLM, folder: Path) -> None:
    """Write README.md into `folder`, unless someone else's lies there."""
    path = folder / "README.md"
    if not path.exists() or MARK in path.read_text(encoding="utf-8"):
        path.write_text(model_card(model), encoding="utf-8")


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])
