"""The latent cache: what MLA keeps of a token, L+R numbers a layer, and the attention that reads it block by block."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.formats import payload_bytes
from moejax.model.config import Config

# Cached tokens attended to at once: the workspace of a step does not grow with the context.
KEY_BLOCK = 256
_INT8_MAX = 127


class Latents(NamedTuple):
    """What attention needs of a token: c_kv (B, T, L) and the rotated k_rope (B, T, R)."""

    c_kv: jax.Array
    k_rope: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "scale"], meta_fields=["latent"])
@dataclass(frozen=True)
class LatentCache:
    """One layer's cache for B sequences of up to S tokens.

        [c_kv | k_rope] = rows                                      floating
        [c_kv | k_rope] = [rows[:L] * scale[0] | rows[L:] * scale[1]]    int8

    Attributes:
      rows: (B, S, L+R).
      scale: (B, S, 2) in bfloat16, None where rows are floating.
      latent: L.
    """

    rows: jax.Array
    scale: jax.Array | None
    latent: int

    @property
    def length(self) -> int:
        """S."""
        return self.rows.shape[1]


def empty_cache(config: Config, batch: int, length: int, dtype: jax.typing.DTypeLike) -> LatentCache:
    """A zeroed cache of one layer; `dtype` is float32, bfloat16 or int8."""
    rows = jnp.zeros((batch, length, config.kv_lora_rank + config.qk_rope_head_dim), dtype)
    scale = jnp.zeros((batch, length, 2), jnp.bfloat16) if rows.dtype == jnp.int8 else None
    return LatentCache(rows, scale, config.kv_lora_rank)


def empty_caches(config: Config, batch: int, length: int, dtype: jax.typing.DTypeLike) -> list[LatentCache]:
    """Zeroed caches of all decoder layers."""
    return [empty_cache(config, batch, length, dtype) for _ in range(config.num_hidden_layers)]


def bytes_per_token(config: Config, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of a token in all decoder layers: L+R numbers a layer, and two scales where they are int8."""
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 1, dtype))
    return config.num_hidden_layers * payload_bytes(cache)


def append(cache: LatentCache, new: Latents, start_B: jax.Array) -> LatentCache:
    """The cache with T tokens written at positions start, start+1, ... of each sequence."""
    if cache.scale is None:
        return LatentCache(_write(cache.rows, jnp.concatenate(new, axis=-1), start_B), None, cache.latent)
    scale_BT2 = jnp.stack([jnp.max(jnp.abs(part), axis=-1) / _INT8_MAX for part in new], axis=-1)
    scale_BT2 = scale_BT2.astype(cache.scale.dtype)
    whole = [_rounded(part, scale_BT2[..., n : n + 1]) for n, part in enumerate(new)]
    rows = _write(cache.rows, jnp.concatenate(whole, axis=-1), start_B)
    return LatentCache(rows, _write(cache.scale, scale_BT2, start_B), cache.latent)


def attend(
    cache: LatentCache,
    last_visible_BT: jax.Array,
    score: Callable[[Latents], jax.Array],
    mix: Callable[[jax.Array, Latents], jax.Array],
    mixed: jax.ShapeDtypeStruct,
    dtype: jnp.dtype,
) -> jax.Array:
    """Softmax attention over the cached tokens, KEY_BLOCK of them at a time: sum_s softmax_s(score)_s value_s.

    `score` gives scaled scores (B, H, T, S') of a block of latents in `dtype`, `mix(weights_BHTS, latents)` the sum of
    its values, of `mixed`'s shape (B, T, H, X) and dtype. Token s is seen where s <= last_visible. Blocks behind the
    last token that anybody sees are not visited. The running maximum and sum are those of Milakov and Gimelshein
    (arXiv:1805.02867).
    """
    size = min(KEY_BLOCK, cache.length)
    blocks = jnp.max(last_visible_BT) // size + 1
    batch, tokens, heads = mixed.shape[:3]

    def visit(n: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest, total, out = carry
        # The last block may begin early to stay within the cache: what was seen before is not seen again.
        first = jnp.minimum(n * size, cache.length - size)
        position_S = first + jnp.arange(size)
        latents = _read(cache, first, size, dtype)
        visible = (position_S <= last_visible_BT[..., None]) & (position_S >= n * size)
        scores = jnp.where(visible[:, None], score(latents).astype(out.dtype), -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - higher[..., None])
        faded = jnp.exp(highest - higher)
        new = mix(weights.astype(dtype), latents).astype(out.dtype)
        return higher, total * faded + jnp.sum(weights, axis=-1), out * _per_token(faded) + new

    # Every token sees position 0, so the maximum is finite from the first block on.
    init = (
        jnp.full((batch, heads, tokens), -jnp.inf, mixed.dtype),
        jnp.zeros((batch, heads, tokens), mixed.dtype),
        jnp.zeros(mixed.shape, mixed.dtype),
    )
    _, total, out = jax.lax.fori_loop(0, blocks, visit, init)
    return (out / _per_token(total)).astype(dtype)


def _per_token(per_head_BHT: jax.Array) -> jax.Array:
    return jnp.swapaxes(per_head_BHT, 1, 2)[..., None]


def _read(cache: LatentCache, first: jax.Array, size: int, dtype: jnp.dtype) -> Latents:
    # The barrier ties the conversion to the block; XLA would convert the whole cache ahead of the loop.
    cache, first = jax.lax.optimization_barrier((cache, first))
    rows = jax.lax.dynamic_slice_in_dim(cache.rows, first, size, axis=1).astype(dtype)
    parts = Latents(*jnp.split(rows, [cache.latent], axis=-1))
    if cache.scale is None:
        return parts
    scale = jax.lax.dynamic_slice_in_dim(cache.scale, first, size, axis=1).astype(dtype)
    return Latents(parts.c_kv * scale[..., :1], parts.k_rope * scale[..., 1:])


def _rounded(part: jax.Array, scale: jax.Array) -> jax.Array:
    exact = part / jnp.where(scale == 0, 1, scale).astype(part.dtype)
    return jnp.clip(jnp.round(exact), -_INT8_MAX, _INT8_MAX).astype(jnp.int8)


def _write(old: jax.Array, new: jax.Array, start_B: jax.Array) -> jax.Array:
    """Row by row where sequences differ in length; a loop, because XLA updates a donated array in place in one."""
    new = new.astype(old.dtype)

    def row(b: jax.Array, old: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(new, b, 1)
        return jax.lax.dynamic_update_slice(old, own, (b, start_B[b].astype(b.dtype), jnp.zeros_like(b)))

    return jax.lax.fori_loop(0, old.shape[0], row, old)
