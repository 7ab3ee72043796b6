"""Every way in which a candidate can end is told apart, and none of them ends the search."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.harness import measure_model
from search import evaluate
from search.data import load_corpus
from search.evaluate import Outcome, Task, candidate_seed, run_task
from search.evaluation import Status
from search.settings import PRESETS
from search.workers import Care, InlineWorkers, ProcessWorkers, Workers, at_once, make_workers
from star_core import Genome, LanguageModel

TINY = dataclasses.replace(
    PRESETS["smoke"],
    depth=2,
    width=32,
    head_dim=8,
    tokens=512,
    seq_len=16,
    batch_size=4,
    valid_tokens=64,
    timeout_seconds=60.0,
)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    return path


@pytest.fixture
def work(tmp_path: Path, text: Path) -> Path:
    load_corpus([str(text)]).save(tmp_path)
    return tmp_path


def task(work: Path, genome: str = "11111-91111", stage: str = "train", **changes: object) -> Task:
    parsed = Genome.parse(genome)
    settings = dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
    return Task(str(parsed), parsed.hash, candidate_seed(0, parsed.hash), settings, work, stage)


@pytest.fixture(params=["inline", "processes"])
def pool(request: pytest.FixtureRequest) -> Iterator[Workers]:
    made = make_workers(dataclasses.replace(TINY, workers=request.param))
    yield made
    made.close()


def outcomes(pool: Workers, tasks: list[Task], jobs: int = 2) -> list[Outcome]:
    found = dict(pool.run(tasks, jobs, lambda task, step, loss: None))
    return [found[task] for task in tasks]


def test_training_and_measurement(pool: Workers, work: Path) -> None:
    tasks = [task(work), task(work, "71111-91111")]
    for one, outcome in zip(tasks, outcomes(pool, tasks), strict=True):
        assert outcome.status is Status.OK, outcome.error
        assert 1 < outcome.metrics["perplexity"] < 256
        assert outcome.metrics["cache_bytes"] > 0
        assert outcome.curve[-1][0] == TINY.steps
        assert (work / f"{one.genome_hash}.safetensors").exists()
    [measured] = outcomes(pool, [task(work, stage="measure", measure_seconds=0.2)])
    assert measured.status is Status.OK, measured.error
    assert measured.metrics["decode_ms_per_token"] > 0
    assert measured.metrics["decode_ms_per_token_ratio"] > 0
    assert "peak_memory_bytes" not in measured.metrics


def test_peak_memory_is_counted_after_training_as_in_a_fresh_process(pool: Workers, work: Path) -> None:
    reference, other = task(work), task(work, "51111-91111")
    first, second = outcomes(pool, [reference, other])
    assert first.metrics["peak_memory_bytes_ratio"] == 1.0
    models = [
        LanguageModel(Genome.parse(one.genome), TINY.model_config(256), seed=one.seed) for one in (other, reference)
    ]
    alone = measure_model(
        *models,
        which=["peak_memory_bytes"],
        batch_size=TINY.batch_size,
        seq_len=TINY.seq_len,
        decode_tokens=2,
    )
    assert {name: second.metrics[name] for name in alone} == alone
    # Counted once, and taken from there.
    (work / "reference.json").write_text("1.0")
    other.result_path.unlink()
    [again] = outcomes(pool, [other])
    assert again.metrics["peak_memory_bytes_ratio"] == again.metrics["peak_memory_bytes"] == alone["peak_memory_bytes"]


def test_memory_is_not_counted_where_nothing_measured_is_minimised(pool: Workers, work: Path) -> None:
    [outcome] = outcomes(pool, [task(work, objectives=("perplexity", "cache_bytes"))])
    assert set(outcome.metrics) == {"perplexity", "bits_per_byte", "parameters", "cache_bytes"}


def test_both_kinds_of_workers_agree_to_the_bit(work: Path) -> None:
    one = task(work, "51111-91111")
    pool = ProcessWorkers()
    [there] = outcomes(pool, [one])
    pool.close()
    one.result_path.unlink()
    [here] = outcomes(InlineWorkers(), [one])
    assert here.metrics == there.metrics
    assert here.curve == there.curve


def test_a_finished_task_is_not_done_again(pool: Workers, work: Path) -> None:
    one = task(work)
    [first] = outcomes(pool, [one])
    [second] = outcomes(pool, [one])
    assert second == first


def test_a_diverging_candidate_is_nan(pool: Workers, work: Path) -> None:
    [outcome] = outcomes(pool, [task(work, learning_rate=1e30)])
    assert outcome.status is Status.NAN
    assert outcome.error is not None
    assert outcome.metrics == {}


def test_a_candidate_that_learns_nothing_is_flat(pool: Workers, work: Path) -> None:
    [outcome] = outcomes(pool, [task(work, learning_rate=1e-9, probe_steps=4)])
    assert outcome.status is Status.FLAT
    assert "nats after 4 steps and needs to be below" in str(outcome.error)
    assert outcome.metrics == {}


def test_a_late_candidate_is_a_timeout(pool: Workers, work: Path) -> None:
    [outcome] = outcomes(pool, [task(work, tokens=10_000_000, timeout_seconds=0.3)])
    assert outcome.status is Status.TIMEOUT
    assert "training steps" in str(outcome.error)


def test_a_genome_that_does_not_fit_is_invalid(pool: Workers, work: Path) -> None:
    bad = dataclasses.replace(task(work), genome="11111-91112")
    [outcome] = outcomes(pool, [bad])
    assert outcome.status is Status.INVALID
    assert "not valid" in str(outcome.error)


def test_memory_beyond_the_limit_is_oom(work: Path) -> None:
    pool = ProcessWorkers(Care(memory_bytes=400 * 2**20))
    [outcome] = outcomes(pool, [task(work, "11111-91111", batch_size=4096, seq_len=256, tokens=4096 * 256)], jobs=1)
    pool.close()
    assert outcome.status is Status.OOM, outcome


@pytest.mark.parametrize("deaths", [1, 2])
def test_one_death_by_signal_is_tried_again_and_the_second_is_a_crash(work: Path, deaths: int) -> None:
    doomed, other = task(work, tokens=60_000), task(work, "71111-91111")
    killed: set[int] = set()

    def kill(one: Task, step: int, loss: float) -> None:
        if one == doomed and len(killed) < deaths:
            [pid] = [running.process.pid for running in pool._running if running.task == doomed]
            if pid not in killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)

    pool = ProcessWorkers()
    found = dict(pool.run([doomed, other], 2, kill))
    pool.close()
    assert len(killed) == deaths
    assert found[other].status is Status.OK
    if deaths == 1:
        assert found[doomed].status is Status.OK, found[doomed].error
    else:
        assert found[doomed].status is Status.CRASH
        assert "killed by SIGKILL, as on its first try" in str(found[doomed].error)


def test_an_exception_is_a_crash_with_its_reason(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(evaluate, "_train", broken)
    outcome = run_task(task(work))
    assert outcome.status is Status.CRASH
    assert outcome.error == "KeyError: 'lost'"


def test_a_full_disk_is_not_the_candidates_fault(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')

    monkeypatch.setattr(evaluate, "_train", full)
    with pytest.raises(OSError, match="No space left"):
        run_task(task(work))


def test_no_process_outlives_its_driver(work: Path, text: Path) -> None:
    run = [sys.executable, "-m", "search.run", "--preset", "smoke", "--tokens", "50000000", "--data", str(text)]
    driver = subprocess.Popen([*run, "--out", str(work / "run")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    logs: list[Path] = []
    deadline = time.monotonic() + 60
    while not logs and time.monotonic() < deadline:
        time.sleep(0.2)
        logs = list((work / "run" / "work").glob("*.log"))
    assert logs, driver.stdout and driver.stdout.peek()  # type: ignore[union-attr]
    driver.kill()
    driver.wait()
    marker = str(work / "run")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _holding(marker):
        time.sleep(0.1)
    assert _holding(marker) == []


def _holding(marker: str) -> list[str]:
    """Return the processes that hold a file open under a folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = [os.readlink(link) for link in folder.iterdir()]
        except OSError:
            continue  # the process has ended, or is not ours
        if any(link.startswith(marker) for link in links):
            found.append(folder.parent.name)
    return found


def test_a_cluster_gets_a_sequence_whole_and_is_asked_for_at_least_one(tmp_path: Path) -> None:
    train, measure = (Task("1", "a", 0, PRESETS["smoke"], tmp_path, stage) for stage in ("train", "measure"))
    assert at_once([train] * 5, 2, 3) == 5
    assert at_once([measure], 1, 3) == 1
    assert at_once(iter([train] * 5), 2, 3) == 3
    # With 0, a line of none would never be found to be over.
    assert at_once([], 2, 3) == at_once(iter([]), 2, 0) == 1
