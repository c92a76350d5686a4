import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaf_oracle import IntArray, planar_codes
from moejax.formats import planar

WIDTHS = list(range(1, 9))
pack, unpack = (jax.jit(function, static_argnums=1) for function in (planar.pack, planar.unpack))
MULTIPLE = {1: 32, 2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 7: 32, 8: 4}


def random_codes(bits: int, *shape: int, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape)


@given(st.sampled_from(WIDTHS), st.sampled_from([(), (2, 3)]), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_round_trip(bits: int, batch: tuple[int, ...], multiples: int, seed: int) -> None:
    """Whatever the codes, they come back, fill the words exactly and lie where the layout's formula says."""
    inputs = MULTIPLE[bits] * multiples
    codes = random_codes(bits, *batch, inputs, seed=seed)
    words = pack(jnp.asarray(codes), bits)
    assert words.dtype == jnp.uint32
    assert words.shape == (*batch, inputs * bits // 32)
    np.testing.assert_array_equal(planar_codes(np.asarray(words, np.int64), bits), codes)
    np.testing.assert_array_equal(unpack(words, bits), codes)


@given(st.sampled_from(WIDTHS), st.integers(0, 2**32 - 1))
def test_any_words_are_codes(bits: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, (2, 3 * bits), np.uint32)
    codes = unpack(jnp.asarray(words), bits)
    assert np.all((codes >= 0) & (codes < 2**bits))
    np.testing.assert_array_equal(pack(codes, bits), words)


def test_four_bits_by_hand() -> None:
    """16 codes in two words of eight fields: even codes in the first, odd ones in the second, the first code lowest."""
    codes = jnp.asarray([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0])
    np.testing.assert_array_equal(planar.pack(codes, 4), np.asarray([0xFDB97531, 0x0ECA8642], np.uint32))


def test_three_bits_by_hand() -> None:
    """The upper two bits of 32 codes in two words, then the lowest bits in one."""
    codes = jnp.asarray([0b111] + [0] * 14 + [0b010] + [0] * 15 + [0b101])
    expected = [0b11, 0b01 << 14 | 0b10 << 30, 1 | 1 << 31]
    np.testing.assert_array_equal(planar.pack(codes, 3), np.asarray(expected, np.uint32))


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes(bits: int) -> None:
    assert sum(planar.planes(bits)) == bits
    assert list(planar.planes(bits)) == sorted(set(planar.planes(bits)), reverse=True)


@pytest.mark.parametrize("bits", WIDTHS)
def test_refuses_rows_that_leave_words_unfilled(bits: int) -> None:
    multiple = MULTIPLE[bits]
    assert planar.inputs_multiple(bits) == multiple
    for inputs in (multiple - 1, multiple + 1, multiple * 3 // 2):
        with pytest.raises(ValueError, match=f"{bits}-bit rows hold a multiple of {multiple} inputs, not {inputs}"):
            planar.pack(jnp.zeros(inputs, jnp.int32), bits)


def test_vmap() -> None:
    codes = jnp.asarray(random_codes(5, 4, 64))
    words = pack(codes, 5)
    np.testing.assert_array_equal(jax.vmap(lambda row: planar.unpack(row, 5))(words), codes)
