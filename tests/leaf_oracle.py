"""Leaves with random content, and what they stand for: the formats' documented equations in numpy and float64."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats import Fp8Blocks, GroupedCodes, GroupedInt, GroupedTernary, Leaf, abstract_leaf, dense

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def random_leaf(spec: str, seed: int = 0) -> Leaf:
    """A leaf of that format and shape: any words, normal values, bytes of scales from 2^-4 to 15."""
    rng = np.random.default_rng(seed)

    def random_array(a: jax.Array) -> jax.Array:
        if a.dtype == jnp.uint32:
            return jnp.asarray(rng.integers(0, 2**32, a.shape, np.uint32))
        if a.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(216, 256, a.shape, np.uint8))
        if a.dtype == jnp.uint16:
            return jnp.asarray(rng.normal(size=a.shape).astype(np.float16).view(np.uint16))
        return jnp.asarray(rng.normal(size=a.shape).astype(a.dtype))

    return jax.tree.map(random_array, abstract_leaf(spec))


def shapes_and_dtypes(tree: object) -> object:
    """The tree with (shape, dtype) for every array: equal for trees of equal structure, abstract or concrete."""
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


@jax.jit
def in_float32(leaf: Leaf) -> jax.Array:
    return dense(leaf, jnp.float32)


def planar_codes(words: IntArray, bits: int, inputs: int) -> IntArray:
    """In a plane of n = 32/p fields of p bits and W words, field i of word j holds code i*W + j; the first plane is
    top."""
    code = np.arange(inputs)
    codes, start = np.zeros((*words.shape[:-1], inputs), np.int64), 0
    for width in PLANES[bits]:
        words_of_plane = words.shape[-1] * width // bits
        i, j = code // words_of_plane, code % words_of_plane
        codes = codes * 2**width + (words[..., start + j] >> (i * width)) % 2**width
        start += words_of_plane
    return codes


def ternary_codes(words: IntArray, inputs: int) -> IntArray:
    """Field f of word j holds code f*W + j: the digit f % 5, highest first, of v < 243, where byte f // 5, lowest
    first, is ceil(256 v / 243)."""
    field, word = np.divmod(np.arange(inputs), words.shape[-1])
    fractions = (words[..., word] >> (field // 5 * 8)) % 256
    return fractions * 243 // 256 // 3 ** (4 - field % 5) % 3


def to_numpy(leaf: Leaf) -> FloatArray:
    """The dense weight, (..., O, I)."""
    if isinstance(leaf, GroupedInt):
        zero = 2 ** (leaf.bits - 1) if leaf.is_signed else (2**leaf.bits - 1) / 2
        steps = planar_codes(np.asarray(leaf.words, np.int64), leaf.bits, leaf.inputs) - zero
        return steps * scale_of_each(leaf)
    if isinstance(leaf, GroupedTernary):
        return (ternary_codes(np.asarray(leaf.words, np.int64), leaf.inputs) - 1) * scale_of_each(leaf)
    if isinstance(leaf, Fp8Blocks):
        values, scale = np.asarray(leaf.values, np.float64), np.asarray(leaf.scale_inv, np.float64)
        outputs, inputs = values.shape[-2:]
        return values * scale[..., np.arange(outputs) // leaf.block[0], :][..., np.arange(inputs) // leaf.block[1]]
    return np.asarray(leaf, np.float64)


def scale_of_each(leaf: GroupedCodes) -> FloatArray:
    """The scale of every input, (..., O, I)."""
    return scales_of(leaf.scale)[..., np.arange(leaf.inputs) // leaf.group_size]


def scales_of(stored: jax.Array | np.ndarray) -> FloatArray:
    """What stored scales stand for: bfloat16 for itself, a byte 8 e + m for (1 + m/8) 2^(e - 28), but 0 for 0, and
    two bytes for a float16."""
    if stored.dtype == np.uint16:
        return np.asarray(stored).view(np.float16).astype(np.float64)
    if stored.dtype != np.uint8:
        return np.asarray(stored, np.float64)
    exponent, mantissa = np.divmod(np.asarray(stored, np.int64), 8)
    return np.where(np.asarray(stored) == 0, 0, (1 + mantissa / 8) * 2.0 ** (exponent - 28))
