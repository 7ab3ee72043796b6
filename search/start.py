"""Genomes that a search begins with, read from models that lie on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from search.settings import SettingsError
from star_core import Genome


def read_starts(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Return the canonical texts of the genomes at `paths`, each network once.

    Raises:
        SettingsError: As `read_start`.
    """
    return tuple(dict.fromkeys(str(read_start(path)) for path in paths))


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
