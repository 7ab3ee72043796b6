"""Ray: what is refused at once, nodes that can't see the run folder, lost processes, and measurements on one node."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
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
from tests.search.fault_tasks import CARE, PIDS, do_moment, fault_settings

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow

GENOME = str(transformer_pp(6).canonical())


def task(work: Path, stage: str = "train", **changes: object) -> Task:
    (work / "corpus.json").write_text("{}")
    (work / "tokens.bin").write_bytes(b"the text")
    return Task(GENOME, "a" * 16, 0, fault_settings("ray", **changes), work, stage)


def run(one: Task, do: Callable[[Task, Callable[[int, float], None]], Outcome] = do_moment) -> Outcome:
    with closing(make_workers(one.settings, dataclasses.replace(CARE, do=do))) as workers:
        [(_, outcome)] = workers.run([one], 1, lambda *_: None)
        return outcome


def do_read(task: Task, report: Callable[[int, float], None]) -> Outcome:
    """Tell how long the text is, and whether it is a link to the run folder's."""
    text = task.work / "tokens.bin"
    outcome = Outcome(Status.OK, {"bytes": len(text.read_bytes()), "linked": float(text.is_symlink())}, 0.0)
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


def test_a_measurement_runs_on_a_node_of_its_own(tmp_path: Path) -> None:
    assert run(task(tmp_path, "measure"), do_read).metrics == {"bytes": 8, "linked": 1.0}
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


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[str]:
    """Start a cluster that finds an empty folder where the run folder is; return its address."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("needs root to give a cluster file systems of its own")
    (tmp_path / "run").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--head --block --port {port} --num-cpus 2 --include-dashboard false --disable-usage-stats"
    ray = Path(sys.executable).parent / "ray"
    command = f"mount -t tmpfs none {tmp_path / 'run'} && exec {sys.executable} {ray} start {options}"
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.communicate(timeout=60)


def test_nodes_need_not_see_the_run_folder(apart: str, tmp_path: Path) -> None:
    work = tmp_path / "run"
    one = task(work, ray_address=apart)
    assert run(one, do_read).metrics == {"bytes": 8, "linked": 0.0}
    assert (work / f"{one.genome_hash}.safetensors").read_text() == "weights"
    assert one.result_path.exists()
