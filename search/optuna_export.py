"""A run as an Optuna study, so that optuna-dashboard and Optuna's plots open it."""

from __future__ import annotations

import warnings
from typing import Any

from search.evaluation import Evaluation
from search.report_data import Run
from search.settings import SettingsError
from star_core.genome import GENES, Genome


def export_study(run: Run, storage: str, name: str | None = None) -> int:
    """Write a run into an Optuna storage as a new study; return the number of trials.

    A trial's values are the objectives, and its parameters the genes of the genome: `liv_00_liv_class` and so on, those
    of a gene that a genome lacks left out. Genome, parents, status and all metrics are user attributes. What failed is
    a failed trial, and what stopped at a rung below the last a pruned one. Baselines are trials as well, marked by the
    attribute `kind`.

    Args:
        run: The run.
        storage: An Optuna storage URL, such as "sqlite:///study.db".
        name: Of the study. Default: that of the run's folder.
    Raises:
        SettingsError: Optuna is not installed, or the storage holds a study of that name.
    """
    try:
        import optuna
    except ImportError as error:
        raise SettingsError("--optuna: needs the package optuna; pip install 'star-arch[optuna]'") from error
    name = name or run.directory.name
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize"] * len(run.objectives), load_if_exists=False
        )
    except optuna.exceptions.DuplicatedStudyError as error:
        raise SettingsError(f"--optuna: {storage} holds a study {name} already") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(run.objectives))
    study.set_user_attr("config", {key: value for key, value in run.config.items() if key != "machine"})
    evaluations = [*run.baselines, *run.candidates]
    # Optuna holds a parameter to one range within a study.
    highest = max((gene for one in evaluations for gene in _genes(one.genome).values()), default=1)
    front = {member.genome_hash for member in run.front}
    trials = [_trial(run, evaluation, highest, front) for evaluation in evaluations]
    study.add_trials(trials)
    return len(trials)


def _genes(genome: str) -> dict[str, int]:
    """Return the genes of each LIV under the names of Optuna parameters."""
    return {
        f"liv_{position:02d}_{gene}": value
        for position, liv in enumerate(Genome.parse(genome).livs)
        for gene, value in zip(GENES, liv.as_tuple(), strict=True)
    }


def _trial(run: Run, evaluation: Evaluation, highest: int, front: set[str]) -> Any:
    from optuna.distributions import IntDistribution
    from optuna.trial import TrialState, create_trial

    genes = _genes(evaluation.genome)
    scored = run.is_scored(evaluation)
    state = TrialState.FAIL
    if scored:
        state = TrialState.PRUNED if run.ranking.tier(len(evaluation.rungs)) else TrialState.COMPLETE
    return create_trial(
        state=state,
        values=[evaluation.metrics[name] for name in run.objectives] if state is TrialState.COMPLETE else None,
        params=genes,
        distributions={gene: IntDistribution(1, highest) for gene in genes},
        user_attrs={
            "genome": evaluation.genome,
            "genome_hash": evaluation.genome_hash,
            "kind": evaluation.kind,
            "name": evaluation.name,
            "generation": evaluation.generation,
            "parents": list(evaluation.parents),
            "status": str(evaluation.status),
            "error": evaluation.error,
            "seconds": evaluation.seconds,
            "front": evaluation.genome_hash in front,
            "metrics": dict(evaluation.metrics),
        },
    )
