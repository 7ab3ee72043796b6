"""The compiled short convolutions at the sizes where their work is cut up: tiles, vectors, blocks, segments,
threads."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import star_kernels
from tests.kernels.checks import assert_rule, gradients, upstream
from tests.kernels.samples import normal

pytestmark = pytest.mark.skipif(
    not star_kernels.backends()["cpp"].available, reason=f"cpp: {star_kernels.backends()['cpp'].reason}"
)


def _leaves(operator: str, batch: int, tokens: int, channels: int, width: int, sequences: int) -> dict[str, Tensor]:
    timed = ("x", "gate_in", "gate_out") if operator == "gated_short_conv" else ("x",)
    tensors = {name: normal(name, batch, tokens, channels) for name in timed}
    tensors["weight"] = normal("weight", channels, width)
    tensors["initial_state"] = normal("state", sequences, channels, width - 1)
    if width % 2:
        tensors["bias"] = normal("bias", channels)
    return tensors


def _run(
    operator: str, backend: str, tensors: dict[str, Tensor], dtype: torch.dtype, cu_seqlens: Tensor | None = None
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the outputs and every gradient of a call on tensors rounded to float32, at `dtype`."""
    leaves = {name: one.float().to(dtype).requires_grad_() for name, one in tensors.items()}
    options = {"activation": "silu"} if operator == "causal_conv1d" and tensors["weight"].shape[1] % 3 else {}
    outputs = getattr(star_kernels, operator)(**leaves, **options, cu_seqlens=cu_seqlens, backend=backend)
    return outputs, gradients(outputs, leaves, tuple(one.float().to(one.dtype) for one in upstream(outputs)))


@pytest.mark.parametrize("operator", ["causal_conv1d", "gated_short_conv"])
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "width"),
    [
        (2, 8, 16, 4),
        (1, 130, 17, 1),
        (3, 64, 60, 2),
        (1, 1026, 7, 3),
        (2, 63, 130, 4),
        (1, 129, 33, 5),
        (2, 37, 48, 6),
        (2, 200, 20, 7),
        (1, 150, 18, 8),
        (1, 70, 5, 70),
        (1, 12, 1050, 4),
    ],
)
def test_float32_matches_the_definition(operator: str, batch: int, tokens: int, channels: int, width: int) -> None:
    tensors = _leaves(operator, batch, tokens, channels, width, batch)
    outputs, found = _run(operator, "cpp", tensors, torch.float32)
    exact, want = _run(operator, "reference", tensors, torch.float64)
    plain, rough = _run(operator, "reference", tensors, torch.float32)
    for index, got in enumerate(outputs):
        assert_rule(got, exact[index], plain[index], f"output {index}", 2.0, 16.0)
    for name, got in found.items():
        assert_rule(got, want[name], rough[name], f"gradient of {name}", 3.0, 16.0)


@pytest.mark.parametrize("operator", ["causal_conv1d", "gated_short_conv"])
@pytest.mark.parametrize("width", [1, 4, 8])
def test_packed_sequences_are_bit_equal_to_separate_ones(operator: str, width: int) -> None:
    """Sequences of no, one, a few and hundreds of tokens; the last are cut into segments in one call and not in the
    other.
    """
    ends = [0, 0, 1, 3, 3, 140, 141, 300, 300]
    tensors = _leaves(operator, 1, ends[-1], 20, width, len(ends) - 1)
    (y, final), found = _run(operator, "cpp", tensors, torch.float32, torch.tensor(ends))
    for index, (start, stop) in enumerate(pairwise(ends)):
        part = {name: one[:, start:stop] if one.shape[:2] == (1, ends[-1]) else one for name, one in tensors.items()}
        part["initial_state"] = tensors["initial_state"][index : index + 1]
        (y_alone, final_alone), _ = _run(operator, "cpp", part, torch.float32)
        assert torch.equal(y[:, start:stop], y_alone), f"sequence {index}"
        assert torch.equal(final[index : index + 1], final_alone), f"sequence {index}"
    _, want = _run(operator, "reference", tensors, torch.float64, torch.tensor(ends))
    _, rough = _run(operator, "reference", tensors, torch.float32, torch.tensor(ends))
    for name, got in found.items():
        assert_rule(got, want[name], rough[name], f"gradient of {name}", 3.0, 16.0)


@pytest.mark.parametrize("operator", ["causal_conv1d", "gated_short_conv"])
def test_threads_and_batch_change_no_bit(operator: str) -> None:
    tensors = _leaves(operator, 4, 300, 130, 4, 4)
    outputs, found = _run(operator, "cpp", tensors, torch.float32)
    torch.set_num_threads(1)
    again, found_again = _run(operator, "cpp", tensors, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert all(torch.equal(found[name], found_again[name]) for name in found)
    alone = {name: one[2:3] if one.shape[0] == 4 else one for name, one in tensors.items()}
    row, _ = _run(operator, "cpp", alone, torch.float32)
    assert all(torch.equal(a[2:3], b) for a, b in zip(outputs, row, strict=True))


def test_final_state_alone_can_be_differentiated() -> None:
    x = normal("x", 2, 9, 20).float().requires_grad_()
    _, final = star_kernels.causal_conv1d(x, normal("weight", 20, 4).float(), backend="cpp")
    final.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (torch.arange(9) >= 6).float().view(1, 9, 1).expand(2, 9, 20))


@pytest.mark.parametrize("operator", ["causal_conv1d", "gated_short_conv"])
def test_outputs_written_past_the_caches_are_the_same(operator: str) -> None:
    """A call of 32 MB and more writes past the caches; one of its rows alone does not."""
    tensors = {name: one.float() for name, one in _leaves(operator, 8, 520, 1024, 4, 8).items()}
    rows = [name for name, one in tensors.items() if one.shape[0] == 8]
    results = []
    for part in (slice(None), slice(3, 4)):
        leaves = {name: (one[part] if name in rows else one).clone().requires_grad_() for name, one in tensors.items()}
        outputs = getattr(star_kernels, operator)(**leaves, backend="cpp")
        found = gradients(outputs, leaves, tuple(one.detach().flip(-1) for one in outputs))
        results.append((*outputs, *(found[name] for name in rows)))
    for whole, alone in zip(*results, strict=True):
        assert torch.equal(whole[3:4], alone)
