"""Genomes that a search begins with: baselines by their names, and what models on disk were built from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from search.settings import SettingsError, nearest
from star_core import Genome
from star_core.genome.baselines import BASELINES

NAMES = tuple(re.sub(r"\W+like$", "", name.lower()).replace(" ", "-") for name in BASELINES)
"""How a command line names the baselines: transformer++, gqa-transformer++, stripedmamba, lfm2."""


def read_starts(starts: Sequence[str | Path], depth: int) -> tuple[str, ...]:
    """Return the canonical texts of the genomes that `starts` name, each network once.

    Args:
        starts: Each a path, as `read_start` takes it, or one or more names of `NAMES` or paths with commas between
            them. A name goes before a file of the same name.
        depth: LIVs of the baselines.
    Raises:
        SettingsError: As `read_start`, or something is neither a baseline's name nor a path.
    """
    genomes = []
    for start in starts:
        parts = [start] if Path(start).exists() else [part.strip() for part in str(start).split(",") if part.strip()]
        genomes += [_named(str(part), depth) or read_start(part) for part in parts]
    return tuple(dict.fromkeys(str(genome) for genome in genomes))


def _named(text: str, depth: int) -> Genome | None:
    """Return the baseline of that name; None for a path."""

    def plain(name: str) -> str:
        return re.sub(r"[\s_-]", "", name.lower())

    known = {plain(name): make for name, make in zip(NAMES, BASELINES.values(), strict=True)}
    known |= {plain(make.__name__): make for make in BASELINES.values()}
    known |= {plain(name): make for name, make in BASELINES.items()}
    if plain(text) in known:
        return known[plain(text)](depth).canonical()
    if os.sep in text or "." in text or Path(text).exists():
        return None
    raise SettingsError(f"--start: {text!r} is neither a baseline nor a file or folder{nearest(text.lower(), NAMES)}")


def read_start(path: str | Path) -> Genome:
    """Read the genome of a saved model in its canonical form; its weights and sizes are left aside.

    Args:
        path: A search's winner, `best/<hash>.safetensors`; a folder that `save_pretrained` wrote, of a STAR model or
            of a class of transformers that `star_core.convert` knows, which needs the extra `hub`.
    Raises:
        SettingsError: Nothing is there, or it holds no genome; one sentence.
    """
    path = Path(path)
    try:
        return (_of_folder(path) if path.is_dir() else _of_file(path)).canonical()
    except (ValueError, TypeError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"--start: {path}: {' '.join(str(error).split())}") from error


def _of_file(path: Path) -> Genome:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise SettingsError(f"--start: {path}: no such file or folder") from error
    except SafetensorError as error:
        raise SettingsError(f"--start: {path}: is no safetensors file; needs a search's winner or a folder") from error
    if "genome" not in metadata:
        raise SettingsError(f"--start: {path}: holds no genome; needs a search's winner, best/<hash>.safetensors")
    return Genome.parse(metadata["genome"])


def _of_folder(path: Path) -> Genome:
    config = path / "config.json"
    if not config.is_file():
        raise SettingsError(f"--start: {path}: has no config.json; needs a folder that save_pretrained wrote")
    values = json.loads(config.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or "model_type" not in values:
        raise SettingsError(f"--start: {path}: config.json names no model_type; needs one that save_pretrained wrote")
    if values["model_type"] == "star":
        if "genome" not in values:
            raise SettingsError(f"--start: {path}: config.json names no genome; needs one that save_pretrained wrote")
        return Genome.parse(values["genome"])
    try:
        from transformers import AutoConfig

        from star_core.convert import genome_of
    except ImportError as error:
        raise SettingsError(f"--start: {path}: needs transformers to read it; install the extra hub") from error
    return genome_of(AutoConfig.from_pretrained(path, local_files_only=True))
