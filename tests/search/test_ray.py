"""Ray: what is refused at once, nodes that can't see the run folder, lost processes, and measurements on one node."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import parent_process
from pathlib import Path

import pytest

from search.evaluate import Outcome, Task
from search.evaluation import Status
from search.settings import SettingsError
from search.store import write_json
from search.workers import make_workers
from star_core.genome.baselines import transformer_pp
from tests.search.fault_search import CARE, fault_settings
from tests.search.fault_tasks import ENDS, PIDS, do_moment
from tests.search.ray_cluster import cluster

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow

GENOME = str(transformer_pp(6).canonical())


def task(work: Path, stage: str = "train", **changes: object) -> Task:
    (work / "corpus.json").write_text("{}")
    (work / "tokens.bin").write_bytes(b"the text")
    (work / "here").touch()
    return Task(GENOME, "a" * 16, 0, fault_settings("ray", **changes), work, stage)


def run(one: Task, do: Callable[[Task, Callable[[int, float], None]], Outcome] = do_moment) -> Outcome:
    with closing(make_workers(one.settings, dataclasses.replace(CARE, do=do))) as workers:
        [(_, outcome)] = workers.run([one], 1, lambda *_: None)
        return outcome


def do_read(task: Task, report: Callable[[int, float], None]) -> Outcome:
    """Tell how long the text is, and whether this is the run folder."""
    size, here = len((task.work / "tokens.bin").read_bytes()), (task.work / "here").exists()
    outcome = Outcome(Status.OK, {"bytes": size, "here": float(here)}, 0.0)
    (task.work / f"{task.genome_hash}.safetensors").write_text("weights")
    write_json(task.result_path, outcome.to_json())
    return outcome


def do_with_losses(task: Task, report: Callable[[int, float], None]) -> Outcome:
    """Kill what looks after this process, as often as a folder's name says."""
    folder = Path(os.environ[PIDS])
    parent = parent_process()
    assert parent is not None
    if len(list(folder.glob("lost-*"))) < int(folder.name):
        (folder / f"lost-{os.getpid()}").touch()
        os.kill(parent.pid or 0, signal.SIGKILL)
        time.sleep(60)
    return do_moment(task, report)


def do_moment_and_lose(task: Task, report: Callable[[int, float], None]) -> Outcome:
    """Kill what looks after this process once the result is there."""
    outcome = do_moment(task, report)
    parent = parent_process()
    assert parent is not None
    os.kill(parent.pid or 0, signal.SIGKILL)
    time.sleep(60)
    return outcome


def test_more_gpus_than_a_node_has_are_refused() -> None:
    with pytest.raises(SettingsError, match="gpus_per_task: no node of the Ray cluster has 64 GPUs; the most is 0"):
        make_workers(fault_settings("ray", gpus_per_task=64.0))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"ray_address: nothing answers at 127\.0\.0\.1:1: Connection refused"),
        ("somewhere", "ray_address: needs HOST:PORT or auto, got 'somewhere'"),
        ("ray://head:10001", "ray_address: needs HOST:PORT or auto, got 'ray://head:10001'"),
    ],
)
def test_an_address_where_no_ray_is_gets_one_sentence(address: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_workers(fault_settings("ray", ray_address=address))


def test_a_cluster_that_wants_its_token_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, **_: object) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}") from RuntimeError(
            "InvalidAuthToken: ..."
        )

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(SettingsError, match="at auto: it wants its token; set RAY_AUTH_MODE=token"):
        make_workers(fault_settings("ray", ray_address="auto"))


def test_a_measurement_runs_on_a_node_of_its_own(tmp_path: Path) -> None:
    assert run(task(tmp_path, "measure"), do_read).metrics == {"bytes": 8, "here": 1.0}
    assert (tmp_path / f"{'a' * 16}.measure.json").exists()


@pytest.mark.parametrize("losses", [1, 3])
def test_a_task_whose_node_is_lost_is_begun_anew_so_many_times(
    losses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / str(losses)
    folder.mkdir()
    monkeypatch.setenv(PIDS, str(folder))
    outcome = run(task(tmp_path), do_with_losses)
    assert len(list(folder.glob("lost-*"))) == losses
    if losses == 1:
        assert outcome.status is Status.OK, outcome
    else:
        assert outcome.status is Status.CRASH
        assert "lost by Ray 3 times" in str(outcome.error)


def test_what_is_done_when_its_node_is_lost_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = tmp_path / "ends"
    ends.mkdir()
    monkeypatch.setenv(ENDS, str(ends))
    one = task(tmp_path)
    assert run(one, do_moment_and_lose).status is Status.OK
    assert (ends / one.result_path.name).read_text() == "x"
    assert (tmp_path / f"{one.genome_hash}.safetensors").exists()


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[str]:
    """Start a cluster that finds an empty folder where the run folder is; return its address."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("needs root to give a cluster file systems of its own")
    (tmp_path / "run").mkdir()
    with cluster(hidden=tmp_path / "run") as address:
        yield address


def test_nodes_need_not_see_the_run_folder(apart: str, tmp_path: Path) -> None:
    work = tmp_path / "run"
    one = task(work, ray_address=apart)
    assert run(one, do_read).metrics == {"bytes": 8, "here": 0.0}
    assert (work / f"{one.genome_hash}.safetensors").read_text() == "weights"
    assert one.result_path.exists()
