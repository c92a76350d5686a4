"""How many experts a token goes to after pruning, and with what routing scale: tried out, the best kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moejax.errors import InputError
from moejax.model import Config
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Trials, Try
from moejax.planning import Plan
from moejax.progress import Progress
from moejax.transforms.experts_per_token import paper_rule


@dataclass(frozen=True)
class ActivatedExperts:
    """K' and a routing scale per layer (the model's K and 1 in dense layers), and their true KL on the probe's text."""

    experts_per_token: tuple[int, ...]
    routing_scales: tuple[float, ...]
    divergence: float

    @property
    def is_scaled(self) -> bool:
        return any(scale != 1.0 for scale in self.routing_scales)


def candidates(recipe: Recipe, config: Config, kept: Sequence[int]) -> list[tuple[int, ...]]:
    """The K' that a recipe lets be tried, one per layer with its number of experts kept (any in dense layers).

    Raises InputError if it asks for more than the model's K.
    """
    full, asked = config.num_experts_per_tok, recipe.experts_per_token
    paper = tuple(paper_rule(full, count / config.n_routed_experts) for count in kept)
    if asked == "paper":
        return [paper]
    if asked == "measured":
        return sorted({(full,) * len(kept), (max(1, full - 1),) * len(kept), paper})
    if asked > full:
        raise InputError(f"the recipe asks for {asked} experts per token; the model has {full}, and fewer can be taken")
    return [(asked,) * len(kept)]


def try_activated_experts(trials: Trials, plan: Plan, recipe: Recipe, progress: Progress) -> list[ActivatedExperts]:
    """The recipe's K', each without and, if it lets it, with the least-squares routing scale; the best first."""
    config = trials.source.config
    layers = plan.blocks[: config.num_hidden_layers]
    kept = [config.n_routed_experts if own.keep is None else len(own.keep) for own in layers]
    (tried,) = try_plans(trials, [plan], candidates(recipe, config, kept), recipe, progress)
    return sorted(tried, key=lambda choice: choice.divergence)


def try_plans(
    trials: Trials, plans: Sequence[Plan], per_layers: Sequence[tuple[int, ...]], recipe: Recipe, progress: Progress
) -> list[list[ActivatedExperts]]:
    """Every plan with each of these K', one a layer, with a routing scale of 1 and, if the recipe lets it, with the
    least-squares one."""
    scalings = (False, True) if recipe.fit_routing_scale else (False,)
    tries = [Try(plan, own, is_scaled) for plan in plans for own in per_layers for is_scaled in scalings]
    found = iter(zip(tries, trials.of(tries, progress), strict=True))
    by_plan = [[next(found) for _ in per_layers for _ in scalings] for _ in plans]
    return [[ActivatedExperts(own.experts_per_token, *found) for own, found in each] for each in by_plan]


def with_activated_experts(plan: Plan, choice: ActivatedExperts) -> Plan:
    """The plan with those K' and routing scales; MTP blocks take the last layer's."""
    last = len(choice.routing_scales) - 1
    blocks = tuple(
        block
        if block.keep is None
        else replace(
            block,
            experts_per_token=choice.experts_per_token[min(i, last)],
            routing_scale=choice.routing_scales[min(i, last)],
        )
        for i, block in enumerate(plan.blocks)
    )
    return replace(plan, blocks=blocks)
