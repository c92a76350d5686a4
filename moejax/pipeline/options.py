"""What may be done to a model: every weight's formats with their exact bytes, and how many experts can go.

Shapes alone decide it, so it is known before any weight is read; `measure` adds what each option costs.
"""

import math
from dataclasses import replace

import jax
import numpy as np

from moejax.errors import InputError
from moejax.formats import ExpertWeights, Leaf, payload_bytes
from moejax.model import Config, DeepseekV3, named_leaves
from moejax.model.leaves import Weight
from moejax.model.weights import Layout, block_name, row_of
from moejax.pipeline.recipe import Recipe
from moejax.planning.menus import ExpertMenu, Menu, Menus
from moejax.planning.plan import PROJECTIONS
from moejax.transforms.prune import min_per_group, pruning_order


def options(model: DeepseekV3, recipe: Recipe) -> Menus:
    """All options of a model, concrete or abstract, with no cost yet: 0 if allowed, infinite if not."""
    leaves, weights, layers = named_leaves(model), quantizable(model), model.config.num_hidden_layers
    rows = [_options_of(leaf, _min_bits(name, model, recipe), recipe) for name, leaf in weights.items()]
    order = order_of_pruning(np.zeros(model.config.n_routed_experts), model.config, recipe)
    counts = allowed_counts(order, model.config, recipe)
    experts = {
        i: ExpertMenu(_expert_menus(leaves, f"{block_name(i, layers)}.mlp.experts", recipe), order, counts)
        for i in moe_blocks(model)
    }
    return Menus(tuple(weights), _menu(rows, recipe), experts, layers)


def quantizable(model: DeepseekV3) -> dict[str, Leaf]:
    """The weights outside the routed experts that may be rounded: all matrices but the routers."""
    return {name: leaf for name, leaf in named_leaves(model).items() if row_of(name).may_be_rounded}


def moe_blocks(model: DeepseekV3) -> list[int]:
    """The blocks that have experts, MTP blocks counted behind the layers."""
    return [i for i in range(model.config.num_blocks) if model.config.is_moe(i)]


def order_of_pruning(
    scores_E: np.ndarray, config: Config, recipe: Recipe, protected_E: np.ndarray | None = None
) -> np.ndarray:
    """Which expert of a layer goes first, second, ...: as far as routing and the recipe let them."""
    group_E = np.arange(config.n_routed_experts) // (config.n_routed_experts // config.n_group)
    at_least = min_per_group(config, config.num_experts_per_tok)
    return pruning_order(scores_E, group_E, at_least, protected_E, recipe.groups == "equal")


def allowed_counts(order: np.ndarray, config: Config, recipe: Recipe) -> np.ndarray:
    """0 where the first n = 0 .. len(order) of an order may be pruned, infinity where the recipe forbids that number.

    All experts may stay, also where they are not a multiple of `bucket_multiple`. Raises InputError if the recipe keeps
    a share of experts that routing does not do with.
    """
    every = config.n_routed_experts
    kept = every - np.arange(every + 1)
    allowed = (kept % recipe.bucket_multiple == 0) | (kept == every)
    if recipe.groups == "equal":
        allowed &= kept % config.n_group == 0
    if recipe.share_kept is not None:
        share = np.min(kept[allowed & (kept >= math.ceil(recipe.share_kept * every))])
        allowed &= kept == share
        if share < every - len(order):
            raise InputError(
                f"share_kept {recipe.share_kept} keeps {share} of {every} experts; routing needs at least "
                f"{every - len(order)} of them"
            )
    return np.where(allowed[: len(order) + 1], 0.0, np.inf)


def pruned_count(allowed: np.ndarray, share: float) -> int:
    """Of the numbers of experts that may be pruned (0 in `allowed`), the one at that share of their range."""
    counts = np.flatnonzero(np.isfinite(allowed))
    return int(counts[round(share * (len(counts) - 1))])


def limited_counts(costs: Menus, config: Config, recipe: Recipe) -> Menus:
    """The same costs, infinite for numbers of pruned experts that the recipe forbids. Raises as `allowed_counts`."""
    experts = {
        block: replace(menu, pruning_cost=menu.pruning_cost + allowed_counts(menu.order, config, recipe))
        for block, menu in costs.experts.items()
    }
    return replace(costs, experts=experts)


def _expert_menus(leaves: dict[str, Weight], experts: str, recipe: Recipe) -> dict[str, Menu]:
    menus = {}
    for projection in PROJECTIONS:
        weights = leaves[f"{experts}.{projection}"]
        assert isinstance(weights, ExpertWeights)
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), weights.buckets[0])
        menus[projection] = _menu([_options_of(one, 1, recipe)] * weights.num_experts, recipe)
    return menus


def _options_of(leaf: Leaf, min_bits: int, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and costs (F,) of one weight."""
    as_it_is = payload_bytes(leaf)
    sizes, costs = [], []
    for candidate in recipe.formats:
        size = payload_bytes(candidate.abstract(leaf.shape))
        sizes.append(size)
        costs.append(0.0 if candidate.bits >= min_bits and size < as_it_is else np.inf)
    return np.asarray([*sizes, as_it_is]), np.asarray([*costs, 0.0])


def _menu(rows: list[tuple[np.ndarray, np.ndarray]], recipe: Recipe) -> Menu:
    return Menu(recipe.names, np.stack([size for size, _ in rows]), np.stack([cost for _, cost in rows]))


def _min_bits(name: str, model: DeepseekV3, recipe: Recipe) -> int:
    return recipe.min_bits_outer if Layout(model.config).is_outer(name) else recipe.min_bits_block
