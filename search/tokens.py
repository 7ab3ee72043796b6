"""Token streams: documents of text to one flat tensor of token ids, as bytes or by a tokenizer file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

BYTE_VOCAB = 256

SEPARATOR = b"\n\n"
"""Stands between two documents: a blank line, which any tokenizer can encode without a special token."""


class DataError(ValueError):
    """The text asked for cannot be used; the message is one sentence that names the path and the cure."""


def require(package: str, why: str) -> None:
    """Raise `DataError` if an optional package is not installed; `why` says what needed it."""
    if find_spec(package) is None:
        raise DataError(f"{why} needs the package {package!r}: pip install {package}")


def join(documents: Sequence[bytes]) -> bytes:
    """Put the documents one after the other with `SEPARATOR` between them."""
    return SEPARATOR.join(documents)


class ByteEncoder:
    """Every byte is a token: no tokenizer, a vocabulary of 256, and perplexity that compares across machines."""

    vocab_size = BYTE_VOCAB

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        """Return the joined documents as a tensor of token ids, [N], uint8."""
        joined = bytearray(join(documents))
        # frombuffer refuses an empty buffer; a writable one costs one copy and spares torch's read-only warning.
        return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)


class FileEncoder:
    """A `tokenizers` JSON file (Hugging Face's format): token ids as int32.

    Args:
        path: The tokenizer file, `tokenizer.json`.
    Raises:
        DataError: the package is missing, or the file is missing, unreadable or not a tokenizer.
    """

    def __init__(self, path: str) -> None:
        require("tokenizers", f"the tokenizer file {path}")
        from tokenizers import Tokenizer

        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the tokenizer file {path} cannot be read: {reason(error)}") from error
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the package raises a bare Exception
            raise DataError(f"{path} is not a file of the `tokenizers` package: {reason(error)}") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        """Return the joined documents as a tensor of token ids, [N], int32.

        Each document is encoded by itself, with the separator behind it, so that the encoding runs in parallel.
        """
        texts = [(document + SEPARATOR).decode("utf-8") for document in documents[:-1]]
        texts += [document.decode("utf-8") for document in documents[-1:]]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        parts = [torch.tensor(encoding.ids, dtype=torch.int32) for encoding in encodings]
        return torch.cat([torch.empty(0, dtype=torch.int32), *parts])


Encoder = ByteEncoder | FileEncoder


def reason(error: Exception) -> str:
    """Say in one line why a text could not be read, without the path that the system's message repeats."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).splitlines() or [type(error).__name__])[0]
