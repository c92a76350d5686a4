"""What pruning costs one MoE layer, measured with and without re-routing and estimated from gate weights alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.model.leaves import named_leaves
from moejax.model.moe import MoE, Routing
from moejax.transforms.prune import masked_bias


class PruningError(NamedTuple):
    """Errors of a layer's routed output y_t = sum_k g_tk * f_tk relative to it, scalars; 0 if nothing was lost.

    rerouted: sum_t |y'_t - y_t|^2 / sum_t |y_t|^2, where y' routes past the pruned experts.
    dropped: the same where y' lacks the pruned experts' terms, with nothing in their place and the others' g unchanged.
    gate2_lost: sum of g^2 over the pairs (t, k) whose expert is pruned / sum of g^2 over all. It is `dropped` if all
    outputs f have one norm and a token's are orthogonal.
    gate_lost: the same of g.
    """

    rerouted: jax.Array
    dropped: jax.Array
    gate2_lost: jax.Array
    gate_lost: jax.Array


@jax.jit
def pruning_error(moe: MoE, x_TD: jax.Array, pruned_E: jax.Array) -> PruningError:
    """The error on inputs x (T, D) of pruning the experts where pruned_E (E,) is true; the shared expert is left out.

    Every group keeps at least `min_per_group` experts, or the re-routed tokens find fewer than K.
    """
    routing = moe.route(x_TD)
    lost_TK = pruned_E[routing.experts_TK]
    lost_weights_TK = jnp.where(lost_TK, routing.weights_TK, 0.0)
    y_TD, _ = moe.experts(x_TD, routing)
    lost_TD, _ = moe.experts(x_TD, Routing(routing.experts_TK, lost_weights_TK))
    rerouted_TD, _ = moe.experts(x_TD, _masked(moe, pruned_E).route(x_TD))
    return PruningError(
        rerouted=_share(jnp.sum((rerouted_TD - y_TD) ** 2), jnp.sum(y_TD**2)),
        dropped=_share(jnp.sum(lost_TD**2), jnp.sum(y_TD**2)),
        gate2_lost=_share(jnp.sum(lost_weights_TK**2), jnp.sum(routing.weights_TK**2)),
        gate_lost=_share(jnp.sum(lost_weights_TK), jnp.sum(routing.weights_TK)),
    )


def _masked(moe: MoE, pruned_E: jax.Array) -> MoE:
    bias = {"bias": masked_bias(moe.bias.get_value(), pruned_E)}
    return MoE(moe.config, (named_leaves(moe) | bias).__getitem__, moe.experts_per_token)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    return part / jnp.maximum(whole, 1e-30)
