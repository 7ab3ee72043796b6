"""The table of what the operators give to each LIV class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from search.liv_table import ReferenceModel, main, measure_classes
from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome import LIVGenes
from star_kernels import dispatch

SIZES = {"width": 128, "tokens": 8, "batch": 1, "decode": 2, "seconds": 0.0}


def test_the_reference_model_computes_the_same_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(Genome((LIVGenes(9, 1, 1, 1, 1),)), ModelConfig(width=128), seed=0)
    tokens = torch.arange(6).view(1, 6)
    seen: list[str | None] = []
    inner = LanguageModel.hidden

    def spy(self: LanguageModel, *arguments: object) -> torch.Tensor:
        seen.append(dispatch._preferred)
        return inner(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "hidden", spy)
    reference = ReferenceModel(model)
    torch.testing.assert_close(reference(tokens, reference.new_cache(1, 6)), model(tokens))
    torch.testing.assert_close(reference.loss(tokens, tokens), model.loss(tokens, tokens))
    assert seen == ["reference", None, "reference", None]
    assert len(list(reference.parameters())) == len(list(model.parameters()))


def test_a_line_for_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--{name}={value}" for name, value in SIZES.items()]
    outputs = [f"--json={tmp_path / 'table.json'}", f"--markdown={tmp_path / 'table.md'}"]
    assert main(["--classes=7,9", *arguments, *outputs]) == 0
    assert "GConv-1" in capsys.readouterr().out
    lines = json.loads((tmp_path / "table.json").read_text())["lines"]
    assert [line["name"] for line in lines] == ["GConv-1", "GMemless"]
    for line in lines:
        assert line["train_reference_ms"] == pytest.approx(line["train_ms"] * line["train_speedup"])
        assert line["decode_ms"] > 0
        assert line["peak_bytes"] > 0
    assert (tmp_path / "table.md").read_text().count("| GConv-1 |") == 1


def test_a_class_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="classes: 18 is no LIV class, needs 1 to 17"):
        list(measure_classes([18], width=128, tokens=8, batch=1, decode=2, seconds=0.0))
    assert main(["--classes=0"]) == 2
    assert "classes: 0 is no LIV class" in capsys.readouterr().err
