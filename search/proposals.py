"""Genomes to train, asked of an optimizer; what breaks the budget by its sizes alone is not among them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import nevergrad as ng

from search.ask_tell import AskTell
from search.data import Corpus
from search.evaluate import Outcome, count_metrics
from search.evaluation import Evaluation, Status
from search.settings import Settings
from search.space import GenomeParameter
from search.stages import Request, Stages

REJECTIONS_PER_PLACE = 50
"""Genomes over the budget that are looked at for each that is wanted; then there are fewer. Counting a genome of 8 LIVs
takes 16 ms, so that a generation of 12 looks for 10 s at most."""


class Proposals:
    """Asks for candidates.

    Args:
        settings: Of the search.
        stages: Whose log and view learn of genomes that are not trained.
        optimizer: Who is asked.
        names: Names of genomes, by their hash.
    """

    def __init__(self, settings: Settings, stages: Stages, optimizer: AskTell, names: Mapping[str, str]) -> None:
        self.optimizer = optimizer
        self._settings, self._stages, self._names = settings, stages, names
        self._vocab_size = Corpus.load(stages.store.work).vocab_size if settings.counted else 0

    def request(self, candidate: GenomeParameter, generation: int) -> Request:
        """Return what is to be evaluated of a candidate."""
        genome = candidate.value
        return Request(
            genome,
            generation,
            name=self._names.get(genome.hash),
            parents=candidate.parent_hashes,
            repaired=candidate.repaired,
            mutations=candidate.mutations,
        )

    def ask(self, generation: int, places: int) -> list[GenomeParameter]:
        """Ask for so many candidates to train; a space that is used up gives fewer, or none.

        What breaks the budget by its sizes is logged, told by how much, and not among them: it costs nothing, and
        evolution finds its way into the budget by it.
        """
        candidates: list[GenomeParameter] = []
        rejections: list[Evaluation] = []
        settings, stages, ranking = self._settings, self._stages, self._settings.ranking
        tries = places * (1 + (REJECTIONS_PER_PLACE if settings.counted else 0))
        with suppress(ng.errors.NevergradEarlyStopping):
            while len(candidates) < places and len(candidates) + len(rejections) < tries:
                candidate = self.optimizer.ask()
                rejection = self._rejected(self.request(candidate, generation)) if settings.counted else None
                if rejection is None:
                    candidates.append(candidate)
                else:
                    violation = ranking.violation(rejection.metrics)
                    self.optimizer.tell(candidate, None, violation, tier=settings.rungs - 1)
                    candidate.learn_outcome(False)
                    rejections.append(rejection)
                    stages.view.rejected(rejection)
        new = (one for one in rejections if stages.store.find(one.genome_hash) is None)
        stages.store.add(*new)
        return candidates

    def _rejected(self, request: Request) -> Evaluation | None:
        """Return the evaluation of a genome whose sizes break the budget; None for one to be trained, or that was."""
        settings = self._settings
        known = self._stages.store.find(request.genome_hash)
        if known is not None:
            return known if known.status is Status.OVER_BUDGET else None
        try:
            metrics = count_metrics(request.genome, settings, self._vocab_size)
        except ValueError:
            return None  # no model has these genes: training says so, with the reason
        reason = settings.ranking.reason(metrics)
        return request.evaluation(Outcome(Status.OVER_BUDGET, metrics, 0.0, reason), settings) if reason else None
