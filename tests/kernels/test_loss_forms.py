"""Linear cross entropy at the sizes where its blocks, chunks and groups change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import _triton
from tests.kernels import oracles
from tests.kernels.checks import assert_close, assert_rule, call, gradients
from tests.kernels.samples import integers, normal, uniform

Leaves = dict[str, Tensor]

# Rows, width, vocabulary: a small weight summed for groups of rows; a large vocabulary in groups of chunks; neither.
SIZES = [(600, 8, 300), (513, 16, 77), (40, 6, 3000), (150, 33, 1100), (100, 70, 129), (300, 5, 5000)]
if _triton.interpreting():  # which takes 0.3 ms for each 4096 logits, forward alone
    SIZES = [(130, 8, 300), (513, 16, 77), (13, 6, 3000), (30, 33, 1100), (100, 70, 129), (9, 5, 5000)]


def inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Leaves, Tensor]:
    """Build leaves and targets, a fifth of which is ignored."""
    values = {
        "hidden": normal("hidden", rows, width),
        "weight": normal("weight", vocabulary, width) / width**0.5,
        "bias": normal("bias", vocabulary),
    }
    targets = integers("targets", rows, high=vocabulary)
    targets[uniform("ignored", rows) < 0.2] = -100
    return {name: one.to(dtype).requires_grad_() for name, one in values.items()}, targets


def loss_of(backend: str, leaves: Leaves, targets: Tensor, **options: Any) -> Tensor:
    """Call the operator."""
    (loss,) = call("linear_cross_entropy", backend, leaves, {"targets": targets, **options})
    return loss


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_loss_and_gradients(backend: str, sizes: tuple[int, int, int], options: dict[str, Any]) -> None:
    leaves, targets = inputs(*sizes, torch.float64)
    exact, _ = inputs(*sizes, torch.float64)
    loss, want = (
        loss_of(backend, leaves, targets, **options),
        oracles.linear_cross_entropy(**exact, targets=targets, **options),
    )
    assert_close(loss, want, "loss", 1e-12)
    found, expected = gradients((loss,), leaves), gradients((want,), exact)
    for name in leaves:
        assert_close(found[name], expected[name], f"gradient of {name}", 1e-12)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
def test_mixed_dtypes(backend: str, sizes: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Hidden rows and parameters may differ in dtype; the sums are float32."""
    leaves, targets = inputs(*sizes, torch.float64)
    leaves = {
        name: one.detach().to(dtypes[0 if name == "hidden" else 1]).requires_grad_() for name, one in leaves.items()
    }
    exact = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    plain = {name: one.detach().float().requires_grad_() for name, one in leaves.items()}
    loss = loss_of(backend, leaves, targets)
    want, rough = (oracles.linear_cross_entropy(**one, targets=targets) for one in (exact, plain))
    assert_rule(loss, want, rough, "loss", 2.0, 8.0)
    found, expected, rough_found = gradients((loss,), leaves), gradients((want,), exact), gradients((rough,), plain)
    for name, leaf in leaves.items():
        assert found[name].dtype == leaf.dtype
        # 16 roundings: a sum over 3,000 words, whose order is the BLAS's and differs between AVX2 and AVX-512.
        assert_rule(found[name], expected[name], rough_found[name].to(leaf.dtype), f"gradient of {name}", 3.0, 16.0)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_threads_and_batch_change_no_bit(backend: str, sizes: tuple[int, int, int]) -> None:
    if backend != "cpp":
        pytest.skip("torch's own products depend on the number of threads and rows")
    leaves, targets = inputs(*sizes, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = loss_of(backend, leaves, targets)
        losses = loss_of(backend, leaves, targets, reduction="none")
        results.append({"loss": loss, "losses": losses, **gradients((loss,), leaves)})
    for other in results[1:]:
        for name, one in other.items():
            assert torch.equal(one, results[0][name]), name
    alone = {**leaves, "hidden": leaves["hidden"][7:8]}
    assert torch.equal(loss_of(backend, alone, targets[7:8], reduction="none"), results[0]["losses"][7:8])


def test_ignored_rows_are_not_read(backend: str) -> None:
    """NaN in the hidden row of an ignored target reaches neither the loss nor any gradient."""
    if backend == "reference":
        pytest.skip("a product over all rows multiplies the ignored ones by zero")
    leaves, targets = inputs(100, 9, 50, torch.float32)
    want = loss_of(backend, leaves, targets)
    expected = gradients((want,), leaves)
    poisoned = {**leaves, "hidden": leaves["hidden"].detach().clone()}
    poisoned["hidden"][targets == -100] = float("nan")
    poisoned["hidden"].requires_grad_()
    loss = loss_of(backend, poisoned, targets)
    assert torch.equal(loss, want)
    for name, one in gradients((loss,), poisoned).items():
        assert torch.equal(one, expected[name]), name


def test_tokens_that_bias_excludes(backend: str) -> None:
    """A bias of -inf over a whole chunk of the vocabulary: probability 0, gradient 0."""
    leaves, targets = inputs(60, 5, 700, torch.float64)
    with torch.no_grad():
        leaves["bias"][100:400] = float("-inf")
    targets[(targets >= 100) & (targets < 400)] = 3
    exact = {name: one.detach().clone().requires_grad_() for name, one in leaves.items()}
    loss, want = loss_of(backend, leaves, targets), oracles.linear_cross_entropy(**exact, targets=targets)
    assert_close(loss, want, "loss", 1e-12)
    found, expected = gradients((loss,), leaves), gradients((want,), exact)
    for name in leaves:
        assert_close(found[name], expected[name], f"gradient of {name}", 1e-12)
        assert (found[name][100:400] == 0).all() or name == "hidden"


def test_upstream_gradient_scales(backend: str) -> None:
    leaves, targets = inputs(30, 5, 20, torch.float64)
    once = gradients((loss_of(backend, leaves, targets),), leaves, (torch.tensor(1.0, dtype=torch.float64),))
    scaled = gradients((loss_of(backend, leaves, targets) * -2.5,), leaves, (torch.tensor(1.0, dtype=torch.float64),))
    for name in leaves:
        assert_close(scaled[name], -2.5 * once[name], name, 1e-14)


@pytest.mark.parametrize("wrong", [20, -1])
def test_targets_out_of_range_are_refused(backend: str, wrong: int) -> None:
    if backend != "cpp":
        pytest.skip("torch's gather refuses them in its own words, and a GPU's values are not looked at")
    leaves, targets = inputs(30, 5, 20, torch.float32)
    targets[4] = wrong
    with pytest.raises(ValueError, match=r"targets must be ignore_index or lie in 0 \.\. V - 1"):
        loss_of(backend, leaves, targets)
