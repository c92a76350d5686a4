"""What calibration remembers: sums (and a peak) over tokens, from which scores and weights of errors are made."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from moejax.calibrate.products import expert_products, input_name
from moejax.kernels import product
from moejax.model.moe import ExpertRun

# A routed expert's second moments are drawn toward its layer's as if it had seen this many tokens more: an expert with
# few tokens of its own would otherwise be fitted to them alone.
PRIOR_TOKENS = 32.0

# The same for its Hessian, which has more to learn: per input dimension. Chosen on text that calibration left out.
PRIOR_TOKENS_PER_INPUT = 1.0

# Experts have products of their own where a block's take no more bytes: DeepSeek-V3's of `hidden` take 4.3 GB, of x
# they would take 53 GB.
EXPERT_PRODUCTS_BYTES = 8 << 30


class Inputs(NamedTuple):
    """What rounding asks of a weight's input x: second_moment E[x^2] (I,), hessian E[x x^T] (I, I) or None where it was
    not collected, over how many tokens, and how many times the usual damping suits the hessian."""

    second_moment: jax.Array
    hessian: jax.Array | None = None
    tokens: jax.Array | float = 1.0
    damping: jax.Array | float = 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over the tokens that chose expert e: gate weight g, gate and up outputs a and u, output f = expert_e(x).

    tokens: all that came to the layer. count_E: 1. weight_E: g. weighted_norm_E: g*|f|. norm2_E: |f|^2. gate2_E: g^2.
    x2_ED: g^2 * x^2, the input of gate and up. hidden2_EF: g^2 * (silu(a)*u)^2, the input of down.
    gate_slope2_EF: g^2 * (silu'(a)*u)^2 and up_slope2_EF: g^2 * silu(a)^2, what an error of a or u becomes in down's
    input, squared.
    peak_E is no sum but the largest |f_d| of any token and output d, 0 if no token chose the expert.
    Where Hessians are collected: x_EDD and hidden_EFF, g^2 times the outer products whose diagonals are x2_ED and
    hidden2_EF, None where they would take too many bytes; and x_DD and hidden_FF, their sums over all experts.
    damping: by projection, where it was chosen.
    """

    tokens: jax.Array
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
    x_EDD: jax.Array | None = None
    hidden_EFF: jax.Array | None = None
    x_DD: jax.Array | None = None
    hidden_FF: jax.Array | None = None
    damping: dict[str, jax.Array] = field(default_factory=dict)

    def merged(self, other: Self) -> Self:
        """The statistics of both batches' tokens."""
        return replace(jax.tree.map(jnp.add, self, other), peak_E=jnp.maximum(self.peak_E, other.peak_E))

    def input_second_moment(self, projection: str) -> jax.Array:
        """E[x^2] of the projection's input over the tokens that chose each expert, weighted by g^2, (E, I)."""
        sums_EI = self.hidden2_EF if projection == "down" else self.x2_ED
        return _shrunk_mean(sums_EI, self.gate2_E, self.count_E)

    def input_hessian(self, projection: str, e: int | jax.Array) -> jax.Array:
        """E[x x^T] of the projection's input over the tokens that chose expert e, weighted by g^2, (I, I).

        Drawn toward the layer's by PRIOR_TOKENS_PER_INPUT * I average tokens; the layer's where experts have no
        products of their own. Its diagonal is `input_second_moment` but for the larger prior.
        """
        own_EII, layer_II = self._products(projection)
        assert layer_II is not None, "calibrated without hessians"
        return _shrunk_hessian(own_EII, layer_II, self.gate2_E, self.count_E, jnp.asarray(e))

    def inputs(self, projection: str, e: int | jax.Array) -> Inputs:
        """The projection's input over the tokens that chose expert e, which the layer's count beside."""
        moment_I = jnp.take(self.input_second_moment(projection), e, axis=0)
        if self.x_DD is None:
            return Inputs(moment_I)
        tokens, damping = self.input_tokens(projection)[e], self.damping.get(projection, 1.0)
        return Inputs(moment_I, self.input_hessian(projection, e), tokens, damping)

    def input_tokens(self, projection: str) -> jax.Array:
        """Over how many tokens each expert's `input_hessian` is, those that it takes from its layer's among them, (E,);
        all of the layer's where experts have no products of their own."""
        own_EII, layer_II = self._products(projection)
        assert layer_II is not None, "calibrated without hessians"
        if own_EII is None:
            return jnp.full_like(self.count_E, self.tokens)
        return self.count_E + PRIOR_TOKENS_PER_INPUT * len(layer_II)

    def _products(self, projection: str) -> tuple[jax.Array | None, jax.Array | None]:
        """Each expert's, where there are such, and the layer's."""
        return (self.hidden_EFF, self.hidden_FF) if projection == "down" else (self.x_EDD, self.x_DD)

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
    """One block's sums: `input2` by weight's name (relative to the block), sum over tokens of x^2, (I,).

    Where Hessians are collected: `products`, sum over tokens of x x^T (I, I), by `input_name` of the weight's name.
    damping: by weight's name, where it was chosen.
    """

    tokens: jax.Array
    input2: dict[str, jax.Array]
    experts: ExpertStatistics | None
    products: dict[str, jax.Array] | None = None
    damping: dict[str, jax.Array] = field(default_factory=dict)

    def merged(self, other: Self) -> Self:
        """The statistics of both batches' tokens; both are of the same block."""
        experts = None
        if self.experts is not None and other.experts is not None:
            experts = self.experts.merged(other.experts)
        own, others = ((sums.tokens, sums.input2, sums.products) for sums in (self, other))
        tokens, input2, summed = jax.tree.map(jnp.add, own, others)
        return replace(self, tokens=tokens, input2=input2, experts=experts, products=summed)

    def input_second_moment(self, name: str) -> jax.Array:
        """E[x^2] of the input of the weight `name`, (I,)."""
        return self.input2[name] / self.tokens

    def input_hessian(self, name: str) -> jax.Array:
        """E[x x^T] of the input of the weight `name`, (I, I); its diagonal is `input_second_moment`."""
        assert self.products is not None, "calibrated without hessians"
        return self.products[input_name(name)] / self.tokens

    def damped_as(self, other: Self) -> Self:
        """With the damping that was chosen for `other`, the same block's."""
        experts = self.experts
        if experts is not None and other.experts is not None:
            experts = replace(experts, damping=other.experts.damping)
        return replace(self, damping=other.damping, experts=experts)

    def without_hessians(self) -> Self:
        """The same as if Hessians had not been collected."""
        experts = self.experts
        if experts is not None:
            experts = replace(experts, x_EDD=None, hidden_EFF=None, x_DD=None, hidden_FF=None)
        return replace(self, products=None, experts=experts)

    def inputs(self, name: str) -> Inputs:
        """The input of the weight `name`."""
        hessian = None if self.products is None else self.input_hessian(name)
        return Inputs(self.input_second_moment(name), hessian, self.tokens, self.damping.get(name, 1.0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """A model's statistics: one entry per block (MTP blocks last), the head's input, and how often each token came."""

    blocks: tuple[BlockStatistics, ...]
    tokens: jax.Array
    head_input2: jax.Array
    count_C: jax.Array
    head_products: jax.Array | None = None
    head_damping: jax.Array | None = None

    def head_hessian(self) -> jax.Array:
        """E[x x^T] of the head's input, (D, D)."""
        assert self.head_products is not None, "calibrated without hessians"
        return self.head_products / self.tokens

    def without_hessians(self) -> Self:
        """The same as if Hessians had not been collected."""
        return replace(self, blocks=tuple(own.without_hessians() for own in self.blocks), head_products=None)

    def head_inputs(self) -> Inputs:
        """The head's input."""
        hessian = None if self.head_products is None else self.head_hessian()
        damping = 1.0 if self.head_damping is None else self.head_damping
        return Inputs(self.head_input2 / self.tokens, hessian, self.tokens, damping)


def expert_statistics(run: ExpertRun, tokens: int, num_experts: int, max_bytes: int | None = None) -> ExpertStatistics:
    """The statistics of one batch of so many tokens.

    Hessians are collected unless `max_bytes` is None: each expert's own where a block's take no more than that.
    """
    float32 = partial(jnp.asarray, dtype=jnp.float32)
    chosen_ER = float32(run.expert_R == jnp.arange(num_experts)[:, None])
    g_R, norm_R = float32(run.weight_R), jnp.linalg.norm(float32(run.y_RD), axis=-1)
    weighted_ER = chosen_ER * g_R**2
    gate_RF, up_RF = float32(run.gate_RF), float32(run.up_RF)
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    slope_RF = sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    peak_R = jnp.max(jnp.abs(float32(run.y_RD)), axis=-1)
    sums = ExpertStatistics(
        tokens=jnp.asarray(tokens, jnp.float32),
        count_E=jnp.sum(chosen_ER, axis=1),
        weight_E=product("er,r->e", chosen_ER, g_R),
        weighted_norm_E=product("er,r->e", chosen_ER, g_R * norm_R),
        norm2_E=product("er,r->e", chosen_ER, norm_R**2),
        gate2_E=jnp.sum(weighted_ER, axis=1),
        x2_ED=product("er,rd->ed", weighted_ER, float32(run.x_RD) ** 2),
        hidden2_EF=product("er,rf->ef", weighted_ER, float32(run.hidden_RF) ** 2),
        gate_slope2_EF=product("er,rf->ef", weighted_ER, (slope_RF * up_RF) ** 2),
        up_slope2_EF=product("er,rf->ef", weighted_ER, (sigmoid_RF * gate_RF) ** 2),
        peak_E=jnp.zeros(num_experts, jnp.float32).at[run.expert_R].max(peak_R),
    )
    return sums if max_bytes is None else _with_products(sums, run, max_bytes)


def _with_products(sums: ExpertStatistics, run: ExpertRun, max_bytes: int) -> ExpertStatistics:
    """The same and what Hessians are made of."""
    rows_E, g_R = jnp.bincount(run.expert_R, length=len(sums.count_E)), jnp.asarray(run.weight_R, jnp.float32)
    (x_EDD, x_DD), (hidden_EFF, hidden_FF) = (
        expert_products(g_R[:, None] * x_RI.astype(jnp.float32), rows_E, max_bytes)
        for x_RI in (run.x_RD, run.hidden_RF)
    )
    return replace(sums, x_EDD=x_EDD, hidden_EFF=hidden_EFF, x_DD=x_DD, hidden_FF=hidden_FF)


@jax.jit
def _shrunk_mean(sums_EI: jax.Array, weight_E: jax.Array, count_E: jax.Array) -> jax.Array:
    """Each expert's weighted mean, drawn toward the layer's by PRIOR_TOKENS average tokens."""
    layer_mean_I = jnp.sum(sums_EI, axis=0) / jnp.maximum(jnp.sum(weight_E), 1e-30)
    prior = PRIOR_TOKENS * jnp.sum(weight_E) / jnp.maximum(jnp.sum(count_E), 1.0)
    return (sums_EI + prior * layer_mean_I) / jnp.maximum(weight_E + prior, 1e-30)[:, None]


@jax.jit
def _shrunk_hessian(
    own_EII: jax.Array | None, layer_II: jax.Array, weight_E: jax.Array, count_E: jax.Array, e: jax.Array
) -> jax.Array:
    """Expert e's weighted mean, drawn toward the layer's by PRIOR_TOKENS_PER_INPUT average tokens per dimension."""
    layer_mean_II = layer_II / jnp.maximum(jnp.sum(weight_E), 1e-30)
    if own_EII is None:
        return layer_mean_II
    tokens = PRIOR_TOKENS_PER_INPUT * len(layer_II)
    prior = tokens * jnp.sum(weight_E) / jnp.maximum(jnp.sum(count_E), 1.0)
    return (own_EII[e] + prior * layer_mean_II) / jnp.maximum(weight_E[e] + prior, 1e-30)
