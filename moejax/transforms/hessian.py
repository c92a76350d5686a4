"""Hessians as error feedback takes them: damped, with whole groups of inputs, and factored."""

import jax
import jax.numpy as jnp

from moejax.transforms.quantize import positive

# How much the Hessian's diagonal grows (see `damped`): where tokens are many; per input and token where they are few.
DAMPING = 0.03
DAMPING_PER_INPUT = 0.7

# What an input that fills a group up counts, as a share of the others' mean.
_PADDING = 1e-6


def damping_for(tokens: jax.Array | float, inputs: int) -> jax.Array:
    """The damping that suits a Hessian of so many tokens: in proportion to inputs per token, at least DAMPING."""
    return jnp.maximum(DAMPING, DAMPING_PER_INPUT * inputs / jnp.maximum(tokens, 1))


def damped(hessian_II: jax.Array, damping: jax.Array | float) -> jax.Array:
    """H with `damping` * sqrt(H_ii * mean H_jj) added to its diagonal, in float32: less to the inputs that matter less,
    but more in proportion. Inputs never seen count a little, as `positive` has it."""
    hessian_II = hessian_II.astype(jnp.float32)
    seen_I = positive(jnp.diagonal(hessian_II))
    return hessian_II + jnp.diag(damping * jnp.sqrt(seen_I) * jnp.sqrt(jnp.mean(seen_I)))


def in_whole_groups(weight_IO: jax.Array, hessian_II: jax.Array, group_size: int) -> tuple[jax.Array, jax.Array]:
    """With inputs behind a shorter last group whose weights are zero, which no other input makes up for, and which cost
    next to nothing."""
    if not (more := -len(weight_IO) % group_size):
        return weight_IO, hessian_II
    own = _PADDING * jnp.mean(jnp.diagonal(hessian_II)) * jnp.eye(more)
    return jnp.pad(weight_IO, ((0, more), (0, 0))), jax.scipy.linalg.block_diag(hessian_II, own)


def factor(hessian_II: jax.Array) -> jax.Array:
    """U, upper triangular, of H = U^T U; of H's diagonal alone, which means no feedback, where float32 finds none."""
    upper_II = jnp.linalg.cholesky(hessian_II, upper=True, symmetrize_input=False)
    return jnp.where(jnp.all(jnp.isfinite(upper_II)), upper_II, jnp.diag(jnp.sqrt(positive(jnp.diagonal(hessian_II)))))
