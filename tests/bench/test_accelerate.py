"""The comparison of accelerated models runs, names what it measured, and stores it."""

import json
from pathlib import Path

import pytest

from bench.accelerate import Line, main, markdown, measure_architecture
from bench.accelerate_models import TINY

pytest.importorskip("transformers", reason="needs the extra `hub`")


def test_every_metric_gives_a_line_and_the_report() -> None:
    lines, report = measure_architecture("mamba2", TINY, tokens=16, seconds=0.1)
    assert [(one.architecture, one.metric, one.tokens) for one in lines] == [
        ("mamba2", "prefill", 16),
        ("mamba2", "decode", 16),
        ("mamba2", "train", 16),
    ]
    for one in lines:
        assert one.ours_ms > 0
        assert one.ratio_low <= one.ratio <= one.ratio_high
        assert one.theirs_ms == pytest.approx(one.ours_ms * one.ratio)
    assert "3 x Mamba2Mixer: causal_conv1d, ssd" in report


def test_what_transformers_trains_slowly_takes_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.accelerate._SLOW_TRAINING_TOKENS", 8)
    lines, _ = measure_architecture("mamba", TINY, metrics=["train"], tokens=16, seconds=0.1)
    assert lines[0].tokens == 8


def test_the_command_stores_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.accelerate.LARGE", TINY)
    stem = tmp_path / "run"
    arguments = ["lfm2", "--metrics", "decode", "--tokens", "8", "--seconds", "0.05", "--vocab-size", "97"]
    assert main([*arguments, "--output", str(stem)]) == 0
    printed = capsys.readouterr().out
    stored = json.loads(stem.with_suffix(".json").read_text())
    assert [one["architecture"] for one in stored["lines"]] == ["lfm2"]
    assert "gated_short_conv" in stored["reports"]["lfm2"]
    assert stem.with_suffix(".md").read_text() in printed


def test_a_step_that_is_too_slow_to_repeat_is_taken_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.accelerate.LARGE", TINY)
    arguments = ["mamba", "lfm2", "--once", "mamba", "--metrics", "prefill", "--tokens", "16", "--seconds", "0.05"]
    assert main([*arguments, "--vocab-size", "97", "--output", str(tmp_path / "run")]) == 0
    lines = [Line(**one) for one in json.loads((tmp_path / "run.json").read_text())["lines"]]
    expected = [("mamba", "prefill"), ("mamba", "train, once"), ("lfm2", "prefill")]
    assert [(one.architecture, one.metric) for one in lines] == expected
    once = lines[1]
    assert once.tokens == 16
    assert once.ours_ms > 0
    assert once.ratio == once.ratio_low == once.ratio_high == pytest.approx(once.theirs_ms / once.ours_ms)
    assert "train, once" in capsys.readouterr().out


def test_an_unknown_architecture_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lama"])
    assert "got lama" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["lfm2", "--once", "mamba"])
    assert "--once: needs some of lfm2, got mamba" in capsys.readouterr().err


def test_the_table_puts_the_untouched_model_first() -> None:
    table = markdown([Line("mamba", "train", 256, 2.0, 50.0, 25.0, 24.0, 26.0)], "here")
    assert table.splitlines()[-1] == "| mamba | train | 256 | 50.0 | 2.0 | 25.00 | 24.00 to 26.00 |"
