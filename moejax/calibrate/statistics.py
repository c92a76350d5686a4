"""What calibration remembers: sums (and a peak) over tokens, from which scores and weights of errors are made."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp

from moejax.model.moe import ExpertRun

# A routed expert's second moments are drawn toward its layer's as if it had seen this many tokens more: an expert with
# few tokens of its own would otherwise be fitted to them alone.
PRIOR_TOKENS = 32.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over the tokens that chose expert e: gate weight g, gate and up outputs a and u, output f = expert_e(x).

    count_E: 1. weight_E: g. weighted_norm_E: g*|f|. norm2_E: |f|^2. gate2_E: g^2.
    x2_ED: g^2 * x^2, the input of gate and up. hidden2_EF: g^2 * (silu(a)*u)^2, the input of down.
    gate_slope2_EF: g^2 * (silu'(a)*u)^2 and up_slope2_EF: g^2 * silu(a)^2, what an error of a or u becomes in down's
    input, squared.
    peak_E is no sum but the largest |f_d| of any token and output d, 0 if no token chose the expert.
    """

    count_E: jax.Array
    weight_E: jax.Array
    weighted_norm_E: jax.Array
    norm2_E: jax.Array
    gate2_E: jax.Array
    x2_ED: jax.Array
    hidden2_EF: jax.Array
    gate_slope2_EF: jax.Array
    up_slope2_EF: jax.Array
    peak_E: jax.Array

    def merged(self, other: Self) -> Self:
        """The statistics of both batches' tokens."""
        return replace(jax.tree.map(jnp.add, self, other), peak_E=jnp.maximum(self.peak_E, other.peak_E))

    def input_second_moment(self, projection: str) -> jax.Array:
        """E[x^2] of the projection's input over the tokens that chose each expert, weighted by g^2, (E, I)."""
        sums_EI = self.hidden2_EF if projection == "down" else self.x2_ED
        return _shrunk_mean(sums_EI, self.gate2_E, self.count_E)

    def output_weight(self, projection: str, down_norm2_EF: jax.Array) -> jax.Array:
        """What a unit error at each output of the projection adds to the layer's output error, (E, O).

        For down it is sum g^2. An error of gate or up at intermediate f passes through the SwiGLU's slope and down's
        column, whose squared norm is down_norm2_EF.
        """
        if projection == "down":
            return self.gate2_E[:, None]
        slope2_EF = self.gate_slope2_EF if projection == "gate" else self.up_slope2_EF
        return slope2_EF * down_norm2_EF


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockStatistics:
    """One block's sums: `input2` by weight's name (relative to the block), sum over tokens of x^2, (I,)."""

    tokens: jax.Array
    input2: dict[str, jax.Array]
    experts: ExpertStatistics | None

    def merged(self, other: Self) -> Self:
        """The statistics of both batches' tokens; both are of the same block."""
        experts = None
        if self.experts is not None and other.experts is not None:
            experts = self.experts.merged(other.experts)
        input2 = jax.tree.map(jnp.add, self.input2, other.input2)
        return replace(self, tokens=self.tokens + other.tokens, input2=input2, experts=experts)

    def input_second_moment(self, name: str) -> jax.Array:
        """E[x^2] of the input of the weight `name`, (I,)."""
        return self.input2[name] / self.tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """A model's statistics: one entry per block (MTP blocks last), the head's input, and how often each token came."""

    blocks: tuple[BlockStatistics, ...]
    tokens: jax.Array
    head_input2: jax.Array
    count_C: jax.Array


def expert_statistics(run: ExpertRun, num_experts: int) -> ExpertStatistics:
    """The statistics of one batch."""
    float32 = partial(jnp.asarray, dtype=jnp.float32)
    chosen_ER = float32(run.expert_R == jnp.arange(num_experts)[:, None])
    g_R, norm_R = float32(run.weight_R), jnp.linalg.norm(float32(run.y_RD), axis=-1)
    weighted_ER = chosen_ER * g_R**2
    gate_RF, up_RF = float32(run.gate_RF), float32(run.up_RF)
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    slope_RF = sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    peak_R = jnp.max(jnp.abs(float32(run.y_RD)), axis=-1)
    return ExpertStatistics(
        count_E=jnp.sum(chosen_ER, axis=1),
        weight_E=chosen_ER @ g_R,
        weighted_norm_E=chosen_ER @ (g_R * norm_R),
        norm2_E=chosen_ER @ norm_R**2,
        gate2_E=jnp.sum(weighted_ER, axis=1),
        x2_ED=weighted_ER @ float32(run.x_RD) ** 2,
        hidden2_EF=weighted_ER @ float32(run.hidden_RF) ** 2,
        gate_slope2_EF=weighted_ER @ (slope_RF * up_RF) ** 2,
        up_slope2_EF=weighted_ER @ (sigmoid_RF * gate_RF) ** 2,
        peak_E=jnp.zeros(num_experts, jnp.float32).at[run.expert_R].max(peak_R),
    )


def _shrunk_mean(sums_EI: jax.Array, weight_E: jax.Array, count_E: jax.Array) -> jax.Array:
    """Each expert's weighted mean, drawn toward the layer's by PRIOR_TOKENS average tokens."""
    layer_mean_I = jnp.sum(sums_EI, axis=0) / jnp.maximum(jnp.sum(weight_E), 1e-30)
    prior = PRIOR_TOKENS * jnp.sum(weight_E) / jnp.maximum(jnp.sum(count_E), 1.0)
    return (sums_EI + prior * layer_mean_I) / jnp.maximum(weight_E + prior, 1e-30)[:, None]
