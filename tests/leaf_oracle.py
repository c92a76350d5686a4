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
    """A row in tiles of 512 codes over the narrowest plane's bits, the last shorter; of a tile plane after plane, the
    first on top; of a plane units of 16 words, the last with fewer: of w words, code j of run i is in word j at bit
    8 (i mod 4) + p (i div 4)."""
    every = words.shape[-1] * 32 // bits
    codes, tile = np.zeros((*words.shape[:-1], every), np.int64), 512 // PLANES[bits][-1]
    for first in range(0, every, tile):
        length, start = min(tile, every - first), first * bits // 32
        for width in PLANES[bits]:
            for code in range(length):
                unit, within = divmod(code, 512 // width)
                unit_words = min(16, length * width // 32 - 16 * unit)
                i, j = divmod(within, unit_words)
                fields = words[..., start + 16 * unit + j] >> (8 * (i % 4) + width * (i // 4))
                codes[..., first + code] = codes[..., first + code] * 2**width + fields % 2**width
            start += length * width // 32
    return codes[..., :inputs]


def ternary_codes(words: IntArray, inputs: int) -> IntArray:
    """Units of 16 words, the last with fewer: of w words, code j of run i is in word j the digit i div 4, highest
    first, of v < 243, where byte i mod 4, lowest first, is ceil(256 v / 243)."""
    unit, within = np.divmod(np.arange(inputs), 320)
    run, word = np.divmod(within, np.minimum(16, words.shape[-1] - 16 * unit))
    fractions = (words[..., 16 * unit + word] >> (run % 4 * 8)) % 256
    return fractions * 243 // 256 // 3 ** (4 - run // 4) % 3


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
