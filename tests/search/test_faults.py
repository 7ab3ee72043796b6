"""Whatever becomes of a task, on whatever workers: a typed outcome, and the front of the healthy ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from search.driver import search
from search.evaluate import Outcome, Task
from search.evaluation import Evaluation, Status
from search.front import front_of
from search.settings import SettingsError
from search.store import Store
from search.view import View
from search.workers import Workers, make_workers
from star_core.genome.baselines import transformer_pp
from tests.search.fault_search import CARE, FakeFaults, fault_search, fault_settings
from tests.search.fault_tasks import STATUSES, do_fail

PACKAGES = {"ray": "ray", "slurm": "submitit"}
HARMLESS = ("raise", "nan", "well")
FATAL = ("memory", "kill", "hang")


def needs(kind: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a test on workers that need an extra: some seconds to start, and not installed everywhere."""
    if kind not in PACKAGES:
        return []
    missing = find_spec(PACKAGES[kind]) is None
    return [pytest.mark.slow, pytest.mark.skipif(missing, reason=f"{PACKAGES[kind]} is not installed")]


def kinds(*names: str) -> list[Any]:
    return [pytest.param(name, marks=needs(name)) for name in names]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "corpus.json").write_text("{}")
    (tmp_path / "tokens.bin").write_text("none")
    return tmp_path


def tasks(work: Path, kind: str, names: tuple[str, ...]) -> list[Task]:
    genome = str(transformer_pp(6).canonical())
    seconds = {"hang": 2.0}
    settings = {name: fault_settings(kind, timeout_seconds=seconds.get(name, 60.0)) for name in names}
    return [Task(genome, name, 0, settings[name], work, "train") for name in names]


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[tuple[str, Workers]]:
    kind = request.param
    with closing(make_workers(fault_settings(kind), dataclasses.replace(CARE, do=do_fail))) as made:
        yield kind, made


@pytest.mark.parametrize("pool", kinds("inline", "processes", "ray", "slurm"), indirect=True)
def test_every_way_to_fail_has_its_status(pool: tuple[str, Workers], work: Path) -> None:
    kind, made = pool
    names = HARMLESS if kind == "inline" else (*HARMLESS, *FATAL)
    asked = tasks(work, kind, names)
    seen: list[tuple[str, int, float]] = []
    found: dict[Task, Outcome] = dict(made.run(asked, 2, lambda task, *rest: seen.append((task.genome_hash, *rest))))
    assert {task.genome_hash: found[task].status for task in asked} == {
        name: STATUSES.get(name, Status.OK) for name in names
    }, found
    errors = {task.genome_hash: found[task].error for task in asked}
    assert errors["raise"] == "RuntimeError: the genome is cursed"
    assert errors["nan"] == "the loss is nan at step 3"
    assert (work / "well.safetensors").read_text() == "well"
    if kind != "inline":
        assert errors["hang"] == "no result 1 s past its deadline; killed"
        assert "allocate memory" in str(errors["memory"])
        assert errors["kill"] == "killed by SIGKILL, as on its first try"
        assert (work / "kill.tries").read_text() == "xx"
    # What is done is not done again; and what a driver that goes on finds is the same.
    [again] = [outcome for _, outcome in made.run(tasks(work, kind, ("well",)), 1, lambda *_: None)]
    assert again == found[asked[names.index("well")]]
    assert (work / "well.tries").read_text() == "x"


def front(root: Path) -> list[Evaluation]:
    with Store(root) as store:
        found = front_of(store.evaluations(), fault_settings("inline").ranking)
        assert {path.stem for path in store.best.iterdir()} >= {e.genome_hash for e in found}
        return [dataclasses.replace(e, seconds=0.0, curve=()) for e in found]


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds("processes", "ray", "slurm"))
def test_a_search_among_failures_ends_with_the_healthy_ones_front(kind: str, tmp_path: Path) -> None:
    settings = fault_settings(kind, population=8, timeout_seconds=30.0)
    fault_search(tmp_path / "run", settings, do_fail)
    with Store(tmp_path / "expected") as store, View(settings, Console(quiet=True)) as view:
        search(settings, store, FakeFaults(), view, lambda: None)
        expected = {e.genome_hash: e.status for e in store.evaluations()}
        best = front_of(store.evaluations(), settings.ranking)
    with Store(tmp_path / "run") as store:
        assert {e.genome_hash: e.status for e in store.evaluations()} == expected
    assert len(set(expected.values())) > 2
    assert [e.genome_hash for e in front(tmp_path / "run")] == [e.genome_hash for e in best]


@pytest.mark.parametrize(("kind", "package"), PACKAGES.items())
def test_a_package_that_is_not_installed_is_one_sentence(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(SettingsError, match=rf"needs the package {package}: pip install 'star-arch\[{kind}\]'"):
        make_workers(fault_settings(kind))
