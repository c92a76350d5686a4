import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import in_float32, random_leaf, to_numpy
from moejax.formats import Fp8Blocks, payload_bytes, reshape_outputs, rows, take_rows

# The last blocks of 144 x 200 are partial: 5 x 7 blocks of 32, which no division of the shape yields.
PARTIAL = "fp8b32x32[144,200]"


def fp8_blocks(spec: str) -> Fp8Blocks:
    leaf = random_leaf(spec)
    assert isinstance(leaf, Fp8Blocks)
    return leaf


def assert_is(leaf: object, expected: np.ndarray) -> None:
    assert isinstance(leaf, Fp8Blocks)
    assert leaf.shape == expected.shape
    np.testing.assert_allclose(in_float32(leaf), expected, rtol=2**-23)


@pytest.mark.parametrize("spec", [PARTIAL, "fp8b128x128[3,144,200]", "fp8b32x64[64,128]", "fp8b1x16[5,40]"])
def test_dequantizes_by_its_equation(spec: str) -> None:
    leaf = fp8_blocks(spec)
    assert_is(leaf, to_numpy(leaf))


def test_blocks_start_at_the_corner() -> None:
    leaf = fp8_blocks(PARTIAL)
    assert leaf.scale_inv.shape == (5, 7)
    only_last = Fp8Blocks(jnp.ones_like(leaf.values), jnp.zeros((5, 7)).at[4, 6].set(1), (32, 32))
    expected = np.zeros((144, 200))
    expected[128:, 192:] = 1
    np.testing.assert_array_equal(only_last.dequantize(jnp.float32), expected)


def test_bfloat16_is_rounded_once() -> None:
    leaf = fp8_blocks(PARTIAL)
    np.testing.assert_array_equal(leaf.dequantize(jnp.bfloat16), leaf.dequantize(jnp.float32).astype(jnp.bfloat16))


def test_every_code_is_its_value() -> None:
    codes = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    leaf = Fp8Blocks(jnp.asarray(codes).reshape(16, 16), jnp.ones((1, 1)), (128, 128))
    np.testing.assert_array_equal(leaf.dequantize(jnp.float32).ravel(), codes.astype(np.float32))


def test_bytes_are_exact() -> None:
    leaf = fp8_blocks(PARTIAL)
    assert payload_bytes(leaf) == 144 * 200 + 4 * 5 * 7
    assert leaf.format_name == "fp8b32x32"


@pytest.mark.parametrize("start", [0, 17, 120])
def test_rows(start: int) -> None:
    for spec in (PARTIAL, "fp8b32x32[3,144,200]"):
        leaf = fp8_blocks(spec)
        expected = to_numpy(leaf)[..., start : start + 24, :]
        assert_is(rows(leaf, start, 24), expected)
        assert_is(jax.jit(lambda leaf, start: rows(leaf, start, 24))(leaf, jnp.asarray(start)), expected)


def test_take() -> None:
    leaf = fp8_blocks(PARTIAL)
    index = np.asarray([[0, 143], [31, 32]])
    assert_is(take_rows(leaf, jnp.asarray(index)), to_numpy(leaf)[index])


def test_reshape_outputs() -> None:
    leaf = fp8_blocks("fp8b32x32[192,200]")
    assert_is(reshape_outputs(leaf, 3, 64), to_numpy(leaf).reshape(3, 64, 200))
    assert_is(reshape_outputs(reshape_outputs(leaf, 3, 64), 192), to_numpy(leaf))


def test_reshape_outputs_may_leave_partial_blocks_together() -> None:
    leaf = fp8_blocks("fp8b32x32[6,144,200]")
    assert_is(reshape_outputs(leaf, 2, 3, 144), to_numpy(leaf).reshape(2, 3, 144, 200))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(PARTIAL, (3, 48)), ("fp8b32x32[192,200]", (4, 48)), ("fp8b32x32[2,48,200]", (96,))],
)
def test_reshape_outputs_splits_no_block(spec: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="they would split fp8b32x32 blocks"):
        reshape_outputs(fp8_blocks(spec), *shape)


def test_vmap() -> None:
    leaf = fp8_blocks("fp8b32x32[3,144,200]")
    np.testing.assert_allclose(jax.vmap(lambda w: w.dequantize(jnp.float32))(leaf), to_numpy(leaf), rtol=2**-23)
