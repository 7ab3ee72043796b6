"""Latency and memory of a language model in prefill, decoding and training, beside a reference model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from bench._validation import require_integer, require_seconds
from bench.memory import peak_tensor_bytes
from bench.timing import Measurement, Provider, measure

METRICS = ("prefill_ms", "decode_ms_per_token", "train_ms_per_step", "peak_memory_bytes")
"""What can be measured."""

OBJECTIVES = (*METRICS, *(f"{name}_ratio" for name in METRICS))
"""The names that `measure_model` takes in `which`."""

_SECONDS_A_METRIC = 1.5


class CausalLanguageModel(Protocol):
    """What a model needs to be measured. `star_core.LanguageModel` has it."""

    def __call__(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Return logits [B, T, V] of `tokens` [B, T], int64, continuing from and extending `cache`."""

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy, a scalar, of `targets` [B, T] after `tokens` [B, T]."""

    def new_cache(self, batch_size: int, max_length: int) -> Any:
        """Return an empty cache for `batch_size` sequences of at most `max_length` tokens."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights."""

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or with False to evaluation."""


def measure_model(
    model: CausalLanguageModel,
    reference_model: CausalLanguageModel | None = None,
    *,
    batch_size: int,
    seq_len: int,
    decode_tokens: int,
    prompt_len: int | None = None,
    which: Sequence[str] = METRICS,
    vocab_size: int = 256,
    seconds: float | None = None,
    max_seconds: float = 120.0,
) -> dict[str, float]:
    """Measure `model`, and with `reference_model` compare the two in the same rounds.

    * `prefill_ms`: one forward pass of one prompt of `seq_len` tokens into an empty cache, without gradients.
    * `decode_ms_per_token`: one step of one token of one sequence, after a prompt of `prompt_len` tokens. Every
      `decode_tokens` steps a new cache is filled, untimed; the first step after it is not timed either. Both models are
      always equally far.
    * `train_ms_per_step`: forward, backward and an AdamW step (torch's fused one) on `batch_size` x `seq_len` tokens.
    * `peak_memory_bytes`: largest sum of live tensor bytes in such steps: weights, gradients, optimizer state,
      activations, temporaries. As `bench.memory.peak_tensor_bytes` counts; the same in every call.

    Both models are copied first: weights, gradients, modes and torch's random state are afterwards what they were.

    Args:
        model: The model, on the device to measure on.
        reference_model: What it is compared with, on the same device. None: no ratios.
        batch_size: Sequences of a training step.
        seq_len: Tokens of a prompt for prefill, and of a training sequence.
        decode_tokens: Steps taken after each prompt; at least 2. The context ends at `prompt_len` + `decode_tokens`.
        prompt_len: Tokens before decoding. Default: `seq_len` - `decode_tokens`, at least 1.
        which: Names out of `OBJECTIVES`; only these are measured. Default: all four metrics.
        vocab_size: Random tokens are drawn below this.
        seconds: Sampling time of all metrics together, warm-up apart. Default: 1.5 for each time measured.
        max_seconds: Longest that one metric may take to give 7 samples.

    Returns:
        For every metric in `which` its name (ms or bytes); times also with `_p20` and `_p80`. With a reference model
        also `_ratio` (this model / reference, below 1 is better), for times the median over the rounds, with
        `_ratio_p20` and `_ratio_p80`.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number is out of range; a name in `which` is unknown, or a ratio without a reference model; a
            model has no weights, or the two are on different devices.
        MeasurementError: As `bench.timing.measure` and `bench.memory.peak_tensor_bytes`.

    Whatever a model raises passes through unchanged.
    """
    require_integer("batch_size", batch_size, 1)
    require_integer("seq_len", seq_len, 1)
    require_integer("decode_tokens", decode_tokens, 2)
    require_integer("vocab_size", vocab_size, 1)
    if prompt_len is None:
        prompt_len = max(1, seq_len - decode_tokens)
    require_integer("prompt_len", prompt_len, 1)
    metrics = _metrics(which, reference_model is not None)
    timed = [name for name in metrics if name != "peak_memory_bytes"]
    if seconds is None:
        seconds = _SECONDS_A_METRIC * max(1, len(timed))
    require_seconds("seconds", seconds)
    require_seconds("max_seconds", max_seconds)
    device = _device("model", model)
    models = [model] if reference_model is None else [model, reference_model]
    for each in models[1:]:
        if (other := _device("reference_model", each)) != device:
            raise ValueError(f"reference_model: needs the device of model, {device}, got {other}")

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=generator).to(device)
    prompt = torch.randint(vocab_size, (1, prompt_len), generator=generator).to(device)
    makers: dict[str, Callable[[CausalLanguageModel], Provider]] = {
        "prefill_ms": lambda copied: _prefill(copied, tokens[:1, :seq_len]),
        "decode_ms_per_token": lambda copied: _decode(copied, prompt, decode_tokens),
        "train_ms_per_step": lambda copied: Provider(_TrainingStep(copied, tokens), once=True),
    }
    result: dict[str, float] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name in timed:
            with torch.set_grad_enabled(name == "train_ms_per_step"):
                providers = [makers[name](copy.deepcopy(each)) for each in models]
                measured = measure(
                    providers[0],
                    reference=providers[1] if len(providers) == 2 else None,
                    warmup=2,
                    min_samples=7,
                    min_seconds=min(seconds / len(timed), max_seconds),
                    max_seconds=max_seconds,
                    device=device,
                )
            result.update(_in_ms(name, measured))
        if "peak_memory_bytes" in metrics:
            peaks = [_training_peak_bytes(each, tokens, device) for each in models]
            result["peak_memory_bytes"] = peaks[0]
            if len(peaks) == 2:
                result["peak_memory_bytes_ratio"] = peaks[0] / peaks[1]
    return result


class _TrainingStep:
    """One step of AdamW on the same tokens, again and again.

    The learning rate is 0: the arithmetic is the same, and weights that never move can't drift into NaN or denormal
    numbers, which take another time.
    """

    def __init__(self, model: CausalLanguageModel, tokens: Tensor) -> None:
        self._model = model.train()
        self._inputs, self._targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def __call__(self) -> None:
        self._model.loss(self._inputs, self._targets).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()


def _prefill(model: CausalLanguageModel, prompt: Tensor) -> Provider:
    model.train(False)
    cache: Any = None

    def prepare() -> None:
        nonlocal cache
        cache = model.new_cache(1, prompt.shape[1])

    return Provider(lambda: model(prompt, cache), prepare)


def _decode(model: CausalLanguageModel, prompt: Tensor, decode_tokens: int) -> Provider:
    model.train(False)
    token = prompt[:, -1:]
    cache: Any = None
    steps_left = 0

    def prepare() -> None:
        nonlocal cache, steps_left
        if steps_left == 0:
            cache = model.new_cache(1, prompt.shape[1] + decode_tokens)
            model(prompt, cache)
            model(token, cache)  # the weights are back in the processor's caches as in the steps that follow
            steps_left = decode_tokens - 1
        steps_left -= 1

    return Provider(lambda: model(token, cache), prepare)


def _training_peak_bytes(model: CausalLanguageModel, tokens: Tensor, device: torch.device) -> int:
    """Return the peak of two training steps of a copy, the copy included; the second has optimizer state throughout."""

    def two_steps() -> None:
        step = _TrainingStep(copy.deepcopy(model), tokens)
        step()
        step()

    two_steps()  # what is set up once a process stays out of the number
    return peak_tensor_bytes(two_steps, device=device)


def _in_ms(name: str, measured: Measurement) -> dict[str, float]:
    result = {
        name: measured.median_s * 1e3,
        f"{name}_p20": measured.p20_s * 1e3,
        f"{name}_p80": measured.p80_s * 1e3,
    }
    if measured.ratio is not None and measured.ratio_p20 is not None and measured.ratio_p80 is not None:
        result[f"{name}_ratio"] = measured.ratio
        result[f"{name}_ratio_p20"] = measured.ratio_p20
        result[f"{name}_ratio_p80"] = measured.ratio_p80
    return result


def _metrics(which: Sequence[str], has_reference: bool) -> list[str]:
    """Return the metrics that the names in `which` call for, each once."""
    if isinstance(which, str):
        raise TypeError(f"which: needs a sequence of names, got the text {which!r}")
    for name in which:
        if name not in OBJECTIVES:
            raise ValueError(f"which: needs names out of {', '.join(OBJECTIVES)}, got {name!r}")
        if name.endswith("_ratio") and not has_reference:
            raise ValueError(f"reference_model: needs a model for {name!r}, got None")
    wanted = {name.removesuffix("_ratio") for name in which}
    if not wanted:
        raise ValueError("which: needs at least one name, got none")
    return [name for name in METRICS if name in wanted]


def _device(name: str, model: CausalLanguageModel) -> torch.device:
    for parameter in model.parameters():
        return parameter.device
    raise ValueError(f"{name}: needs a model with weights, got one without")
