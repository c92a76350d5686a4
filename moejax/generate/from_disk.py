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
from moejax.model.rope import angles
from moejax.model.sliced import SlicedBlock
from moejax.model.source import Source, Step, walk
from moejax.model.steps import run_block_cached


@dataclass(frozen=True)
class PartByPart:
    """A `Runner` that reads every weight for every step; no more than one part of the model is in memory at a time.

    It draws what `InMemory` draws, up to the rounding of sums that another compilation adds in another order.
    """

    source: Source

    @property
    def config(self) -> Config:
        return self.source.config

    def step(self, rows: Rows, cache: list[LatentCache], draw: Draw, dtype: str) -> tuple[jax.Array, list[LatentCache]]:
        decoding = _Decoding(self.config, rows, cache, dtype)
        walk(self.source, decoding, head=True)
        token_B = sample(decoding.logits_BC, draw)
        return known_token(token_B, decoding.x_BTD, rows.last_B, decoding.logits_BC), decoding.cache


class _Decoding(Step):
    """One step's rows through the model, into the cache."""

    x_BTD: jax.Array
    logits_BC: jax.Array

    def __init__(self, config: Config, rows: Rows, cache: list[LatentCache], dtype: str):
        self.cache = cache
        self._config, self._rows, self._dtype = config, rows, dtype
        positions_BT = rows.start_B[:, None] + jnp.arange(rows.tokens_BT.shape[1])
        self._by = angles(config, positions_BT, jnp.promote_types(dtype, jnp.float32))

    def embedding(self, embedding: Leaf) -> None:
        self.x_BTD = take(embedding, self._rows.tokens_BT, self._dtype).block_until_ready()

    def block(self, index: int, block: SlicedBlock) -> None:
        self.x_BTD, self.cache[index] = run_block_cached(
            block.whole(), self.x_BTD, self._by, self.cache[index], self._rows.start_B
        )
        self.x_BTD.block_until_ready()  # before the next block is read

    def norm(self, gain_D: jax.Array) -> None:
        self._gain_D = gain_D

    def head(self, head: Leaf) -> None:
        x_BD = jnp.take_along_axis(self.x_BTD, self._rows.last_B[:, None, None], axis=1)[:, 0]
        self.logits_BC = _logits(x_BD, self._gain_D, head, eps=self._config.rms_norm_eps)


@partial(jax.jit, static_argnames="eps")
def _logits(x_BD: jax.Array, norm: jax.Array, head: Leaf, eps: float) -> jax.Array:
    return head_logits(rms_norm(x_BD, norm, eps), head)
