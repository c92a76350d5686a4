"""RMSNorm."""

import jax
import jax.numpy as jnp

# Hugging Face builds the two latent norms without passing rms_norm_eps on, so they keep the class's default.
LATENT_EPS = 1e-6


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """gain * x / sqrt(mean(x^2) + eps) over the last axis, computed in at least float32, returned in x's dtype.

    NaN where a square is infinite, which would otherwise give zeros.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jnp.where(jnp.isfinite(mean), jax.lax.rsqrt(mean + eps), jnp.nan)
    return (normed * gain.astype(wide.dtype)).astype(x.dtype)
