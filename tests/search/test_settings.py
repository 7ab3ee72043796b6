"""Settings: presets hold together, bad values are refused in words, JSON and back is the identity."""

import dataclasses
import json

import pytest

from search.settings import OBJECTIVES, PRESETS, Settings, SettingsError


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_hold_together(name: str) -> None:
    preset = PRESETS[name]
    assert preset.preset == name
    assert preset.train_config().steps == preset.steps > preset.train_config().warmup
    assert preset.batch_size % preset.accumulation == 0
    assert preset.model_config(256).width == preset.width


def test_paper_settings_are_the_papers() -> None:
    small, large = PRESETS["paper-125m"], PRESETS["paper-1b"]
    assert (small.depth, small.width, small.seq_len, small.tokens) == (24, 768, 4096, 1_300_000_000)
    assert (small.population, small.generations, small.train_config().lr, small.warmup_steps) == (16, 18, 8e-4, 500)
    assert (large.depth, large.width, large.tokens) == (48, 2048, 40_000_000_000)


def test_json_and_back() -> None:
    settings = dataclasses.replace(PRESETS["smoke"], data=("a.txt", "b"), objectives=("perplexity", "parameters"))
    values = json.loads(json.dumps(settings.to_json()))
    assert Settings.from_json(values | {"machine": {"cores": 2}}) == settings


def test_a_run_from_before_budgets_and_ties_has_none() -> None:
    values = PRESETS["smoke"].to_json()
    del values["budget"], values["epsilon"]
    old = Settings.from_json(values)
    assert (old.budget, old.epsilon, old.ranking.budget) == ((), 0.0, ())
    assert PRESETS["smoke"].epsilon == 0.02


def test_a_measured_term_of_the_budget_asks_for_the_measurement() -> None:
    plain = dataclasses.replace(PRESETS["smoke"], objectives=("perplexity", "cache_bytes"))
    assert not plain.timed
    assert not dataclasses.replace(plain, budget=("parameters<=5",)).timed
    assert dataclasses.replace(plain, budget=("peak_memory_bytes<=5",)).timed
    assert dataclasses.replace(plain, budget=("parameters<=5",)).counted
    assert not dataclasses.replace(plain, budget=("peak_memory_bytes<=5",)).counted


def test_rungs_end_after_thirds() -> None:
    assert PRESETS["laptop"].rung_steps == (128,)
    assert dataclasses.replace(PRESETS["laptop"], rungs=3).rung_steps == (14, 42, 128)


def test_missing_setting_is_an_error() -> None:
    values = PRESETS["smoke"].to_json()
    del values["depth"]
    with pytest.raises(SettingsError, match=r"config\.json: .*depth"):
        Settings.from_json(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ("perplexity", "decode_ms")}, "unknown 'decode_ms'; did you mean decode_ms_per_token"),
        ({"objectives": ("perplexity", "zzz")}, "unknown 'zzz'; needs one of perplexity, "),
        ({"objectives": ("perplexity",)}, "two to five different names, got perplexity"),
        ({"objectives": ("perplexity", "perplexity")}, "two to five different"),
        ({"objectives": OBJECTIVES[:6]}, "two to five different"),
        ({"budget": ("parameters",)}, "budget: needs METRIC<=NUMBER or METRIC>=NUMBER, got 'parameters'"),
        ({"budget": ("parameters<=x",)}, "budget: needs a finite number above 0 as the limit, got 'x'"),
        ({"budget": ("parameters<=-1",)}, "budget: needs a finite number above 0 as the limit, got '-1'"),
        ({"budget": ("parameter<=1",)}, "budget: unknown 'parameter'; did you mean parameters"),
        ({"budget": ("parameters<=1", "parameters>=2")}, "no genome can keep both parameters>=2 and parameters<=1"),
        ({"epsilon": 1.0}, "epsilon: needs a number from 0 to below 1, got 1.0"),
        ({"epsilon": float("nan")}, "epsilon: needs a number from 0 to below 1, got nan"),
        ({"final_seeds": -1}, "final_seeds: needs at least 0, got -1"),
        ({"inherit": True, "cache": "x.db"}, "inherit: can't go with a cache: a result then depends"),
        ({"rungs": 0}, "rungs: needs at least 1, got 0"),
        ({"rungs": 5}, "rungs: needs a step at the lowest of them, 3 times as many .* the 32 steps .*, got 5"),
        ({"probe_steps": 33}, "probe_steps: needs at most the 32 steps of a training, got 33"),
        ({"workers": "threads"}, "workers: needs one of processes, inline, ray, slurm, got 'threads'"),
        ({"ray_address": "head:6379"}, "ray_address: needs workers = ray, got 'processes'"),
        ({"workers": "ray", "slurm": ("time=5",)}, "slurm: needs workers = slurm, got 'ray'"),
        ({"gpus_per_task": 1.0}, "gpus_per_task: needs workers = ray or slurm, got 'processes'"),
        ({"workers": "ray", "gpus_per_task": -1.0}, "gpus_per_task: needs a finite number of at least 0, got -1.0"),
        ({"workers": "ray", "inherit": True}, "inherit: needs workers that see the run folder, .*, got 'ray'"),
        ({"population": 3}, "population: needs at least 4, got 3"),
        ({"generations": 0}, "generations: needs at least 1, got 0"),
        ({"depth": 1}, "depth: needs at least 2, got 1"),
        ({"seed": -1}, "seed: needs at least 0, got -1"),
        ({"tokens": 100}, "tokens: needs at least one batch of"),
        ({"width": 72}, "width: needs a multiple of 4 heads of 16 = 64, got 72"),
        ({"batch_size": 0}, "batch_size: needs at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: needs a finite number above 0, got 0.0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds: needs a finite number above 0, got nan"),
        ({"accumulation": 3}, "accumulation: needs a divisor of batch_size = 8, got 3"),
        ({"head_dim": 3}, "head_dim: needs an even number, got 3"),
    ],
)
def test_bad_settings_fail_clearly(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(PRESETS["smoke"], **changes)  # type: ignore[arg-type]
