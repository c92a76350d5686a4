"""How many experts a token goes to after pruning, and with what routing scale: tried out, the best kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from moejax.errors import InputError
from moejax.model import Config
from moejax.model.deepseek_v3 import Block
from moejax.model.moe import MoE
from moejax.pipeline.probe import Probe
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import PlannedModel, Trial
from moejax.pipeline.working_copy import with_leaves
from moejax.planning import Plan
from moejax.planning.plan import digest
from moejax.progress import Progress
from moejax.transforms.experts_per_token import fit_routing_scale, paper_rule


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


def try_activated_experts(trial: Trial, plan: Plan, recipe: Recipe, progress: Progress) -> list[ActivatedExperts]:
    """The recipe's K', each without and, if it lets it, with the least-squares routing scale; the best first."""
    config, planned = trial.model.config, PlannedModel(trial, plan)
    layers = plan.blocks[: config.num_hidden_layers]
    kept = [config.n_routed_experts if own.keep is None else len(own.keep) for own in layers]
    tried = []
    for per_layer in progress(candidates(recipe, config, kept), "trying experts per token"):
        tried += try_routing_scales(planned, per_layer, recipe)
    return sorted(tried, key=lambda choice: choice.divergence)


def try_routing_scales(planned: PlannedModel, per_layer: tuple[int, ...], recipe: Recipe) -> list[ActivatedExperts]:
    """K' `per_layer` with a routing scale of 1 and, if the recipe lets it, with the least-squares one."""
    name = f"plan {digest(planned.plan)} with {per_layer} experts per token"
    found = planned.trial.work.once(name, lambda: _tried_scales(planned, per_layer, recipe))
    return [ActivatedExperts(per_layer, tuple(scales), divergence) for scales, divergence in found]


def _tried_scales(
    planned: PlannedModel, per_layer: tuple[int, ...], recipe: Recipe
) -> list[tuple[tuple[float, ...], float]]:
    """Routing scales and the divergence with them."""
    blocks = planned.blocks
    scalings = [(1.0,) * len(blocks)]
    if recipe.fit_routing_scale:
        own_blocks = enumerate(zip(blocks, per_layer, strict=True))
        scalings.append(tuple(_fitted_scale(planned.trial.probe, i, *own) for i, own in own_blocks))
    found = []
    for scales in dict.fromkeys(scalings):
        adjusted = [_adjusted(*own) for own in zip(blocks, per_layer, scales, strict=True)]
        found.append((scales, planned.divergence_with(adjusted)))
    return found


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


def _adjusted(block: Block, experts_per_token: int, scale: float) -> Block:
    if not isinstance(block.mlp, MoE):
        return block
    return with_leaves(block, {"mlp.routing_scale": jax.numpy.float32(scale)}, experts_per_token)


def _fitted_scale(probe: Probe, index: int, block: Block, experts_per_token: int) -> float:
    original = probe.blocks[index]
    if not isinstance(original.mlp, MoE):
        return 1.0
    fewer = _adjusted(block, experts_per_token, 1.0).mlp
    scale = fit_routing_scale(original.mlp, fewer, probe.experts_input(index))
    return round(float(scale), 4)
