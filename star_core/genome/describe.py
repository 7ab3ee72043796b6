"""Genomes in words."""

from __future__ import annotations

from star_core.genome.backbone import Genome


def describe(genome: Genome) -> str:
    """Return several lines for a person to read: depth, text and hash, then each LIV with where what it shares comes
    from.

    Positions count from 0. The text is that of the canonical form.

    Raises:
        ValueError: The genome is not valid.
    """
    sharing = genome.sharing()
    lines = [f"{len(genome)} LIVs, {genome.canonical()}, hash {genome.hash}"]
    for position, cls in enumerate(genome.classes):
        notes = []
        if (source := sharing.featurizer_source[position]) != position:
            notes.append(f"featurizer weights of LIV {source}")
        by_source: dict[int, list[str]] = {}
        for name, source in sorted(sharing.tensor_source[position].items()):
            by_source.setdefault(source, []).append(name)
        notes.extend(f"{' and '.join(names)} of LIV {source}" for source, names in by_source.items())
        lines.append(f"{position:>3}  {cls.name:<12} {'; '.join(notes)}".rstrip())
    return "\n".join(lines)
