"""Leaves, packed or plain, seen alike."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats.arrays import array_bytes, slice_axis
from moejax.formats.packed import PackedTensor

Leaf = jax.Array | PackedTensor

DENSE_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64", "int32": "i32"}


def dense(leaf: Leaf, dtype: jnp.dtype) -> jax.Array:
    """The leaf as a plain array of `dtype`."""
    return leaf.dequantize(dtype) if isinstance(leaf, PackedTensor) else leaf.astype(dtype)


def rows(leaf: Leaf, start: jax.Array | int, size: int) -> Leaf:
    """Outputs start to start+size, (..., size, I); start may be traced."""
    if isinstance(leaf, PackedTensor):
        return leaf.rows(start, size)
    return slice_axis(leaf, start, size, axis=leaf.ndim - 2)


def row_parts(leaf: Leaf, most_numbers: int) -> list[slice]:
    """Which rows of a matrix (O, I) to take together, about as many each, so that no part has more numbers; leaves of
    several matrices are one part."""
    outputs, parts = leaf.shape[0], -(-leaf.size // most_numbers) if leaf.ndim == 2 else 1
    size = -(-outputs // parts)
    return [slice(start, min(start + size, outputs)) for start in range(0, outputs, size)]


def matrix(leaf: Leaf, index: jax.Array | int) -> Leaf:
    """Of matrices (N, O, I), the one at index, (O, I); index may be traced."""
    return jax.tree.map(lambda a: slice_axis(a, index, 1, axis=0)[0], leaf)


def take_rows(leaf: Leaf, index: jax.Array) -> Leaf:
    """Of one matrix (O, I), the outputs at index (...), as (..., I)."""
    return leaf.take(index) if isinstance(leaf, PackedTensor) else leaf[index]


def reshape_outputs(leaf: Leaf, *shape: int) -> Leaf:
    """The same rows with the axes before I reshaped to `shape`."""
    if isinstance(leaf, PackedTensor):
        return leaf.reshape_outputs(*shape)
    return leaf.reshape(*shape, leaf.shape[-1])


def format_name(leaf: Leaf) -> str:
    """`int3g64`, `fp8b128x128`, `bf16`, ...: what plans and manifests call the leaf's format."""
    return leaf.format_name if isinstance(leaf, PackedTensor) else DENSE_NAMES[np.dtype(leaf.dtype).name]


def payload_bytes(tree: object) -> int:
    """Bytes of every array in a tree of leaves, abstract or concrete: what it takes on disk without metadata."""
    return sum(map(array_bytes, jax.tree.leaves(tree)))
