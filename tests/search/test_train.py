"""The training loop: the schedule, decay, clipping, accumulation, determinism, its typed failures, and the loss."""

from __future__ import annotations

import dataclasses
import math
import pickle
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from search import data
from search.data import Corpus, DataError, load_corpus
from search.train import (
    DeadlineExceeded,
    Diverged,
    Flat,
    TrainConfig,
    TrainResult,
    evaluate_loss,
    learning_rate,
    peak_rate,
    train,
)

SHORT = TrainConfig(tokens=20 * 4 * 16, seq_len=16, batch_size=4, lr=1e-2, eval_tokens=256)


class Stand(nn.Module):
    """A small recurrent language model with what the loop must treat apart: embedding, norm, dropout."""

    def __init__(self, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.mixer = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.mixer(self.embedding(tokens))[0]
        logits: Tensor = self.head(self.dropout(self.norm(mixed)))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def stand(seed: int = 0, **options: Any) -> Stand:
    torch.manual_seed(seed)
    return Stand(**options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    file = tmp_path_factory.mktemp("text") / "counting.txt"
    file.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}\n" for i in range(600)))
    return load_corpus([str(file)])


@pytest.fixture
def updates() -> Iterator[list[tuple[float, float]]]:
    """Rate and gradient norm that the optimizer sees, one pair a step."""
    seen: list[tuple[float, float]] = []

    def look(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        seen.append((optimizer.param_groups[0]["lr"], norm))

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


def change(**fields: Any) -> TrainConfig:
    return dataclasses.replace(SHORT, **fields)


# The result


def test_training_learns_and_reports_the_held_out_loss(corpus: Corpus) -> None:
    config = change(tokens=200 * 8 * 32, batch_size=8, seq_len=32, eval_tokens=None)
    model = stand(dropout=0.0)
    before = evaluate_loss(model, corpus, batch_size=8, seq_len=32)
    seen: list[tuple[int, float]] = []
    result = train(model, corpus, config, seed=1, on_step=lambda step, loss: seen.append((step, loss)))
    assert before > 5.4
    assert result.valid_loss < 2.2
    assert result.valid_loss == evaluate_loss(model, corpus, batch_size=8, seq_len=32)
    assert result.perplexity == pytest.approx(math.exp(result.valid_loss))
    assert result.bits_per_byte == pytest.approx(result.valid_loss / math.log(2))
    assert (result.steps, result.tokens) == (200, 200 * 8 * 32)
    assert [step for step, _ in seen] == list(range(1, 201))
    assert result.train_loss == pytest.approx(sum(loss for _, loss in seen[-20:]) / 20)
    assert result.seconds > 0
    assert len(result.curve) == 100
    assert [step for step, _ in result.curve] == list(range(2, 201, 2))
    means = [(seen[i][1] + seen[i + 1][1]) / 2 for i in range(0, 200, 2)]
    assert [loss for _, loss in result.curve] == pytest.approx(means)


@pytest.mark.parametrize("steps", [1, 7, 100, 101, 250])
def test_curve_has_at_most_100_points_and_keeps_the_mean(corpus: Corpus, steps: int) -> None:
    losses: list[float] = []
    config = change(tokens=steps * 4, seq_len=4, batch_size=1)
    curve = train(stand(), corpus, config, seed=0, on_step=lambda step, loss: losses.append(loss)).curve
    ends = [0] + [step for step, _ in curve]
    lengths = [after - before for before, after in pairwise(ends)]
    assert len(curve) == min(steps, 100)
    assert ends[-1] == steps
    assert max(lengths) - min(lengths) <= 1
    weighted = sum(length * loss for length, (_, loss) in zip(lengths, curve, strict=True))
    assert weighted / steps == pytest.approx(sum(losses) / steps)


def test_bits_per_byte_count_the_bytes_of_a_token(corpus: Corpus) -> None:
    longer = dataclasses.replace(corpus, valid_bytes=4 * len(corpus.valid))
    once, four = (train(stand(), c, SHORT, seed=0) for c in (corpus, longer))
    assert four.valid_loss == once.valid_loss
    assert four.bits_per_byte == pytest.approx(once.bits_per_byte / 4)


def test_evaluation_is_the_mean_over_all_tokens_in_evaluation_mode(corpus: Corpus) -> None:
    model = stand(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = evaluate_loss(model, corpus, batch_size=7, seq_len=10)
    assert model.training
    count = (len(corpus.valid) - 1) // 10
    assert count % 7, "the last batch must be smaller than the others for this test to tell"
    windows = corpus.valid[: count * 10].view(count, 10).long()
    targets = corpus.valid[1 : count * 10 + 1].view(count, 10).long()
    with torch.no_grad():
        expected = model.eval().loss(windows, targets).item()
    assert measured == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# The step


def test_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    config = change(tokens=110 * 64, warmup_steps=10, lr=2.0, min_lr_ratio=0.1)
    rates = [learning_rate(config, step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[59] == pytest.approx(1.1)  # half-way down
    assert rates[34] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[-1] == pytest.approx(0.2)
    assert sorted(rates[9:], reverse=True) == rates[9:]


def test_rate_without_warm_up_starts_on_the_cosine() -> None:
    config = change(warmup_steps=0, min_lr_ratio=0.0, lr=1.0)
    assert learning_rate(config, 1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 20)))
    assert learning_rate(config, 20) == 0.0
    assert learning_rate(change(tokens=64, lr=1.0), 1) == 1.0


def test_optimizer_gets_the_scheduled_rate_and_a_clipped_gradient(
    corpus: Corpus, updates: list[tuple[float, float]]
) -> None:
    train(stand(), corpus, change(clip=0.01), seed=0)
    assert [rate for rate, _ in updates] == [learning_rate(SHORT, step) for step in range(1, 21)]
    assert [norm for _, norm in updates] == pytest.approx([0.01] * 20, rel=1e-3)


def test_small_gradients_are_not_scaled(corpus: Corpus, updates: list[tuple[float, float]]) -> None:
    train(stand(), corpus, change(clip=1e6), seed=0)
    norms = [norm for _, norm in updates]
    assert max(norms) < 1e3
    assert max(norms) > 1.05 * min(norms)


def test_weight_decay_shrinks_matrices_alone(corpus: Corpus) -> None:
    class Idle(nn.Module):
        """Every gradient is zero, so that decay is all that can move a parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(256, 4)
            self.tied = nn.Linear(4, 256, bias=False)
            self.tied.weight = self.table.weight
            self.embedding = nn.Parameter(torch.ones(256, 4))
            self.norm = nn.LayerNorm(4)
            self.linear = nn.Linear(4, 4)
            self.rates = nn.Parameter(torch.ones(4, 4))
            self.rates._no_weight_decay = True  # type: ignore[attr-defined]

        def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return 1 + 0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()

    torch.manual_seed(0)
    model = Idle()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, corpus, change(weight_decay=0.5), seed=0)
    after = model.state_dict()
    kept = math.prod(1 - 0.5 * learning_rate(SHORT, step) for step in range(1, 21))
    torch.testing.assert_close(after["linear.weight"], before["linear.weight"] * kept)
    assert kept < 0.95
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["linear.weight"]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradient_equals_the_big_batches(corpus: Corpus, parts: int) -> None:
    def trained(accumulation: int) -> tuple[Stand, TrainResult]:
        model = stand(dropout=0.0).double()
        return model, train(model, corpus, change(batch_size=8, accumulation=accumulation), seed=3)

    (whole, result), (cut, cut_result) = trained(1), trained(parts)
    for big, small in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(small, big, rtol=1e-9, atol=1e-11)
    assert cut_result.train_loss == pytest.approx(result.train_loss)
    assert cut_result.valid_loss == pytest.approx(result.valid_loss)
    assert cut_result.tokens == result.tokens


def test_accumulation_computes_a_part_at_a_time(corpus: Corpus) -> None:
    sizes: set[int] = set()

    class Watching(Stand):
        def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
            sizes.add(len(tokens))
            return super().loss(tokens, targets)

    train(Watching(), corpus, change(accumulation=2), seed=0)
    assert sizes == {2}


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(corpus: Corpus) -> None:
    seen: set[torch.dtype] = set()
    model = stand(dropout=0.0)
    model.head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    result = train(model, corpus, change(precision="bfloat16"), seed=0)
    exact = train(stand(dropout=0.0), corpus, SHORT, seed=0)
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # bfloat16 keeps 8 bits: the logits, of size about 2, are rounded by up to 2^-8 each.
    assert result.valid_loss == pytest.approx(exact.valid_loss, abs=0.05)
    assert result.valid_loss != exact.valid_loss


# Determinism


def test_training_is_deterministic_to_the_last_bit(corpus: Corpus) -> None:
    runs: list[tuple[TrainResult, list[Tensor]]] = []
    for noise in (1, 2):
        model = stand()
        torch.manual_seed(noise)
        result = train(model, corpus, change(threads=1), seed=11)
        runs.append((dataclasses.replace(result, seconds=0.0), list(model.parameters())))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("stops", [(7,), (1, 19), (5, 6, 13)], ids=str)
def test_training_that_stops_and_goes_on_ends_as_one_in_one_go(
    corpus: Corpus, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    config = change(threads=1)
    whole = stand()
    expected = train(whole, corpus, config, seed=11)
    before: Path | None = None
    for stop in stops:
        kept = tmp_path / str(stop)
        torch.manual_seed(stop)  # the caller's random state is of no consequence
        part = train(stand(seed=3 if before else 0), corpus, config, seed=11, start=before, stop=stop, keep=kept)
        assert (part.steps, part.tokens) == (stop, stop * 64)
        assert part.curve[-1][0] == stop
        before = kept
    model = stand(seed=3)
    result = train(model, corpus, config, seed=11, start=before)
    assert dataclasses.replace(result, seconds=0.0) == dataclasses.replace(expected, seconds=0.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, stops))


def test_the_rate_of_a_training_that_stops_is_that_of_the_whole_budget(
    corpus: Corpus, updates: list[tuple[float, float]]
) -> None:
    train(stand(), corpus, SHORT, seed=0, stop=7)
    assert [rate for rate, _ in updates] == [learning_rate(SHORT, step) for step in range(1, 8)]


def test_batches_can_skip_the_first_ones(corpus: Corpus) -> None:
    every = list(corpus.batches("train", 2, 8, 5, 9))
    rest = list(corpus.batches("train", 2, 8, 5, 9, skip=4))
    assert len(rest) == 5
    assert all(torch.equal(a, b) for pair in zip(every[4:], rest, strict=True) for a, b in zip(*pair, strict=True))
    with pytest.raises(ValueError, match="skip must be from 0 to steps = 3, got 4"):
        corpus.batches("train", 2, 8, 5, 3, skip=4)


def test_a_stop_out_of_range_and_a_foreign_checkpoint_fail_clearly(corpus: Corpus, tmp_path: Path) -> None:
    for stop in (0, 21):
        with pytest.raises(ValueError, match=f"stop must be above 0 and at most 20, got {stop}"):
            train(stand(), corpus, SHORT, seed=0, stop=stop)
    train(stand(), corpus, SHORT, seed=0, stop=5, keep=tmp_path / "kept")
    with pytest.raises(ValueError, match="stop must be above 5 and at most 20, got 5"):
        train(stand(), corpus, SHORT, seed=0, start=tmp_path / "kept", stop=5)
    with pytest.raises(ValueError, match=r"start: .*kept is the checkpoint of another model"):
        train(stand(width=8), corpus, SHORT, seed=0, start=tmp_path / "kept")


def test_seed_changes_the_training(corpus: Corpus) -> None:
    first, second = (train(stand(), corpus, SHORT, seed=seed) for seed in (1, 2))
    assert first.curve != second.curve


def test_callers_random_state_and_threads_are_left_alone(corpus: Corpus) -> None:
    threads = torch.get_num_threads()
    used: set[int] = set()
    model = stand()
    state = torch.get_rng_state()
    train(model, corpus, change(threads=3), seed=5, on_step=lambda step, loss: used.add(torch.get_num_threads()))
    assert torch.equal(torch.get_rng_state(), state)
    assert used == {3}
    assert torch.get_num_threads() == threads


# Failures


class Failing(Stand):
    """Returns `value`, or a loss with that gradient, at the given call of `loss`."""

    def __init__(self, call: int, value: float, *, gradient: bool = False) -> None:
        super().__init__()
        self.call, self.value, self.gradient, self.calls = call, value, gradient, 0

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        loss = super().loss(tokens, targets)
        if self.calls != self.call:
            return loss
        # sqrt has an infinite slope at 0: a finite loss with a gradient that is not.
        return loss + (self.head.bias * 0).abs().sqrt().sum() if self.gradient else loss * self.value


@pytest.mark.parametrize(
    ("model", "step", "message"),
    [
        pytest.param(lambda: Failing(3, math.nan), 3, "the loss is nan at step 3", id="nan"),
        pytest.param(lambda: Failing(1, math.inf), 1, "the loss is inf at step 1", id="inf"),
        pytest.param(lambda: Failing(20, 0, gradient=True), 20, "the gradient norm is nan at step 20", id="gradient"),
        pytest.param(lambda: Failing(21, math.nan), 0, "the loss on held-out text is nan$", id="evaluation"),
        pytest.param(lambda: Failing(21, 1e4), 0, r"the loss on held-out text is \d{4}", id="no-perplexity"),
    ],
)
def test_divergence_is_raised_with_its_step(
    corpus: Corpus, model: Callable[[], Failing], step: int, message: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(Diverged, match=message) as caught:
        train(model(), corpus, change(eval_tokens=1), seed=0)
    assert caught.value.step == step
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.step) == (str(caught.value), step)


def test_weights_before_a_diverged_step_are_kept_finite(corpus: Corpus) -> None:
    torch.manual_seed(0)
    model = Failing(3, math.nan)
    with pytest.raises(Diverged, match="at step 3"):
        train(model, corpus, SHORT, seed=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_probe_stops_what_has_learnt_nothing(corpus: Corpus, tmp_path: Path) -> None:
    stuck = change(lr=1e-9)
    bound = corpus.unigram_entropy()
    losses: list[float] = []
    with pytest.raises(Flat, match=r"the loss is \d\.\d{3} nats after 8 steps and needs to be below \d") as caught:
        train(stand(), corpus, stuck, seed=0, probe=(8, bound), on_step=lambda _, loss: losses.append(loss))
    assert len(losses) == caught.value.step == 8
    assert caught.value.loss == pytest.approx(sum(losses[6:]) / 2)
    assert caught.value.bound == bound
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.step) == (str(caught.value), 8)
    # Below the bound, and not below where it began: as flat.
    with pytest.raises(Flat) as caught:
        train(stand(), corpus, SHORT, seed=0, probe=(1, 100.0))
    assert caught.value.bound == caught.value.loss < 100
    # A checkpoint before the probe takes its losses along.
    train(stand(), corpus, stuck, seed=0, stop=5, keep=tmp_path / "kept")
    with pytest.raises(Flat, match="after 8 steps"):
        train(stand(), corpus, stuck, seed=0, start=tmp_path / "kept", probe=(8, bound))


def test_a_probe_that_is_passed_changes_nothing(corpus: Corpus) -> None:
    assert train(stand(), corpus, SHORT, seed=0, probe=(10, 5.5)).curve == train(stand(), corpus, SHORT, seed=0).curve


def test_unigram_entropy_is_that_of_the_frequencies(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = torch.tensor([8, 4, 2, 1, 1]).double() / 16
    tokens = torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [7, 200], dtype=torch.uint8)
    small = dataclasses.replace(corpus, train=tokens)
    assert small.unigram_entropy() == pytest.approx(float(-(shares * shares.log()).sum()))
    assert dataclasses.replace(corpus, train=tokens.int()).unigram_entropy() == small.unigram_entropy()
    # Of a long text stretches are counted, of all parts of it.
    text = torch.cat([tokens.repeat(4096), torch.full((65536,), 9, dtype=torch.uint8)])
    monkeypatch.setattr(data, "ENTROPY_TOKENS", len(text) // 4)
    long = dataclasses.replace(corpus, train=text).unigram_entropy()
    assert long == pytest.approx(0.5 * small.unigram_entropy() + math.log(2))


@pytest.mark.parametrize(
    ("ticks", "message"),
    [
        (3, "the deadline passed with 3 of 20 training steps done"),
        (22, "the deadline passed with training and 128 tokens of the evaluation done"),
    ],
)
def test_deadline_is_kept(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, ticks: int, message: str) -> None:
    clock = iter(range(-1, 1000))  # one tick each time it is read: at the start, then before each step and batch
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(DeadlineExceeded, match=message):
        train(stand(), corpus, SHORT, seed=0, deadline=float(ticks) - 0.5)


def test_a_deadline_that_does_not_pass_changes_nothing(corpus: Corpus) -> None:
    late = train(stand(), corpus, SHORT, seed=0, deadline=time.monotonic() + 1000)
    assert late.valid_loss == train(stand(), corpus, SHORT, seed=0).valid_loss


def test_on_step_may_stop_the_training(corpus: Corpus) -> None:
    def stop(step: int, loss: float) -> None:
        if step == 5:
            raise InterruptedError("enough")

    threads = torch.get_num_threads()
    with pytest.raises(InterruptedError, match="enough"):
        train(stand(), corpus, change(threads=threads + 1), seed=0, on_step=stop)
    assert torch.get_num_threads() == threads


def test_text_too_short_for_the_sequence_fails_before_training(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words\n" * 10)
    with pytest.raises(DataError, match=r"short\.txt is too short for seq_len 16"):
        train(stand(), load_corpus([str(tmp_path / "short.txt")]), SHORT, seed=0)


# The configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"eval_tokens": 0}, "eval_tokens must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"lr": 0.0}, r"lr must be above 0 and finite, got 0\.0"),
        ({"lr": math.nan}, "lr must be above 0 and finite, got nan"),
        ({"clip": math.inf}, "clip must be above 0 and finite, got inf"),
        ({"weight_decay": -0.1}, r"weight_decay must be at least 0 and finite, got -0\.1"),
        ({"min_lr_ratio": 1.1}, r"min_lr_ratio must be between 0 and 1, got 1\.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers .*, got \(0\.9, 1\.0\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers .*, got \(0\.9,\)"),
        ({"precision": "float16"}, 'precision must be "float32" or "bfloat16", got \'float16\''),
        ({"accumulation": 3}, "accumulation must divide batch_size: 4 sequences cannot be cut into 3 equal parts"),
        ({"tokens": 63}, "tokens must be at least one step's, batch_size x seq_len = 64, got 63"),
        ({"warmup_steps": 20}, "warmup_steps must be at least 0 and below the number of steps, 20, got 20"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0 .*, got -1"),
    ],
)
def test_invalid_configuration_fails_clearly(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(**fields)


def test_defaults_work_out_steps_and_warm_up() -> None:
    config = TrainConfig(tokens=100_000, seq_len=100, batch_size=10)
    assert (config.steps, config.warmup) == (100, 10)
    assert (change(tokens=64).steps, change(tokens=64).warmup) == (1, 1)
    assert change(tokens=127).steps == 1
    assert change(warmup_steps=3).warmup == 3


def test_papers_settings() -> None:
    paper = TrainConfig.paper()
    assert (paper.betas, paper.weight_decay, paper.lr, paper.clip) == ((0.9, 0.95), 0.1, 8e-4, 1.0)
    assert (paper.warmup, paper.tokens, paper.seq_len) == (500, 1_300_000_000, 4096)
    assert paper.steps == 4959
    assert TrainConfig.paper(batch_size=32, accumulation=1, precision="float32").steps == 9918


def test_peak_rate_is_the_papers_at_its_width_and_falls_with_width() -> None:
    assert peak_rate(768) == TrainConfig.paper().lr
    assert peak_rate(128) == pytest.approx(TrainConfig().lr)
    assert peak_rate(64) == pytest.approx(2 * peak_rate(128))
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        peak_rate(0)
