"""Measured costs: what every format costs every weight, as KL divergence.

The error of a weight's outputs is computed for every format from calibration's second moments. One probe per weight
(per projection for a layer's experts together) then measures the true KL divergence at one format, and sets the scale:

    cost(format) = KL(probed format) * error(format) / error(probed format)

MTP blocks, which the model's predictions do not depend on, take the scales of the last layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, Statistics
from moejax.formats import ExpertWeights, GroupFormat, Leaf, dense
from moejax.model import DeepseekV3, named_leaves
from moejax.pipeline.options import block_name, moe_blocks, quantizable
from moejax.pipeline.probe import Probe
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Trial
from moejax.pipeline.working_copy import one_bucket, with_leaves
from moejax.planning.costs import Costs, ExpertMenu
from moejax.progress import Progress
from moejax.transforms.quantize import quantization_errors, quantize

# The widths at which probes measure, near those that budgets lead to.
_PROBE_BITS, _EXPERT_PROBE_BITS = 3, 2


def measure_costs(menus: Costs, trial: Trial, recipe: Recipe, progress: Progress) -> Costs:
    """Costs of every format that fits, allowed or not; `menus` has their bytes, and the costs of pruning."""
    model = trial.model
    measured = _Measurement(model, trial.probe, trial.statistics, recipe, named_leaves(model), {})
    cost_NF = np.stack([measured.tensor(name) for name in progress(list(quantizable(model)), "measuring weights")])
    experts: dict[int, ExpertMenu] = {}
    for i in progress(moe_blocks(model), "measuring experts"):
        own = {name: replace(menu, cost_NF=measured.experts(i, name)) for name, menu in menus.experts[i].menus.items()}
        experts[i] = replace(menus.experts[i], menus=own)
    return replace(menus, tensors=replace(menus.tensors, cost_NF=cost_NF), experts=experts)


@dataclass(frozen=True)
class _Measurement:
    """What all measurements share. `scales` collects KL per unit of error by weight's name, for MTP blocks to reuse."""

    model: DeepseekV3
    probe: Probe
    statistics: Statistics
    recipe: Recipe
    leaves: dict[str, Leaf | ExpertWeights]
    scales: dict[str, float]

    def tensor(self, name: str) -> np.ndarray:
        """Costs of one weight outside the routed experts, (F,), KEEP last."""
        leaf = self.leaves[name]
        assert not isinstance(leaf, ExpertWeights)
        weight = dense(leaf, jnp.float32)
        moment, output_weight = self._moments(name, weight)
        error_F = np.sum(self._errors(weight, moment, output_weight), axis=tuple(range(1, weight.ndim - 1)))

        def divergence(to: GroupFormat) -> float:
            return self._divergence(name, dense(quantize(weight, moment, to), jnp.float32))

        return self._scaled(name, error_F, _PROBE_BITS, divergence)

    def experts(self, index: int, projection: str) -> np.ndarray:
        """Costs of one projection of every expert of a block, (E, F), KEEP last."""
        name = f"{block_name(self.model, index)}.mlp.experts.{projection}"
        weights, sums = self.leaves[name], self.statistics.blocks[index].experts
        assert isinstance(weights, ExpertWeights) and sums is not None
        moment_EI = sums.input_second_moment(projection)
        output_EO = sums.output_weight(projection, self._down_norm2(index))
        output_EO = jnp.broadcast_to(output_EO, weights.shape[:2])
        each = [dense(weights.expert(e), jnp.float32) for e in range(weights.num_experts)]
        error_EF = np.stack([self._errors(w, moment_EI[e], output_EO[e]) for e, w in enumerate(each)])

        def divergence(to: GroupFormat) -> float:
            rounded = jnp.stack([dense(quantize(w, moment_EI[e], to), jnp.float32) for e, w in enumerate(each)])
            return self._divergence(name, one_bucket(rounded))

        total_F = self._scaled(name, error_EF.sum(axis=0), _EXPERT_PROBE_BITS, divergence)
        share_EF = error_EF / np.maximum(error_EF.sum(axis=0), 1e-300)
        return np.concatenate([share_EF * total_F[:-1], np.zeros((len(each), 1))], axis=1)

    def _moments(self, name: str, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Second moment of a weight's input (I,), and what a unit error at each output counts (..., O)."""
        if name == "embed":
            return jnp.ones(weight.shape[-1]), self.statistics.count_C.astype(jnp.float32)
        ones = jnp.ones(weight.shape[:-1])
        if name == "head":
            return self.statistics.head_input2 / self.statistics.tokens, ones
        sums, own = self._sums(name)
        return sums.input_second_moment(own), ones

    def _sums(self, name: str) -> tuple[BlockStatistics, str]:
        kind, index, own = name.split(".", 2)
        layers = self.model.config.num_hidden_layers
        return self.statistics.blocks[int(index) + (layers if kind == "mtp" else 0)], own.removeprefix("block.")

    def _errors(self, weight: jax.Array, moment: jax.Array, output_weight: jax.Array) -> np.ndarray:
        """Error of a weight (..., O, I) at every candidate format, (F, ...); infinite where a format does not fit."""
        formats = self.recipe.formats
        error_F = np.full((len(formats), *weight.shape[:-2]), np.inf)
        for group_size in {candidate.group_size for candidate in formats}:
            chosen = [f for f, own in enumerate(formats) if own.group_size == group_size and own.fits(weight.shape[-1])]
            if chosen:
                levels = jnp.asarray([formats[f].levels for f in chosen], jnp.float32)
                error_F[chosen] = quantization_errors(weight, moment, output_weight, levels, group_size)
        return error_F

    def _down_norm2(self, index: int) -> jax.Array:
        """Squared norms of the columns of every expert's down projection, (E, F)."""
        down = self.leaves[f"{block_name(self.model, index)}.mlp.experts.down"]
        assert isinstance(down, ExpertWeights)
        each = (dense(down.expert(e), jnp.float32) for e in range(down.num_experts))
        return jnp.stack([jnp.sum(w_DF**2, axis=0) for w_DF in each])

    def _scaled(
        self, name: str, error_F: np.ndarray, bits: int, divergence: Callable[[GroupFormat], float]
    ) -> np.ndarray:
        """error_F as KL divergence, and 0 for KEEP."""
        usable = [f for f in range(len(error_F)) if np.isfinite(error_F[f])]
        if not usable:
            return np.append(error_F, 0.0)
        if name.startswith("mtp."):
            scale = self._last_layers_scale(name)
        else:
            probed = min(usable, key=lambda f: abs(self.recipe.formats[f].bits - bits))
            # Rounding makes a tiny divergence negative.
            measured = max(divergence(self.recipe.formats[probed]), 0.0)
            scale = measured / max(float(error_F[probed]), 1e-300)
        self.scales[name] = scale
        return np.append(error_F * scale, 0.0)

    def _last_layers_scale(self, name: str) -> float:
        own = name.split(".", 2)[2].removeprefix("block.").replace("eh_proj", "self_attn.o")
        return self.scales.get(f"layers.{self.model.config.num_hidden_layers - 1}.{own}", 1.0)

    def _divergence(self, name: str, changed: jax.Array | ExpertWeights) -> float:
        if isinstance(changed, jax.Array) and name in ("embed", "head"):
            return getattr(self.probe, {"embed": "divergence_of_embedding", "head": "divergence_of_head"}[name])(
                changed
            )
        index, own = name.removeprefix("layers.").split(".", 1)
        return self.probe.divergence_of_block(int(index), with_leaves(self.probe.blocks[int(index)], {own: changed}))
