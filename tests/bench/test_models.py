"""Measuring a model: what is timed, what is left alone, which numbers come back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar, TypedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import METRICS, MeasurementError, measure_model


class Sizes(TypedDict):
    batch_size: int
    seq_len: int
    decode_tokens: int


SIZES = Sizes(batch_size=2, seq_len=16, decode_tokens=4)


@dataclass
class MeanCache:
    """The running sum of the embeddings, and how many there were."""

    max_length: int
    total: Tensor
    length: int = 0


@dataclass(frozen=True)
class Call:
    model: str
    tokens: tuple[int, ...]
    context: int | None
    grad: bool
    training: bool


@dataclass
class Log:
    calls: list[Call] = field(default_factory=list)


class MeanModel(nn.Module):
    """A causal language model small enough to reason about: the mean of the past, through `layers` linear layers."""

    log: ClassVar[Log] = Log()

    def __init__(self, name: str = "model", layers: int = 1, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.name = name
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, cache: MeanCache | None = None) -> Tensor:
        context = None if cache is None else cache.length
        self.log.calls.append(Call(self.name, tuple(tokens.shape), context, torch.is_grad_enabled(), self.training))
        h = self.embedding(tokens)
        total, counts = h.cumsum(1), torch.arange(1, tokens.shape[1] + 1).unsqueeze(-1)
        if cache is not None:
            assert cache.length + tokens.shape[1] <= cache.max_length
            total = total + cache.total.unsqueeze(1)
            counts = counts + cache.length
            cache.total, cache.length = total[:, -1], cache.length + tokens.shape[1]
        h = total / counts
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return F.linear(self.dropout(h), self.embedding.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def new_cache(self, batch_size: int, max_length: int) -> MeanCache:
        return MeanCache(max_length, torch.zeros(batch_size, self.embedding.embedding_dim))


@pytest.fixture(autouse=True)
def log() -> Log:
    MeanModel.log.calls.clear()
    return MeanModel.log


def test_every_metric_with_its_ratio_and_spread() -> None:
    got = measure_model(MeanModel(), MeanModel("reference"), **SIZES, seconds=0.05)
    times = [name for name in METRICS if name != "peak_memory_bytes"]
    assert got.keys() == {
        *(f"{name}{suffix}" for name in times for suffix in ("", "_p20", "_p80", "_ratio", "_ratio_p20", "_ratio_p80")),
        "peak_memory_bytes",
        "peak_memory_bytes_ratio",
    }
    for name in times:
        assert 0 < got[f"{name}_p20"] <= got[name] <= got[f"{name}_p80"]
        assert 0 < got[f"{name}_ratio_p20"] <= got[f"{name}_ratio"] <= got[f"{name}_ratio_p80"]
    assert got["peak_memory_bytes_ratio"] == 1.0


def test_without_a_reference_there_is_no_ratio() -> None:
    got = measure_model(MeanModel(), **SIZES, which=["prefill_ms", "peak_memory_bytes"], seconds=0.01)
    assert got.keys() == {"prefill_ms", "prefill_ms_p20", "prefill_ms_p80", "peak_memory_bytes"}


def test_a_ratio_alone_measures_its_metric_alone(log: Log) -> None:
    which = ["decode_ms_per_token_ratio", "decode_ms_per_token"]
    got = measure_model(MeanModel(), MeanModel("reference"), **SIZES, which=which, seconds=0.01)
    assert {name.partition("_ratio")[0].removesuffix("_p20").removesuffix("_p80") for name in got} == {which[1]}
    assert {call.tokens for call in log.calls} == {(1, 12), (1, 1)}


def test_the_deeper_model_takes_longer() -> None:
    which = [name for name in METRICS if name.endswith(("_ms", "_token", "_step"))]
    got = measure_model(MeanModel(layers=100), MeanModel("reference"), **SIZES, which=which, seconds=0.1)
    for name in which:
        assert got[f"{name}_ratio"] > 3


def test_prefill_is_one_prompt_into_an_empty_cache(log: Log) -> None:
    measure_model(MeanModel(), **SIZES, which=["prefill_ms"], seconds=0.01)
    assert set(log.calls) == {Call("model", (1, 16), 0, grad=False, training=False)}


def test_decoding_is_one_token_at_a_time_after_the_prompt(log: Log) -> None:
    measure_model(MeanModel(), **SIZES, prompt_len=5, which=["decode_ms_per_token"], seconds=0.01)
    assert not any(call.grad or call.training for call in log.calls)
    prompts = [index for index, call in enumerate(log.calls) if call.tokens == (1, 5)]
    assert len(prompts) >= 2
    for start in prompts[:-1]:
        assert [(call.tokens, call.context) for call in log.calls[start : start + 5]] == [
            ((1, 5), 0),
            *(((1, 1), 5 + step) for step in range(4)),
        ]


def test_both_models_decode_at_the_same_context(log: Log) -> None:
    measure_model(MeanModel(), MeanModel("reference"), **SIZES, which=["decode_ms_per_token"], seconds=0.02)
    contexts = {
        name: [call.context for call in log.calls if call.model == name and call.tokens == (1, 1)]
        for name in ("model", "reference")
    }
    assert contexts["model"] == contexts["reference"]


def test_training_is_a_batch_with_gradients(log: Log) -> None:
    measure_model(MeanModel(), **SIZES, which=["train_ms_per_step"], seconds=0.01)
    assert set(log.calls) == {Call("model", (2, 16), None, grad=True, training=True)}


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("training", [True, False])
def test_models_and_random_state_are_left_as_they_were(training: bool) -> None:
    models = [MeanModel(dropout=0.5), MeanModel("reference", dropout=0.5)]
    for model in models:
        model.train(training)
        tokens = torch.ones(1, 3, dtype=torch.int64)
        model.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
    before = [(copy.deepcopy(model.state_dict()), gradients(model)) for model in models]
    random_state = torch.get_rng_state()
    measure_model(*models, **SIZES, seconds=0.02)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    for model, (weights, grads) in zip(models, before, strict=True):
        assert model.training is training
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(*pair) for pair in zip(gradients(model), grads, strict=True))
        assert len(grads) == len(list(model.parameters()))


class SumModel(MeanModel):
    """A loss that needs nothing beside its weights."""

    def __init__(self, size: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(size))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.weight.sum()


def test_training_peak_is_weights_gradients_and_two_moments() -> None:
    size = 100_000
    got = measure_model(SumModel(size), **SIZES, which=["peak_memory_bytes"])
    assert 16 * size <= got["peak_memory_bytes"] < 16 * size + 1000


class WideModel(SumModel):
    """Ten times as many activations as weights, twice over: the result of exp, and its argument or its gradient."""

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.weight.repeat(10).exp().sum()


def test_training_peak_has_optimizer_state_beside_activations() -> None:
    size = 10_000
    got = measure_model(WideModel(size), **SIZES, which=["peak_memory_bytes"])
    assert (1 + 2 + 20) * 4 * size <= got["peak_memory_bytes"] < (1 + 2 + 20) * 4 * size + 1000


def test_training_peak_is_the_same_every_time_and_grows_with_the_batch() -> None:
    def peak(batch_size: int) -> float:
        which = ["peak_memory_bytes"]
        return measure_model(MeanModel(), batch_size=batch_size, seq_len=64, decode_tokens=2, which=which)[which[0]]

    assert peak(2) == peak(2)
    # logits and their gradient alone: 8 bytes x 64 tokens x 256
    assert peak(10) - peak(2) > 8 * 8 * 64 * 256


def test_too_slow_fails() -> None:
    with pytest.raises(MeasurementError, match=r"of min_samples = 7 samples"):
        measure_model(MeanModel(), **SIZES, which=["prefill_ms"], max_seconds=0.0)


class BrokenModel(MeanModel):
    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("metric", ["train_ms_per_step", "peak_memory_bytes"])
def test_error_of_the_model_passes_through(metric: str) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_model(BrokenModel(), **SIZES, which=[metric])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: needs at least 1, got 0"),
        ({"seq_len": 1.0}, TypeError, "seq_len: needs an integer, got float"),
        ({"decode_tokens": 1}, ValueError, "decode_tokens: needs at least 2, got 1"),
        ({"prompt_len": 0}, ValueError, "prompt_len: needs at least 1, got 0"),
        ({"vocab_size": 0}, ValueError, "vocab_size: needs at least 1, got 0"),
        ({"seconds": -1.0}, ValueError, "seconds: needs a finite number, 0 or more, got -1.0"),
        ({"max_seconds": "long"}, TypeError, "max_seconds: needs a number of seconds, got str"),
        ({"which": ["latency"]}, ValueError, "which: needs names out of prefill_ms, .*, got 'latency'"),
        ({"which": []}, ValueError, "which: needs at least one name"),
        ({"which": "prefill_ms"}, TypeError, "which: needs a sequence of names, got the text 'prefill_ms'"),
        (
            {"which": ["prefill_ms_ratio"]},
            ValueError,
            "reference_model: needs a model for 'prefill_ms_ratio'",
        ),
    ],
)
def test_bad_argument_fails_clearly(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure_model(MeanModel(), **{**SIZES, **arguments})  # type: ignore[arg-type]


def test_bad_models_fail_clearly() -> None:
    with pytest.raises(ValueError, match="model: needs a model with weights"):
        measure_model(nn.Identity(), **SIZES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference_model: needs the device of model, cpu, got meta"):
        measure_model(MeanModel(), MeanModel().to("meta"), **SIZES)
