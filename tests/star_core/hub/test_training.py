"""Training through transformers: its Trainer, recomputed activations, torch.compile; ten genomes from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from star_core.genome import POOL, random_genome

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402

from star_core.hub import StarForCausalLM  # noqa: E402
from tests.star_core.hub.samples import LEFT, make, prompts  # noqa: E402


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}], ids=["default", "reentrant"])
@pytest.mark.parametrize("every", [1, 3])
def test_activation_checkpointing_changes_no_gradient(options: dict[str, bool], every: int) -> None:
    model, tokens = make().train(), prompts()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(tokens, attention_mask=LEFT, labels=tokens).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)
    model._set_gradient_checkpointing(True, model.model.backbone._gradient_checkpointing_func, every)
    calls = []
    recompute = model.model.backbone._gradient_checkpointing_func
    model.model.backbone._gradient_checkpointing_func = lambda *args: (calls.append(1), recompute(*args))[1]
    got = gradients()
    assert len(calls) == len(range(0, 7, every))
    for one, expected in zip(got, want, strict=True):
        torch.testing.assert_close(one, expected, rtol=0.0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(training: bool) -> None:
    torch._dynamo.reset()
    model, tokens = make(), prompts()
    options = {"use_cache": False, "labels": tokens if training else None}
    model.train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = compiled(tokens, **options), model(tokens, **options)
    if training:
        torch.testing.assert_close(got.loss, want.loss)
        parameters = list(model.parameters())
        for one, expected in zip(*(torch.autograd.grad(o.loss, parameters) for o in (got, want)), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)


def test_compiled_model_takes_padding_and_generates() -> None:
    """With breaks in the graph: where padding lies decides the shapes."""
    torch._dynamo.reset()
    model, tokens = make(), prompts()
    want = model(tokens, attention_mask=LEFT).logits
    wanted = model.generate(tokens, attention_mask=LEFT, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    torch.testing.assert_close(model(tokens, attention_mask=LEFT).logits, want, rtol=1e-4, atol=1e-4)
    got = model.generate(tokens, attention_mask=LEFT, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(got, wanted)


def test_trainer_evaluates(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, rows = make(), prompts(4, 7)
    arguments = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True)
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=arguments, eval_dataset=data)
    want = model(rows, labels=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(want.loss), rel=1e-5)
    predictions = torch.from_numpy(trainer.predict(data).predictions)
    torch.testing.assert_close(predictions, want.logits, rtol=1e-5, atol=1e-5)


def train(model: StarForCausalLM, folder: Path, steps: int, resume: bool = False) -> StarForCausalLM:
    """Train on padded rows of unequal length, with clipping, decay and gradient accumulation."""
    from transformers import Trainer, TrainingArguments

    lengths = [7, 4, 6, 7, 2, 5, 7, 3] * 2
    rows = prompts(len(lengths), 7, seed=9)
    data = []
    for row, length in zip(rows, lengths, strict=True):
        mask = torch.arange(7) >= 7 - length
        data.append({"input_ids": row, "attention_mask": mask.long(), "labels": row.masked_fill(~mask, -100)})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        logging_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return model


def ten_genomes() -> list[str]:
    """Draw ten genomes of five LIVs that hold every class: each has two that the earlier ones lack, while some do."""
    rng, drawn, missing = np.random.default_rng(0), [], set(POOL)
    while len(drawn) < 10:
        genome = random_genome(rng, 5, tuple(POOL))
        found = missing & {genes.liv_class for genes in genome.livs}
        if len(found) >= min(2, len(missing)):
            drawn.append(str(genome))
            missing -= found
    assert not missing
    return drawn


@pytest.mark.parametrize("seed", range(10))
def test_random_genomes_save_load_generate_train_and_resume(seed: int, tmp_path: Path) -> None:
    """What is loaded is what was saved, and four steps are two, a checkpoint and two more, to the bit."""
    pytest.importorskip("accelerate")
    genome = ten_genomes()[seed]
    model, tokens = make(genome, seed), prompts()
    model.save_pretrained(tmp_path / "saved")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, read.state_dict()[name]), name
    assert torch.equal(read(tokens, attention_mask=LEFT).logits, model(tokens, attention_mask=LEFT).logits)
    for options in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}):
        outputs = []
        for one in (model, read):
            torch.manual_seed(1)
            config = GenerationConfig(max_new_tokens=4, pad_token_id=0, **options)
            outputs.append(one.generate(tokens, attention_mask=LEFT, generation_config=config))
        assert torch.equal(*outputs)

    before = {name: weight.clone() for name, weight in read.state_dict().items()}
    straight = train(read, tmp_path / "straight", 4)
    changed = [name for name, weight in straight.state_dict().items() if not torch.equal(weight, before[name])]
    assert len(changed) == len(before)
    train(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tmp_path / "resumed", 2)
    resumed = train(make(genome, seed + 100), tmp_path / "resumed", 4, resume=True)
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "resumed" / "checkpoint-4").eval()
    assert torch.equal(final(tokens).logits, resumed.eval()(tokens).logits)
