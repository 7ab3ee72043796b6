"""Fine-tune a model of STAR with transformers' Trainer, save it, load it and let it write.

    pip install 'star-arch[hub,search]'
    python examples/fine_tune_with_trainer.py [runs/.../best/<hash>.safetensors]

Takes a winner of a search over bytes; without one, LFM2's layout with random weights, which then learns from nothing.
The text is the default one of the search, speeches. Prints, among Trainer's own lines, in half a minute:

    loss: 7.29 nats a byte before, 1.62 after 200 steps
    saved to runs/fine-tuned
    Fellow citizens, and who a we poopening that by the pleclary. Buti agenemonster of the ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from search.data import load_corpus
from star_core.genome import lfm2
from star_core.hub import StarConfig, StarForCausalLM, from_winner

FOLDER = "runs/fine-tuned"
STEPS = 200


def rows(batches: Iterable[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    """Return each sequence as Trainer wants it; the model shifts the labels itself."""
    return [{"input_ids": tokens, "labels": tokens} for batch, _ in batches for tokens in batch]


def main() -> None:
    """Evaluate, train, evaluate again; save, load, generate."""
    set_seed(0)
    if len(sys.argv) > 1:
        model = from_winner(sys.argv[1])
    else:
        model = StarForCausalLM(StarConfig(genome=str(lfm2(8)), width=64, head_dim=16))
    corpus = load_corpus(None)
    arguments = TrainingArguments(
        output_dir=FOLDER,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        warmup_steps=STEPS // 10,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(corpus.batches("train", batch_size=8, seq_len=128, seed=0, steps=STEPS)),
        eval_dataset=rows(corpus.validation_batches(batch_size=8, seq_len=128, max_tokens=16_384)),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss: {before:.2f} nats a byte before, {after:.2f} after {STEPS} steps")

    trainer.save_model(FOLDER)
    print(f"saved to {FOLDER}")
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    prompt = torch.tensor([list(b"Fellow citizens, ")])
    written = model.generate(prompt, max_new_tokens=120, do_sample=True, top_k=10)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
