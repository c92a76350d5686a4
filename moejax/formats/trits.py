"""Planar ternary words: the bit layout of packed ternary codes, 1.6 bits each.

A row of I codes 0, 1, 2 becomes ceil(I/20) words, in units of 16 words, the last with fewer. A unit of w words holds 20
runs of w codes; code j of run i is in word j: the digit i div 4, the highest first, of its byte i mod 4, the lowest
first. So runs come out of neighbouring words by the same steps, and four neighbouring ones lie in the bytes of a word,
as in `planar`. Fields beyond I are padding and hold code 1, the weight zero.

The base-3 digits d_0 .. d_4 of a byte are those of a number v < 243, and the byte holds it as the fraction
q = ceil(256 v / 243). Then digit k is the whole part of 3 frac(3^k q / 256), which takes no division:
((3^k q mod 256) * 3) >> 8. The fraction is that of TQ1_0 in llama.cpp
(https://github.com/ggml-org/llama.cpp/pull/8151).
"""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats.planar import UNIT_WORDS, by_parts

BYTES_PER_WORD, DIGITS_PER_BYTE = 4, 5
CODES_PER_WORD = BYTES_PER_WORD * DIGITS_PER_BYTE

_SHIFTS = np.arange(BYTES_PER_WORD, dtype=np.uint32) * 8
_POWERS = 3 ** np.arange(DIGITS_PER_BYTE, dtype=np.uint32)


def words_per_row(inputs: int) -> int:
    """W of a row of that many codes."""
    return -(-inputs // CODES_PER_WORD)


def pack(codes: jax.Array) -> jax.Array:
    """Codes (..., I) in {0, 1, 2} to words uint32 (..., ceil(I/20))."""
    *outer, inputs = codes.shape
    padding = jnp.ones((*outer, words_per_row(inputs) * CODES_PER_WORD - inputs), jnp.uint32)
    fields = jnp.concatenate([codes.astype(jnp.uint32), padding], axis=-1)
    return by_parts(fields, UNIT_WORDS * CODES_PER_WORD, _pack_units)


def unpack(words: jax.Array, inputs: int) -> jax.Array:
    """The inverse of `pack`: words uint32 (..., W) to codes int32 (..., inputs)."""
    return by_parts(words, UNIT_WORDS, _unpack_units)[..., :inputs].astype(jnp.int32)


def _pack_units(fields: jax.Array) -> jax.Array:
    digits = fields.reshape(*fields.shape[:-1], DIGITS_PER_BYTE, BYTES_PER_WORD, -1)
    values = jnp.sum(digits * _POWERS[::-1, None, None], axis=-3, dtype=jnp.uint32)
    fractions = (values * 256 + 242) // 243
    return jnp.sum(fractions << _SHIFTS[:, None], axis=-2, dtype=jnp.uint32)


def _unpack_units(words: jax.Array) -> jax.Array:
    # Run by run and in bytes, in which XLA for CPU puts them down in two thirds of the time.
    runs = [(((words >> shift) * power & 0xFF) * 3) >> 8 for power in _POWERS for shift in _SHIFTS]
    return jnp.stack([run.astype(jnp.uint8) for run in runs], axis=-2).reshape(*words.shape[:-1], -1)
