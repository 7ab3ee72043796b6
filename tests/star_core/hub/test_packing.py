"""Several sequences in one row, as transformers' padding-free collator has it: nothing differs from a padded batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from star_core.genome import POOL

transformers = pytest.importorskip("transformers")

from transformers import DataCollatorWithFlattening  # noqa: E402

from star_core.hub import StarForCausalLM  # noqa: E402
from tests.star_core.hub.samples import LEFT, make, prompts  # noqa: E402

LENGTHS = (5, 1, 7, 2)


def sequences(seed: int = 0) -> list[Tensor]:
    return [row[:length] for row, length in zip(prompts(len(LENGTHS), 7, seed), LENGTHS, strict=True)]


def flattened(**options: Any) -> dict[str, Any]:
    collate = DataCollatorWithFlattening(return_tensors="pt", **options)
    batch: dict[str, Any] = collate([{"input_ids": row.tolist()} for row in sequences()])
    return batch


def padded() -> dict[str, Tensor]:
    tokens = torch.nn.utils.rnn.pad_sequence(sequences(), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in sequences()], batch_first=True)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def loss_and_gradients(model: StarForCausalLM, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    loss = model(**batch).loss
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def check_equal(model: StarForCausalLM, got: dict[str, Any], want: dict[str, Any]) -> None:
    (loss, gradients), (wanted, expected) = loss_and_gradients(model, got), loss_and_gradients(model, want)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-9)


@pytest.mark.parametrize("liv_class", list(POOL), ids=lambda liv_class: POOL[liv_class].name)
def test_a_flattened_batch_trains_as_the_padded_one(liv_class: int) -> None:
    model = make(f"{liv_class}.1.1.1.1-9.1.1.1.1").train()
    check_equal(model, flattened(), padded())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_ids_start": 2},
        {"return_flash_attn_kwargs": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_whatever_the_collator_says_of_the_boundaries(options: dict[str, Any]) -> None:
    check_equal(make().train(), flattened(**options), padded())


def test_nothing_is_computed_for_padding_and_logits_are_those_of_the_sequences_alone() -> None:
    model, seen = make(), []
    model.model.backbone.livs[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    batch = flattened()
    out = model(batch["input_ids"], position_ids=batch["position_ids"], output_hidden_states=True)
    assert seen == [(1, sum(LENGTHS), 32)]
    assert out.cache is None
    alone = [model(row[None]).logits[0] for row in sequences()]
    torch.testing.assert_close(out.logits[0], torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert {tuple(one.shape) for one in out.hidden_states} == {(1, sum(LENGTHS), 32)}


def test_rows_of_several_sequences_may_be_padded() -> None:
    """Two rows, the first of two sequences with padding before, between and behind them."""
    model, rows = make(), sequences()
    tokens, positions = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int64)
    mask = torch.zeros(2, 12, dtype=torch.int64)
    for row, start, which in ((0, 1, 0), (0, 8, 3), (1, 2, 2)):
        columns = slice(start, start + LENGTHS[which])
        tokens[row, columns], mask[row, columns] = rows[which], 1
        positions[row, columns] = torch.arange(LENGTHS[which])
    labels = tokens.masked_fill(mask == 0, -100)
    out = model(tokens, attention_mask=mask, position_ids=positions, labels=labels)
    for row, start, which in ((0, 1, 0), (0, 8, 3), (1, 2, 2)):
        got = out.logits[row, start : start + LENGTHS[which]]
        torch.testing.assert_close(got, model(rows[which][None]).logits[0], rtol=1e-4, atol=1e-4)
    losses = [model(rows[which][None], labels=rows[which][None]).loss.item() for which in (0, 3, 2)]
    assert float(out.loss) == pytest.approx((4 * losses[0] + losses[1] + 6 * losses[2]) / 11, rel=1e-5)


def test_the_first_token_of_a_sequence_is_no_target_of_the_one_before() -> None:
    batch = flattened()
    plain = batch | {"labels": batch["input_ids"]}
    check_equal(make().train(), plain, batch)


def test_plain_positions_change_nothing() -> None:
    model, tokens = make(), prompts()
    want = model(tokens, attention_mask=LEFT)
    positions = (LEFT.cumsum(1) - 1).masked_fill(LEFT == 0, 1)
    got = model(tokens, attention_mask=LEFT, position_ids=positions)
    assert torch.equal(got.logits, want.logits)
    assert got.cache is not None
    assert torch.equal(model(tokens, position_ids=torch.arange(3, 10)[None]).logits, model(tokens).logits)


def test_activation_checkpointing_changes_no_gradient_of_a_flattened_batch() -> None:
    model = make().train()
    want = loss_and_gradients(model, flattened())
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    got = loss_and_gradients(model, flattened())
    for one, expected in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(one, expected, rtol=0.0, atol=1e-6 * float(expected.abs().max()))


def test_trainer_takes_the_collator(tmp_path: Path) -> None:
    """Three steps of `Trainer` on flattened batches end at the weights of three steps on padded ones."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    trained = []
    data = [{"input_ids": row.tolist()} for row in sequences(1) * 3]

    def pad(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        rows = [torch.tensor(feature["input_ids"]) for feature in features]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    for collate in (DataCollatorWithFlattening(), pad):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
        )  # fmt: skip
        model = make()
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
        trainer.train()
        trained.append((model, trainer.evaluate()["eval_loss"]))
    (one, loss), (other, wanted) = trained
    assert loss == pytest.approx(wanted, rel=1e-5)
    for name, weight in one.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert not torch.equal(one.lm_head.weight, make().lm_head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_ids": torch.zeros(2, 7).long()}, r"position_ids: needs \[B, T\] = \[3, 7\] or \[1, 7\]"),
        ({"position_ids": torch.zeros(1, 3, 7).long()}, "position_ids: needs"),
        ({"seq_idx": torch.zeros(3, 5).long()}, "seq_idx: needs"),
        ({"cu_seq_lens_q": torch.tensor([0, 7])}, "cu_seq_lens_q: needs boundaries from 0 to T of one row"),
        ({"position_ids": torch.zeros(3, 7).long(), "use_cache": True}, "cache: needs None where a row holds several"),
    ],
)
def test_bad_boundaries_fail_clearly(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(prompts(), **options)


@pytest.mark.parametrize("ends", [[0, 3], [1, 7], [7], [], [[0, 7]]], ids=str)
def test_boundaries_that_do_not_span_the_row_fail_clearly(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seq_lens_k: needs boundaries from 0 to T of one row"):
        make()(prompts(1), cu_seq_lens_k=torch.tensor(ends))
