"""The search for a plan: solve under the budget for several prices of pruning, try each plan out, keep the best.

Predictions order plans well enough to solve by, but the best of several is found by trying: the plan whose true KL
divergence on the probe's text is lowest wins. Fitted routing scales help plans that prune little more than others, so
plans are compared with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moejax.pipeline.activated_experts import try_plans
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Trials
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


def search(problem: Problem, trials: Trials, recipe: Recipe, budget: int, progress: Progress) -> list[Candidate]:
    """Candidate plans within the budget, the best first."""
    if recipe.allocation == "raise":
        raised = problem.fit_raised(budget)
        return [] if raised is None else try_out({1.0: raised}, problem, trials, recipe, progress)
    found: dict[float, Fitted] = {}
    for weight in PRUNING_WEIGHTS:
        fitted = problem.fit(budget, weight)
        if fitted is not None and all(fitted.plan != other.plan for other in found.values()):
            found[weight] = fitted
    return try_out(found, problem, trials, recipe, progress)


def try_out(
    found: Mapping[float, Fitted], problem: Problem, trials: Trials, recipe: Recipe, progress: Progress
) -> list[Candidate]:
    """Plans by the pruning weight they were solved with, with their true divergences beside the predicted ones, the
    best first; every layer activates as many experts as before."""
    config = trials.source.config
    per_layer = (config.num_experts_per_tok,) * config.num_hidden_layers
    tried = try_plans(trials, [own.plan for own in found.values()], [per_layer], recipe, progress)
    candidates = [
        Candidate(
            weight,
            own.plan,
            problem.predicted(own.losses),
            choices[0].divergence,
            min(choice.divergence for choice in choices),
        )
        for (weight, own), choices in zip(found.items(), tried, strict=True)
    ]
    return sorted(candidates, key=lambda candidate: candidate.best_divergence)
