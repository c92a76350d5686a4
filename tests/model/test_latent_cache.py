"""The latent cache: what is written where, and attention block by block against one plain softmax in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_cases import BASE
from moejax.model import config_from_hf
from moejax.model import latent_cache as module
from moejax.model.latent_cache import LatentCache, Latents, append, attend, bytes_per_token, empty_cache

CONFIG = config_from_hf(BASE)
L, R = CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim
BATCH, LENGTH, TOKENS, HEADS = 3, 11, 2, 2


def latents(seed: int, tokens: int, scale: float = 1.0) -> Latents:
    random = np.random.RandomState(seed)
    return Latents(*(jnp.asarray(random.normal(size=(BATCH, tokens, n)) * scale, jnp.float32) for n in (L, R)))


def filled(dtype: str, seed: int = 0) -> LatentCache:
    return append(empty_cache(CONFIG, BATCH, LENGTH, dtype), latents(seed, LENGTH), jnp.zeros(BATCH, jnp.int32))


def values(cache: LatentCache) -> np.ndarray:
    """What is cached, in float64, read by the definition in LatentCache's docstring."""
    rows = np.asarray(cache.rows, np.float64)
    if cache.scale is None:
        return rows
    scale = np.asarray(cache.scale, np.float64)
    return np.concatenate([rows[..., :L] * scale[..., :1], rows[..., L:] * scale[..., 1:]], axis=-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_tokens_are_written_at_each_sequences_own_position(dtype: str) -> None:
    new, start = latents(1, TOKENS), [0, 4, LENGTH - TOKENS]
    before, after = filled(dtype), append(filled(dtype), new, jnp.asarray(start))
    expected = values(before)
    for b, first in enumerate(start):
        expected[b, first : first + TOKENS] = np.concatenate([part[b] for part in new], axis=-1)
    tolerance = {"float32": 0, "bfloat16": 0.02, "int8": 0.02}[dtype]
    np.testing.assert_allclose(values(after), expected, rtol=0, atol=tolerance)
    untouched = np.ones((BATCH, LENGTH), bool)
    for b, first in enumerate(start):
        untouched[b, first : first + TOKENS] = False
    np.testing.assert_array_equal(values(after)[untouched], values(before)[untouched])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 100), exponent=st.integers(-20, 20))
def test_int8_is_within_half_a_step_of_its_part(seed: int, exponent: int) -> None:
    new = latents(seed, LENGTH, 10.0**exponent)
    cache = append(empty_cache(CONFIG, BATCH, LENGTH, "int8"), new, jnp.zeros(BATCH, jnp.int32))
    for part, kept in zip(new, np.split(values(cache), [L], axis=-1), strict=True):
        highest = np.abs(np.asarray(part, np.float64)).max(axis=-1, keepdims=True)
        # A bfloat16 scale may be rounded down by 2^-9, which clips the largest value by as much.
        assert np.all(np.abs(kept - part) <= highest * (0.51 / 127 + 2.0**-8))


def test_zeros_stay_zeros_in_int8() -> None:
    cache = append(empty_cache(CONFIG, BATCH, LENGTH, "int8"), latents(0, TOKENS, 0.0), jnp.zeros(BATCH, jnp.int32))
    assert not values(cache).any()


@pytest.mark.parametrize("block", [1, 4, 5, 11, 256])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_attention_block_by_block_is_one_softmax(block: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEY_BLOCK", block)
    cache, random = filled(dtype), np.random.RandomState(2)
    q = jnp.asarray(random.normal(size=(BATCH, TOKENS, HEADS, L)), jnp.float32)
    last_BT = np.array([[0, 1], [5, 6], [9, 10]])

    out = attend(
        cache,
        jnp.asarray(last_BT),
        lambda keys: jnp.einsum("bthl,bsl->bhts", q, keys.c_kv),
        lambda weights, own: jnp.einsum("bhts,bsr->bthr", weights, own.k_rope),
        jax.ShapeDtypeStruct((BATCH, TOKENS, HEADS, R), jnp.float32),
        jnp.dtype("float32"),
    )

    c_kv, k_rope = np.split(values(cache), [L], axis=-1)
    for b in range(BATCH):
        for t in range(TOKENS):
            seen = slice(0, last_BT[b, t] + 1)
            scores = np.asarray(q[b, t], np.float64) @ c_kv[b, seen].T
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(out[b, t], weights @ k_rope[b, seen], rtol=0, atol=2e-5)


def test_blocks_behind_the_last_visible_token_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold NaN, which would spoil any sum."""
    monkeypatch.setattr(module, "KEY_BLOCK", 4)
    cache = filled("float32")
    spoilt = LatentCache(cache.rows.at[:, 8:].set(jnp.nan), None, L)
    out = attend(
        spoilt,
        jnp.full((BATCH, 1), 7),
        lambda keys: jnp.sum(keys.c_kv, axis=-1)[:, None, None],
        lambda weights, own: jnp.einsum("bhts,bsr->bthr", weights, own.k_rope),
        jax.ShapeDtypeStruct((BATCH, 1, 1, R), jnp.float32),
        jnp.dtype("float32"),
    )
    assert np.isfinite(out).all()


@pytest.mark.parametrize(("dtype", "bytes_each", "scales"), [("float32", 4, 0), ("bfloat16", 2, 0), ("int8", 1, 2)])
def test_bytes_of_a_token(dtype: str, bytes_each: int, scales: int) -> None:
    assert bytes_per_token(CONFIG, dtype) == CONFIG.num_hidden_layers * ((L + R) * bytes_each + scales * 2)
