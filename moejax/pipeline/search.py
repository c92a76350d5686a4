"""The search for a plan: solve under the budget for several prices of pruning, try each plan out, keep the best.

Predictions order plans well enough to solve by, but the best of several is found by trying: the plan whose true KL
divergence on the probe's text is lowest wins. Fitted routing scales help plans that prune little more than others, so
plans are compared with them.
"""

from dataclasses import dataclass

from moejax.pipeline.activated_experts import try_routing_scales
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import PlannedModel, Trial
from moejax.planning import Plan
from moejax.planning.fit import PRUNING_WEIGHTS, Fitted, Problem
from moejax.progress import Progress


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried: the pruning weight it was solved with, its predicted KL, its true KL on the probe's text
    as it is, and the least of that and the true KL with routing scales fitted, where the recipe lets them be."""

    pruning_weight: float
    plan: Plan
    predicted: float
    divergence: float
    best_divergence: float


def search(problem: Problem, trial: Trial, recipe: Recipe, budget: int, progress: Progress) -> list[Candidate]:
    """Candidate plans within the budget, the best first."""
    if recipe.allocation == "raise":
        raised = problem.fit_raised(budget)
        return [] if raised is None else [try_out(1.0, raised, problem, trial, recipe)]
    tried: list[Candidate] = []
    for weight in progress(PRUNING_WEIGHTS, "trying plans"):
        fitted = problem.fit(budget, weight)
        if fitted is not None and all(fitted.plan != other.plan for other in tried):
            tried.append(try_out(weight, fitted, problem, trial, recipe))
    return sorted(tried, key=lambda candidate: candidate.best_divergence)


def try_out(pruning_weight: float, fitted: Fitted, problem: Problem, trial: Trial, recipe: Recipe) -> Candidate:
    """The plan with its true divergences beside the predicted one; every layer activates as many experts as before."""
    config = trial.model.config
    per_layer = (config.num_experts_per_tok,) * config.num_hidden_layers
    tried = try_routing_scales(PlannedModel(trial, fitted.plan), per_layer, recipe)
    best = min(choice.divergence for choice in tried)
    return Candidate(pruning_weight, fitted.plan, problem.predicted(fitted.losses), tried[0].divergence, best)
