"""Feed-forward layers: the dense SwiGLU, the router, and the mixture of experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.formats import ExpertWeights
from moejax.kernels import expert_matmul, hadamard, matmul, product
from moejax.model.config import Config
from moejax.model.leaves import Leaves, Taps, linear, prefixed, under


class Mlp(nnx.Module):
    """SwiGLU: y = W_down(silu(x W_gate) * (x W_up))."""

    def __init__(self, config: Config, leaves: Leaves):
        self.config = config
        self.gate = nnx.Param(leaves("gate"))
        self.up = nnx.Param(leaves("up"))
        self.down = nnx.Param(leaves("down"))

    def __call__(self, x: jax.Array, taps: Taps | None = None) -> jax.Array:
        hidden = jax.nn.silu(linear(x, self.gate, taps, "gate")) * linear(x, self.up, taps, "up")
        return linear(_down_input(hidden, self.config), self.down, taps, "down")


def _down_input(hidden: jax.Array, config: Config) -> jax.Array:
    """What `down` takes of the SwiGLU's products (..., F): the same, or hidden H / sqrt(F) where the config says so."""
    return hadamard(hidden) if config.down_input_transform else hidden


class Routing(NamedTuple):
    """The experts each token goes to, int32 (T, K), and their weights (T, K)."""

    experts_TK: jax.Array
    weights_TK: jax.Array


class ExpertRun(NamedTuple):
    """What happened inside the routed experts, rows sorted by expert (R = T*K): for calibration.

    hidden_RF is what `down` takes.
    """

    expert_R: jax.Array
    weight_R: jax.Array
    x_RD: jax.Array
    gate_RF: jax.Array
    up_RF: jax.Array
    hidden_RF: jax.Array
    y_RD: jax.Array


class Experts(nnx.Module):
    """The routed experts' weights: gate and up (E, F, D), down (E, D, F)."""

    def __init__(self, config: Config, leaves: Leaves):
        self.config = config
        self.gate = nnx.Param(leaves("gate"))
        self.up = nnx.Param(leaves("up"))
        self.down = nnx.Param(leaves("down"))

    def __call__(self, x_TD: jax.Array, routing: Routing) -> tuple[jax.Array, ExpertRun]:
        """y_t = sum_k weight_tk * expert_{e(t,k)}(x_t), visiting only the experts that some token chose."""
        T, K = routing.experts_TK.shape
        order_R = jnp.argsort(routing.experts_TK.reshape(-1), stable=True)
        rows_E = jnp.bincount(routing.experts_TK.reshape(-1), length=self.gate.get_value().num_experts)
        x_RD = x_TD[order_R // K]
        gate_RF = self._project(x_RD, self.gate, rows_E)
        up_RF = self._project(x_RD, self.up, rows_E)
        hidden_RF = _down_input(jax.nn.silu(gate_RF) * up_RF, self.config)
        y_RD = self._project(hidden_RF, self.down, rows_E)
        y_TKD = jnp.zeros_like(y_RD).at[order_R].set(y_RD, unique_indices=True).reshape(T, K, -1)
        wide = jnp.promote_types(y_TKD.dtype, jnp.float32)
        y_TD = product("tkd,tk->td", y_TKD.astype(wide), routing.weights_TK.astype(wide)).astype(y_TKD.dtype)
        expert_R, weight_R = routing.experts_TK.reshape(-1)[order_R], routing.weights_TK.reshape(-1)[order_R]
        return y_TD, ExpertRun(expert_R, weight_R, x_RD, gate_RF, up_RF, hidden_RF, y_RD)

    @staticmethod
    def _project(x_RI: jax.Array, weights: nnx.Param[ExpertWeights], rows_E: jax.Array) -> jax.Array:
        return expert_matmul(x_RI, weights.get_value(), rows_E)


class MoE(nnx.Module):
    """DeepSeek-V3's mixture of experts (arXiv:2412.19437, section 2.1.2).

        s = sigmoid(x W_router), choice = s + bias
        a group's score is the sum of its two best choices; the best `topk_group` groups stay
        the top K choices among them are the token's experts
        weight = s of the chosen (/ their sum) * routed_scaling_factor * routing_scale
        y = sum_k weight_k * expert_k(x) + shared(x)

    Groups are ragged: `group_id` says to which group each surviving expert belongs. `experts_per_token` is K, and
    `routing_scale` what experts_per_token's transform fits when K is lowered; 1 in an original model.
    """

    def __init__(self, config: Config, leaves: Leaves, experts_per_token: int | None = None):
        self.config = config
        self.experts_per_token = experts_per_token or config.num_experts_per_tok
        self.router = nnx.Param(leaves("router"))
        self.bias = nnx.Param(leaves("bias"))
        self.group_id = nnx.Param(leaves("group_id"))
        self.routing_scale = nnx.Param(leaves("routing_scale"))
        self.experts = Experts(config, under(leaves, "experts"))
        self.shared = Mlp(config, under(leaves, "shared"))

    @property
    def num_experts(self) -> int:
        return self.router.get_value().shape[0]

    def __call__(self, x_BTD: jax.Array, choice_TK: jax.Array | None = None, taps: Taps | None = None) -> jax.Array:
        """x (B, T, D) to the layer's output. `choice_TK` (B*T, K) replays given experts instead of choosing."""
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.route(x_TD, choice_TK)
        routed_TD, run = self.experts(x_TD, routing)
        shared_taps: Taps | None = None if taps is None else {}
        y_TD = routed_TD + self.shared(x_TD, shared_taps)
        if taps is not None:
            taps |= {"router": x_TD, "experts": run} | prefixed("shared", shared_taps)
        return y_TD.reshape(x_BTD.shape)

    def scores(self, x_TD: jax.Array) -> jax.Array:
        """sigmoid(x W_router) in at least float32, (T, E)."""
        wide = jnp.promote_types(x_TD.dtype, jnp.float32)
        return jax.nn.sigmoid(matmul(x_TD.astype(wide), self.router.get_value()))

    def route(self, x_TD: jax.Array, choice_TK: jax.Array | None = None) -> Routing:
        """Each token's experts and weights."""
        return self.choose(self.scores(x_TD), choice_TK)

    def choose(self, scores_TE: jax.Array, choice_TK: jax.Array | None = None) -> Routing:
        """From scores (T, E) to experts and weights; an expert whose bias is -inf is never chosen."""
        if choice_TK is None:
            choice_TE = self._within_best_groups(scores_TE + self.bias.get_value().astype(scores_TE.dtype))
            choice_TK = jax.lax.top_k(choice_TE, self.experts_per_token)[1]
        weights = jnp.take_along_axis(scores_TE, choice_TK, axis=-1)
        if self.config.norm_topk_prob:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        scale = self.config.routed_scaling_factor * self.routing_scale.get_value().astype(weights.dtype)
        return Routing(choice_TK, weights * scale)

    def _within_best_groups(self, choice_TE: jax.Array) -> jax.Array:
        """Choices with -inf wherever the expert's group is not among the token's best (0 would beat negatives)."""
        groups = self.config.n_group
        if groups == 1:
            return choice_TE
        group_E = self.group_id.get_value()
        member_GE = group_E == jnp.arange(groups)[:, None]
        choice_TGE = jnp.where(member_GE, choice_TE[:, None, :], -jnp.inf)
        score_TG = jnp.sum(jax.lax.top_k(choice_TGE, 2)[0], axis=-1)
        best_TG = jax.lax.top_k(score_TG, self.config.topk_group)[1]
        allowed_TE = jnp.any(group_E == best_TG[..., None], axis=1)
        return jnp.where(allowed_TE, choice_TE, -jnp.inf)
