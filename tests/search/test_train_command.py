"""`python -m search.train`: one process and two, kills and resumption, the cost told before, what is asked wrongly."""

from __future__ import annotations

import dataclasses
import json
import random
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import star_core
from search import train_command
from search.settings import PRESETS
from search.show import account
from search.train_cost import CARDS, cost_of
from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome.baselines import transformer_pp
from tests.search.processes import Marked

GENOME = "1.1.2.1.4-9.1.1.1.1-1.1.2.1.4-5.1.1.1.1-11.2.2.1.1-7.1.1.1.1-11.2.2.1.1-8.1.1.1.1"
TINY = ["--preset", "smoke", "--tokens", "2560", "--seq-len", "16", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "counting.txt"
    file.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}\n" for i in range(600)))
    return file


def result_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "result.json").read_text())
    del found["seconds"]
    return found


def test_one_process_trains_and_tells_the_cost_first(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    arguments = [*TINY, "--genome", GENOME, "--data", str(text), "--out", str(root), "--save-every", "16"]
    assert train_command.main([*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert not root.exists()
    assert train_command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(told)
    assert "2,560 tokens of" in told
    assert "in 40 steps of 4 x 16, float32, 1 processes" in told
    assert "hours on 1 x h100 at 40% of 989 TFLOP/s" in told
    assert "measured on 10 steps" in shown
    assert "step 40 of 40" in shown
    model = star_core.load(root / "model.safetensors")
    assert str(model.genome) == str(Genome.parse(GENOME).canonical())
    result = result_of(root)
    assert result["steps"] == 40
    assert result["valid_loss"] < 5.0
    assert [path.name for path in (root / "checkpoint").iterdir()] == ["step-00000040"]
    # Begun anew it is refused, and gone on with it is done.
    assert train_command.main(arguments) == 2
    assert "already holds a training; add --resume" in capsys.readouterr().err
    assert train_command.main(["--resume", "--out", str(root)]) == 0
    assert "is trained to its end" in capsys.readouterr().out
    assert result_of(root) == result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out: needs a folder"),
        (["--out", "RUN"], "--genome: needs what to train"),
        (["--out", "RUN", "--genome", "lfm3"], "'lfm3' is neither a baseline nor a file or folder"),
        (["--out", "RUN", "--genome", "lfm2,stripedmamba"], "--genome: needs one genome, got 2"),
        (["--out", "RUN", "--genome", "lfm2", "--data", "nowhere.txt"], "nowhere.txt"),
        (
            ["--out", "RUN", "--genome", "lfm2", "--batch-size", "3", "--accumulation", "2"],
            "accumulation: needs a divisor",
        ),
        (["--out", "RUN", "--genom", "lfm2"], "unknown option '--genom'; did you mean --genome?"),
        (["--out", "RUN", "--genome", "lfm2", "--utilisation", "1.5"], "--utilisation: needs a number above 0"),
        (["--out", "RUN", "--genome", "lfm2", "--save-every", "0"], "--save-every: needs at least 1, got 0"),
        (["--out", "RUN", "--resume"], "not there, so this is no run folder"),
        (["--out", "RUN", "--resume", "--seed", "3"], "--seed: a training goes on as it began"),
    ],
)
def test_what_is_asked_wrongly_gets_one_clear_sentence(
    arguments: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "run") if argument == "RUN" else argument for argument in arguments]
    if "--resume" not in arguments:
        arguments = ["--preset", "smoke", *(["--data", str(text)] if "--data" not in arguments else []), *arguments]
    assert train_command.main([*arguments, "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert message in shown
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_command, "find_spec", lambda name: None)
    asked = [*TINY, "--genome", "lfm2", "--out", str(tmp_path / "run"), "--tensorboard", str(tmp_path / "curves")]
    assert train_command.main(asked) == 2
    assert capsys.readouterr().err == (
        "error: --tensorboard: needs the package tensorboard: pip install 'star-arch[train]'\n"
    )


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_every_step(text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = [*TINY, "--genome", "lfm2", "--data", str(text), "--out", str(tmp_path / "run")]
    assert train_command.main([*asked, "--tensorboard", str(tmp_path / "curves")]) == 0
    curves = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert {"loss", "gradient_norm", "learning_rate", "tokens_per_second"} <= set(curves.Tags()["scalars"])
    assert [event.step for event in curves.Scalars("loss")] == list(range(1, 41))


def test_the_cost_of_a_transformer_is_the_textbooks() -> None:
    settings = PRESETS["paper-125m"]
    with torch.device("meta"):
        model = LanguageModel(transformer_pp(24), settings.model_config(256))
    cost = cost_of(model, settings.train_config())
    width, tokens = 768, 4959 * 64 * 4096
    matrices = 12 * 4 * width**2 + 12 * 9 * width**2 + 256 * width + 25 * width
    assert cost.used == cost.parameters == matrices
    assert cost.dense == pytest.approx(6 * matrices * tokens)
    assert cost.attention == pytest.approx(12 * 6 * 4096 * width * tokens)
    assert cost.hours("h100", 8, 0.4) == pytest.approx(cost.total / (8 * 0.4 * CARDS["h100"]) / 3600)
    assert cost.utilisation("h100", 8, 3600 * cost.hours("h100", 8, 0.4)) == pytest.approx(0.4)


def test_a_shared_featurizer_costs_as_often_as_it_is_used() -> None:
    sizes = ModelConfig(width=32, head_dim=8)
    apart, together = (LanguageModel(Genome.parse(text), sizes) for text in ("11111-11111", "11211-11211"))
    config = PRESETS["smoke"].train_config()
    assert cost_of(together, config).parameters < cost_of(apart, config).parameters
    assert cost_of(together, config).used == cost_of(apart, config).used
    differential = LanguageModel(Genome.parse("10.1.1.1.1-10.1.1.1.1"), sizes)
    assert cost_of(differential, config).attention == 2 * cost_of(apart, config).attention


BEYOND = {
    "a width of its own": ("width=64,ffn=2,head_dim=16;11111-91111", 6 * 24 * 64),
    "wide keys, a band": (
        "31111[operator=32223,k=111224,q=111221,v=111234,window=6]",
        3 * 2 * 4 * (16 + 24) * (6 - 36 / 48),
    ),
    "attention where the class has a recurrence": ("51111[operator=12123]", 6 * 24 * 32),
    "a recurrence where the class has attention": ("11111[operator=54111]", 0),
    "linear attention": ("11111[operator=12113]-11111", 6 * 24 * 32),
    "differential": ("10.1.1.1.1[operator=12233,window=3]", 2 * 6 * 32 * 2 * (3 - 9 / 48)),
    "reused keys and values": ("11224[residual=3]-11224[residual=3]-72212-72212", 2 * 6 * 24 * 32),
    "RG-LRU": ("91111[operator=94141,value=321231]-91111[operator=91132]", 0),
}


@pytest.mark.parametrize(("text", "attention"), BEYOND.values(), ids=BEYOND.keys())
def test_the_cost_beyond_the_paper_is_that_of_the_model(text: str, attention: float) -> None:
    config, genome = ModelConfig(width=32, head_dim=8), Genome.parse(text)
    train = dataclasses.replace(PRESETS["smoke"].train_config(), seq_len=24)
    with torch.device("meta"):
        cost = cost_of(LanguageModel(genome, config), train)
    assert cost.parameters == LanguageModel(genome, config).num_parameters()
    assert cost.attention == pytest.approx(attention * train.steps * train.batch_size * train.seq_len)
    # Maps of channels as they run, two operations for each of their parameters: all but norms, short filters and rates.
    wide = ModelConfig(width=256, head_dim=32)
    used = cost_of(LanguageModel(genome, wide), train).used
    assert account(genome, wide, ()).projection_flops == pytest.approx(2 * used, rel=0.05)


# Two processes


def torchrun(arguments: list[str]) -> Marked:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m", "search.train"]
    return Marked([*command, *arguments], OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")


def check_same_course(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Compare trainings whose sums ran in another order: rounding grows from step to step, to 5 % after 400."""
    assert [step for step, _ in got["curve"]] == [step for step, _ in want["curve"]]
    losses, wanted = ([loss for _, loss in one["curve"]] for one in (got, want))
    assert losses[:20] == pytest.approx(wanted[:20], rel=1e-3)
    assert losses == pytest.approx(wanted, rel=0.2)
    assert got["valid_loss"] == pytest.approx(want["valid_loss"], rel=0.1)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_are_one_that_was_not(text: Path, tmp_path: Path) -> None:
    asked = [*TINY, "--tokens", "25600", "--genome", GENOME, "--data", str(text), "--save-every", "20", "--recompute"]
    whole, cut, alone, mixed = (tmp_path / name for name in ("whole", "cut", "alone", "mixed"))
    assert "2 processes" in torchrun([*asked, "--out", str(whole)]).finish()

    def newest() -> str:
        return max((path.name for path in (cut / "checkpoint").glob("step-*")), default="")

    rng = random.Random(0)
    run = torchrun([*asked, "--out", str(cut)])
    for _ in range(3):
        before, deadline = newest(), time.monotonic() + 300
        while newest() <= before and run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3 * rng.random())
        run.kill_all()
        assert not (cut / "result.json").exists()
        run = torchrun(["--resume", "--out", str(cut), "--device", "cpu", "--save-every", "20"])
    assert "going on after step" in run.finish()
    assert result_of(cut) == result_of(whole)
    weights = [star_core.load(root / "model.safetensors").state_dict() for root in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def one_process(arguments: list[str]) -> str:
        return Marked(["-m", "search.train", *arguments], OMP_NUM_THREADS="1").finish()

    one_process([*asked, "--out", str(alone)])
    single, double = result_of(alone), result_of(whole)
    check_same_course(double, single)

    # Two processes, and then one: the shards are cut anew.
    run = torchrun([*asked, "--out", str(mixed)])
    while not list((mixed / "checkpoint").glob("step-*")) and run.process.poll() is None:
        time.sleep(0.02)
    run.kill_all()
    assert "going on after step" in one_process(["--resume", "--out", str(mixed), "--device", "cpu"])
    check_same_course(result_of(mixed), single)
