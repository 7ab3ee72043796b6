"""How a kernel's warps and stages are chosen and remembered; `kinds` holds that a kernel may be started repeatedly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from star_kernels._tuning import Run, Tuner, fewer_stages, identity, variants

DEFAULT = Run(4, 3)


def _others() -> list[Run]:
    return variants(DEFAULT)


class _TooBigError(Exception):
    pass


class _Gpu:
    """Kernels that take as long as `seconds` says, and no more than `most_stages`."""

    def __init__(self, seconds: dict[Run, float] | None = None, most_stages: int = 9) -> None:
        self.seconds, self.most_stages = seconds or {}, most_stages
        self.started: list[Run] = []

    def start(self, run: Run) -> None:
        if run.num_stages > self.most_stages:
            raise _TooBigError
        self.started.append(run)

    def time(self, call: Callable[[], object]) -> float:
        call()
        return self.seconds.get(self.started[-1], 1.0)

    def tuner(self, path: Path, timing: bool) -> Tuner:
        return Tuner(path, timing, self.time, (_TooBigError,))


def _named() -> str:
    return "name"


def test_variants_are_neighbours_of_the_default_and_fit_a_program() -> None:
    assert variants(DEFAULT) == [DEFAULT, Run(2, 3), Run(8, 3), Run(4, 2), Run(4, 4)]
    assert variants(Run(1, 1)) == [Run(1, 1), Run(2, 1), Run(1, 2)]
    assert variants(Run(16, 1), threads_of_a_warp=64) == [Run(16, 1), Run(8, 1), Run(16, 2)]
    assert fewer_stages(DEFAULT) == [Run(4, 3), Run(4, 2), Run(4, 1)]


def test_without_timing_the_default_runs(tmp_path: Path) -> None:
    gpu = _Gpu({Run(8, 3): 0.1})
    tuner = gpu.tuner(tmp_path / "tuning.json", timing=False)
    for _ in range(2):
        tuner.run("key", _named, DEFAULT, gpu.start, _others)
    assert gpu.started == [DEFAULT, DEFAULT]
    assert not (tmp_path / "tuning.json").exists()


def test_the_fastest_is_found_once_and_kept_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuning.json"
    gpu = _Gpu({Run(8, 3): 0.1, Run(4, 2): 0.5})
    tuner = gpu.tuner(path, timing=True)
    tuner.run("key", _named, DEFAULT, gpu.start, _others)
    assert gpu.started == [*variants(DEFAULT), Run(8, 3)]
    tuner.run("key", pytest.fail, DEFAULT, gpu.start, _others)
    assert gpu.started[-1] == Run(8, 3)
    assert json.loads(path.read_text()) == {"name": [8, 3]}
    for timing in (False, True):
        later = _Gpu()
        later.tuner(path, timing).run("key", _named, DEFAULT, later.start, _others)
        assert later.started == [Run(8, 3)]


def test_files_of_several_processes_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    gpu = _Gpu()
    first, second = gpu.tuner(path, timing=True), gpu.tuner(path, timing=True)
    first.run("a", lambda: "a", DEFAULT, gpu.start, _others)
    second.run("b", lambda: "b", DEFAULT, gpu.start, _others)
    assert set(json.loads(path.read_text())) == {"a", "b"}
    assert [one.name for one in tmp_path.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize("content", ["", '{"name": [8,', "[1]", '{"name": 3}'])
def test_a_broken_file_is_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    gpu = _Gpu()
    gpu.tuner(path, timing=False).run("key", _named, DEFAULT, gpu.start, _others)
    assert gpu.started == [DEFAULT]


def test_stages_are_left_out_until_a_program_fits(tmp_path: Path) -> None:
    gpu = _Gpu(most_stages=1)
    tuner = gpu.tuner(tmp_path / "tuning.json", timing=False)
    for _ in range(2):
        tuner.run("key", _named, DEFAULT, gpu.start, _others)
    assert gpu.started == [Run(4, 1), Run(4, 1)]
    nothing = _Gpu(most_stages=0)
    with pytest.raises(_TooBigError):
        nothing.tuner(tmp_path / "tuning.json", timing=False).run("key", _named, DEFAULT, nothing.start, _others)


def test_tuning_passes_over_what_does_not_fit(tmp_path: Path) -> None:
    gpu = _Gpu({Run(4, 2): 0.1}, most_stages=2)
    gpu.tuner(tmp_path / "tuning.json", timing=True).run("key", _named, DEFAULT, gpu.start, _others)
    assert gpu.started[-1] == Run(4, 2)


def test_tuning_passes_over_what_the_compiler_refuses(tmp_path: Path) -> None:
    gpu = _Gpu()

    def start(run: Run) -> None:
        if run.num_warps == 8:
            raise RuntimeError("PassManager::run failed")
        gpu.start(run)

    gpu.tuner(tmp_path / "tuning.json", timing=True).run("key", _named, DEFAULT, start, _others)
    assert gpu.started[-1] == DEFAULT


def test_what_must_start_once_is_not_timed(tmp_path: Path) -> None:
    gpu = _Gpu()
    gpu.tuner(tmp_path / "tuning.json", timing=True).run("key", _named, DEFAULT, gpu.start, list)
    assert gpu.started == [DEFAULT]


def test_identity_names_kinds_and_constants_and_no_size() -> None:
    label = identity("_forward", "cuda:90", DEFAULT, (torch.bfloat16, int, type(None)), {"BLOCK": 64, "ADD": False})
    assert label == "_forward|cuda:90|4x3|bfloat16,int,NoneType|ADD=False,BLOCK=64"
