"""Decode by a captured graph: on a GPU the kernels of one step, recorded once, start with a single call for each token.

A step of a small model is a hundred kernels of a few microseconds, which Python starts one after another more slowly
than the GPU runs them. A graph replays them with the numbers and addresses that they were recorded with, so nothing in
a step may depend on how many tokens there are but what lies in the GPU's memory: tokens, lengths and states are tensors
that stay where they are, every row attends to the whole memory of the cache up to its own length, and what a step costs
grows with `max_length` where a LIV keeps tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from star_core.cache import Cache
from star_core.liv._base import LIV
from star_core.ragged import Ragged

if TYPE_CHECKING:
    from star_core.model import LanguageModel

Step = Callable[[], None]


class Graph(Protocol):
    """What records the work of a call, and does it again."""

    def warm_up(self, step: Step) -> None:
        """Run `step` in earnest, as it will be recorded: what is compiled or allocated at first use is there then."""

    def capture(self, step: Step) -> None:
        """Record `step` without doing it.

        Raises:
            RuntimeError: It does what cannot be recorded, such as wait for a number from the GPU.
        """

    def replay(self) -> None:
        """Do what was recorded."""


class CudaGraph:
    """A graph of CUDA or HIP, recorded on a stream of its own.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, step: Step) -> None:
        """See `Graph`."""
        with torch.cuda.device(self._device):
            calling = torch.cuda.current_stream()
            self._stream.wait_stream(calling)
            with torch.cuda.stream(self._stream):
                step()
            calling.wait_stream(self._stream)

    def capture(self, step: Step) -> None:
        """See `Graph`."""
        # Other threads may go on with the GPU meanwhile.
        capturing = torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capturing:
            step()

    def replay(self) -> None:
        """See `Graph`."""
        with torch.cuda.device(self._device):
            self._graph.replay()


class _FixedShapes(Cache):
    """The states of a cache, with the lengths on the device: as if it were full, so that no shape tells a length.

    Args:
        cache: Holds the states, and has room.
    """

    lengths: Tensor

    def __init__(self, cache: Cache) -> None:
        super().__init__([], batch_size=cache.batch_size, max_length=cache.max_length, device=cache.device)
        self.states = cache.states
        self.length = cache.max_length - 1
        if cache.lengths is None:
            self.lengths = torch.full((cache.batch_size,), cache.length, dtype=torch.int64, device=cache.device)
        else:
            self.lengths = cache.lengths.clone()

    def advance(self, tokens: int, ragged: Ragged | None) -> None:
        """Count a step's tokens where they lie."""
        self.lengths.add_(tokens)


class GraphDecoder:
    """Take one token of every row to the next logits: the first call in earnest, the second recorded, then replays.

    Where a step cannot be recorded, decoding goes on in plain steps, with a warning that names the LIV's class, once.

    Args:
        model: The model; its parameters must stay where they are.
        cache: Holds at least one token, and is extended by each call. Between calls it may be read, and its rows
            exchanged in place, not moved, resized or extended otherwise.
        graph: Records the step.
    """

    def __init__(self, model: LanguageModel, cache: Cache, graph: Graph) -> None:
        if cache.length < 1:
            raise ValueError("cache: needs the prompt's tokens before it is decoded by steps, holds none")
        self._model, self._cache, self._graph = model, cache, graph
        self._fixed = _FixedShapes(cache)
        if cache.lengths is not None:
            cache.lengths = self._fixed.lengths
        rows = cache.batch_size
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=cache.device)
        self._logits = torch.empty(rows, model.config.vocab_size, dtype=torch.float32, device=cache.device)
        self._call: Step = self._first

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits that follow `tokens`.

        Args:
            tokens: [B, 1], int64.
        Returns:
            [B, vocab_size], float32; the next call writes to the same memory.
        Raises:
            ValueError: The cache is made for another batch size, or is full.
        """
        if tokens.shape != self._tokens.shape:
            raise ValueError(f"tokens: needs [B, 1] = {list(self._tokens.shape)}, got {list(tokens.shape)}")
        self._cache.require_room(tokens.shape[0], 1)
        self._tokens.copy_(tokens)
        self._call()
        return self._logits

    def _step(self) -> None:
        """Do what is recorded."""
        self._logits.copy_(self._model(self._tokens, self._fixed)[:, -1])

    def _first(self) -> None:
        self._graph.warm_up(self._step)
        self._cache.length += 1
        self._call = self._second

    def _second(self) -> None:
        with _running(self._model) as names:
            try:
                self._graph.capture(self._step)
            except RuntimeError as error:
                _warn(names[-1] if names else type(self._model).__name__, error)
                self._call = self._plain
            else:
                self._call = self._replay
        self._call()

    def _replay(self) -> None:
        self._graph.replay()
        self._cache.length += 1

    def _plain(self) -> None:
        self._logits.copy_(self._model(self._tokens, self._cache)[:, -1])


def stepper(model: LanguageModel, cache: Cache) -> Callable[[Tensor], Tensor]:
    """Return what takes tokens [B, 1] to the logits [B, vocab_size] after them, and extends the cache.

    On a GPU that is a `GraphDecoder`; on other devices, and under autocast, whose casts of the weights last no longer
    than its block, plain steps.
    """
    if cache.device.type == "cuda" and not torch.is_autocast_enabled("cuda"):
        return GraphDecoder(model, cache, CudaGraph(cache.device))
    return lambda tokens: model(tokens, cache)[:, -1]


_warned: set[str] = set()


def _warn(name: str, error: RuntimeError) -> None:
    if name not in _warned:
        _warned.add(name)
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"a decoding step of {name} cannot be captured as a graph ({reason}); decoding goes on in plain steps",
            RuntimeWarning,
            stacklevel=5,
        )


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """List the classes of the LIVs that are called inside, in order."""
    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda liv, _: names.append(type(liv).__name__))
        for module in model.modules()
        if isinstance(module, LIV)
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()
