"""Linear cross entropy, held to torch's cross entropy of the whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels
from star_kernels.loss import reference
from tests.kernels import oracles
from tests.kernels.checks import assert_close, assert_rule, call, gradients, offset_slices, reversed_axes
from tests.kernels.samples import integers, normal


def tensors(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Build leaves: hidden (rows, width), weight and bias."""
    values = {
        "hidden": normal("hidden", rows, width),
        "weight": normal("weight", vocabulary, width),
        "bias": normal("bias", vocabulary),
    }
    return {name: one.to(dtype).requires_grad_() for name, one in values.items()}


def loss_of(backend: str, leaves: dict[str, Tensor], targets: Tensor, **options: Any) -> Tensor:
    """Call the operator."""
    (loss,) = call("linear_cross_entropy", backend, leaves, {"targets": targets, **options})
    return loss


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"label_smoothing": 1.0, "softcap": 5.0, "reduction": "none"},
    {"label_smoothing": 0.3, "reduction": "sum", "ignore_index": 2},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "default")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (40, 8, 130)], ids=["R1", "R5", "R40"])
@pytest.mark.parametrize("held", [1, 600, 2**20])
class TestMatchesDenseFormula:
    """Losses and gradients, whatever the block of rows that is held at once."""

    def test_loss_and_gradients(
        self,
        backend: str,
        options: dict[str, Any],
        sizes: tuple[int, int, int],
        held: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", held)
        rows, _, vocabulary = sizes
        targets = integers("targets", rows, high=vocabulary)
        targets[1::4] = options.get("ignore_index", -100)
        leaves, exact = tensors(*sizes), tensors(*sizes)
        loss, want = (
            loss_of(backend, leaves, targets, **options),
            oracles.linear_cross_entropy(**exact, targets=targets, **options),
        )
        assert loss.dtype == torch.float64
        assert_close(loss, want, "loss", 1e-12)
        found, expected = gradients((loss,), leaves), gradients((want,), exact)
        for name in leaves:
            assert_close(found[name], expected[name], f"gradient of {name}", 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_is_at_most_twice_plain_torch(backend: str, dtype: torch.dtype, reduction: str) -> None:
    leaves = tensors(37, 24, 50, dtype)
    exact = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    plain = {name: one.detach().float().requires_grad_() for name, one in leaves.items()}
    targets = integers("targets", 37, high=50)
    loss = loss_of(backend, leaves, targets, reduction=reduction)
    want, rough = (oracles.linear_cross_entropy(**one, targets=targets, reduction=reduction) for one in (exact, plain))
    assert loss.dtype == torch.float32
    assert_rule(loss, want, rough, "loss", 2.0, 8.0)
    found, expected, rough_found = gradients((loss,), leaves), gradients((want,), exact), gradients((rough,), plain)
    for name, leaf in leaves.items():
        assert found[name].dtype == dtype
        assert_rule(found[name], expected[name], rough_found[name].to(leaf.dtype), f"gradient of {name}", 3.0, 8.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_target_ignored(backend: str, reduction: str) -> None:
    """As in torch: the mean is NaN, the others are zero, and every gradient is zero."""
    leaves, exact = tensors(5, 3, 7), tensors(5, 3, 7)
    targets = torch.full((5,), -100)
    loss = loss_of(backend, leaves, targets, reduction=reduction)
    want = oracles.linear_cross_entropy(**exact, targets=targets, reduction=reduction)
    assert torch.equal(loss.isnan(), want.isnan())
    assert torch.equal(loss.nan_to_num(), want.nan_to_num())
    for name, gradient in gradients((loss,), leaves).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(backend: str, reduction: str) -> None:
    leaves = tensors(0, 3, 7)
    loss = loss_of(backend, leaves, torch.zeros(0, dtype=torch.int64), reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    for name, gradient in gradients((loss,), leaves).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_channel_and_no_token(backend: str, reduction: str) -> None:
    """Without channels the logits are the bias; without a vocabulary every target is ignored."""
    leaves, exact = tensors(4, 0, 7), tensors(4, 0, 7)
    targets = integers("targets", 4, high=7)
    loss = loss_of(backend, leaves, targets, reduction=reduction)
    want = oracles.linear_cross_entropy(**exact, targets=targets, reduction=reduction)
    assert_close(loss, want, "loss", 1e-12)
    assert_close(gradients((loss,), leaves)["bias"], gradients((want,), exact)["bias"], "gradient of bias", 1e-12)
    leaves = tensors(4, 3, 0)
    loss = loss_of(backend, leaves, torch.full((4,), -100), reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    for name, gradient in gradients((loss,), leaves).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_weighted_rows(backend: str) -> None:
    """`reduction="none"` times weights, summed: each row's gradient has its own factor."""
    leaves, exact = tensors(9, 4, 11), tensors(9, 4, 11)
    targets, weights = integers("targets", 9, high=11), normal("weights", 9)
    targets[3] = -100
    loss = (loss_of(backend, leaves, targets, reduction="none") * weights).sum()
    want = (oracles.linear_cross_entropy(**exact, targets=targets, reduction="none") * weights).sum()
    found, expected = gradients((loss,), leaves), gradients((want,), exact)
    for name in leaves:
        assert_close(found[name], expected[name], f"gradient of {name}", 1e-12)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offset_of_the_logits(backend: str, offset: float) -> None:
    leaves = tensors(6, 4, 7, torch.float32)
    leaves["bias"] = torch.full((7,), offset, requires_grad=True)
    exact = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    targets = integers("targets", 6, high=7)
    loss = loss_of(backend, leaves, targets)
    want = oracles.linear_cross_entropy(**exact, targets=targets)
    assert_close(loss, want, "loss", 2e-3)  # the logits themselves are rounded to 1e-3 at 1e4
    found, expected = gradients((loss,), leaves), gradients((want,), exact)
    for name in leaves:
        assert_close(found[name], expected[name], f"gradient of {name}", 2e-3)


@pytest.mark.parametrize("vocabulary", [7, 50257])
def test_vocabularies(backend: str, vocabulary: int) -> None:
    leaves, exact = tensors(19, 8, vocabulary), tensors(19, 8, vocabulary)
    targets = integers("targets", 19, high=vocabulary)
    loss = loss_of(backend, leaves, targets)
    want = oracles.linear_cross_entropy(**exact, targets=targets)
    assert_close(loss, want, "loss", 1e-12)
    found, expected = gradients((loss,), leaves), gradients((want,), exact)
    for name in leaves:
        assert_close(found[name], expected[name], f"gradient of {name}", 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_inputs_left_alone(backend: str, reduction: str) -> None:
    leaves = tensors(6, 4, 7, torch.float32)
    before = {name: one.detach().clone() for name, one in leaves.items()}
    loss = loss_of(backend, leaves, integers("targets", 6, high=7), reduction=reduction)
    first, second = gradients((loss,), leaves), gradients((loss,), leaves)
    for name, one in leaves.items():
        assert torch.equal(one, before[name]), f"{name} was modified"
        assert torch.equal(first[name], second[name]), f"{name}, second backward"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend: str, reduction: str) -> None:
    leaves, targets = tensors(4, 3, 5), torch.tensor([0, 4, -100, 2])

    def function(*values: Tensor) -> Tensor:
        named = dict(zip(leaves, values, strict=True))
        return loss_of(backend, named, targets, reduction=reduction, label_smoothing=0.2, softcap=2.0)

    assert torch.autograd.gradcheck(function, list(leaves.values()))


def test_loss_scale_saves_small_float16_gradients(backend: str) -> None:
    """The mean over 4,000 rows leaves gradients below float16's smallest number; a scale of 2**14 brings them back."""
    leaves = tensors(4000, 4, 7, torch.float16)
    targets = integers("targets", 4000, high=7)
    (loss_of(backend, leaves, targets) * 2**14).backward()
    exact = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    (oracles.linear_cross_entropy(**exact, targets=targets) * 2**14).backward()
    assert_close(leaves["hidden"].grad, exact["hidden"].grad, "gradient of hidden", 1e-3)
    smallest = exact["hidden"].grad.abs() / 2**14 < 6e-8
    assert smallest.any()
    assert (leaves["hidden"].grad[smallest] != 0).float().mean() > 0.9


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_only_the_needed_gradient(backend: str, needed: str) -> None:
    """Frozen tensors get no gradient, and the others the same as ever."""
    all_leaves, leaves = tensors(4, 3, 5), tensors(4, 3, 5)
    targets = integers("targets", 4, high=5)
    loss_of(backend, all_leaves, targets).backward()
    for name, one in leaves.items():
        one.requires_grad_(name == needed)
    loss_of(backend, leaves, targets).backward()
    assert torch.equal(leaves[needed].grad, all_leaves[needed].grad)
    assert all(one.grad is None for name, one in leaves.items() if name != needed)


def test_without_gradients_the_loss_is_the_same(backend: str) -> None:
    leaves, targets = tensors(6, 4, 7), integers("targets", 6, high=7)
    with torch.no_grad():
        quiet = loss_of(backend, leaves, targets)
    assert not quiet.requires_grad
    assert_close(quiet, loss_of(backend, leaves, targets).detach(), "loss", 1e-14)


def test_batches_of_tokens_strides_and_int32_targets(backend: str) -> None:
    flat, targets = tensors(6, 4, 7), integers("targets", 6, high=7)
    want = loss_of(backend, flat, targets, reduction="none")
    expected = gradients((want,), flat, (torch.ones(6).double(),))
    for lay_out in (reversed_axes, offset_slices):
        leaves = {name: lay_out(one.detach()).requires_grad_() for name, one in tensors(6, 4, 7).items()}
        loss = loss_of(backend, leaves, targets.int(), reduction="none")
        assert_close(loss, want, "loss", 1e-13)
        found = gradients((loss,), leaves, (torch.ones((), dtype=torch.float64).expand(6),))
        for name in leaves:
            assert_close(found[name], expected[name], f"gradient of {name}", 1e-13)
    tokens = {**flat, "hidden": flat["hidden"].view(2, 3, 4)}
    assert torch.equal(loss_of(backend, tokens, targets.view(2, 3), reduction="none"), want.view(2, 3))


def test_peak_memory_is_a_fraction_of_the_logits() -> None:
    """Blocks hold at most 1/16 of the rows, once the batch does not fit one block."""
    for rows, vocabulary in ((512, 50257), (4096, 50257), (4096, 32000), (100, 2**20)):
        largest = max(block.stop - block.start for block in reference._blocks(rows, vocabulary))
        assert largest <= rows / 16
    assert reference._blocks(4096, 256) == [slice(0, 4096)]
    assert reference._blocks(3, 2**21) == [slice(0, 1), slice(1, 2), slice(2, 3)]


HIDDEN, WEIGHT, TARGETS = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"hidden has shape \(\), needs 1 axes", {"hidden": torch.zeros(())}),
        (ValueError, r"weight has shape \(5, 4\), needs \(V, D\) = \(5, 3\)", {"weight": torch.zeros(5, 4)}),
        (ValueError, r"weight has shape \(3,\), needs 2 axes \(V, D\)", {"weight": torch.zeros(3)}),
        (TypeError, r"targets is torch\.float32, needs torch\.int32 or torch\.int64", {"targets": torch.zeros(4)}),
        (ValueError, r"targets has shape \(2,\), needs \(\.\.\.\) = \(4,\)", {"targets": TARGETS[:2]}),
        (ValueError, r"bias has shape \(3,\), needs \(V,\) = \(5,\)", {"bias": torch.zeros(3)}),
        (ValueError, r"reduction is 'avg', needs one of 'mean', 'sum', 'none'", {"reduction": "avg"}),
        (ValueError, r"label_smoothing is 1\.5, needs a number in 0 \.\. 1", {"label_smoothing": 1.5}),
        (ValueError, r"softcap is 0, needs a number > 0", {"softcap": 0}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        star_kernels.linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **arguments})
