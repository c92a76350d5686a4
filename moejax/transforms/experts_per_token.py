"""Activated-expert adjustment: fewer experts per token, and a routing scale that makes up for it."""

import jax
import jax.numpy as jnp

from moejax.model.moe import MoE


def paper_rule(experts_per_token: int, share_kept: float) -> int:
    """K' = round(r*K) for a share r of experts kept (arXiv:2509.25689), at least 1."""
    return max(1, round(share_kept * experts_per_token))


def adjust(moe: MoE, experts_per_token: int, routing_scale: jax.Array | float = 1.0) -> MoE:
    """The layer choosing `experts_per_token` experts, their weights times `routing_scale` and their scale so far."""
    scale = moe.routing_scale.get_value() * jnp.asarray(routing_scale, jnp.float32)
    return moe.with_leaves({"routing_scale": scale}, experts_per_token)


@jax.jit
def fit_routing_scale(y_TD: jax.Array, fewer_TD: jax.Array) -> jax.Array:
    """The s that minimizes sum_t |s*y'_t - y_t|^2, y and y' (T, D) the routed outputs of a layer's full and of fewer
    experts: s = sum_t <y_t, y'_t> / sum_t |y'_t|^2."""
    return jnp.sum(y_TD * fewer_TD) / jnp.maximum(jnp.sum(fewer_TD * fewer_TD), 1e-30)
