"""What pruning costs every layer: experts are masked, so that tokens re-route, and the layer is run again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from moejax.model import named_leaves
from moejax.model.moe import MoE
from moejax.pipeline.options import allowed_counts, moe_blocks, order_of_pruning
from moejax.pipeline.probe import Probe
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Trial
from moejax.pipeline.working_copy import with_leaves
from moejax.planning.costs import Costs
from moejax.progress import Progress
from moejax.transforms.prune import masked_bias, pruning_scores, super_experts
from moejax.transforms.pruning_error import PruningError, pruning_error

# Pruning is probed at so many counts per layer, spread evenly, and interpolated between them.
_PROBES = 6


@dataclass(frozen=True)
class PruningProbe:
    """One layer with so many of its experts masked: the model's true KL, and the layer's own errors (floats)."""

    block: int
    pruned: int
    divergence: float
    error: PruningError

    @property
    def rerouting_ratio(self) -> float:
        """The layer's measured error over what its gate weights alone say: rerouted / gate2_lost."""
        return float(self.error.rerouted) / max(float(self.error.gate2_lost), 1e-30)


@dataclass(frozen=True)
class LayerPruning:
    """One layer's order of pruning, the KL of pruning the first n of it, n = 0 .. len(order), infinite where that
    number may not be pruned, and the probes behind it."""

    order: np.ndarray
    cost: np.ndarray
    probes: tuple[PruningProbe, ...]


def measure_pruning(trial: Trial, recipe: Recipe, progress: Progress) -> dict[int, LayerPruning]:
    """By block index. MTP blocks, which the model's predictions do not depend on, take the last layer's costs."""
    model, probe = trial.model, trial.probe
    experts = {i: trial.statistics.blocks[i].experts for i in moe_blocks(model)}
    scores = {i: pruning_scores(own, recipe.criterion) for i, own in experts.items() if own is not None}
    peaks = {i: np.asarray(own.peak_E) for i, own in experts.items() if own is not None}
    protected = super_experts(peaks, model.config.num_hidden_layers) if recipe.protect_super_experts else {}
    measured: dict[int, LayerPruning] = {}
    last = np.zeros(1)
    for i in progress(moe_blocks(model), "measuring pruning"):
        order = order_of_pruning(scores[i], model.config, recipe, protected.get(i))
        allowed = allowed_counts(order, model.config, recipe)
        probes: tuple[PruningProbe, ...] = ()
        if i < len(probe.blocks):
            counts = _probed_counts(allowed)
            found = trial.work.once(f"pruning of block {i}", partial(_probe_pruning, probe, i, order, counts))
            probes = tuple(PruningProbe(i, count, kld, PruningError(*error)) for count, kld, error in found)
            last = _interpolated(probes, len(order))
        cost = last[np.minimum(np.arange(len(order) + 1), len(last) - 1)]
        measured[i] = LayerPruning(order, cost + allowed, probes)
    return measured


def with_pruning(costs: Costs, pruning: Mapping[int, LayerPruning]) -> Costs:
    """The costs with experts pruned in these orders, at these costs."""
    experts = {
        block: replace(menu, order=pruning[block].order, pruning_cost=pruning[block].cost)
        for block, menu in costs.experts.items()
    }
    return replace(costs, experts=experts)


def _probed_counts(allowed: np.ndarray) -> list[int]:
    counts = np.flatnonzero(np.isfinite(allowed))
    counts = counts[counts > 0]
    spread = np.linspace(0, len(counts) - 1, min(_PROBES, len(counts))).round().astype(int)
    return counts[np.unique(spread)].tolist()


def _probe_pruning(
    probe: Probe, index: int, order: np.ndarray, counts: Sequence[int]
) -> list[tuple[int, float, tuple[float, ...]]]:
    """Of the first experts of an order, so many: how many, the divergence, and the layer's errors."""
    block = probe.blocks[index]
    assert isinstance(block.mlp, MoE)
    bias_E, found = named_leaves(block)["mlp.bias"], []
    for count in counts:
        pruned_E = np.isin(np.arange(len(bias_E)), order[:count])
        masked = with_leaves(block, {"mlp.bias": masked_bias(bias_E, pruned_E)})
        error = pruning_error(block.mlp, probe.experts_input(index), jnp.asarray(pruned_E))
        found.append((count, probe.divergence_of_block(index, masked), tuple(map(float, error))))
    return found


def _interpolated(probes: tuple[PruningProbe, ...], most: int) -> np.ndarray:
    """KL of pruning n = 0 .. most, never falling."""
    counts = [0, *(own.pruned for own in probes)]
    divergences = np.maximum.accumulate([0.0, *(own.divergence for own in probes)])
    return np.interp(np.arange(most + 1), counts, divergences)
