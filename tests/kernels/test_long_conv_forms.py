"""Long convolutions at lengths where a Fourier transform takes over, held to each channel's Toeplitz matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from star_kernels import _triton
from tests.kernels.checks import assert_close, assert_rule, call, gradients, upstream
from tests.kernels.samples import normal

TIMED = ("x", "gate_in", "gate_out")
# The interpreter takes 2 ms for each program of a kernel's grid, and there is one a channel.
WIDE = 40 if _triton.interpreting() else 300


def direct(tensors: dict[str, Tensor], ends: tuple[int, ...] = ()) -> Tensor:
    """Multiply by each channel's Toeplitz matrix, whose entries of other sequences and of later tokens are zero."""
    u, taps = tensors["gate_in"] * tensors["x"], tensors["filter"]
    tokens = torch.arange(u.shape[1])
    sequence = torch.bucketize(tokens, torch.tensor(ends or (0, len(tokens))), right=True)
    lag = tokens.unsqueeze(1) - tokens
    seen = (lag >= 0) & (lag < taps.shape[1]) & (sequence.unsqueeze(1) == sequence)
    lag = lag.clamp(0, taps.shape[1] - 1)
    channels = [u[..., d] @ torch.where(seen, taps[d][lag], 0).T for d in range(u.shape[2])]
    return tensors["gate_out"] * (torch.stack(channels, dim=-1) + tensors["skip"] * u)


def inputs(batch: int, length: int, channels: int, reach: int) -> dict[str, Tensor]:
    """Build all tensors in float64."""
    return {
        **{name: normal(name, batch, length, channels) for name in TIMED},
        "filter": normal("filter", channels, reach) / reach**0.5,
        "skip": normal("skip", channels),
    }


def run(backend: str, leaves: dict[str, Tensor], **options: Tensor) -> Tensor:
    """Call the operator."""
    (y,) = call("long_conv", backend, leaves, options)
    return y


def leaves_of(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return fresh leaves; parameters stay float32 beside half-precision activations."""
    wide = torch.promote_types(dtype, torch.float32)
    return {name: one.to(dtype if name in TIMED else wide).clone().requires_grad_() for name, one in tensors.items()}


# One length for each way to split a transform, at and beside its ends; filters shorter and longer than the sequence.
@pytest.mark.parametrize(
    ("tokens", "reach"),
    [
        *((64, 64), (65, 65), (96, 96), (97, 300), (128, 128), (129, 129), (192, 100), (193, 193)),
        *((257, 257), (385, 70), (600, 600), (769, 769), (1026, 1026), (700, 7)),
    ],
)
def test_values_and_gradients_at_any_length(backend: str, tokens: int, reach: int) -> None:
    tensors = inputs(2, tokens, 5, reach)
    leaves, exact = leaves_of(tensors, torch.float64), leaves_of(tensors, torch.float64)
    y, want = run(backend, leaves), direct(exact)
    assert_close(y, want, "y", 1e-12)
    found, expected = gradients((y,), leaves), gradients((want,), exact)
    for name in leaves:
        assert_close(found[name], expected[name], f"gradient of {name}", 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("tokens", "channels", "reach"), [(130, 20, 130), (1100, 3, 1100), (900, 5, 12)])
def test_error_is_at_most_twice_plain_torch(
    backend: str, dtype: torch.dtype, tokens: int, channels: int, reach: int
) -> None:
    leaves = leaves_of(inputs(2, tokens, channels, reach), dtype)
    exact = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    plain = {name: one.detach().float().requires_grad_() for name, one in leaves.items()}
    y, want, rough = run(backend, leaves), direct(exact), direct(plain)
    dy = upstream((y,))[0]
    # Whole tensors only: a transform's error is relative to its channel's largest value, as the docstring says.
    assert_rule(y.flatten(), want.flatten(), rough.to(dtype).flatten(), "y", 2.0, 16.0)
    found = gradients((y,), leaves, (dy,))
    expected = gradients((want,), exact, (dy.double(),))
    rough_found = gradients((rough,), plain, (dy.float(),))
    for name, leaf in leaves.items():
        rounded = rough_found[name].to(leaf.dtype).flatten()
        assert_rule(found[name].flatten(), expected[name].flatten(), rounded, f"gradient of {name}", 3.0, 16.0)


def test_packed_sequences_of_many_lengths(backend: str) -> None:
    """Short ones beside long ones, twice the same length, and empty ones between."""
    ends = (0, 0, 3, 103, 203, 203, 280, 700, 701, 1001)
    tensors = inputs(1, ends[-1], 4, 350)
    leaves, exact = leaves_of(tensors, torch.float64), leaves_of(tensors, torch.float64)
    y, want = run(backend, leaves, cu_seqlens=torch.tensor(ends)), direct(exact, ends)
    assert_close(y, want, "y", 1e-12)
    found, expected = gradients((y,), leaves), gradients((want,), exact)
    for name in leaves:
        assert_close(found[name], expected[name], f"gradient of {name}", 1e-12)


def test_nan_moves_forward_only_through_a_transform(backend: str) -> None:
    """NaN in one token: earlier tokens and all other channels stay, and so do the gradients that do not see it."""
    length, at, channel = 150, 90, 2
    tensors = inputs(2, length, 20, length)
    clean_leaves = leaves_of(tensors, torch.float32)
    clean = run(backend, clean_leaves)
    clean_gradients = gradients((clean,), clean_leaves)
    tensors["x"][1, at, channel] = float("nan")
    leaves = leaves_of(tensors, torch.float32)
    y = run(backend, leaves)
    found = gradients((y,), leaves)
    assert y[1, at:, channel].isnan().all()
    assert_close(y[1, :at, channel], clean[1, :at, channel], "earlier tokens", 1e-5)
    others = torch.ones(2, length, 20, dtype=torch.bool)
    others[1, :, channel] = False
    assert torch.equal(y[others], clean[others])
    for name in TIMED:
        assert torch.equal(found[name][others], clean_gradients[name][others]), name
    # dx does not depend on x, and no output before the NaN's token tells of it.
    assert_close(found["x"][1, :, channel], clean_gradients["x"][1, :, channel], "dx", 1e-5)
    assert not found["gate_out"][1, :at, channel].isnan().any()
    # Tap j meets the token where at + j is still inside.
    assert found["filter"][channel, : length - at].isnan().all()
    assert not found["filter"][channel, length - at :].isnan().any()
    kept = [c for c in range(20) if c != channel]
    assert torch.equal(found["filter"][kept], clean_gradients["filter"][kept])


def test_nan_is_seen_as_far_as_the_taps_reach(backend: str) -> None:
    """Few taps: the tokens between two NaNs see neither. A NaN tap is seen by the tokens that it has one for."""
    tokens = 70
    tensors = {name: one.float() for name, one in inputs(1, tokens, 2, 3).items()}
    at = torch.arange(tokens)
    broken = {name: one.clone() for name, one in tensors.items()}
    broken["x"][0, [5, 50], 0] = float("nan")
    y = run(backend, broken)
    assert torch.equal(y[0, :, 0].isnan(), ((at >= 5) & (at < 8)) | ((at >= 50) & (at < 53)))
    assert y[0, :, 1].isfinite().all()
    broken = {name: one.clone() for name, one in tensors.items()}
    broken["filter"][1, 2] = float("nan")
    leaves = leaves_of(broken, torch.float32)
    y = run(backend, leaves)
    found = gradients((y,), leaves)
    assert torch.equal(y[0, :, 1].isnan(), at >= 2)
    assert torch.equal(found["x"][0, :, 1].isnan(), at < tokens - 2)
    assert y[0, :, 0].isfinite().all()
    assert found["x"][0, :, 0].isfinite().all()


@pytest.mark.parametrize(("batch", "tokens", "channels"), [(5, 200, 20), (7, 40, 33), (1, 300, WIDE)])
def test_threads_and_batch_change_no_bit(backend: str, batch: int, tokens: int, channels: int) -> None:
    if backend == "reference":
        pytest.skip("torch's own sums depend on the number of threads")
    leaves = leaves_of(inputs(batch, tokens, channels, tokens), torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = run(backend, leaves)
        results.append({"y": y, **gradients((y,), leaves)})
    for other in results[1:]:
        for name, one in other.items():
            assert torch.equal(one, results[0][name]), name
    last = {name: one[-1:] if name in TIMED else one for name, one in leaves.items()}
    alone, beside = run(backend, last), results[0]["y"][-1:]
    if backend == "triton" and alone.device.type == "cpu":
        # In the interpreter a tile's product is the BLAS's, which on AVX2 rounds a row by where it stands in the tile.
        assert_close(alone, beside, "y", 1e-6)
    else:
        assert torch.equal(alone, beside)


def test_steps_continue_a_long_history(backend: str) -> None:
    """A history of several tiles, at every width of the last block of channels."""
    for channels in (1, 15, 16, 17):
        tensors = inputs(2, 150, channels, 150)
        y = direct(tensors)
        history = tensors["x"] * tensors["gate_in"]
        for t in (0, 1, 63, 64, 65, 149):
            token = {name: tensors[name][:, t] for name in TIMED}
            constants = {name: tensors[name] for name in ("filter", "skip")}
            y_t, state = call("long_conv_step", backend, {"state": history[:, :t], **token, **constants}, {})
            assert_close(y_t, y[:, t], f"token {t}", 1e-12)
            assert torch.equal(state, history[:, : t + 1] if t < 149 else history[:, 1:150])
