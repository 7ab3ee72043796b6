"""What every layer must do, whichever peer it comes from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from star_core.layers import State
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal

Call = Callable[..., Tensor]
"""layer(x, state=..., cu_seqlens=...) as a plain function that returns the output alone."""


def randomised(layer: nn.Module) -> nn.Module:
    """Move every parameter away from its start, so that none is 0, 1 or shared, and compute in float64."""
    layer.double()
    with torch.no_grad():
        for name, one in layer.named_parameters():
            one.add_(0.3 * normal(name, *one.shape))
    return layer


def assert_decodes(call: Call, x: Tensor) -> None:
    """Assert that any cut of the tokens, single ones included, gives what one call gives."""
    want = call(x)
    length = x.shape[1]
    for cuts in ([1] * length, [4, 1, 1, length - 6], [length - 1, 1], [1, 2, length - 3]):
        state: State = {}
        pieces = [call(piece, state=state) for piece in x.split(cuts, dim=1)]
        assert_close(torch.cat(pieces, dim=1), want, f"cuts {cuts}")


def assert_state_is_replaced(call: Call, x: Tensor) -> None:
    """Assert that a shallow copy of a state is a snapshot: going on from it twice gives the same."""
    state: State = {}
    call(x[:, :4], state=state)
    kept = {name: one.clone() for name, one in state.items()}
    snapshot = dict(state)
    first = call(x[:, 4:5], state=state)
    for name, one in kept.items():
        assert torch.equal(snapshot[name], one), name
    assert torch.equal(call(x[:, 4:5], state=snapshot), first)


def assert_packs(call: Call, x: Tensor) -> None:
    """Assert that packed sequences, an empty one among them, are those sequences alone, states included."""
    lengths = [3, 0, 1, x.shape[1] - 4]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x = x[:1]
    state: State = {}
    got = call(x, state=state, cu_seqlens=ends)
    for i, piece in enumerate(x.split(lengths, dim=1)):
        alone: State = {}
        if piece.shape[1]:
            want = call(piece, state=alone)
            assert_close(got[:, ends[i] : ends[i + 1]], want, f"sequence {i}")
            for name, one in alone.items():
                if one.shape[0] == 1 and state[name].shape[0] == len(lengths):
                    assert_close(state[name][i : i + 1], one, f"{name} of sequence {i}")
    again = call(x, state=dict(state), cu_seqlens=ends)
    assert not torch.allclose(again, got), "the states of packed sequences were not read"


def assert_gradients(layer: nn.Module, call: Call, x: Tensor) -> None:
    """Assert that a whole pass and the same pass in two parts have the same finite gradients, of every parameter."""
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    dy = normal("dy", *x.shape)
    want = torch.autograd.grad(call(leaves[0]), leaves, dy)
    state: State = {}
    parts = torch.cat([call(piece, state=state) for piece in leaves[0].split([3, 1, x.shape[1] - 4], dim=1)], dim=1)
    got = torch.autograd.grad(parts, leaves, dy)
    for (name, _), one, expected in zip([("x", x), *layer.named_parameters()], got, want, strict=True):
        assert bool(expected.isfinite().all()), name
        assert bool((expected != 0).any()), f"{name} has no gradient"
        assert_close(one, expected, f"gradient of {name}", 1e-9)


def assert_gradcheck(call: Call, x: Tensor) -> None:
    """Assert the derivative of the output by the input."""
    assert torch.autograd.gradcheck(call, (x.clone().requires_grad_(),), atol=1e-6)


def assert_round_trip(layer: nn.Module, other: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    """Assert that a fresh layer with the state_dict of another is that layer."""
    before = call(other)
    assert not torch.equal(before, call(layer))
    kept = copy.deepcopy(layer.state_dict())
    other.load_state_dict(kept)
    assert torch.equal(call(other), call(layer))
    assert list(other.state_dict()) == list(kept)


def assert_compiles(layer: nn.Module, *arguments: Any) -> None:
    """Assert that the forward pass compiles to one graph and gives the eager pass's numbers."""
    torch._dynamo.reset()
    want = layer(*arguments)
    got = torch.compile(layer, fullgraph=True)(*arguments)
    first = got[0] if isinstance(got, tuple) else got
    torch.testing.assert_close(first, want[0] if isinstance(want, tuple) else want, rtol=0.0, atol=2e-5)
    torch._dynamo.reset()


def assert_refuses(cases: list[tuple[Callable[[], Any], str]], error: type[Exception] = ValueError) -> None:
    """Assert that each call raises, with its message."""
    for case, message in cases:
        with pytest.raises(error, match=message):
            case()
