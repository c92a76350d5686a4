"""Planar ternary words: the bit layout of packed ternary codes, 1.6 bits each.

A row of I codes 0, 1, 2 becomes W = ceil(I/20) words of 20 fields; field f of word j holds code f*W + j, so that every
field of neighbouring words is a contiguous run of codes. Fields beyond I are padding and hold code 1, the weight zero.

Fields 5b to 5b+4 are the base-3 digits d_0 .. d_4, highest first, of a number v < 243, and byte b of the word, lowest
first, holds it as the fraction q = ceil(256 v / 243). Then digit k is the whole part of 3 frac(3^k q / 256), which
takes no division: ((3^k q mod 256) * 3) >> 8. The fraction is that of TQ1_0 in llama.cpp
(https://github.com/ggml-org/llama.cpp/pull/8151).
"""

import jax
import jax.numpy as jnp
import numpy as np

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
    words = words_per_row(inputs)
    padding = jnp.ones((*outer, words * CODES_PER_WORD - inputs), jnp.uint32)
    fields = jnp.concatenate([codes.astype(jnp.uint32), padding], axis=-1)
    digits = fields.reshape(*outer, BYTES_PER_WORD, DIGITS_PER_BYTE, words)
    values = jnp.sum(digits * _POWERS[::-1, None], axis=-2, dtype=jnp.uint32)
    fractions = (values * 256 + 242) // 243
    return jnp.sum(fractions << _SHIFTS[:, None], axis=-2, dtype=jnp.uint32)


def unpack(words: jax.Array, inputs: int) -> jax.Array:
    """The inverse of `pack`: words uint32 (..., W) to codes int32 (..., inputs)."""
    # Field by field, where one array of shifts and powers took XLA for CPU 2.3 times as long.
    fields = [(((words >> shift) * power & 0xFF) * 3) >> 8 for shift in _SHIFTS for power in _POWERS]
    return jnp.concatenate(fields, axis=-1)[..., :inputs].astype(jnp.int32)
