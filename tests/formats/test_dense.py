import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import random_leaf, to_numpy
from moejax.formats import dense, format_name, matrix, payload_bytes, reshape_outputs, rows, take_rows

SPECS = ["f32[3,24,64]", "bf16[3,24,64]", "fp8b16x16[3,24,64]", "int3g32[3,24,64]", "ternaryg32[3,24,64]"]


@pytest.mark.parametrize("spec", SPECS)
def test_matrix_and_rows(spec: str) -> None:
    """Slices of narrow floats keep every bit."""
    leaf = random_leaf(spec)
    expected = np.asarray(to_numpy(leaf)[1, 5:16], np.float32)
    np.testing.assert_array_equal(dense(rows(matrix(leaf, 1), 5, 11), jnp.float32), expected)
    traced = jax.jit(lambda leaf, index, start: dense(rows(matrix(leaf, index), start, 11), jnp.float32))
    np.testing.assert_array_equal(traced(leaf, jnp.asarray(1), jnp.asarray(5)), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_arrays(dtype: jax.typing.DTypeLike) -> None:
    w = jnp.arange(24.0).reshape(6, 4).astype(dtype)
    np.testing.assert_array_equal(rows(w, 2, 3), w[2:5])
    np.testing.assert_array_equal(rows(w.reshape(2, 3, 4), 1, 2), w.reshape(2, 3, 4)[:, 1:])
    np.testing.assert_array_equal(take_rows(w, jnp.asarray([[5], [0]])), w[jnp.asarray([[5], [0]])])
    np.testing.assert_array_equal(reshape_outputs(w, 3, 2), w.reshape(3, 2, 4))
    assert dense(w, jnp.float32).dtype == jnp.float32


def test_format_names() -> None:
    assert [format_name(random_leaf(spec)) for spec in SPECS] == ["f32", "bf16", "fp8b16x16", "int3g32", "ternaryg32"]


def test_payload_bytes() -> None:
    tree = {"a": random_leaf("bf16[3,5]"), "b": jax.ShapeDtypeStruct((2, 7), jnp.float32), "c": random_leaf("f32[]")}
    assert payload_bytes(tree) == 2 * 15 + 4 * 14 + 4
