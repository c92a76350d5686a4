"""Activated-expert adjustment: fewer experts per token, and a routing scale that makes up for it."""

import jax
import jax.numpy as jnp

from moejax.model.leaves import named_leaves
from moejax.model.moe import MoE


def paper_rule(experts_per_token: int, share_kept: float) -> int:
    """K' = round(r*K) for a share r of experts kept (arXiv:2509.25689), at least 1."""
    return max(1, round(share_kept * experts_per_token))


def adjust(moe: MoE, experts_per_token: int, routing_scale: jax.Array | float = 1.0) -> MoE:
    """The layer choosing `experts_per_token` experts, their weights times `routing_scale` and their scale so far."""
    leaves = named_leaves(moe)
    leaves["routing_scale"] = leaves["routing_scale"] * jnp.asarray(routing_scale, jnp.float32)
    return MoE(moe.config, leaves.__getitem__, experts_per_token)


@jax.jit
def fit_routing_scale(full: MoE, fewer: MoE, x_TD: jax.Array) -> jax.Array:
    """The s that minimizes sum_t |s*y'_t - y_t|^2, y and y' the routed outputs of `full` and `fewer` on x (T, D).

    s = sum_t <y_t, y'_t> / sum_t |y'_t|^2.
    """
    y_TD, _ = full.experts(x_TD, full.route(x_TD))
    fewer_TD, _ = fewer.experts(x_TD, fewer.route(x_TD))
    return jnp.sum(y_TD * fewer_TD) / jnp.maximum(jnp.sum(fewer_TD * fewer_TD), 1e-30)
