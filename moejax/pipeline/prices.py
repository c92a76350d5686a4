"""From what was measured to what the solver weighs: a predicted KL divergence for every format and number of experts.

With y a block's output and spoiled(w) = E |y' - y|^2 / |y|^2 of one with weight w in its family's probed format p,

    cost(w, f) = slope(family, layer) * spoiled(w) * error(w, f) / error(w, p)
    slope(family, layer) = KL(the probe: all weights of the family in that layer in format p) / sum of their spoiled(w)

and so of pruning n experts, with what is spoiled at n. Slopes are interpolated between the layers, and the numbers of
experts pruned, that are probed.
Embedding and head are probed by themselves: cost = KL(p) * error(f) / error(p).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from moejax.model import Config
from moejax.model.weights import block_and_name
from moejax.pipeline.measured import BlockMeasures, Measured, Pruned
from moejax.pipeline.options import allowed_counts, order_of_pruning, pruned_count
from moejax.pipeline.probes import (
    PRUNING,
    Change,
    family_of,
    joint_probes,
    probed_format,
    pruning_probes,
    rounding_probes,
)
from moejax.pipeline.recipe import Recipe
from moejax.planning.menus import ExpertMenu, Menus
from moejax.planning.predict import LossCurves, curve_of
from moejax.transforms.prune import PruningError, super_experts

# Whose cost a weight takes that MTP blocks alone have: another matrix of D outputs.
_STAND_IN = "self_attn.o"


@dataclass(frozen=True)
class PruningProbe:
    """One layer with so many of its experts masked: the KL that is predicted of it, and the layer's own errors."""

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
    number may not be pruned, and what it is known by."""

    order: np.ndarray
    cost: np.ndarray
    probes: tuple[PruningProbe, ...]


class Prices:
    """Costs by the measures of one model, whatever a plan may do; MTP blocks, which the model's predictions do not
    depend on, take the last layer's."""

    def __init__(self, measured: Measured, config: Config, recipe: Recipe):
        self._measured, self._config, self._recipe = measured, config, recipe
        self._slopes = {family: self._slope(by) for family, by in rounding_probes(config, recipe.formats).items()}
        self._pruning_slopes = {share: self._slope(by) for share, by in pruning_probes(config).items()}

    def costs(self, menus: Menus, pruning: Mapping[int, LayerPruning]) -> Menus:
        """Of every format, allowed or not; `menus` has their bytes."""
        cost_NF = np.stack([np.append(self.of_tensor(name), 0.0) for name in menus.names])
        experts = {}
        for block, menu in menus.experts.items():
            own = {
                name: replace(of, cost_NF=np.pad(self.of_weight(block, f"mlp.experts.{name}"), ((0, 0), (0, 1))))
                for name, of in menu.menus.items()
            }
            experts[block] = ExpertMenu(own, pruning[block].order, pruning[block].cost)
        return replace(menus, tensors=replace(menus.tensors, cost_NF=cost_NF), experts=experts)

    def of_tensor(self, name: str) -> np.ndarray:
        """Costs of a weight outside the routed experts, by its name in the model, (F,)."""
        block, own = block_and_name(name, self._config.num_hidden_layers)
        if block is not None:
            return self.of_weight(block, own)
        family, error_F = family_of(name), self._measured.outer[name]
        probed = probed_format(family, self._recipe.formats)
        return error_F * (self._slopes[family](-1) / max(error_F[probed], 1e-300))

    def of_weight(self, block: int, own: str) -> np.ndarray:
        """Costs of a weight in a block, (F,), or (E, F)."""
        return self._measured.blocks[block].errors[own] * self._unit(block, own)

    def pruning(self) -> dict[int, LayerPruning]:
        """By block with experts. Experts whose outputs reach extremes stay if the recipe says so; which they are is
        known behind the last layer, so what pruning spoils was measured as if they did not."""
        layers = self._config.num_hidden_layers
        peaks = {i: own.peak_E for i, own in self._measured.blocks.items() if own.peak_E is not None}
        protected = super_experts(peaks, layers) if self._recipe.protect_super_experts else {}
        priced: dict[int, LayerPruning] = {}
        last = np.zeros(1)
        for i, own in self._measured.blocks.items():
            if own.scores_E is None:
                continue
            order = order_of_pruning(own.scores_E, self._config, self._recipe, protected.get(i))
            probes = tuple(PruningProbe(i, at.count, self._of_pruned(i, at), at.error) for at in own.pruned)
            if i < layers:
                last = _interpolated(probes, len(own.scores_E))
            cost = last[np.minimum(np.arange(len(order) + 1), len(last) - 1)]
            priced[i] = LayerPruning(order, cost + allowed_counts(order, self._config, self._recipe), probes)
        return priced

    def curves(self) -> LossCurves:
        """How losses add up: the joint probes beside the sums of what they are predicted to cost one at a time."""
        found = {}
        for kind, changes in joint_probes(self._config, self._recipe.formats).items():
            together = [self._measured.divergence.get(change.name, 0.0) for change in changes]
            found[kind] = curve_of([self._sum(change) for change in changes], together)
        return LossCurves(**found)

    def _sum(self, change: Change) -> float:
        """What a joint probe's changes are predicted to cost, one at a time."""
        layers = {i: own for i, own in self._measured.blocks.items() if i in change.layers}
        if PRUNING in change.families:
            return sum(self._of_pruned(i, self._probed(own, change)) for i, own in layers.items() if own.pruned)
        f = int(change.level)
        outer = [name for name in self._measured.outer if family_of(name) in change.families]
        inside = [(i, own) for i, block in layers.items() for own in block.errors if family_of(own) in change.families]
        return sum(float(self.of_tensor(name)[f]) for name in outer) + sum(
            float(np.sum(self.of_weight(i, own)[..., f])) for i, own in inside
        )

    def _unit(self, block: int, own: str) -> float:
        """KL per unit of a weight's error, or of those of a projection's experts together."""
        last = self._config.num_hidden_layers - 1
        if block > last:
            return self._unit(last, own if own in self._measured.blocks[last].errors else _STAND_IN)
        family, measures = family_of(own), self._measured.blocks[block]
        probed = probed_format(family, self._recipe.formats)
        error = float(np.sum(measures.errors[own][..., probed]))
        return self._slopes[family](block) * measures.spoiled[own] / max(error, 1e-300)

    def _of_pruned(self, block: int, pruned: Pruned) -> float:
        own = self._measured.blocks[block]
        counts = {share: self._count(own, share) for share in self._pruning_slopes}
        known = {count: self._pruning_slopes[share](block) for share, count in counts.items() if count > 0}
        return float(np.interp(pruned.count, list(known), list(known.values()))) * pruned.spoiled

    def _slope(self, probes: Mapping[int, Change]) -> Callable[[int], float]:
        """From a layer to KL per share of the block's output spoiled; of embedding and head the KL itself."""
        layers = list(probes)
        slopes = [self._slope_at(layer, change) for layer, change in probes.items()]
        return lambda layer: float(np.interp(layer, layers, slopes))

    def _slope_at(self, layer: int, change: Change) -> float:
        # Rounding makes a tiny divergence negative.
        measured = max(self._measured.divergence.get(change.name, 0.0), 0.0)
        if not change.layers:
            return measured
        own = self._measured.blocks[layer]
        if PRUNING in change.families:
            spoiled = self._probed(own, change).spoiled
        else:
            spoiled = sum(share for name, share in own.spoiled.items() if family_of(name) in change.families)
        return measured / max(spoiled, 1e-300)

    def _probed(self, own: BlockMeasures, change: Change) -> Pruned:
        """What is known of a layer's pruning at the number of experts that a probe prunes."""
        count = self._count(own, change.level)
        return next((at for at in own.pruned if at.count == count), _nothing())

    def _count(self, own: BlockMeasures, share: float) -> int:
        assert own.scores_E is not None
        order = order_of_pruning(own.scores_E, self._config, self._recipe)
        return pruned_count(allowed_counts(order, self._config, self._recipe), share)


def _interpolated(probes: Sequence[PruningProbe], most: int) -> np.ndarray:
    """KL of pruning n = 0 .. most, never falling."""
    counts = [0, *(own.pruned for own in probes)]
    divergences = np.maximum.accumulate([0.0, *(own.divergence for own in probes)])
    return np.interp(np.arange(most + 1), counts, divergences)


def _nothing() -> Pruned:
    """That no expert is pruned."""
    return Pruned(0, PruningError(*[jnp.zeros(())] * 4), 0.0)
