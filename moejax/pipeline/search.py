"""The search for a plan: solve under the budget for several prices of pruning, try each plan out, keep the best.

Predictions order plans well enough to solve by, but the best of several is found by trying: the plan whose true KL
divergence on the probe's text is lowest wins.
"""

from dataclasses import dataclass

from moejax.pipeline.trial import Trial
from moejax.planning import Plan
from moejax.planning.fit import PRUNING_WEIGHTS, Fitted, Problem
from moejax.progress import Progress


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried, the pruning weight it was solved with, its predicted and true KL on the probe's text."""

    pruning_weight: float
    plan: Plan
    predicted: float
    divergence: float


def search(problem: Problem, trial: Trial, budget: int, progress: Progress) -> list[Candidate]:
    """Candidate plans within the budget, the best first."""
    tried: list[Candidate] = []
    for weight in progress(PRUNING_WEIGHTS, "trying plans"):
        fitted = problem.fit(budget, weight)
        if fitted is not None and all(fitted.plan != other.plan for other in tried):
            tried.append(try_out(weight, fitted, problem, trial))
    return sorted(tried, key=lambda candidate: candidate.divergence)


def try_out(pruning_weight: float, fitted: Fitted, problem: Problem, trial: Trial) -> Candidate:
    """The plan with its true divergence beside the predicted one."""
    return Candidate(pruning_weight, fitted.plan, problem.predicted(fitted.losses), trial.divergence(fitted.plan))
