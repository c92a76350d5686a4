"""Decoding a model larger than memory: every step asks for one part of it after another."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from moejax.formats import Leaf
from moejax.generate.decode import Rows, known_token
from moejax.generate.sampling import Draw, sample
from moejax.kernels import take
from moejax.model import Config
from moejax.model.deepseek_v3 import head_logits
from moejax.model.latent_cache import LatentCache
from moejax.model.norm import rms_norm
from moejax.model.parts import Parts
from moejax.model.rope import rotation
from moejax.model.steps import run_block_cached


@dataclass(frozen=True)
class PartByPart:
    """A `Runner` that reads every weight for every step; no more than one part of the model is in memory at a time.

    It draws what `InMemory` draws, up to the rounding of sums that another compilation adds in another order.
    """

    parts: Parts

    @property
    def config(self) -> Config:
        return self.parts.config

    def step(self, rows: Rows, cache: list[LatentCache], draw: Draw, dtype: str) -> tuple[jax.Array, list[LatentCache]]:
        x_BTD = take(self.parts.embedding(), rows.tokens_BT, dtype).block_until_ready()
        positions_BT = rows.start_B[:, None] + jnp.arange(rows.tokens_BT.shape[1])
        by = rotation(self.config, positions_BT, jnp.promote_types(dtype, jnp.float32))
        for index, own in enumerate(cache):
            x_BTD, cache[index] = run_block_cached(self.parts.block(index), x_BTD, by, own, rows.start_B)
            x_BTD.block_until_ready()  # before the next block is read
        x_BD = jnp.take_along_axis(x_BTD, rows.last_B[:, None, None], axis=1)[:, 0]
        eps = self.config.rms_norm_eps
        logits_BC = _logits(x_BD, self.parts.norm(), self.parts.head(), eps=eps)
        return known_token(sample(logits_BC, draw), x_BTD, rows.last_B, logits_BC), cache


@partial(jax.jit, static_argnames="eps")
def _logits(x_BD: jax.Array, norm: jax.Array, head: Leaf, eps: float) -> jax.Array:
    return head_logits(rms_norm(x_BD, norm, eps), head)
