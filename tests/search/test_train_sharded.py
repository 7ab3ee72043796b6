"""Sharded training: the plain loop's losses, groups that share featurizers, checkpoints, exact resumption."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from search.data import Corpus, load_corpus
from search.train import Diverged, TrainConfig, evaluate_loss, train
from search.train_checkpoint import newest
from search.train_sharded import Ranks, connected, held_out_loss, shard, sharing_groups, train_sharded, whole_weights
from star_core import Genome, LanguageModel, ModelConfig

SIZES = ModelConfig(width=32, head_dim=8, vocab_size=256, time_scale=16)
SHORT = TrainConfig(tokens=12 * 4 * 16, seq_len=16, batch_size=4, lr=1e-2, eval_tokens=256)
ALL = "-".join(f"{number}.1.1.1.1" for number in range(1, 18))
# Featurizers and tensors that two LIVs share, of every family and of a differential class.
SHARED = (
    "1.1.2.1.4-9.1.1.1.1-1.1.2.1.4-5.2.2.2.4-5.2.2.2.4-8.3.2.3.2-9.1.1.1.1-8.3.2.3.2-11.4.2.1.1-7.5.2.1.1-"
    "11.4.2.1.1-7.5.2.1.1"
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with connected("cpu") as made:
        yield made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    file = tmp_path_factory.mktemp("text") / "counting.txt"
    file.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}\n" for i in range(600)))
    return load_corpus([str(file)])


def model_of(genome: str, seed: int = 0) -> LanguageModel:
    return LanguageModel(Genome.parse(genome), SIZES, seed=seed)


def losses_of(
    model: LanguageModel,
    corpus: Corpus,
    ranks: Ranks,
    folder: Path,
    config: TrainConfig = SHORT,
    stop: int | None = None,
) -> list[float]:
    """Train and return the losses of the steps taken; with `stop`, only up to that step."""
    seen: list[float] = []

    class KilledError(Exception):
        pass

    def on_step(step: int, loss: float, norm: float) -> None:
        if stop is not None and step > stop:
            raise KilledError
        seen.append(loss)

    try:
        train_sharded(model, corpus, config, ranks, seed=3, folder=folder, save_every=4, on_step=on_step)
    except KilledError:
        assert stop is not None
    return seen


@pytest.mark.parametrize("genome", [ALL, SHARED], ids=["all", "shared"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_sharded_losses_are_those_of_the_plain_loop(
    genome: str, recompute: bool, corpus: Corpus, ranks: Ranks, tmp_path: Path
) -> None:
    plain: list[float] = []
    config = dataclasses.replace(SHORT, accumulation=2, tokens=4 * 4 * 16, lr=2e-3)
    expected = train(model_of(genome), corpus, config, seed=3, on_step=lambda step, loss: plain.append(loss))
    model = model_of(genome)
    model.backbone.gradient_checkpointing = recompute
    seen: list[float] = []
    result = train_sharded(
        model,
        corpus,
        config,
        ranks,
        seed=3,
        folder=tmp_path,
        save_every=100,
        on_step=lambda step, loss, norm: seen.append(loss),
    )
    # What differs is the order of sums in the norm that clips, by float32 rounding.
    assert seen == pytest.approx(plain, rel=1e-4)
    assert result.valid_loss == pytest.approx(expected.valid_loss, rel=1e-4)
    assert (result.steps, result.tokens) == (expected.steps, expected.tokens)


def test_bfloat16_computes_in_bfloat16_on_float32_weights(corpus: Corpus, ranks: Ranks, tmp_path: Path) -> None:
    plain: list[float] = []
    config = dataclasses.replace(SHORT, tokens=3 * 4 * 16, precision="bfloat16")
    train(model_of(SHARED), corpus, config, seed=3, on_step=lambda step, loss: plain.append(loss))
    model = model_of(SHARED)
    assert losses_of(model, corpus, ranks, tmp_path, config) == pytest.approx(plain, rel=1e-2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_groups_keep_shared_featurizers_together(ranks: Ranks) -> None:
    livs = model_of(SHARED).backbone.livs
    places = {liv: place for place, liv in enumerate(livs)}
    groups = [[places[liv] for liv in group] for group in sharing_groups(livs)]
    assert groups == [[0, 2], [1], [3, 4], [5, 7], [6], [8, 10], [9, 11]]


def test_every_weight_but_scalars_is_sharded_once(ranks: Ranks) -> None:
    model = model_of(SHARED)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shard(model, ranks)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert {name for name, parameter in after.items() if not isinstance(parameter.data, DTensor)} == {
        name for name, parameter in before.items() if not parameter.ndim
    }
    whole = whole_weights(model, ranks)
    assert all(torch.equal(whole[name], parameter) for name, parameter in before.items())


def test_the_held_out_loss_is_the_plain_one(corpus: Corpus, ranks: Ranks) -> None:
    model = model_of(SHARED)
    config = dataclasses.replace(SHORT, eval_tokens=7 * 16)
    expected = evaluate_loss(model, corpus, batch_size=4, seq_len=16, max_tokens=7 * 16)
    shard(model, ranks)
    assert held_out_loss(model, corpus, config, ranks) == pytest.approx(expected, rel=1e-6)


def test_a_training_goes_on_to_the_last_bit(corpus: Corpus, ranks: Ranks, tmp_path: Path) -> None:
    whole = losses_of(model_of(SHARED), corpus, ranks, tmp_path / "whole")
    cut = losses_of(model_of(SHARED), corpus, ranks, tmp_path / "cut", stop=6)
    assert cut == whole[:6]
    assert str(newest(tmp_path / "cut")).endswith("step-00000004")
    # Another seed's weights: all of them come from the checkpoint.
    rest = losses_of(model_of(SHARED, seed=1), corpus, ranks, tmp_path / "cut")
    assert rest == whole[4:]
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["step-00000012"]


def test_what_a_kill_leaves_of_a_checkpoint_is_not_one(corpus: Corpus, ranks: Ranks, tmp_path: Path) -> None:
    whole = losses_of(model_of(ALL), corpus, ranks, tmp_path / "whole")
    losses_of(model_of(ALL), corpus, ranks, tmp_path / "cut", stop=6)
    (tmp_path / "cut" / "new").mkdir()
    (tmp_path / "cut" / "new" / "__0_0.distcp").write_bytes(b"half")
    assert losses_of(model_of(ALL), corpus, ranks, tmp_path / "cut") == whole[4:]


def test_another_models_checkpoint_is_refused(corpus: Corpus, ranks: Ranks, tmp_path: Path) -> None:
    losses_of(model_of("11111-91111"), corpus, ranks, tmp_path, stop=4)
    with pytest.raises(ValueError, match="step-00000004 is the checkpoint of another model"):
        losses_of(model_of("51111-91111"), corpus, ranks, tmp_path)


def test_a_batch_that_cannot_be_divided_is_refused(corpus: Corpus, ranks: Ranks, tmp_path: Path) -> None:
    three = dataclasses.replace(ranks, world=3)
    with pytest.raises(ValueError, match="batch_size: needs a multiple of 3 processes x 1 parts, got 4"):
        losses_of(model_of("11111-91111"), corpus, three, tmp_path)


def test_a_diverging_training_says_so(corpus: Corpus, ranks: Ranks, tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, lr=1e30, warmup_steps=0)
    with pytest.raises(Diverged, match=r"is (nan|inf) at step"):
        losses_of(model_of("11111-91111"), corpus, ranks, tmp_path, config)
