"""Scales of eight bits against their equation in NumPy and float64, scales in float16 against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaf_oracle import scales_of
from moejax.formats.scales import as_stored, decode_scales, encode_scales, kind_of

CODES = np.arange(256, dtype=np.uint8)
VALUES = scales_of(CODES)
LARGEST = 15.0

encode_e8 = jax.jit(lambda scale: encode_scales(scale, "e8"))


def test_the_oracle_by_hand() -> None:
    np.testing.assert_array_equal(
        VALUES[[0, 1, 8, 128, 248, 255]], [0, 1.125 * 2.0**-28, 2.0**-27, 2.0**-12, 8, LARGEST]
    )
    assert np.all(np.diff(VALUES) > 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_code_decodes_to_its_value_exactly(dtype: jax.typing.DTypeLike) -> None:
    decoded = decode_scales(jnp.asarray(CODES), dtype)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(np.asarray(decoded, np.float64), VALUES)


def test_decodes_to_float64_too() -> None:
    with jax.enable_x64(True):
        decoded = decode_scales(jnp.asarray(CODES), jnp.float64)
        assert decoded.dtype == jnp.float64
        np.testing.assert_array_equal(decoded, VALUES)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_value_is_encoded_to_its_code(dtype: jax.typing.DTypeLike) -> None:
    codes = encode_e8(jnp.asarray(VALUES, dtype))
    assert (codes.dtype, kind_of(codes)) == (jnp.uint8, "e8")
    np.testing.assert_array_equal(codes, CODES)


@given(st.lists(st.tuples(st.floats(1, 2, exclude_max=True, width=32), st.integers(-36, 5)), min_size=8, max_size=8))
def test_rounds_to_the_nearest_value(parts: list[tuple[float, int]]) -> None:
    """In value, not in proportion, over the whole range and beyond both its ends."""
    scale = np.asarray([mantissa * 2.0**exponent for mantissa, exponent in parts], np.float32)
    found = np.abs(scales_of(encode_e8(scale)) - scale)
    np.testing.assert_array_equal(found, np.min(np.abs(VALUES[:, None] - scale.astype(np.float64)), axis=0))


def test_midpoints_are_the_thresholds() -> None:
    """Between any two neighbours, the step across the middle is the step from one to the other."""
    middle = ((VALUES[:-1] + VALUES[1:]) / 2).astype(np.float32)
    np.testing.assert_array_equal(encode_e8(np.nextafter(middle, np.float32(0))), CODES[:-1])
    np.testing.assert_array_equal(encode_e8(np.nextafter(middle, np.float32(16))), CODES[1:])


@pytest.mark.parametrize(
    ("scale", "value"),
    [(0, 0), (-0.0, 0), (-1, 0), (1e-30, 0), (1e-45, 0), (15.9, LARGEST), (1e30, LARGEST), (np.inf, LARGEST)],
)
def test_what_lies_outside_the_range_is_clamped(scale: float, value: float) -> None:
    assert float(as_stored(jnp.float32(scale), "e8")) == value


def test_bfloat16_scales_are_stored_as_they_round() -> None:
    scale = jnp.asarray([0.1, -0.3, 1e-30, 1e30, 0], jnp.float32)
    stored = encode_scales(scale, "bf16")
    assert (stored.dtype, kind_of(stored)) == (jnp.bfloat16, "bf16")
    np.testing.assert_array_equal(as_stored(scale, "bf16"), scale.astype(jnp.bfloat16).astype(jnp.float32))


def test_every_float16_is_decoded_and_encoded() -> None:
    """All finite ones, subnormal ones too; zero keeps no sign that matters."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    bits, values = bits[np.isfinite(values)], values[np.isfinite(values)]
    decoded = jax.jit(decode_scales, static_argnums=1)(jnp.asarray(bits), jnp.float32)
    np.testing.assert_array_equal(decoded, values)
    encoded = jax.jit(encode_scales, static_argnums=1)(jnp.asarray(values), "f16")
    assert (encoded.dtype, kind_of(encoded)) == (jnp.uint16, "f16")
    np.testing.assert_array_equal(encoded, bits)


def test_what_float16_cannot_hold_is_its_largest() -> None:
    np.testing.assert_array_equal(as_stored(jnp.asarray([1e6, -1e6]), "f16"), [65504, -65504])
