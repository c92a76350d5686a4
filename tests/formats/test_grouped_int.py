from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaf_oracle import in_float32, random_leaf, shapes_and_dtypes, to_numpy
from moejax.formats import GroupedInt, IntFormat, Leaf, payload_bytes, reshape_outputs, rows, take_rows
from moejax.formats.grouped_int import encode

WIDTHS = list(range(1, 9))
GROUPS = [32, 64, 128]
jitted_encode = jax.jit(encode, static_argnames="bits")


def grouped_int(spec: str) -> GroupedInt:
    leaf = random_leaf(spec)
    assert isinstance(leaf, GroupedInt)
    return leaf


def assert_is(leaf: Leaf, expected: np.ndarray) -> None:
    """Exactly, although in float32: a level has at most eight significant bits, and so has a scale."""
    assert isinstance(leaf, GroupedInt)
    assert leaf.shape == expected.shape
    np.testing.assert_array_equal(in_float32(leaf), expected)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_dequantizes_by_its_equation(bits: int, group_size: int) -> None:
    leaf = grouped_int(f"int{bits}g{group_size}[2,8,256]")
    assert (leaf.bits, leaf.group_size, leaf.ndim, leaf.size) == (bits, group_size, 3, 2 * 8 * 256)
    assert leaf.format_name == f"int{bits}g{group_size}"
    assert_is(leaf, to_numpy(leaf))


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_are_exact(bits: int, group_size: int) -> None:
    outputs, inputs = 6, 384
    weight, scale = jnp.ones((outputs, inputs)), jnp.ones((outputs, inputs // group_size))
    leaf = jax.eval_shape(partial(encode, bits=bits), weight, scale)
    assert payload_bytes(leaf) == outputs * inputs * bits // 8 + 2 * outputs * inputs // group_size


@given(st.sampled_from(WIDTHS), st.sampled_from([32, 64]), st.floats(0.01, 10), st.integers(0, 2**32 - 1))
def test_encode_chooses_the_nearest_level(bits: int, group_size: int, spread: float, seed: int) -> None:
    """No other code under the stored scale is closer, for weights within the levels and beyond them."""
    rng = np.random.default_rng(seed)
    weight = np.asarray(rng.normal(size=(4, 128)), np.float32)
    scale = np.asarray(rng.uniform(0.5, 2, size=(4, 128 // group_size)) * spread, np.float32)
    leaf = jitted_encode(jnp.asarray(weight), jnp.asarray(scale), bits)
    scale_OI = np.repeat(np.asarray(leaf.scale, np.float64), group_size, axis=1)
    levels = (np.arange(2**bits) - (2**bits - 1) / 2) * scale_OI[..., None]
    nearest = np.min(np.abs(levels - weight[..., None]), axis=-1)
    np.testing.assert_array_less(np.abs(to_numpy(leaf) - weight), nearest + 1e-4 * scale_OI)


@pytest.mark.parametrize("bits", WIDTHS)
def test_encode_returns_what_it_was_given(bits: int) -> None:
    """A weight on the levels keeps its codes, also when bfloat16 has moved it: by a quarter of a step at most."""
    leaf = grouped_int(f"int{bits}g32[8,256]")
    for dtype in (jnp.float32, jnp.bfloat16):
        again = jitted_encode(in_float32(leaf).astype(dtype), leaf.scale, bits)
        np.testing.assert_array_equal(again.words, leaf.words)
        np.testing.assert_array_equal(again.scale, leaf.scale)


def test_encode_of_zeros() -> None:
    leaf = jitted_encode(jnp.zeros((2, 64)), jnp.zeros((2, 2)), 3)
    np.testing.assert_array_equal(in_float32(leaf), 0)


def test_rows_and_take() -> None:
    leaf = grouped_int("int3g32[12,64]")
    dense = to_numpy(leaf)
    assert_is(rows(leaf, 5, 4), dense[5:9])
    assert_is(jax.jit(lambda leaf, start: rows(leaf, start, 4))(leaf, jnp.asarray(8)), dense[8:])
    index = np.asarray([[0, 11], [3, 3]])
    assert_is(take_rows(leaf, jnp.asarray(index)), dense[index])


def test_reshape_outputs() -> None:
    leaf = grouped_int("int3g32[12,64]")
    by_head = reshape_outputs(leaf, 3, 4)
    assert_is(by_head, to_numpy(leaf).reshape(3, 4, 64))
    assert_is(rows(by_head, 1, 2), to_numpy(leaf).reshape(3, 4, 64)[:, 1:3])
    assert_is(reshape_outputs(by_head, 12), to_numpy(leaf))


def test_shape_follows_vmap_and_indexing() -> None:
    leaf = grouped_int("int6g64[3,8,128]")
    dense = to_numpy(leaf)

    def row_sums(matrix: GroupedInt) -> jax.Array:
        assert matrix.shape == (8, 128)
        return matrix.dequantize(jnp.float32).sum(-1)

    np.testing.assert_allclose(jax.vmap(row_sums)(leaf), dense.sum(-1), rtol=1e-5, atol=1e-4)
    assert_is(jax.tree.map(lambda a: a[1], leaf), dense[1])


@pytest.mark.parametrize("bits", WIDTHS)
def test_abstract_shapes_are_the_concrete_ones(bits: int) -> None:
    abstract = IntFormat(bits, 64).abstract((3, 8, 128))
    weight, scale = jnp.ones((3, 8, 128)), jnp.ones((3, 8, 2))
    encoded = jax.eval_shape(partial(encode, bits=bits), weight, scale)
    assert encoded.shape == (3, 8, 128)
    assert shapes_and_dtypes(encoded) == shapes_and_dtypes(abstract)
