"""Estimated costs: what every format and what pruning would cost a model whose weights are not at hand.

The counterpart of `measure`, from three things that others or we have measured: how sensitive predictions are to
errors of each kind of weight (`Sensitivity`), how often and how strongly experts are chosen (`ExpertScores`), and the
formats' own errors on Gaussian weights:

    cost(weight, format) = KL(weight in IQ1_M) * error(format) / error(IQ1_M)
    cost(one expert's projection, format) = the same of all experts of the layer, times the expert's importance
    cost(pruning) = KL(down projections in IQ1_M) / error(IQ1_M) * R * H * importance of the pruned

IQ1_M's grid holds -1, 0 and 1, so its error is taken to be the ternary format's. R is the layer's output error with
re-routing over the importance lost, H how much more KL an output error of pruning causes than one of rounding; both are
what the tiny checkpoint's layers gave (`tools/bench/pruning.py` prints them). How rounded experts
add up is read off DeepSeek-V3's public quantizations, whose sums these costs are at their sizes.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import Inputs
from moejax.formats import Format, TernaryFormat
from moejax.model import DeepseekV3
from moejax.model.weights import block_name
from moejax.pipeline.options import order_of_pruning
from moejax.pipeline.recipe import Recipe
from moejax.planning.expert_scores import ExpertScores
from moejax.planning.menus import ExpertMenu, Menu, Menus
from moejax.planning.plan import PROJECTIONS
from moejax.planning.predict import Curve, LossCurves
from moejax.planning.sensitivity import Sensitivity
from moejax.transforms.prune import gate_scores
from moejax.transforms.rounding import rounding_errors

REROUTING_RATIO = 1.1
PRUNING_OVER_ROUNDING = 3.8
# Summed costs, 97 % of them of experts, with nothing pruned at 217, 165, 151 and 131 GiB, and ln(PPL / 3.21) of
# DeepSeek-R1-0528 on wikitext-2 in public llama.cpp recipes of those sizes: perplexities 3.43, 4.03, 4.36 and 4.88
# (`tools/bench/deepseek_v3_cost.py --public` prints both).
ESTIMATED_CURVES = LossCurves(experts=Curve(((0.065, 0.066), (0.142, 0.227), (0.176, 0.306), (0.241, 0.419))))
_GAUSSIAN_SHAPE = (256, 1024)
_GROUP_SIZE = 128


def estimate_costs(
    allowed: Menus, model: DeepseekV3, recipe: Recipe, scores: ExpertScores, sensitivity: Sensitivity
) -> Menus:
    """The options `allowed` of an abstract model with estimated costs, whatever number of experts is pruned."""
    config = model.config
    *errors_F, unit = gaussian_errors([*recipe.formats, TernaryFormat(_GROUP_SIZE)])
    relative_F = np.append(np.asarray(errors_F) / unit, 0.0)
    of_weights = np.asarray([sensitivity.of(name, config) for name in allowed.names])
    tensors = _costing(allowed.tensors, of_weights, relative_F)
    experts = {}
    for block, menu in allowed.experts.items():
        own_name = block_name(block, config.num_hidden_layers)
        of = {name: sensitivity.of(f"{own_name}.mlp.experts.{name}", config) for name in PROJECTIONS}
        importance_E = scores.importance(block)
        menus = {name: _costing(menu.menus[name], of[name] * importance_E, relative_F) for name in PROJECTIONS}
        order = order_of_pruning(_scores(scores, block, recipe.criterion), config, recipe)
        lost = np.concatenate([[0.0], np.cumsum(importance_E[order])])
        cost = of["down"] / unit * REROUTING_RATIO * PRUNING_OVER_ROUNDING * lost
        experts[block] = ExpertMenu(menus, order, cost)
    return replace(allowed, tensors=tensors, experts=experts)


def gaussian_errors(formats: Sequence[Format], seed: int = 0) -> np.ndarray:
    """E|w - q|^2 / E|w|^2 of weights drawn from a Gaussian, (F,), rounded as `quantize` rounds."""
    weight = jax.random.normal(jax.random.key(seed), _GAUSSIAN_SHAPE)
    outputs, inputs = _GAUSSIAN_SHAPE
    errors_F = rounding_errors(weight, Inputs(jnp.ones(inputs)), formats, jnp.ones(outputs))
    return errors_F / float(jnp.sum(weight**2))


def criterion_of(recipe: Recipe) -> str:
    """By what experts are pruned: the recipe's criterion if gate weights alone decide it, else squared gate weights."""
    return recipe.criterion if recipe.criterion in gate_scores(np.ones(1), np.ones(1)) else "squared gate weights"


def _scores(scores: ExpertScores, block: int, criterion: str) -> np.ndarray:
    by_gate = gate_scores(scores.count[block], scores.gate_mass[block])
    return by_gate.get(criterion, scores.importance(block))


def _costing(menu: Menu, unit_N: np.ndarray, relative_F: np.ndarray) -> Menu:
    return replace(menu, cost_NF=menu.cost_NF + unit_N[:, None] * relative_F)
