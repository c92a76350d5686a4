"""Decoding: prompts through the latent cache in chunks, then one token after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.generate.sampling import GREEDY, Draw, Sampling, check_sampling, sample
from moejax.model import Config, DeepseekV3, require_tokens
from moejax.model.finite import finite_rows, refuse_head
from moejax.model.hidden_states import require_finite_blocks
from moejax.model.latent_cache import LatentCache, empty_caches
from moejax.model.source import ModelSource, Source
from moejax.sharding import by_sequence, gathered, made_by_sequence

CACHE_DTYPES = ("float32", "bfloat16", "int8")
# What is drawn where something is not finite.
NO_TOKEN = -1
# Caches are of a power of two, no less than this, so that few lengths are compiled.
_SHORTEST_CACHE = 256


@dataclass(frozen=True)
class Decoding:
    """How a model is run.

    Attributes:
      dtype: what is computed in.
      cache_dtype: what latents are kept in: float32, bfloat16 or int8; `dtype` if None.
      prefill_chunk: tokens of a prompt that go through the model at once; what they take grows with it.
    """

    dtype: str = "float32"
    cache_dtype: str | None = None
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        if self.prefill_chunk < 1:
            raise InputError(f"prefill_chunk is {self.prefill_chunk}; at least 1 token is needed")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise InputError(f"cache_dtype is {self.cache_dtype}; accepted are {', '.join(CACHE_DTYPES)}")

    @property
    def kept_in(self) -> str:
        """The latents' dtype."""
        return self.cache_dtype or self.dtype


class Rows(NamedTuple):
    """T tokens of each sequence at positions start, start+1, ..., and the index of the one behind which a token is
    drawn: (B, T), (B,), (B,)."""

    tokens_BT: jax.Array
    start_B: jax.Array
    last_B: jax.Array


class Runner(Protocol):
    """A model that can be decoded: in memory, or read from disk for every step."""

    @property
    def config(self) -> Config: ...

    @property
    def source(self) -> Source: ...

    def step(self, rows: Rows, cache: list[LatentCache], draw: Draw, dtype: str) -> tuple[jax.Array, list[LatentCache]]:
        """The rows into the cache, and the token drawn behind each, (B,): `known_token`."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A model whose weights are all in memory: a step is one compiled function."""

    model: DeepseekV3

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def source(self) -> Source:
        return ModelSource(self.model)

    def step(self, rows: Rows, cache: list[LatentCache], draw: Draw, dtype: str) -> tuple[jax.Array, list[LatentCache]]:
        return decode_step(self.model, rows, cache, draw, dtype)


@partial(jax.jit, static_argnames="dtype", donate_argnames="cache")
def decode_step(
    model: DeepseekV3, rows: Rows, cache: list[LatentCache], draw: Draw, dtype: str
) -> tuple[jax.Array, list[LatentCache]]:
    def logits(
        model: DeepseekV3, rows: Rows, cache: list[LatentCache]
    ) -> tuple[jax.Array, jax.Array, list[LatentCache]]:
        x_BTD, cache = model.extend(rows.tokens_BT, cache, rows.start_B, dtype)
        x_B1D = jnp.take_along_axis(x_BTD, rows.last_B[:, None, None], axis=1)
        return x_BTD, model.logits(x_B1D)[:, 0], cache

    x_BTD, logits_BC, cache = by_sequence(logits, (model,), (rows, cache))
    x_BTD, logits_BC = gathered(x_BTD), gathered(logits_BC)
    return gathered(known_token(sample(logits_BC, draw), x_BTD, rows.last_B, logits_BC)), cache


def known_token(token_B: jax.Array, x_BTD: jax.Array, last_B: jax.Array, logits_BC: jax.Array) -> jax.Array:
    """The token drawn behind the one at index last of each sequence, (B,); NO_TOKEN where the logits or, up to that
    index, the hidden states x are not finite."""
    behind_BT = jnp.arange(x_BTD.shape[1]) > last_B[:, None]
    is_finite_B = jnp.all(finite_rows(x_BTD) | behind_BT, axis=1) & jnp.all(jnp.isfinite(logits_BC), axis=1)
    return jnp.where(is_finite_B, token_B, NO_TOKEN)


def generate(
    model: DeepseekV3 | Runner,
    prompt: Sequence[int] | np.ndarray,
    max_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[int] = (),
    decoding: Decoding = Decoding(),
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that continue the prompt, ending before a token of `stop`.

    The same seed draws the same tokens. Raises InputError, before anything is computed, if the prompt is empty, or
    prompt and continuation exceed the model's context, or a value of `sampling` is out of range; and, naming the
    matrix, where an output is not finite.
    """
    batch = generate_batch(model, [prompt], max_tokens, sampling=sampling, seed=seed, stop=stop, decoding=decoding)
    return (token for (token,) in batch if token is not None)


def generate_batch(
    model: DeepseekV3 | Runner,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[int] = (),
    decoding: Decoding = Decoding(),
) -> Iterator[list[int | None]]:
    """The same for several prompts of any lengths at once: each step yields a token a prompt, None for those that have
    ended. Ends when all have. Row 0 draws what `generate` draws with that seed."""
    runner = InMemory(model) if isinstance(model, DeepseekV3) else model
    check_request(runner.config, prompts, max_tokens)
    check_sampling(sampling)
    return _decode(runner, prompts, max_tokens, sampling, seed, frozenset(stop), decoding)


def check_request(config: Config, prompts: Sequence[Sequence[int] | np.ndarray], max_tokens: int) -> None:
    """Raise InputError for an empty prompt, tokens that are not the model's, or more than its context holds."""
    limit = config.max_position_embeddings
    if not prompts:
        raise InputError("there is no prompt; at least one is needed")
    for prompt in prompts:
        if not len(prompt):
            raise InputError("the prompt has no tokens; at least one is needed")
        if len(prompt) + max_tokens > limit:
            raise InputError(f"{len(prompt)} prompt tokens and {max_tokens} more exceed the context of {limit} tokens")
        require_tokens(prompt, config)


def cache_length(longest_prompt: int, max_tokens: int, chunk: int) -> int:
    """Positions of a cache that holds the padded prompt and what follows: a power of two."""
    padded = sum(size for _, size in chunks(longest_prompt, chunk))
    return max(_SHORTEST_CACHE, _power_of_two(max(padded, longest_prompt + max_tokens)))


def chunks(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """First position and size of every chunk of a prompt; the last is padded to a power of two."""
    for start in range(0, length, chunk):
        yield start, min(chunk, _power_of_two(length - start))


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _decode(
    runner: Runner,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: frozenset[int],
    decoding: Decoding,
) -> Iterator[list[int | None]]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    length = cache_length(int(lengths.max()), max_tokens, decoding.prefill_chunk)
    cache = made_by_sequence(partial(empty_caches, runner.config, len(prompts), length, decoding.kept_in))
    seeds_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(prompts)))
    going, position_B, token_B = np.ones(len(prompts), bool), jnp.asarray(lengths), None
    so_far = [list(prompt) for prompt in prompts]
    for n in range(max_tokens):
        draw = Draw(sampling, _keys(seeds_B, n))
        if token_B is None:
            token_B, cache = _prefill(runner, prompts, cache, draw, decoding)
        else:
            rows = Rows(token_B[:, None], position_B, jnp.zeros_like(position_B))
            token_B, cache = runner.step(rows, cache, draw, decoding.dtype)
            position_B = position_B + 1
        tokens = np.asarray(token_B).tolist()
        if any(goes and token == NO_TOKEN for goes, token in zip(going, tokens, strict=True)):
            for sequence in so_far:
                require_finite_blocks(runner.source, jnp.asarray([sequence]), decoding.dtype)
            refuse_head()
        for sequence, token in zip(so_far, tokens, strict=True):
            sequence.append(token)
        going &= [token not in stop for token in tokens]
        if not going.any():
            return
        yield [token if goes else None for token, goes in zip(tokens, going, strict=True)]


def _prefill(
    runner: Runner,
    prompts: Sequence[Sequence[int] | np.ndarray],
    cache: list[LatentCache],
    draw: Draw,
    decoding: Decoding,
) -> tuple[jax.Array, list[LatentCache]]:
    """All prompts into the cache, chunk by chunk, and the token drawn behind each.

    Shorter prompts are padded, with tokens of their own; what padding writes is overwritten before any token can see
    it.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    chunk = decoding.prefill_chunk
    token_B = jnp.zeros(len(prompts), jnp.int32)
    for start, size in chunks(int(lengths.max()), chunk):
        tokens_BT = np.array([[prompt[0]] * size for prompt in prompts], np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=True):
            own = prompt[start : start + size]
            row[: len(own)] = own
        last_B = np.clip(lengths - 1 - start, 0, size - 1).astype(np.int32)
        rows = Rows(jnp.asarray(tokens_BT), jnp.full(len(prompts), start, jnp.int32), jnp.asarray(last_B))
        drawn_B, cache = runner.step(rows, cache, draw, decoding.dtype)
        is_last_B = jnp.asarray((lengths - 1) // chunk == start // chunk)
        is_bad_B = (drawn_B == NO_TOKEN) & jnp.asarray(start < lengths)
        token_B = jnp.where(is_last_B | is_bad_B, drawn_B, token_B)
        if is_bad_B.any():
            break
    return token_B, cache


@jax.jit
def _keys(seeds_B: jax.Array, n: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, n))(seeds_B)
