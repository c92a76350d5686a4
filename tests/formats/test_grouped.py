"""What leaves in groups share, of every class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import in_float32, random_leaf, scales_of, to_numpy
from moejax.formats import GroupedCodes, Leaf, reshape_outputs, rows, take_rows

FORMATS = ["int3g32", "ternaryg32", "int3g32e8", "ternaryg32e8"]


def grouped(spec: str) -> GroupedCodes:
    leaf = random_leaf(spec)
    assert isinstance(leaf, GroupedCodes)
    return leaf


def assert_is(leaf: Leaf, expected: np.ndarray) -> None:
    """Exactly, although in float32: a level has at most eight significant bits, and so has a scale."""
    assert isinstance(leaf, GroupedCodes)
    assert leaf.shape == expected.shape
    np.testing.assert_array_equal(in_float32(leaf), expected)


@pytest.mark.parametrize("name", FORMATS)
class TestEveryClass:
    def test_rows_and_take(self, name: str) -> None:
        leaf = grouped(f"{name}[12,64]")
        dense = to_numpy(leaf)
        assert_is(rows(leaf, 5, 4), dense[5:9])
        assert_is(jax.jit(lambda leaf, start: rows(leaf, start, 4))(leaf, jnp.asarray(8)), dense[8:])
        index = np.asarray([[0, 11], [3, 3]])
        assert_is(take_rows(leaf, jnp.asarray(index)), dense[index])

    def test_reshape_outputs(self, name: str) -> None:
        leaf = grouped(f"{name}[12,64]")
        by_head = reshape_outputs(leaf, 3, 4)
        assert_is(by_head, to_numpy(leaf).reshape(3, 4, 64))
        assert_is(rows(by_head, 1, 2), to_numpy(leaf).reshape(3, 4, 64)[:, 1:3])
        assert_is(reshape_outputs(by_head, 12), to_numpy(leaf))

    def test_shape_follows_vmap_and_indexing(self, name: str) -> None:
        leaf = grouped(f"{name}[3,8,128]")
        dense = to_numpy(leaf)

        def row_sums(matrix: GroupedCodes) -> jax.Array:
            assert matrix.shape == (8, 128)
            return matrix.dequantize(jnp.dtype(jnp.float32)).sum(-1)

        np.testing.assert_allclose(jax.vmap(row_sums)(leaf), dense.sum(-1), rtol=1e-5, atol=1e-4)
        assert_is(jax.tree.map(lambda a: a[1], leaf), dense[1])

    def test_decoded_scale(self, name: str) -> None:
        leaf = grouped(f"{name}[3,8,128]")
        scale = leaf.decoded_scale(jnp.bfloat16)
        assert (scale.shape, scale.dtype) == ((3, 8, 4), jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(scale, np.float64), scales_of(leaf.scale))
