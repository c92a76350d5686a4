"""Measured costs: what every format costs every weight, as KL divergence.

Every weight is rounded to every format, as it will be if the plan says so, and the error of its outputs follows from
what calibration collected. One probe per weight (per projection for a layer's experts together) then measures the true
KL divergence at one format, and sets the scale:

    cost(format) = KL(probed format) * error(format) / error(probed format)

MTP blocks, which the model's predictions do not depend on, take the scales of the last layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import Inputs
from moejax.errors import InputError
from moejax.formats import ExpertWeights, GroupFormat, Leaf
from moejax.kernels import hadamard
from moejax.model import named_leaves
from moejax.model.weights import block_and_name, block_name, in_mtp_block, row_of
from moejax.pipeline.options import moe_blocks, quantizable
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Trial
from moejax.pipeline.working_copy import one_bucket, with_leaves
from moejax.planning.costs import Costs, ExpertMenu
from moejax.progress import Progress
from moejax.transforms.compress import embedding_inputs
from moejax.transforms.compress_block import experts_together, requantize_experts, requantize_once
from moejax.transforms.rounding import rounding_error, to_float32

# The widths at which probes measure, near those that budgets lead to.
_PROBE_BITS, _EXPERT_PROBE_BITS = 3, 2


def measure_costs(menus: Costs, trial: Trial, recipe: Recipe, progress: Progress) -> Costs:
    """Costs of every format, allowed or not; `menus` has their bytes, and the costs of pruning."""
    model = trial.model
    measured = _Measurement(trial, recipe, named_leaves(model), {})
    cost_NF = np.stack([measured.tensor(name) for name in progress(list(quantizable(model)), "measuring weights")])
    experts: dict[int, ExpertMenu] = {}
    for i in progress(moe_blocks(model), "measuring experts"):
        own = {name: replace(menu, cost_NF=measured.experts(i, name)) for name, menu in menus.experts[i].menus.items()}
        experts[i] = replace(menus.experts[i], menus=own)
    return replace(menus, tensors=replace(menus.tensors, cost_NF=cost_NF), experts=experts)


@dataclass(frozen=True)
class _Measurement:
    """What all measurements share. `scales` collects KL per unit of error by weight's name, for MTP blocks to reuse.

    Errors and costs are by format, (F,), or by expert and format, (E, F); costs have KEEP behind them.
    """

    trial: Trial
    recipe: Recipe
    leaves: dict[str, Leaf | ExpertWeights]
    scales: dict[str, float]

    @property
    def num_layers(self) -> int:
        return self.trial.model.config.num_hidden_layers

    def tensor(self, name: str) -> np.ndarray:
        """Costs of one weight outside the routed experts."""
        return self._once(name, partial(self._of_tensor, name))

    def experts(self, index: int, projection: str) -> np.ndarray:
        """Costs of one projection of every expert of a block."""
        return self._once(self._experts_name(index, projection), partial(self._of_experts, index, projection))

    def _once(self, name: str, find: Callable[[], tuple[np.ndarray, float]]) -> np.ndarray:
        """Costs that, with their scale, may be known of an earlier run."""

        def found() -> tuple[list[Any], float]:
            costs, scale = find()
            return costs.tolist(), scale

        costs, self.scales[name] = self.trial.work.once(f"costs of {name}", found)
        return np.asarray(costs)

    def _of_tensor(self, name: str) -> tuple[np.ndarray, float]:
        leaf = self.leaves[name]
        assert not isinstance(leaf, ExpertWeights)
        inputs, output_weight = self._inputs(name, leaf)

        def rounded(to: GroupFormat) -> Leaf:
            return requantize_once(self.trial.rounder, name, leaf, inputs, to.name)

        def divergence(to: GroupFormat) -> float:
            return self._divergence(name, to_float32(rounded(to)))

        (error_F,) = self._errors([name], [leaf], lambda to: [rounded(to)], [inputs], [output_weight])
        scale = self._scale(name, error_F, _PROBE_BITS, divergence)
        return np.append(error_F * scale, 0.0), scale

    def _of_experts(self, index: int, projection: str) -> tuple[np.ndarray, float]:
        name = self._experts_name(index, projection)
        weights, sums = self.leaves[name], self.trial.statistics.blocks[index].experts
        assert isinstance(weights, ExpertWeights) and sums is not None
        output_EO = jnp.broadcast_to(sums.output_weight(projection, self._down_norm2(index)), weights.shape[:2])

        def rounded(members: Sequence[int], to: GroupFormat) -> list[Leaf]:
            def afresh(some: Sequence[int]) -> list[Leaf]:
                own = [members[k] for k in some]
                return requantize_experts(weights, sums, projection, to.name, own, own)

            return self.trial.rounder([f"{name}.{e}" for e in members], to.name, afresh)

        def divergence(to: GroupFormat) -> float:
            each = [to_float32(leaf) for leaf in rounded(range(weights.num_experts), to)]
            return self._divergence(name, one_bucket(jnp.stack(each)))

        def errors(members: Sequence[int]) -> np.ndarray:
            leaves, inputs = [weights.expert(e) for e in members], [sums.inputs(projection, e) for e in members]
            names = [f"{name} of expert {e}" for e in members]
            return self._errors(names, leaves, partial(rounded, members), inputs, [output_EO[e] for e in members])

        every, together = range(weights.num_experts), experts_together(weights)
        error_EF = np.concatenate([errors(every[e : e + together]) for e in every[::together]])
        total_F = error_EF.sum(axis=0)
        scale = self._scale(name, total_F, _EXPERT_PROBE_BITS, divergence)
        share_EF = error_EF / np.maximum(total_F, 1e-300)
        return np.concatenate([share_EF * (total_F * scale), np.zeros((weights.num_experts, 1))], axis=1), scale

    def _experts_name(self, index: int, projection: str) -> str:
        return f"{block_name(index, self.num_layers)}.mlp.experts.{projection}"

    def _inputs(self, name: str, leaf: Leaf) -> tuple[Inputs, jax.Array]:
        """A weight's input, and what a unit error at each output counts (..., O)."""
        statistics, ones = self.trial.statistics, jnp.ones(leaf.shape[:-1])
        block, own = block_and_name(name, self.num_layers)
        if block is not None:
            return statistics.blocks[block].inputs(own), ones
        if row_of(name).role == "embedding":
            return embedding_inputs(self.trial.model.config), statistics.count_C.astype(jnp.float32)
        return statistics.head_inputs(), ones

    def _errors(
        self,
        names: Sequence[str],
        leaves: Sequence[Leaf],
        rounded: Callable[[GroupFormat], list[Leaf]],
        inputs: Sequence[Inputs],
        output_weights: Sequence[jax.Array],
    ) -> np.ndarray:
        """Errors of weights of one shape at every candidate format, (B, F)."""
        dense_B = [to_float32(leaf) for leaf in leaves]
        error_BF = np.empty((len(leaves), len(self.recipe.formats)))
        for f, to in enumerate(self.recipe.formats):
            cases = zip(dense_B, map(to_float32, rounded(to)), inputs, output_weights, strict=True)
            error_BF[:, f] = [rounding_error(*case) for case in cases]
        for name, matrix, error_F in zip(names, dense_B, error_BF, strict=True):
            if not np.all(np.isfinite(error_F)):
                raise InputError(
                    f"{name}: its largest weight is {float(jnp.max(jnp.abs(matrix))):.3g}, and the error of rounding "
                    "it is not finite; a checkpoint whose weights are sound is needed"
                )
        return error_BF

    def _down_norm2(self, index: int) -> jax.Array:
        """Squared norms of what a unit of every product of gate and up becomes in the output, (E, F)."""
        down = self.leaves[self._experts_name(index, "down")]
        assert isinstance(down, ExpertWeights)
        each = (to_float32(down.expert(e)) for e in range(down.num_experts))
        if self.trial.model.config.down_input_transform:
            each = (hadamard(w_DF, inverse=True) for w_DF in each)
        return jnp.stack([jnp.sum(w_DF**2, axis=0) for w_DF in each])

    def _scale(self, name: str, error_F: np.ndarray, bits: int, divergence: Callable[[GroupFormat], float]) -> float:
        """KL divergence per unit of error, measured at the format nearest to so many bits."""
        if in_mtp_block(name):
            return self._last_layers_scale(name)
        probed = min(range(len(error_F)), key=lambda f: abs(self.recipe.formats[f].bits - bits))
        # Rounding makes a tiny divergence negative.
        measured = max(divergence(self.recipe.formats[probed]), 0.0)
        return measured / max(float(error_F[probed]), 1e-300)

    def _last_layers_scale(self, name: str) -> float:
        _, own = block_and_name(name, self.num_layers)
        last = block_name(self.num_layers - 1, self.num_layers)
        return self.scales.get(f"{last}.{'self_attn.o' if own == 'eh_proj' else own}", 1.0)

    def _divergence(self, name: str, changed: jax.Array | ExpertWeights) -> float:
        probe = self.trial.probe
        block, own = block_and_name(name, self.num_layers)
        if block is not None:
            return probe.divergence_of_block(block, with_leaves(probe.blocks[block], {own: changed}))
        assert isinstance(changed, jax.Array)
        is_embedding = row_of(name).role == "embedding"
        return (probe.divergence_of_embedding if is_embedding else probe.divergence_of_head)(changed)
