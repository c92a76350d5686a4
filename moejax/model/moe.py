"""Feed-forward layers: the dense SwiGLU, the router, and the mixture of experts."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.formats import ExpertWeights
from moejax.kernels import hadamard
from moejax.model.config import Config
from moejax.model.leaves import Leaves, Taps, Weight, linear, named_leaves, prefixed, under
from moejax.sharding import expert_matmul, gathered, matmul


class Mlp(nnx.Module):
    """SwiGLU: y = W_down(silu(x W_gate) * (x W_up))."""

    def __init__(self, config: Config, leaves: Leaves):
        self.config = config
        self.gate = nnx.Param(leaves("gate"))
        self.up = nnx.Param(leaves("up"))
        self.down = nnx.Param(leaves("down"))

    def __call__(self, x: jax.Array, taps: Taps | None = None) -> jax.Array:
        hidden = jax.nn.silu(linear(x, self.gate, taps, "gate")) * linear(x, self.up, taps, "up")
        return gathered(linear(_down_input(hidden, self.config), self.down, taps, "down"))


def _down_input(hidden: jax.Array, config: Config) -> jax.Array:
    """What `down` takes of the SwiGLU's products (..., F): the same, or hidden H / sqrt(F) where the config says so."""
    return hadamard(hidden) if config.down_input_transform else hidden


class Routing(NamedTuple):
    """The experts each token goes to, int32 (T, K), and their weights (T, K)."""

    experts_TK: jax.Array
    weights_TK: jax.Array


class ExpertRun(NamedTuple):
    """What happened inside some routed experts, rows sorted by expert, token by token.

    There may be more rows than these experts were chosen for: R is what was made room for. The rows behind are zeros of
    no token and no expert: theirs are T and E, the numbers of both. hidden_RF is what `down` takes.
    """

    token_R: jax.Array
    expert_R: jax.Array
    weight_R: jax.Array
    x_RD: jax.Array
    gate_RF: jax.Array
    up_RF: jax.Array
    hidden_RF: jax.Array
    y_RD: jax.Array

    def onto(self, y_TD: jax.Array) -> jax.Array:
        """y_t + sum_k weight_tk * expert_{e(t,k)}(x_t), a token's terms in the order of its experts: the sum over all
        is the same, however many runs it is made in."""
        terms_RD = self.y_RD.astype(y_TD.dtype) * self.weight_R[:, None].astype(y_TD.dtype)
        return y_TD.at[self.token_R].add(terms_RD, mode="drop")


class Experts(nnx.Module):
    """Routed experts' weights: gate and up (E, F, D), down (E, D, F); all of a layer's, or some."""

    def __init__(self, config: Config, leaves: Leaves):
        self.config = config
        self.gate = nnx.Param(leaves("gate"))
        self.up = nnx.Param(leaves("up"))
        self.down = nnx.Param(leaves("down"))

    @property
    def num_experts(self) -> int:
        return self.gate.get_value().num_experts

    def __call__(self, x_TD: jax.Array, routing: Routing) -> tuple[jax.Array, ExpertRun]:
        """y_t = sum_k weight_tk * expert_{e(t,k)}(x_t) of all of a layer's experts."""
        run = self.run(x_TD, routing, routing.experts_TK.size)
        return run.onto(jnp.zeros_like(x_TD, wide_dtype(x_TD))).astype(x_TD.dtype), run

    def run(
        self, x_TD: jax.Array, routing: Routing, rows: int, first: jax.Array | int = 0, start: jax.Array | int = 0
    ) -> ExpertRun:
        """Tokens x (T, D) through those of these experts, numbers `first`, first + 1 and so on of the layer, that they
        go to; others are not visited. R = `rows` of those choices, sorted by expert, from number `start` on."""
        token_R, expert_R, weight_R, x_RD, rows_E = _by_expert(x_TD, routing, self.num_experts, rows, first, start)
        gate_RF = self._project(x_RD, self.gate, rows_E)
        up_RF = self._project(x_RD, self.up, rows_E)
        hidden_RF = _down_input(jax.nn.silu(gate_RF) * up_RF, self.config)
        y_RD = gathered(self._project(hidden_RF, self.down, rows_E))
        return ExpertRun(token_R, expert_R, weight_R, x_RD, gate_RF, up_RF, hidden_RF, y_RD)

    @staticmethod
    def _project(x_RI: jax.Array, weights: nnx.Param[ExpertWeights], rows_E: jax.Array) -> jax.Array:
        return expert_matmul(x_RI, weights.get_value(), rows_E)


# Under jit, as `_chosen` and `Attention.attend_cached` are, so that layers that differ in their experts' formats alone
# are traced and lowered once.
@partial(jax.jit, static_argnames=("num_experts", "rows"))
def _by_expert(
    x_TD: jax.Array,
    routing: Routing,
    num_experts: int,
    rows: int,
    first: jax.Array | int,
    start: jax.Array | int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """`ExpertRun`'s token_R, expert_R, weight_R and x_RD, and how many rows every expert has, (E,)."""
    (T, K), E = routing.experts_TK.shape, num_experts
    local_TK = routing.experts_TK - first
    expert_R = jnp.where((local_TK >= 0) & (local_TK < E), local_TK, E).reshape(-1)
    if rows < len(expert_R):
        expert_R = jnp.pad(expert_R, (0, rows), constant_values=E)  # so that there are rows to take from `start` on
    order_R = jax.lax.dynamic_slice_in_dim(jnp.argsort(expert_R, stable=True), start, rows)
    expert_R = expert_R[order_R]
    is_own_R = expert_R < E
    token_R = order_R // K
    x_RD = jnp.where(is_own_R[:, None], x_TD[token_R], 0)
    weight_R = jnp.where(is_own_R, routing.weights_TK.reshape(-1)[order_R], 0)
    rows_E = jnp.bincount(expert_R, length=E + 1)[:E]
    return jnp.where(is_own_R, token_R, T), expert_R, weight_R, x_RD, rows_E


def wide_dtype(x: jax.Array) -> jnp.dtype:
    """What sums over experts are made in: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


class MoE(nnx.Module):
    """DeepSeek-V3's mixture of experts (arXiv:2412.19437, section 2.1.2).

        s = sigmoid(x W_router), choice = s + bias
        a group's score is the sum of its two best choices; the best `topk_group` groups stay
        the top K choices among them are the token's experts
        weight = s of the chosen (/ their sum) * routed_scaling_factor * routing_scale
        y = sum_k weight_k * expert_k(x) + shared(x)

    Groups are ragged: `group_id` says to which group each surviving expert belongs. `experts_per_token` is K, and
    `routing_scale` what experts_per_token's transform fits when K is lowered; 1 in an original model. `experts` is None
    in a trunk (see `sliced`).
    """

    def __init__(
        self, config: Config, leaves: Leaves, experts_per_token: int | None = None, *, has_experts: bool = True
    ):
        self.config = config
        self.experts_per_token = experts_per_token or config.num_experts_per_tok
        self.router = nnx.Param(leaves("router"))
        self.bias = nnx.Param(leaves("bias"))
        self.group_id = nnx.Param(leaves("group_id"))
        self.routing_scale = nnx.Param(leaves("routing_scale"))
        self.experts = Experts(config, under(leaves, "experts")) if has_experts else None
        self.shared = Mlp(config, under(leaves, "shared"))

    @property
    def num_experts(self) -> int:
        return self.router.get_value().shape[0]

    def with_leaves(self, changed: Mapping[str, Weight], experts_per_token: int | None = None) -> Self:
        """The layer, or trunk, with some other weights, by name within it, and another K if one is given."""
        leaves, has_experts = named_leaves(self) | dict(changed), self.experts is not None
        return type(self)(
            self.config, leaves.__getitem__, experts_per_token or self.experts_per_token, has_experts=has_experts
        )

    def __call__(self, x_BTD: jax.Array, choice_TK: jax.Array | None = None, taps: Taps | None = None) -> jax.Array:
        """x (B, T, D) to the layer's output. `choice_TK` (B*T, K) replays given experts instead of choosing."""
        assert self.experts is not None, "a trunk is not run by itself"
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing, shared_TD = self.enter(x_TD, choice_TK, taps)
        routed_TD, run = self.experts(x_TD, routing)
        if taps is not None:
            taps["experts"] = run
        return (routed_TD + shared_TD).reshape(x_BTD.shape)

    def enter(
        self, x_TD: jax.Array, choice_TK: jax.Array | None = None, taps: Taps | None = None
    ) -> tuple[Routing, jax.Array]:
        """All but the routed experts: where tokens go, and what the shared experts put out, (T, D)."""
        shared_taps: Taps | None = None if taps is None else {}
        shared_TD = self.shared(x_TD, shared_taps)
        if taps is not None:
            taps |= {"router": x_TD} | prefixed("shared", shared_taps)
        return self.route(x_TD, choice_TK), shared_TD

    def scores(self, x_TD: jax.Array) -> jax.Array:
        """sigmoid(x W_router) in at least float32, (T, E)."""
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        return jax.nn.sigmoid(gathered(matmul(x_TD.astype(wide), self.router.get_value())))

    def route(self, x_TD: jax.Array, choice_TK: jax.Array | None = None) -> Routing:
        """Each token's experts and weights."""
        return self.choose(self.scores(x_TD), choice_TK)

    def choose(self, scores_TE: jax.Array, choice_TK: jax.Array | None = None) -> Routing:
        """From scores (T, E) to experts and weights; an expert whose bias is -inf is never chosen."""
        bias_E, group_E, scale = (p.get_value() for p in (self.bias, self.group_id, self.routing_scale))
        return _chosen(scores_TE, choice_TK, bias_E, group_E, scale, self.config, self.experts_per_token)


@partial(jax.jit, static_argnames=("config", "experts_per_token"))
def _chosen(
    scores_TE: jax.Array,
    choice_TK: jax.Array | None,
    bias_E: jax.Array,
    group_E: jax.Array,
    routing_scale: jax.Array,
    config: Config,
    experts_per_token: int,
) -> Routing:
    if choice_TK is None:
        choice_TE = _within_best_groups(scores_TE + bias_E.astype(scores_TE.dtype), group_E, config)
        choice_TK = jax.lax.top_k(choice_TE, experts_per_token)[1]
    weights = jnp.take_along_axis(scores_TE, choice_TK, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(choice_TK, weights * (config.routed_scaling_factor * routing_scale.astype(weights.dtype)))


def _within_best_groups(choice_TE: jax.Array, group_E: jax.Array, config: Config) -> jax.Array:
    """Choices with -inf wherever the expert's group is not among the token's best (0 would beat negatives)."""
    if config.n_group == 1:
        return choice_TE
    member_GE = group_E == jnp.arange(config.n_group)[:, None]
    choice_TGE = jnp.where(member_GE, choice_TE[:, None, :], -jnp.inf)
    score_TG = jnp.sum(jax.lax.top_k(choice_TGE, 2)[0], axis=-1)
    best_TG = jax.lax.top_k(score_TG, config.topk_group)[1]
    allowed_TE = jnp.any(group_E == best_TG[..., None], axis=1)
    return jnp.where(allowed_TE, choice_TE, -jnp.inf)
