"""Text from a model: prompt in, tokens out, one at a time from the latent cache."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.model import DeepseekV3
from moejax.model.attention import LatentCache

# Prompts are padded to a power of two and caches to a multiple of this, so that few lengths are compiled.
CACHE_MULTIPLE = 128


def generate(
    model: DeepseekV3,
    prompt: Sequence[int] | np.ndarray,
    max_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that continue the prompt, ending before a token of `stop`.

    Temperature 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature), and the same
    seed draws the same. Raises InputError if prompt and continuation exceed the model's context or the prompt is empty.
    """
    limit = model.config.max_position_embeddings
    if not len(prompt):
        raise InputError("the prompt has no tokens; at least one is needed")
    if len(prompt) + max_tokens > limit:
        raise InputError(f"{len(prompt)} prompt tokens and {max_tokens} more exceed the context of {limit} tokens")
    padded = 1 << (len(prompt) - 1).bit_length()
    length = -(-max(padded, len(prompt) + max_tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
    cache = model.empty_cache(1, length, dtype)
    tokens = jnp.asarray(np.pad(np.asarray(prompt, np.int32), (0, padded - len(prompt))))[None]
    key, position = jax.random.key(seed), len(prompt)
    # What the padding wrote behind the prompt is overwritten before any token can see it.
    token, cache = _step(model, tokens, cache, 0, position - 1, temperature, key, dtype=jnp.dtype(dtype))
    for n in range(max_tokens):
        if int(token) in stop:
            return
        yield int(token)
        if n + 1 < max_tokens:
            drawn = jax.random.fold_in(key, n + 1)
            token, cache = _step(
                model, token[None, None], cache, position, 0, temperature, drawn, dtype=jnp.dtype(dtype)
            )
            position += 1


@partial(jax.jit, static_argnames=("dtype",), donate_argnames=("cache",))
def _step(
    model: DeepseekV3,
    tokens_1T: jax.Array,
    cache: list[LatentCache],
    start: jax.Array | int,
    last: jax.Array | int,
    temperature: jax.Array | float,
    key: jax.Array,
    dtype: jnp.dtype,
) -> tuple[jax.Array, list[LatentCache]]:
    """Extend the cache by T tokens and choose the token that follows the one at index `last` of them."""
    x_1TD, cache = model.extend(tokens_1T, cache, jnp.asarray(start), dtype)
    logits_C = model.logits(jax.lax.dynamic_slice_in_dim(x_1TD, last, 1, axis=1))[0, 0]
    drawn = jax.random.categorical(key, logits_C / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_C)).astype(jnp.int32), cache
