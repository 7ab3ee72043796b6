"""The command line end to end: a run, kills and resumes, and everything that can be asked wrongly."""

import dataclasses
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import star_core
from search import run
from search.data import load_corpus
from search.driver import search
from search.evaluate import Outcome, Task
from search.settings import PRESETS
from search.stages import _work
from search.store import Store
from search.view import View
from search.workers import InlineWorkers, Progress
from star_core.genome import BASELINES

TINY = [
    "--preset",
    "smoke",
    "--population",
    "4",
    "--generations",
    "2",
    "--depth",
    "2",
    "--width",
    "32",
    "--head-dim",
    "8",
    "--tokens",
    "512",
    "--seq-len",
    "16",
    "--batch-size",
    "4",
]
PLAIN = [*TINY, "--objectives", "perplexity,cache_bytes"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Fourscore and seven years ago our fathers brought forth a new nation.\n" * 200)
    return path


def rows(root: Path, columns: str) -> list[Any]:
    with sqlite3.connect(root / "run.db") as db:
        return db.execute(f"SELECT {columns} FROM evaluations ORDER BY id").fetchall()


RESULTS = "kind, name, genome, genome_hash, status, seed, generation, metrics, error, parents, repaired, curve"


def test_a_run_leaves_what_it_promises(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    assert run.main([*TINY, "--data", str(text), "--out", str(root), "--measure-seconds", "0.2"]) == 0
    shown = capsys.readouterr().out
    for name in ("Transformer++", "GQA Transformer++", "StripedMamba", "LFM2-like", "initial population's best"):
        assert name in shown
    logged = rows(root, "kind, generation, status, metrics")
    assert [row[:3] for row in logged[:4]] == [("baseline", -1, "OK")] * 4
    assert sum(row[0] == "candidate" for row in logged) == 8
    config = json.loads((root / "config.json").read_text())
    assert config["objectives"] == ["perplexity", "decode_ms_per_token_ratio", "cache_bytes"]
    assert (root / "report.html").stat().st_size > 10_000
    front = json.loads((root / "front.json").read_text())
    assert front
    for member in front:
        assert set(member) == {"genome", "genome_hash", "metrics"}
        assert set(config["objectives"]) <= member["metrics"].keys()
        model = star_core.load(root / "best" / f"{member['genome_hash']}.safetensors")
        assert model.genome.hash == member["genome_hash"]
        assert model.num_parameters() == member["metrics"]["parameters"]
    assert len(list((root / "best").iterdir())) == len(front)
    # Finished: going on changes nothing.
    assert run.main(["--resume", "--out", str(root)]) == 0
    assert rows(root, "kind, generation, status, metrics") == logged


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "search.run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(root: Path) -> dict[str, float]:
    """Seconds that each finished training took: a number that a second training would not meet again."""
    found: dict[str, float] = {}
    for path in (root / "work").glob("*.train.json"):
        with suppress(FileNotFoundError):  # logged a moment ago, and so taken away
            found[path.name.split(".")[0]] = json.loads(path.read_text())["seconds"]
    if (root / "run.db").exists():
        with suppress(sqlite3.OperationalError):  # the file is made a moment before its table
            found.update(rows(root, "genome_hash, seconds"))
    return found


def check_kills_and_resumes(tmp_path: Path, text: Path, kills: int, arguments: list[str]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start([*arguments, "--data", str(text), "--out", str(whole)])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    rng = random.Random(0)
    seen: dict[str, float] = {}
    process = start([*arguments, "--data", str(text), "--out", str(cut)])
    for _ in range(kills):
        before = finished(cut)
        deadline = time.monotonic() + 120
        # Something new is finished, and then a moment passes.
        while process.poll() is None and finished(cut).keys() <= before.keys() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        now = finished(cut)
        assert {key: now[key] for key in seen} == seen
        seen = now
        process = start(["--resume", "--out", str(cut)])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert rows(cut, RESULTS) == rows(whole, RESULTS)
    now = finished(cut)
    assert {key: now[key] for key in seen} == seen
    assert (cut / "front.json").read_text() == (whole / "front.json").read_text()
    assert sorted(path.name for path in (cut / "best").iterdir()) == sorted(
        path.name for path in (whole / "best").iterdir()
    )


def test_a_killed_search_ends_as_an_uninterrupted_one(tmp_path: Path, text: Path) -> None:
    check_kills_and_resumes(tmp_path, text, 2, PLAIN)


@pytest.mark.slow
def test_a_search_killed_five_times_ends_as_an_uninterrupted_one(tmp_path: Path, text: Path) -> None:
    check_kills_and_resumes(tmp_path, text, 5, [*PLAIN, "--generations", "4", "--population", "6", "--tokens", "8192"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--data", "EMPTY"], "empty"),
        (["--objectives", "perplexity,latency"], "objectives: unknown 'latency'"),
        (["--generatoins", "3"], "unknown option '--generatoins'; did you mean --generations?"),
        (["--generations", "many"], "argument --generations: invalid int value: 'many'"),
        (["--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
        (["--population", "1"], "population: needs at least 4"),
        (["--resume", "--out", "EMPTY_FOLDER"], "not there, so this is no run folder"),
        (["--seq-len", "100000", "--tokens", "4000000"], "too short for seq_len 100000"),
        (["--out", "/dev/null/run"], "/dev/null"),
    ],
)
def test_what_is_asked_wrongly_gets_one_clear_sentence(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    places = {"EMPTY": str(tmp_path / "empty.txt"), "EMPTY_FOLDER": str(tmp_path / "folder")}
    arguments = [places.get(argument, argument) for argument in arguments]
    defaults = {"--data": str(text), "--out": str(tmp_path / "run")}
    for option, value in defaults.items():
        if option not in arguments and "--resume" not in arguments:
            arguments += [option, value]
    assert run.main(["--width", "64", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    tiny = [*PLAIN, "--generations", "1", "--workers", "inline", "--data", str(text), "--out", str(root)]
    assert run.main(tiny) == 0
    before = rows(root, RESULTS)
    assert run.main(tiny) == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err
    assert run.main(["--resume", "--out", str(root), "--depth", "6"]) == 2
    assert "began with --depth 2, and can't go on with 6" in capsys.readouterr().err
    assert run.main(["--resume", "--out", str(root), "--preset", "laptop"]) == 2
    assert rows(root, RESULTS) == before
    # Where it is done may be another.
    assert run.main(["--resume", "--out", str(root), "--workers", "processes", "--jobs", "1"]) == 0
    config = json.loads((root / "config.json").read_text())
    assert (config["workers"], config["jobs"], config["depth"]) == ("processes", 1, 2)
    assert rows(root, RESULTS) == before


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root to mount a small file system")
def test_a_full_disk_loses_nothing(tmp_path: Path, text: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine can't mount a small file system")
    try:
        root = disk / "run"
        process = start([*PLAIN, "--data", str(text), "--out", str(root)])
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2, output
        assert "the disk is full" in output
        assert "Traceback" not in output
        kept = rows(root, RESULTS)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        process = start(["--resume", "--out", str(root)])
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert rows(root, RESULTS)[: len(kept)] == kept
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("longer", "shorter"),
    [
        ("51111-91111", "51111[operator=12123]-91111"),
        ("11111[operator=54111]-91111", "11111-91111"),
        ("width=64;11111", "11111"),
        ("11111", "width=16;11111"),
    ],
)
def test_the_work_of_a_genome_goes_by_its_own_classes_and_width(tmp_path: Path, longer: str, shorter: str) -> None:
    settings = dataclasses.replace(PRESETS["smoke"], width=32, head_dim=8)
    first, second = (Task(text, text, 0, settings, tmp_path, "train") for text in (longer, shorter))
    assert _work(first) > _work(second)


def test_the_longest_trainings_come_first_and_the_log_keeps_the_order_asked(tmp_path: Path, text: Path) -> None:
    corpus = load_corpus([str(text)])
    settings = dataclasses.replace(
        PRESETS["smoke"], depth=2, width=32, head_dim=8, tokens=64, seq_len=16, batch_size=4, valid_tokens=64
    )
    settings = dataclasses.replace(settings, objectives=("perplexity", "cache_bytes"), generations=1)
    started: list[str] = []

    class Watched(InlineWorkers):
        def run(self, tasks: Iterable[Task | None], jobs: int, progress: Progress) -> Iterator[tuple[Task, Outcome]]:
            given = list(tasks)
            started.extend(task.genome for task in given if task is not None)
            return super().run(given, jobs, progress)

    with Store(tmp_path / "run") as store, View(settings, Console(quiet=True)) as view:
        corpus.save(store.work)
        search(settings, store, Watched(), view, lambda: None)
        logged = [evaluation.genome for evaluation in store.evaluations()]
    names = ("Transformer++", "GQA Transformer++", "StripedMamba", "LFM2-like")
    asked = [str(BASELINES[name](2).canonical()) for name in names]
    assert logged[:4] == asked
    assert started[0] == asked[2]  # the one with a recurrence
    assert sorted(started) == sorted(logged)
