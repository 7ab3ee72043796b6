"""Searches that begin with the genomes of saved models."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from search import run
from search.settings import PRESETS, SettingsError
from search.start import NAMES, read_start, read_starts
from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome import BASELINES, transformer_pp
from tests.search.test_run import PLAIN

WINNER = Genome.parse("13.1.1.1.1-9.1.1.1.1")
BASELINE = transformer_pp(2)


def winner(path: Path, genome: Genome = WINNER) -> Path:
    LanguageModel(genome, ModelConfig(width=32, head_dim=8, vocab_size=9), seed=0).save(path)
    return path


def folder(path: Path, config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_search_begins_with_what_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, root = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("Fourscore and seven years ago our fathers brought forth a new nation.\n" * 200)
    first = winner(tmp_path / "first.safetensors")
    second = folder(tmp_path / "second", {"model_type": "star", "genome": str(BASELINE)})
    arguments = [*PLAIN, "--workers", "inline"]
    starts = ["--start", str(first), "--start", str(second), "--start", str(first)]
    assert run.main([*arguments, *starts, "--data", str(text), "--out", str(root)]) == 0
    assert "start 1" in capsys.readouterr().out
    assert json.loads((root / "config.json").read_text())["start"] == [str(WINNER), str(BASELINE)]
    with sqlite3.connect(root / "run.db") as db:
        rows = db.execute("SELECT kind, name, genome, generation, parents FROM evaluations ORDER BY id").fetchall()
    assert [row[0] for row in rows[:4]] == ["baseline"] * 4
    assert rows[4][:4] == ("candidate", "start 1", str(WINNER), 0)
    assert not json.loads(rows[4][4])
    # The baseline takes a place in the population, and is not evaluated a second time.
    assert [row[2] for row in rows].count(str(BASELINE)) == 1
    assert sum(row[3] == 0 for row in rows) == 3
    assert sum(row[3] == 1 for row in rows) == 4
    # The same starts go on with the run; others are refused.
    assert run.main(["--resume", "--out", str(root), *starts]) == 0
    capsys.readouterr()
    assert run.main(["--resume", "--out", str(root), "--start", str(second)]) == 2
    assert "began with --start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: at / "nowhere", "--start: .*nowhere: no such file or folder"),
        (lambda at: folder(at / "run", {"objectives": []}), "config.json names no model_type"),
        (lambda at: (at / "bare").mkdir() or at / "bare", "bare: has no config.json; needs a folder"),
        (lambda at: folder(at / "bad", {"model_type": "star", "genome": "12"}), "bad: LIV 0 .* needs 5 genes"),
        (
            lambda at: folder(at / "mixed", {"model_type": "star", "genome": "91115"}),
            "mixed: .* strategy 5 for GMemless",
        ),
        (lambda at: folder(at / "none", {"model_type": "star"}), "none: config.json names no genome; needs"),
        (lambda at: at / "text", "text: is no safetensors file; needs"),
        (
            lambda at: save_file({"a": torch.zeros(1)}, at / "a.safetensors") or at / "a.safetensors",
            "a.safetensors: holds no genome; needs a search's winner",
        ),
    ],
)
def test_what_holds_no_genome_gets_one_sentence(tmp_path: Path, make: Any, message: str) -> None:
    (tmp_path / "text").write_text("no weights")
    path = make(tmp_path)
    with pytest.raises(SettingsError, match=message) as caught:
        read_starts([path], 2)
    assert "\n" not in str(caught.value)


def test_baselines_go_by_their_names(tmp_path: Path) -> None:
    assert NAMES == ("transformer++", "gqa-transformer++", "stripedmamba", "lfm2")
    for name, make in zip(NAMES, BASELINES.values(), strict=True):
        for spelling in (name, name.upper(), make.__name__):
            assert read_starts([spelling], 6) == (str(make(6).canonical()),)
    for label, make in BASELINES.items():
        assert read_starts([label], 6) == (str(make(6).canonical()),)
    path = winner(tmp_path / "a.safetensors")
    mixed = read_starts([f"lfm2, {path}", "transformer_pp,lfm2"], 2)
    assert mixed == (str(BASELINES["LFM2-like"](2)), str(WINNER), str(BASELINE))
    comma = winner(tmp_path / "a,b.safetensors")
    assert read_starts([comma], 2) == (str(WINNER),)


def test_a_mistyped_name_gets_the_nearest_one() -> None:
    with pytest.raises(SettingsError, match=r"--start: 'transfomer\+\+' is neither .*; did you mean transformer\+\+\?"):
        read_starts(["lfm2,transfomer++"], 6)
    with pytest.raises(SettingsError, match=r"--start: 'zzz' is neither a baseline nor a file or folder; needs one of"):
        read_starts(["zzz"], 6)


def test_a_search_begins_with_named_baselines(tmp_path: Path) -> None:
    text, root = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("Fourscore and seven years ago our fathers brought forth a new nation.\n" * 200)
    arguments = [*PLAIN, "--generations", "1", "--workers", "inline", "--data", str(text), "--out", str(root)]
    assert run.main([*arguments, "--start", "transformer++,gqa-transformer++"]) == 0
    expected = [str(BASELINES[name](2)) for name in ("Transformer++", "GQA Transformer++")]
    assert json.loads((root / "config.json").read_text())["start"] == expected
    assert run.main(["--resume", "--out", str(root), "--start", "transformer_pp", "--start", "gqa_transformer_pp"]) == 0


def test_the_command_line_says_so_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = winner(tmp_path / "deep.safetensors", transformer_pp(4))
    for arguments, message in (
        ([str(tmp_path / "no")], "no such file or folder"),
        (["lfm3"], "--start: 'lfm3' is neither a baseline nor a file or folder; did you mean lfm2?"),
        (["lfm2", "--depth", "1"], "depth: needs at least 2, got 1"),
        ([str(deep), "--depth", "6"], "start: needs genomes of depth = 6 LIVs, got one of 4"),
    ):
        assert run.main(["--workers", "inline", "--out", str(tmp_path / "run"), "--start", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_more_starts_than_places_are_refused() -> None:
    smoke = PRESETS["smoke"]
    texts = tuple(f"{number}1111-91111-91111-91111" for number in range(1, 6))
    with pytest.raises(SettingsError, match="start: needs at most population = 4 genomes, got 5"):
        dataclasses.replace(smoke, start=texts)


def test_folders_of_transformers_are_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    transformers.LlamaConfig(**sizes, num_key_value_heads=2).save_pretrained(tmp_path / "llama")
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    transformers.LlamaConfig(**sizes, hidden_act="gelu").save_pretrained(tmp_path / "gelu")
    assert read_start(tmp_path / "llama") == Genome.parse("41111-91111-41111-91111")
    with pytest.raises(SettingsError, match=r"gpt2: config: needs one of LlamaConfig, .* got GPT2Config"):
        read_start(tmp_path / "gpt2")
    with pytest.raises(SettingsError, match="gelu: hidden_act: is 'gelu'"):
        read_start(tmp_path / "gelu")
