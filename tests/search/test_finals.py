"""The final front once more: other seeds, means and deviations, and nothing of it twice."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from search import run
from search.evaluate import Outcome, Task
from search.evaluation import Evaluation, Status
from search.front import front_of, summary_of
from search.report import write_report
from search.store import Store, write_json
from tests.search.fake_workers import FakeWorkers, fake_search, fake_settings
from tests.search.test_run import PLAIN, rows

TIMED = ("perplexity", "decode_ms_per_token")


def logged(root: Path) -> list[Evaluation]:
    with Store(root) as store:
        return store.evaluations()


def test_the_front_is_repeated_with_other_seeds(tmp_path: Path) -> None:
    settings = fake_settings(final_seeds=3, objectives=TIMED)
    assert fake_search(tmp_path, settings) == fake_search(tmp_path / "plain", fake_settings(objectives=TIMED))
    evaluations = logged(tmp_path)
    front = front_of(evaluations, settings.ranking)
    finals = [e for e in evaluations if e.kind.startswith("final")]
    assert [(e.kind, e.genome_hash) for e in finals] == [
        (f"final {replica}", e.genome_hash) for replica in (1, 2, 3) for e in front
    ]
    assert len({e.seed for e in (*finals, *front)}) == 4 * len(front)
    assert evaluations[-len(finals) :] == finals
    again = FakeWorkers()
    fake_search(tmp_path, settings, again)
    assert again.done == []
    assert logged(tmp_path) == evaluations


def test_mean_and_deviation_are_in_the_front_and_in_the_report(tmp_path: Path) -> None:
    settings = fake_settings(final_seeds=3, objectives=TIMED)
    fake_search(tmp_path, settings)
    write_json(tmp_path / "config.json", settings.to_json())
    with Store(tmp_path) as store:
        front = store.keep_front(settings.ranking)
        evaluations = store.evaluations()
    rows = json.loads((tmp_path / "front.json").read_text())
    assert [row["metrics"] for row in rows] == [dict(e.metrics) for e in front]
    for row in rows:
        repeated = [e for e in evaluations if e.genome_hash == row["genome_hash"] and e.kind.startswith("final")]
        values = [e.metrics["perplexity"] for e in repeated]
        assert row["final"]["seeds"] == 3
        assert row["final"]["failed"] == 0
        assert row["final"]["mean"]["perplexity"] == pytest.approx(statistics.fmean(values))
        assert row["final"]["deviation"]["perplexity"] == pytest.approx(statistics.stdev(values))
        assert row["final"]["mean"].keys() == row["metrics"].keys()
    page = write_report(tmp_path).read_text()
    assert "mean ± standard deviation of 3 trainings and measurements with other seeds" in page
    final = rows[0]["final"]
    assert f"{final['mean']['perplexity']:.3f} ± {final['deviation']['perplexity']:.3f}" in page


class Failing(FakeWorkers):
    """Fails every second repetition."""

    def outcome(self, task: Task) -> Outcome:
        if task.replica % 2:
            return Outcome(Status.NAN, {}, 1.0, "the loss is nan at step 3")
        return super().outcome(task)


@pytest.mark.parametrize(("seeds", "done"), [(1, 0), (2, 1)])
def test_repetitions_that_fail_are_counted(tmp_path: Path, seeds: int, done: int) -> None:
    settings = fake_settings(final_seeds=seeds)
    fake_search(tmp_path, settings, Failing())
    write_json(tmp_path / "config.json", settings.to_json())
    with Store(tmp_path) as store:
        store.keep_front(settings.ranking)
    for row in json.loads((tmp_path / "front.json").read_text()):
        assert (row["final"]["seeds"], row["final"]["failed"]) == (done, 1)
        assert not row["final"]["deviation"]
        assert bool(row["final"]["mean"]) == bool(done)
    assert ("failed</span>" in write_report(tmp_path).read_text()) == (not done)


def test_a_search_interrupted_in_its_repetitions_ends_as_one_that_was_not(tmp_path: Path) -> None:
    settings = fake_settings(final_seeds=2, generations=1, objectives=TIMED)
    whole = FakeWorkers()
    fake_search(tmp_path / "whole", settings, whole)
    first = next(number for number, task in enumerate(whole.tasks) if task.replica)
    assert len(whole.tasks) - first >= 8
    for patience in range(first, len(whole.tasks)):
        root = tmp_path / str(patience)
        cut, rest = FakeWorkers(patience=patience), FakeWorkers()
        with pytest.raises(KeyboardInterrupt):
            fake_search(root, settings, cut)
        fake_search(root, settings, rest)
        assert logged(root) == logged(tmp_path / "whole")
        assert len(cut.tasks) + len(rest.tasks) == len(whole.tasks)


def test_repetitions_of_a_real_run_leave_the_winners_weights_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, root = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("Fourscore and seven years ago our fathers brought forth a new nation.\n" * 200)
    arguments = [*PLAIN, "--workers", "inline", "--generations", "1", "--data", str(text)]
    assert run.main([*arguments, "--out", str(root), "--final-seeds", "2"]) == 0
    assert run.main([*arguments, "--out", str(tmp_path / "plain")]) == 0
    assert "final 2  " in capsys.readouterr().out
    front = json.loads((root / "front.json").read_text())
    for row in front:
        finals = [json.loads(metrics) for kind, metrics, genome in rows(root, "kind, metrics, genome_hash")
                  if kind.startswith("final") and genome == row["genome_hash"]]  # fmt: skip
        perplexities = {final["perplexity"] for final in finals} | {row["metrics"]["perplexity"]}
        assert len(perplexities) == 3
        assert {final["parameters"] for final in finals} == {row["metrics"]["parameters"]}
        name = f"{row['genome_hash']}.safetensors"
        ours, plain = load_file(root / "best" / name), load_file(tmp_path / "plain" / "best" / name)
        assert all(torch.equal(tensor, plain[key]) for key, tensor in ours.items())
    assert [{key: row[key] for key in ("genome_hash", "metrics")} for row in front] == [
        {key: row[key] for key in ("genome_hash", "metrics")}
        for row in json.loads((tmp_path / "plain" / "front.json").read_text())
    ]
    assert not list((root / "work").glob("*+*"))


def test_a_summary_of_one_has_no_deviation() -> None:
    one = Evaluation("1", "a", Status.OK, 0, 0, {"perplexity": 5.0}, 1.0, kind="final 1")
    assert summary_of([one]) == {"seeds": 1, "failed": 0, "mean": {"perplexity": 5.0}, "deviation": {}}
