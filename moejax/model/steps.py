"""The model one block at a time: jitted once per shape, for everything that runs layer by layer.

Evaluation and calibration go through the layers in Python, so that no more than one block need be in memory and equal
blocks share one compilation.
"""

from functools import partial

import jax

from moejax.model.deepseek_v3 import Block
from moejax.model.latent_cache import LatentCache
from moejax.model.norm import rms_norm
from moejax.model.rope import Angles
from moejax.sharding import by_sequence, gathered


@jax.jit
def run_block(block: Block, x_BTD: jax.Array, by: Angles) -> jax.Array:
    """One decoder block, compiled."""
    return gathered(by_sequence(lambda block, by, x_BTD: block(x_BTD, by), (block, by), (x_BTD,)))


@partial(jax.jit, donate_argnames="cache")
def run_block_cached(
    block: Block, x_BTD: jax.Array, by: Angles, cache: LatentCache, start_B: jax.Array
) -> tuple[jax.Array, LatentCache]:
    """One decoder block behind its cache, compiled."""
    return block.attend_cached(x_BTD, by, cache, start_B)


# What attention makes of hidden states, which the feed-forward part takes, compiled.
run_attention = jax.jit(Block.attended)

# The final norm, compiled.
run_norm = partial(jax.jit, static_argnames="eps")(rms_norm)
