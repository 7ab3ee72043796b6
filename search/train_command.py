"""The command line of a training at scale, `python -m search.train`, alone or under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from search.data import Corpus, DataError, load_corpus
from search.options import Parser
from search.report_metrics import format_seconds
from search.settings import PRESETS, SettingsError
from search.start import NAMES, read_starts
from search.store import RunFolderError, read_json, write_json
from search.train import Diverged, TrainConfig, TrainResult, learning_rate
from search.train_checkpoint import newest
from search.train_cost import CARDS, UTILISATION, Cost, cost_of
from search.train_sharded import Ranks, connected, train_sharded, whole_weights
from star_core import Genome, LanguageModel, ModelConfig

MEASURED_STEPS = 10
"""First steps that are left out, and then as many that the time is measured on."""

PRINT_SECONDS = 10.0
"""Least time between two printed lines."""

SETTINGS = (
    "genome", "preset", "data", "tokenizer", "tokens", "seq_len", "batch_size", "accumulation", "learning_rate",
    "precision", "seed", "recompute",
)  # fmt: skip
"""Options that decide what a training computes: config.json keeps them, and `--resume` takes them from there."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained, on what, and how.

    Attributes:
        genome: Canonical text.
        model: Sizes.
        train: Budget and settings.
        data: Files, folders or data set names; empty for the embedded corpus.
        tokenizer: A file of the `tokenizers` package; None for bytes.
        seed: Seeds weights and batches.
        recompute: Whether activations inside a LIV are computed a second time and not kept.
        text: Name of the corpus.
        fingerprint: Of the corpus.
    """

    genome: str
    model: ModelConfig
    train: TrainConfig
    data: tuple[str, ...]
    tokenizer: str | None
    seed: int
    recompute: bool
    text: str
    fingerprint: str

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Read what `dataclasses.asdict` and JSON made of a plan."""
        train = values["train"] | {"betas": tuple(values["train"]["betas"])}
        sizes = {"model": ModelConfig(**values["model"]), "train": TrainConfig(**train)}
        return cls(**values | sizes | {"data": tuple(values["data"])})


def parser() -> Parser:
    """Return the parser; options that are not given are absent from what it returns."""
    made = Parser(
        "python -m search.train", "Train one genome at scale. Under torchrun, weights are sharded over its processes."
    )
    option = made.add_argument
    option(
        "--genome",
        metavar="TEXT|PATH",
        help=f"what to train: a genome's text, a winner's file, a folder of transformers', or of {', '.join(NAMES)}",
    )
    option("--preset", choices=[*PRESETS], help="sizes and budget to begin with (default: paper-125m)")
    option("--data", nargs="+", metavar="PATH", help="as of python -m search.run")
    option("--tokenizer", metavar="FILE", help="a file of the tokenizers package (default: every byte is a token)")
    option("--tokens", type=int, metavar="N", help="training tokens")
    option("--seq-len", type=int, metavar="N", help="training length in tokens")
    option("--batch-size", type=int, metavar="N", help="sequences in a step, those of all processes together")
    option("--accumulation", type=int, metavar="N", help="parts that a process's share of a batch is cut into")
    option("--learning-rate", type=float, metavar="X", help="peak learning rate (default: by width)")
    option("--precision", choices=["float32", "bfloat16"], help="what is computed in; weights are float32")
    option("--seed", type=int, metavar="N", help="seed of weights and batches (default: 0)")
    option(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="compute activations inside LIVs a second time and do not keep them (default: with the paper's presets)",
    )
    option("--out", type=Path, metavar="DIR", help="folder for checkpoints and result, seen by all processes")
    option("--resume", action="store_true", help="go on with the training in --out")
    option("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 500)")
    option("--tensorboard", type=Path, metavar="DIR", help="write curves for TensorBoard there")
    option("--card", choices=[*CARDS], help="card whose peak hours and utilisation are told for (default: h100)")
    option("--utilisation", type=float, metavar="X", help=f"part of the peak assumed (default: {UTILISATION})")
    option("--device", choices=["cpu", "cuda"], help="where to train (default: a GPU where there is one)")
    option("--dry-run", action="store_true", help="tell the cost and stop")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code: 0, or 2 where something was asked that can't be done or the training diverged."""
    try:
        given = _parse(argv)
        with connected(given.pop("device", None)) as ranks:
            return _main(given, ranks)
    except (SettingsError, RunFolderError, DataError, ValueError, Diverged) as error:
        return _complain(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _complain("the disk is full; the checkpoint before is safe: free some space and add --resume")


def _complain(what: str) -> int:
    """Say once, in the first process, what is wrong; return the exit code."""
    quiet = os.environ.get("RANK", "0") != "0"
    Console(stderr=True, quiet=quiet).print(f"error: {what}", soft_wrap=True, highlight=False, markup=False)
    return 2


def _parse(argv: Sequence[str] | None) -> dict[str, Any]:
    given = parser().given(argv)
    if "out" not in given:
        raise SettingsError("--out: needs a folder for checkpoints and result")
    if given.get("save_every", 1) < 1:
        raise SettingsError(f"--save-every: needs at least 1, got {given['save_every']}")
    if not 0 < given.get("utilisation", UTILISATION) <= 1:
        raise SettingsError(f"--utilisation: needs a number above 0 and at most 1, got {given['utilisation']}")
    if "tensorboard" in given and find_spec("tensorboard") is None:
        raise SettingsError("--tensorboard: needs the package tensorboard: pip install 'star-arch[train]'")
    return given


def _main(given: dict[str, Any], ranks: Ranks) -> int:
    root: Path = given["out"]
    plan = _agreed(lambda: _plan(given, root), ranks)
    say = Console(quiet=not ranks.first).print
    with torch.device("meta"):
        cost = cost_of(LanguageModel(Genome.parse(plan.genome), plan.model), plan.train)
    card, utilisation = given.get("card", "h100"), given.get("utilisation", UTILISATION)
    for line in _lines(plan, cost, card, utilisation, ranks.world):
        say(line, soft_wrap=True, highlight=False, markup=False)
    if given.get("dry_run"):
        return 0
    if (root / "result.json").exists():
        say(f"{root}: is trained to its end", soft_wrap=True, highlight=False, markup=False)
        return 0
    corpus = Corpus.load(root / "work")
    # The backbone adds what LIVs return out of place, and so drops no hook.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model = LanguageModel(Genome.parse(plan.genome), plan.model, seed=plan.seed)
    model.backbone.gradient_checkpointing = plan.recompute
    watch = _Watch(plan, cost, card, ranks, given.get("tensorboard"))
    try:
        result = train_sharded(
            model,
            corpus,
            plan.train,
            ranks,
            seed=plan.seed,
            folder=root / "checkpoint",
            save_every=given.get("save_every", 500),
            on_start=watch.start,
            on_step=watch.step,
        )
    finally:
        watch.close()
    _keep(model, result, plan, root, ranks)
    say(
        f"Perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte on held-out text; "
        f"{format_seconds(result.seconds)}. Weights: {root / 'model.safetensors'}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return 0


def _agreed(make: Callable[[], Plan], ranks: Ranks) -> Plan:
    """Let the first process make the plan, and give it, or what is wrong, to all."""
    box: list[Any] = [None]
    if ranks.first:
        try:
            box = [make()]
        except (SettingsError, RunFolderError, DataError, ValueError) as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    plan: Plan = box[0]
    return plan


def _plan(given: dict[str, Any], root: Path) -> Plan:
    """Return the plan of the folder that is gone on with, or make a new one and write its corpus and config.json."""
    path = root / "config.json"
    if given.get("resume"):
        if fixed := [name for name in SETTINGS if name in given]:
            option = "--" + fixed[0].replace("_", "-")
            raise SettingsError(f"{option}: a training goes on as it began; give --resume without it")
        plan = Plan.from_json(read_json(path))
        if Corpus.load(root / "work").fingerprint != plan.fingerprint:
            raise RunFolderError(f"{root / 'work'}: the saved text is not the one that the training began with")
        return plan
    if path.exists() or newest(root / "checkpoint") is not None:
        raise RunFolderError(
            f"{root}: already holds a training; add --resume to go on with it, or choose another --out"
        )
    if "genome" not in given:
        raise SettingsError("--genome: needs what to train")
    corpus = load_corpus(given.get("data"), tokenizer=given.get("tokenizer"))
    plan = _new_plan(given, corpus)
    corpus.check(plan.train.seq_len)
    if not given.get("dry_run"):
        root.mkdir(parents=True, exist_ok=True)
        corpus.save(root / "work")
        write_json(path, dataclasses.asdict(plan))
    return plan


def _new_plan(given: dict[str, Any], corpus: Corpus) -> Plan:
    preset = PRESETS[given.get("preset", "paper-125m")]
    genome = _genome(given["genome"], preset.depth)
    names = ("tokens", "seq_len", "batch_size", "accumulation", "learning_rate", "precision", "seed")
    settings = dataclasses.replace(preset, depth=len(genome), **{name: given[name] for name in names if name in given})
    return Plan(
        genome=str(genome),
        model=settings.model_config(corpus.vocab_size),
        train=dataclasses.replace(settings.train_config(), threads=None),
        data=tuple(given.get("data", ())),
        tokenizer=given.get("tokenizer"),
        seed=settings.seed,
        recompute=given.get("recompute", preset.preset.startswith("paper")),
        text=corpus.name,
        fingerprint=corpus.fingerprint,
    )


def _genome(text: str, depth: int) -> Genome:
    """Read a genome's text, or what `read_starts` takes."""
    try:
        return Genome.parse(text).canonical()
    except ValueError:
        found = read_starts([text], depth)
    if len(found) != 1:
        raise SettingsError(f"--genome: needs one genome, got {len(found)}")
    return Genome.parse(found[0])


def _lines(plan: Plan, cost: Cost, card: str, utilisation: float, cards: int) -> list[str]:
    """Say what is trained, and what it costs."""
    train = plan.train
    tokens = train.steps * train.batch_size * train.seq_len
    hours = cost.hours(card, cards, utilisation)
    width = plan.model.with_sizes(Genome.parse(plan.genome).sizes).width
    return [
        f"{plan.genome}: width {width}, {cost.parameters:,} parameters, {cost.used:,} met by a token",
        f"{tokens:,} tokens of {plan.text} in {train.steps:,} steps of {train.batch_size} x {train.seq_len}, "
        f"{train.precision}, {cards} processes",
        f"{cost.total:.3g} FLOPs: 6 N D = {cost.dense:.3g} and attention {cost.attention:.3g}; "
        f"{hours:.3g} hours on {cards} x {card} at {utilisation:.0%} of {CARDS[card] / 1e12:.0f} TFLOP/s",
    ]


def _keep(model: LanguageModel, result: TrainResult, plan: Plan, root: Path, ranks: Ranks) -> None:
    """Write the whole model and the result; both appear once they are whole."""
    weights = whole_weights(model, ranks)
    if ranks.first:
        plain = LanguageModel(Genome.parse(plan.genome), plan.model, seed=plan.seed)
        parameters = dict(plain.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        temporary = root / "model.new"
        plain.save(temporary)
        temporary.replace(root / "model.safetensors")
        write_json(root / "result.json", dataclasses.asdict(result))
    dist.barrier()


class _Watch:
    """Prints how a training goes, and draws its curves; in all processes but the first it does nothing."""

    def __init__(self, plan: Plan, cost: Cost, card: str, ranks: Ranks, tensorboard: Path | None) -> None:
        self.plan, self.cost, self.card, self.ranks, self.tensorboard = plan, cost, card, ranks, tensorboard
        self._console = Console(quiet=not ranks.first)
        self._writer: Any = None
        self._done = 0
        self._printed = self._measured_from = time.monotonic()

    def start(self, done: int) -> None:
        """Say where the training goes on."""
        self._done = done
        if done:
            self._say(f"going on after step {done:,}")
        if self.tensorboard is not None and self.ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            # Points beyond the checkpoint are drawn a second time.
            self._writer = SummaryWriter(str(self.tensorboard), purge_step=done + 1)

    def step(self, step: int, loss: float, norm: float) -> None:
        """Take a step's numbers."""
        if not self.ranks.first:
            return
        now, train = time.monotonic(), self.plan.train
        if step - self._done == MEASURED_STEPS:
            self._measured_from = now
        timed = step - self._done - MEASURED_STEPS
        seconds = (now - self._measured_from) / timed if timed > 0 else math.nan
        if self._writer is not None:
            scalars = {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate(train, step)}
            if timed > 0:
                scalars["tokens_per_second"] = train.batch_size * train.seq_len / seconds
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        if timed == MEASURED_STEPS:
            whole = seconds * train.steps
            reached = self.cost.utilisation(self.card, self.ranks.world, whole)
            self._say(
                f"measured on {timed} steps: {whole / 3600:.3g} hours in all, "
                f"{reached:.2%} of the peak of {self.ranks.world} x {self.card}"
            )
        if now - self._printed >= PRINT_SECONDS or step == train.steps:
            self._printed = now
            left = format_seconds(seconds * (train.steps - step)) if timed > 0 else "unknown time"
            self._say(f"step {step:,} of {train.steps:,}  loss {loss:.4f} nats  gradient norm {norm:.3f}  {left} left")

    def close(self) -> None:
        """Write what is not written yet."""
        if self._writer is not None:
            self._writer.close()

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
