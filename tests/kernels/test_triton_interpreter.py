"""What the tests leave out of Triton's interpreter to save time changes no bit of any result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from star_kernels import _triton
from tests.kernels.checks import Case, call, gradients
from tests.kernels.samples import normal, uniform

SCRIPT = """
import sys, torch
from tests.kernels import interpreter
interpreter.close_gaps()
from tests.kernels.test_triton_interpreter import results
torch.save(results(), sys.argv[1])
"""


def results() -> list[Tensor]:
    """Return outputs and gradients of kernels with scans, products, sums, maxima, loops, casts and masks."""

    def size(*shape: int) -> Tensor:
        return normal("x", *shape)

    decay = uniform("decay", 1, 19, 3)
    heads = {name: normal(name, 1, 19, 2, 5) for name in "qkv"}
    log_decay = -uniform("log", 1, 19, 2)
    cases = (
        ("attention", Case(heads, {"window": 7, "softcap": 3.0})),
        ("diagonal_scan", Case({"decay": decay, "x": size(1, 19, 3)})),
        ("gated_delta_rule", Case({**heads, "log_decay": log_decay, "beta": uniform("beta", 1, 19, 2)})),
        ("causal_conv1d", Case({"x": size(1, 19, 3), "weight": size(3, 4)}, {"activation": "silu"})),
        ("long_conv", Case({"x": size(1, 19, 3), "filter": size(3, 19)})),
        ("rms_norm", Case({"x": size(5, 7), "weight": size(7)})),
    )
    found: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        for operator, case in cases:
            leaves = case.leaves(dtype)
            outputs = call(operator, "triton", leaves, case.options)
            found += [*(one.detach() for one in outputs), *gradients(outputs, leaves).values()]
    return found


@pytest.mark.skipif(not _triton.interpreting(), reason="needs Triton's interpreter")
def test_saving_time_changes_no_bit(tmp_path: Path) -> None:
    file = tmp_path / "results.pt"
    subprocess.run([sys.executable, "-c", SCRIPT, str(file)], check=True)
    want = torch.load(file)
    found = results()
    assert len(found) == len(want) >= 2 * 6 * 3
    for index, (got, expected) in enumerate(zip(found, want, strict=True)):
        assert torch.equal(got, expected), f"result {index}"
