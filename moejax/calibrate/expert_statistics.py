"""What calibration remembers of routed experts: sums (and a peak) over the tokens that chose each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.products import Inputs, expert_products
from moejax.kernels import product
from moejax.model import Config
from moejax.model.moe import ExpertRun

# A routed expert's second moments are drawn toward its layer's as if it had seen this many tokens more: an expert with
# few tokens of its own would otherwise be fitted to them alone.
PRIOR_TOKENS = 32.0

# The same for its Hessian, which has more to learn: per input dimension. Chosen on text that calibration left out.
PRIOR_TOKENS_PER_INPUT = 1.0

# Experts have products of their own where a block's take no more bytes: DeepSeek-V3's of `hidden` take 4.3 GB, of x
# they would take 53 GB.
EXPERT_PRODUCTS_BYTES = 8 << 30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerSums:
    """What an expert's statistics are drawn toward: sums over all experts of its layer, named as in `ExpertStatistics`.

    tokens: all that came to the layer. x_DD and hidden_FF: None where Hessians are not collected.
    """

    tokens: jax.Array
    count: jax.Array
    gate2: jax.Array
    x2_D: jax.Array
    hidden2_F: jax.Array
    x_DD: jax.Array | None = None
    hidden_FF: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over the tokens that chose expert e: gate weight g, gate and up outputs a and u, output f = expert_e(x).

    count_E: 1. weight_E: g. weighted_norm_E: g*|f|. norm2_E: |f|^2. gate2_E: g^2.
    x2_ED: g^2 * x^2, the input of gate and up. hidden2_EF: g^2 * (silu(a)*u)^2, the input of down.
    gate_slope2_EF: g^2 * (silu'(a)*u)^2 and up_slope2_EF: g^2 * silu(a)^2, what an error of a or u becomes in down's
    input, squared.
    peak_E is no sum but the largest |f_d| of any token and output d, 0 if no token chose the expert.
    layer: the sums over all experts of the layer, of which these may be some (`of`).
    Where Hessians are collected: x_EDD and hidden_EFF, g^2 times the outer products whose diagonals are x2_ED and
    hidden2_EF, in one array or several that hold some experts each, side by side; none where they would take too many
    bytes. damping: by projection, where it was chosen. output_DD: by what errors of down's outputs are weighed, where
    gradients were collected.
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
    layer: LayerSums
    x_EDD: tuple[jax.Array, ...] = ()
    hidden_EFF: tuple[jax.Array, ...] = ()
    damping: dict[str, jax.Array] = field(default_factory=dict)
    output_DD: jax.Array | None = None

    def merged(self, other: Self) -> Self:
        """The statistics of the same experts over other tokens too."""
        return replace(jax.tree.map(jnp.add, self, other), peak_E=jnp.maximum(self.peak_E, other.peak_E))

    def of(self, members: Sequence[int] | np.ndarray) -> Self:
        """Of some experts, by rising number."""
        own = np.asarray(members)
        if len(own) == len(self.count_E) and np.array_equal(own, range(len(own))):
            rows: dict[str, Any] = {}
        else:
            rows = {name: getattr(self, name)[own] for name in _ROWS}
        return replace(self, x_EDD=_rows_of(self.x_EDD, own), hidden_EFF=_rows_of(self.hidden_EFF, own), **rows)

    def input_second_moment(self, projection: str) -> jax.Array:
        """E[x^2] of the projection's input over the tokens that chose each expert, weighted by g^2, (E, I)."""
        down, layer = projection == "down", self.layer
        sums_EI, layer_I = (self.hidden2_EF, layer.hidden2_F) if down else (self.x2_ED, layer.x2_D)
        return _shrunk_mean(sums_EI, layer_I, self.gate2_E, layer)

    def input_hessian(self, projection: str, e: int | jax.Array) -> jax.Array:
        """E[x x^T] of the projection's input over the tokens that chose expert e, weighted by g^2, (I, I).

        Drawn toward the layer's by PRIOR_TOKENS_PER_INPUT * I average tokens; the layer's where experts have no
        products of their own. Its diagonal is `input_second_moment` but for the larger prior.
        """
        own, layer_II = self._products(projection)
        assert layer_II is not None, "calibrated without hessians"
        return _shrunk_hessian(_matrix_of(own, e), layer_II, jnp.take(self.gate2_E, e), self.layer)

    def hessian_weight(self, projection: str, e: int | jax.Array) -> jax.Array:
        """The sum of g^2 that expert e's `input_hessian` is over, with those of the tokens taken from its layer's."""
        _, layer_II = self._products(projection)
        assert layer_II is not None, "calibrated without hessians"
        return jnp.maximum(jnp.take(self.gate2_E, e) + _prior(layer_II, self.layer), 1e-30)

    def inputs(self, projection: str, e: int | jax.Array) -> Inputs:
        """The projection's input over the tokens that chose expert e, which the layer's count beside."""
        moment_I = jnp.take(self.input_second_moment(projection), e, axis=0)
        if self.layer.x_DD is None:
            return Inputs(moment_I)
        tokens, damping = self.input_tokens(projection)[e], self.damping.get(projection, 1.0)
        output_DD = self.output_DD if projection == "down" else None
        return Inputs(moment_I, self.input_hessian(projection, e), tokens, damping, output_DD)

    def input_tokens(self, projection: str) -> jax.Array:
        """Over how many tokens each expert's `input_hessian` is, those that it takes from its layer's among them, (E,);
        all of the layer's where experts have no products of their own."""
        own, layer_II = self._products(projection)
        assert layer_II is not None, "calibrated without hessians"
        if not own:
            return jnp.full_like(self.count_E, self.layer.tokens)
        return self.count_E + PRIOR_TOKENS_PER_INPUT * len(layer_II)

    def shares_hessian(self, projection: str) -> bool:
        """Whether Hessians are collected, and experts have none of their own."""
        own, layer_II = self._products(projection)
        return layer_II is not None and not own

    def _products(self, projection: str) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """Each expert's, where there are such, and the layer's."""
        if projection == "down":
            return self.hidden_EFF, self.layer.hidden_FF
        return self.x_EDD, self.layer.x_DD

    def output_weight(self, projection: str, down_norm2_EF: jax.Array) -> jax.Array:
        """What a unit error at each output of the projection adds to the layer's output error, (E, O).

        For down it is sum g^2. An error of gate or up at intermediate f passes through the SwiGLU's slope and down's
        column, whose squared norm is down_norm2_EF.
        """
        if projection == "down":
            return self.gate2_E[:, None]
        slope2_EF = self.gate_slope2_EF if projection == "gate" else self.up_slope2_EF
        return slope2_EF * down_norm2_EF


# What has a row of every expert; and what is in one array or several.
_ROWS = [field.name for field in fields(ExpertStatistics) if field.name.rpartition("_")[2] in ("E", "ED", "EF")]
PRODUCTS = ("x_EDD", "hidden_EFF")


def joined(slices: Iterable[ExpertStatistics], tokens: jax.Array) -> ExpertStatistics:
    """Of all experts of a layer that so many tokens came to, from those of consecutive ones; their layer's sums, which
    may hold Hessians, are let go of one after another."""
    each: list[dict[str, Any]] = []
    layer: LayerSums | None = None
    for own in slices:
        layer = own.layer if layer is None else _sum(layer, own.layer)
        each.append({name: getattr(own, name) for name in (*_ROWS, *PRODUCTS)})
        del own
    assert layer is not None
    rows: dict[str, Any] = {name: jnp.concatenate([own[name] for own in each]) for name in _ROWS}
    products: dict[str, Any] = {name: tuple(chain(*(own[name] for own in each))) for name in PRODUCTS}
    return ExpertStatistics(**rows, **products, layer=replace(layer, tokens=tokens))


# In place: a layer's Hessians are 200 MB of DeepSeek-V3.
_sum = partial(jax.jit, donate_argnums=0)(partial(jax.tree.map, jnp.add))


def unseen_experts(config: Config) -> ExpertStatistics:
    """As if one token had chosen each of a layer's experts, and every input were 1 on average."""
    experts, inputs, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    sizes = {"E": (experts,), "ED": (experts, inputs), "EF": (experts, hidden)}
    rows: dict[str, Any] = {name: jnp.ones(sizes[name.rpartition("_")[2]]) for name in _ROWS}
    count = jnp.float32(experts)
    layer = LayerSums(count, count, count, count * jnp.ones(inputs), count * jnp.ones(hidden))
    return ExpertStatistics(**rows, layer=layer)


def expert_statistics(run: ExpertRun, num_experts: int, max_bytes_each: int | None = None) -> ExpertStatistics:
    """The statistics of a run through so many experts; of the layer's tokens, which it does not know, none.

    Hessians are collected unless `max_bytes_each` is None: an expert's own where it takes no more than that.
    """
    float32 = partial(jnp.asarray, dtype=jnp.float32)
    chosen_ER = float32(run.expert_R == jnp.arange(num_experts)[:, None])
    g_R, norm_R = float32(run.weight_R), jnp.linalg.norm(float32(run.y_RD), axis=-1)
    weighted_ER = chosen_ER * g_R**2
    gate_RF, up_RF = float32(run.gate_RF), float32(run.up_RF)
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    slope_RF = sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    peak_R = jnp.max(jnp.abs(float32(run.y_RD)), axis=-1)
    count_E, gate2_E = jnp.sum(chosen_ER, axis=1), jnp.sum(weighted_ER, axis=1)
    x2_ED = product("er,rd->ed", weighted_ER, float32(run.x_RD) ** 2)
    hidden2_EF = product("er,rf->ef", weighted_ER, float32(run.hidden_RF) ** 2)
    layer = map(partial(jnp.sum, axis=0), (count_E, gate2_E, x2_ED, hidden2_EF))
    sums = ExpertStatistics(
        count_E=count_E,
        weight_E=product("er,r->e", chosen_ER, g_R),
        weighted_norm_E=product("er,r->e", chosen_ER, g_R * norm_R),
        norm2_E=product("er,r->e", chosen_ER, norm_R**2),
        gate2_E=gate2_E,
        x2_ED=x2_ED,
        hidden2_EF=hidden2_EF,
        gate_slope2_EF=product("er,rf->ef", weighted_ER, (slope_RF * up_RF) ** 2),
        up_slope2_EF=product("er,rf->ef", weighted_ER, (sigmoid_RF * gate_RF) ** 2),
        peak_E=jnp.zeros(num_experts, jnp.float32).at[run.expert_R].max(peak_R, mode="drop"),
        layer=LayerSums(jnp.zeros((), jnp.float32), *layer),
    )
    return sums if max_bytes_each is None else _with_products(sums, run, max_bytes_each)


def _with_products(sums: ExpertStatistics, run: ExpertRun, max_bytes_each: int) -> ExpertStatistics:
    """The same and what Hessians are made of."""
    num_experts = len(sums.count_E)
    rows_E = jnp.bincount(run.expert_R, length=num_experts + 1)[:num_experts]
    g_R = jnp.asarray(run.weight_R, jnp.float32)
    (x_EDD, x_DD), (hidden_EFF, hidden_FF) = (
        expert_products(g_R[:, None] * x_RI.astype(jnp.float32), rows_E, max_bytes_each)
        for x_RI in (run.x_RD, run.hidden_RF)
    )
    layer = replace(sums.layer, x_DD=x_DD, hidden_FF=hidden_FF)
    x, hidden = (() if own_EII is None else (own_EII,) for own_EII in (x_EDD, hidden_EFF))
    return replace(sums, layer=layer, x_EDD=x, hidden_EFF=hidden)


def _rows_of(pieces: tuple[jax.Array, ...], members: np.ndarray) -> tuple[jax.Array, ...]:
    """Of arrays that hold some experts each, side by side, some experts' rows in one array; none of none."""
    if not pieces:
        return ()
    starts = np.cumsum([0, *map(len, pieces)])
    of = np.searchsorted(starts, members, side="right") - 1
    first, piece = members[0], pieces[of[0]]
    if np.array_equal(members, range(first, first + len(piece))) and first == starts[of[0]]:
        return (jnp.asarray(piece),)  # a whole one, as it lies
    return (jnp.stack([jnp.asarray(pieces[n][e - starts[n]]) for n, e in zip(of, members, strict=True)]),)


def _matrix_of(pieces: tuple[jax.Array, ...], e: int | jax.Array) -> jax.Array | None:
    """Expert e's; which one must be known where there are several pieces."""
    if not pieces:
        return None
    if len(pieces) == 1:
        return jnp.asarray(pieces[0][e])
    (own_1II,) = _rows_of(pieces, np.asarray([int(e)]))
    return own_1II[0]


@jax.jit
def _shrunk_mean(sums_EI: jax.Array, layer_I: jax.Array, weight_E: jax.Array, layer: LayerSums) -> jax.Array:
    """Each expert's weighted mean, drawn toward the layer's by PRIOR_TOKENS average tokens."""
    prior = PRIOR_TOKENS * layer.gate2 / jnp.maximum(layer.count, 1.0)
    layer_mean_I = layer_I / jnp.maximum(layer.gate2, 1e-30)
    return (sums_EI + prior * layer_mean_I) / jnp.maximum(weight_E + prior, 1e-30)[:, None]


@jax.jit
def _shrunk_hessian(own_II: jax.Array | None, layer_II: jax.Array, weight: jax.Array, layer: LayerSums) -> jax.Array:
    """An expert's weighted mean, drawn toward the layer's by PRIOR_TOKENS_PER_INPUT average tokens per dimension."""
    layer_mean_II = layer_II / jnp.maximum(layer.gate2, 1e-30)
    if own_II is None:
        return layer_mean_II
    prior = _prior(layer_II, layer)
    return (own_II + prior * layer_mean_II) / jnp.maximum(weight + prior, 1e-30)


def _prior(layer_II: jax.Array, layer: LayerSums) -> jax.Array:
    return PRIOR_TOKENS_PER_INPUT * len(layer_II) * layer.gate2 / jnp.maximum(layer.count, 1.0)
