"""The model one block at a time: jitted once per shape, for everything that runs layer by layer.

Evaluation and calibration go through the layers in Python, so that no more than one block need be in memory and equal
blocks share one compilation.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moejax.model.deepseek_v3 import Block, DeepseekV3
from moejax.model.rope import Rotation


@jax.jit
def run_block(block: Block, x_BTD: jax.Array, by: Rotation) -> jax.Array:
    """One decoder block, compiled."""
    return block(x_BTD, by)


def run_blocks(blocks: Sequence[Block], x_BTD: jax.Array, by: Rotation) -> jax.Array:
    """Blocks one behind the other."""
    for block in blocks:
        x_BTD = run_block(block, x_BTD, by)
    return x_BTD


def embed(model: DeepseekV3, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, Rotation]:
    """What the first block takes: embeddings (B, T, D) and the rotation of positions 0 to T-1."""
    x_BTD = model.embedded(tokens_BT, dtype)
    return x_BTD, model.rotation(jnp.arange(tokens_BT.shape[1]), x_BTD.dtype)
