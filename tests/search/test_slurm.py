"""Jobs of SLURM: what is asked for, jobs that are lost, and drivers that are killed and find their jobs again."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from search import slurm_workers
from search.evaluate import Outcome, Task
from search.evaluation import Status
from search.settings import SettingsError
from search.slurm_workers import SlurmWorkers
from search.store import write_json
from search.workers import make_workers
from star_core.genome.baselines import transformer_pp
from tests.search import fake_slurm
from tests.search.fault_search import CARE, fault_settings
from tests.search.fault_tasks import do_moment

pytest.importorskip("submitit", reason="submitit is not installed")

GENOME = str(transformer_pp(6).canonical())


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "slurm"


def task(work: Path, stage: str = "train", name: str = "a" * 16) -> Task:
    return Task(
        GENOME, name, 0, fault_settings("slurm", slurm=("partition=gpu", "mem=2G"), timeout_seconds=60.0), work, stage
    )


def do_slowly(task: Task, report: Callable[[int, float], None]) -> Outcome:
    time.sleep(8.0)
    return do_moment(task, report)


def run(one: Task, do: Callable[[Task, Callable[[int, float], None]], Outcome] = do_moment) -> Outcome:
    with closing(make_workers(one.settings, dataclasses.replace(CARE, do=do))) as workers:
        [(_, outcome)] = workers.run([one], 1, lambda *_: None)
        return outcome


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("partition",), "slurm: needs KEY=VALUE, such as partition=gpu, got 'partition'"),
        (("cluster=moon",), "slurm: cluster needs slurm or local, got 'moon'"),
        (("cluster=local", "mem=2G"), "slurm: cluster=local takes no other option, got mem"),
        ((), "workers: slurm needs SLURM's commands, and there is no srun on this machine"),
    ],
)
def test_what_no_slurm_can_do_is_refused(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SettingsError, match=message):
        make_workers(fault_settings("slurm", slurm=options))


def test_no_task_is_done_at_once(slurm: Path) -> None:
    settings = fault_settings("slurm", slurm=("partition=gpu",), jobs=0)
    with closing(make_workers(settings, CARE)) as workers:
        assert list(workers.run([], 1, lambda *_: None)) == []


def test_part_of_a_gpu_is_refused(slurm: Path) -> None:
    with pytest.raises(SettingsError, match=r"gpus_per_task: SLURM takes whole GPUs, got 0\.5"):
        make_workers(fault_settings("slurm", slurm=(), gpus_per_task=0.5))


@pytest.mark.slow
def test_a_job_asks_for_what_the_options_say(slurm: Path, tmp_path: Path) -> None:
    assert run(task(tmp_path)).status is Status.OK
    [script] = [path.read_text() for path in (tmp_path / "slurm").glob("*_submission.sh")]
    for line in ("--partition=gpu", "--mem=2G", "--time=8", f"--job-name=star-train-{'a' * 8}"):
        assert f"#SBATCH {line}\n" in script
    assert "exclusive" not in script
    assert not list((tmp_path / "slurm").glob("*.job"))


@pytest.mark.slow
def test_a_measurement_has_its_node_alone(slurm: Path, tmp_path: Path) -> None:
    outcome = run(task(tmp_path, "measure"), do_measure)
    assert outcome.metrics == {"decode_ms_per_token": 1.0}
    [script] = [path.read_text() for path in (tmp_path / "slurm").glob("*_submission.sh")]
    assert "#SBATCH --exclusive\n" in script


def do_measure(task: Task, report: Callable[[int, float], None]) -> Outcome:
    outcome = Outcome(Status.OK, {"decode_ms_per_token": 1.0}, 0.0)
    write_json(task.result_path, outcome.to_json())
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("losses", [2, 3])
def test_a_lost_job_is_submitted_again_so_many_times(
    losses: int, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, killed = task(tmp_path), list[str]()
    monkeypatch.setattr("submitit.SlurmJob._results_timeout_s", 1)
    with closing(make_workers(one.settings, dataclasses.replace(CARE, do=do_slowly))) as workers:
        running = workers.run([one], 1, lambda *_: None)
        sleep = time.sleep

        def kill(seconds: float) -> None:
            for job, pid in fake_slurm.jobs(slurm).items():
                if job not in killed and len(killed) < losses:
                    killed.append(job)
                    os.killpg(pid, signal.SIGKILL)
            sleep(seconds)

        monkeypatch.setattr(slurm_workers.time, "sleep", kill)
        [(_, outcome)] = running
    assert len(killed) == losses
    if losses == 2:
        assert outcome.status is Status.OK, outcome
    else:
        assert outcome.status is Status.CRASH
        assert "lost, as were 2 before it" in str(outcome.error)
    assert len(fake_slurm.jobs(slurm)) == 3


@pytest.mark.slow
def test_a_driver_that_goes_on_finds_its_job(slurm: Path, tmp_path: Path) -> None:
    one = task(tmp_path)
    # A driver that is killed does nothing more after this.
    SlurmWorkers(one.settings, dataclasses.replace(CARE, do=do_slowly))._submit(one)
    [(job, pid)] = fake_slurm.jobs(slurm).items()
    assert fake_slurm.is_running(pid)
    assert run(one).status is Status.OK
    assert list(fake_slurm.jobs(slurm)) == [job]
