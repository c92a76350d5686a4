import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaf_oracle import IntArray, planar_codes
from moejax.formats import planar

WIDTHS = list(range(1, 9))
pack, unpack = jax.jit(planar.pack, static_argnums=1), jax.jit(planar.unpack, static_argnums=(1, 2))
seeds = st.integers(0, 2**32 - 1)
MULTIPLE = {1: 32, 2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 7: 32, 8: 4}


def random_codes(bits: int, *shape: int, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape)


@given(
    st.sampled_from(WIDTHS), st.sampled_from([(), (2, 3)]), st.sampled_from([1, 31, 32, 48, 96, 512, 1024, 1376]), seeds
)
def test_round_trip(bits: int, batch: tuple[int, ...], inputs: int, seed: int) -> None:
    """Whatever the codes, they come back, take no more words than they must and lie where the layout's formula says."""
    codes = random_codes(bits, *batch, inputs, seed=seed)
    words = pack(jnp.asarray(codes), bits)
    assert words.dtype == jnp.uint32
    whole = -(-inputs // MULTIPLE[bits]) * MULTIPLE[bits]
    assert words.shape == (*batch, whole * bits // 32) == (*batch, planar.words_per_row(inputs, bits))
    np.testing.assert_array_equal(planar_codes(np.asarray(words, np.int64), bits, inputs), codes)
    np.testing.assert_array_equal(unpack(words, bits, inputs), codes)
    np.testing.assert_array_equal(unpack(words, bits, whole)[..., inputs:], 0)


@given(st.sampled_from(WIDTHS), st.integers(0, 2**32 - 1))
def test_any_words_are_codes(bits: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, (2, 3 * bits), np.uint32)
    codes = unpack(jnp.asarray(words), bits, 3 * 32)
    assert np.all((codes >= 0) & (codes < 2**bits))
    np.testing.assert_array_equal(pack(codes, bits), words)


def test_four_bits_by_hand() -> None:
    """16 codes in two words of eight fields: even codes in the first, odd ones in the second; the first four of either
    in the lower halves of its bytes."""
    codes = jnp.asarray([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0])
    np.testing.assert_array_equal(planar.pack(codes, 4), np.asarray([0xF7D5B391, 0x08E6C4A2], np.uint32))


def test_three_bits_by_hand() -> None:
    """The upper two bits of 32 codes in two words, then the lowest bits in one."""
    codes = jnp.asarray([0b111] + [0] * 14 + [0b010] + [0] * 15 + [0b101])
    # Code 15 is the second of run 7, the last byte's second field; code 31 the second of run 15.
    expected = [0b11, 0b01 << 26 | 0b10 << 30, 1 | 1 << 31]
    np.testing.assert_array_equal(planar.pack(codes, 3), np.asarray(expected, np.uint32))


def test_a_row_may_be_cut_after_any_tile() -> None:
    """Its words are those of its parts, one behind the other."""
    for bits in WIDTHS:
        tile = planar.tile_inputs(bits)
        codes = jnp.asarray(random_codes(bits, 2, 3 * tile + 32))
        parts = [pack(codes[:, start : start + tile], bits) for start in range(0, 3 * tile + 32, tile)]
        np.testing.assert_array_equal(pack(codes, bits), np.concatenate(parts, axis=1))


def test_the_bytes_of_a_word_hold_codes_of_64_in_a_row() -> None:
    """So that they share their scale, whatever the group size from 64 on."""
    for width in (1, 2, 4, 8):
        codes, unit = np.zeros(2 * 512 // width, np.int64), 512 // width
        for first in range(0, 2 * unit, 64):
            codes[:] = 0
            codes[first : first + 64] = 1
            words = np.asarray(pack(jnp.asarray(codes), width)).reshape(2, 16)
            shift = width * (first % unit // 64)
            np.testing.assert_array_equal(words[first // unit], 0x01010101 << shift)
            np.testing.assert_array_equal(words[1 - first // unit], 0)


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes(bits: int) -> None:
    assert sum(planar.planes(bits)) == bits
    assert list(planar.planes(bits)) == sorted(set(planar.planes(bits)), reverse=True)


@pytest.mark.parametrize("bits", WIDTHS)
def test_padding_fills_whole_words_and_no_more(bits: int) -> None:
    multiple = MULTIPLE[bits]
    assert planar.inputs_multiple(bits) == multiple
    lengths = [1, multiple, multiple + 1, multiple * 3 // 2]
    assert [planar.padded(inputs, bits) for inputs in lengths] == [multiple, multiple, 2 * multiple, 2 * multiple]


def test_vmap() -> None:
    codes = jnp.asarray(random_codes(5, 4, 64))
    words = pack(codes, 5)
    np.testing.assert_array_equal(jax.vmap(lambda row: planar.unpack(row, 5, 64))(words), codes)
