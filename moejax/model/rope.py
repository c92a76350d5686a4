"""Rotary position embedding on the R rope dims, with YaRN's frequencies."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.model.config import Config, Yarn


class Angles(NamedTuple):
    """cos and sin of every position's angles, (..., R/2), YaRN's scale included."""

    cos: jax.Array
    sin: jax.Array


def angles(config: Config, positions: jax.Array, dtype: jnp.dtype) -> Angles:
    """The angles of positions (...): angle_j = position * frequency_j, in `dtype` (at least float32)."""
    angle = positions[..., None].astype(dtype) * jnp.asarray(frequencies(config), dtype)
    scale = config.yarn.rotary_scale if config.yarn else 1.0
    return Angles(jnp.cos(angle) * scale, jnp.sin(angle) * scale)


def turn(x: jax.Array, by: Angles, interleave: bool) -> jax.Array:
    """Turn the pairs of x (..., R) by angles broadcast from (..., R/2).

    Pairs are neighbours (2j, 2j+1) if `interleave`, else (j, j + R/2); the result holds first parts before second
    parts either way, which no inner product of two rotated vectors notices.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else jnp.split(x, 2, axis=-1)
    cos, sin = by.cos.astype(x.dtype), by.sin.astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def frequencies(config: Config) -> np.ndarray:
    """Radians per position, (R/2,): theta^(-2j/R), stretched by YaRN where a turn takes longer than training saw."""
    dims = config.qk_rope_head_dim
    plain = config.rope_theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
    if config.yarn is None:
        return plain
    keep = 1 - _stretch_ramp(config.yarn, config.rope_theta, dims)
    return plain * keep + plain / config.yarn.factor * (1 - keep)


def _stretch_ramp(yarn: Yarn, theta: float, dims: int) -> np.ndarray:
    """0 where a frequency is kept, 1 where it is divided by the factor, between them linear (arXiv:2309.00071, 3.2)."""

    def dim_of_turns(turns: float) -> float:
        return dims * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_of_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of_turns(yarn.beta_slow)), dims - 1)
    return np.clip((np.arange(dims // 2) - low) / max(high - low, 1e-3), 0, 1)
