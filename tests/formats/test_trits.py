from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from leaf_oracle import ternary_codes
from moejax.formats import trits

pack, unpack = jax.jit(trits.pack), jax.jit(trits.unpack, static_argnums=1)


@given(st.sampled_from([1, 2, 7, 10, 13, 20, 24]), st.integers(0, 2**32 - 1))
def test_round_trip(multiples: int, seed: int) -> None:
    """Whatever the codes, they come back and lie where the layout's formula says; padding stands for zero weights."""
    inputs = 32 * multiples
    codes = np.random.default_rng(seed).integers(0, 3, (2, 3, inputs))
    words = pack(jnp.asarray(codes))
    assert words.dtype == jnp.uint32
    assert words.shape == (2, 3, -(-inputs // 20)) == (2, 3, trits.words_per_row(inputs))
    fields = ternary_codes(np.asarray(words, np.int64), 20 * words.shape[-1])
    np.testing.assert_array_equal(fields[..., :inputs], codes)
    np.testing.assert_array_equal(fields[..., inputs:], 1)
    np.testing.assert_array_equal(unpack(words, inputs), codes)


def test_every_byte() -> None:
    """Each of the 243 numbers of five digits, in each byte of a word, is the fraction it should be and comes back."""
    numbers = np.asarray(list(product(range(3), repeat=5)))
    values = np.arange(243)
    np.testing.assert_array_equal(numbers @ [81, 27, 9, 3, 1], values)
    for byte in range(4):
        codes = np.zeros((243, 20), np.int64)
        codes[:, byte::4] = numbers
        words = pack(jnp.asarray(codes))
        np.testing.assert_array_equal(np.asarray(words)[:, 0] >> (8 * byte), np.ceil(values * 256 / 243))
        np.testing.assert_array_equal(unpack(words, 20), codes)


@given(st.integers(0, 2**32 - 1))
def test_any_words_are_codes(seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, (2, 13), np.uint32)
    codes = unpack(jnp.asarray(words), 256)
    assert np.all((codes >= 0) & (codes < 3))
    np.testing.assert_array_equal(codes, ternary_codes(words.astype(np.int64), 256))


def test_by_hand() -> None:
    """32 codes in two words: the even ones in the first, the odd ones in the second; the last digit of every byte is
    padding."""
    codes = jnp.asarray([2, 1] + [0] * 30)
    two, one, zero = 0xAC, 0x57, 0x02  # ceil(256 v / 243) of 20001, 10001 and 00001 in base 3: 163, 82 and 1
    expected = [two | zero << 8 | zero << 16 | zero << 24, one | zero << 8 | zero << 16 | zero << 24]
    np.testing.assert_array_equal(trits.pack(codes), np.asarray(expected, np.uint32))


def test_vmap() -> None:
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 64)))
    np.testing.assert_array_equal(jax.vmap(lambda row: trits.unpack(row, 64))(pack(codes)), codes)
