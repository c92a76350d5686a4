"""Planar words: the bit layout of packed integers.

A row of I codes of p bits becomes W = ceil(I/n) words of n = 32/p fields; field i of word j holds code i*W + j, so that
every field of neighbouring words is a contiguous run of codes. Widths that are no power of two are sums of planes,
widest first (3 bits = a 2-bit plane, then a 1-bit plane), stored one behind the other in the same row of words; then I
is first rounded up to what fills the words of every plane. Fields beyond I are padding and hold code 0.
"""

import jax
import jax.numpy as jnp

WORD_BITS = 32
WIDTHS = range(1, 9)


def planes(bits: int) -> tuple[int, ...]:
    """Plane widths, widest first, with sum(planes(bits)) = bits."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def inputs_multiple(bits: int) -> int:
    """The number of inputs whose codes fill whole words in every plane."""
    return WORD_BITS // planes(bits)[-1]


def padded(inputs: int, bits: int) -> int:
    """A row's length with its padding: the next multiple of `inputs_multiple`."""
    return -(-inputs // inputs_multiple(bits)) * inputs_multiple(bits)


def words_per_row(inputs: int, bits: int) -> int:
    """The words of all planes of a row of that many codes."""
    return padded(inputs, bits) * bits // WORD_BITS


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes (..., I) in [0, 2^bits) to words uint32 (..., `words_per_row`)."""
    *outer, inputs = codes.shape
    codes = codes.astype(jnp.uint32)
    if more := padded(inputs, bits) - inputs:
        codes = jnp.concatenate([codes, jnp.zeros((*outer, more), jnp.uint32)], axis=-1)
    words, shift = [], bits
    for width in planes(bits):
        shift -= width
        words.append(_pack_plane((codes >> shift) & _mask(width), width))
    return jnp.concatenate(words, axis=-1)


def unpack(words: jax.Array, bits: int, inputs: int) -> jax.Array:
    """The inverse of `pack`: words uint32 (..., W) to codes int32 (..., inputs)."""
    length = padded(inputs, bits)
    codes, start = jnp.zeros((*words.shape[:-1], length), jnp.int32), 0
    for width in planes(bits):
        stop = start + length * width // WORD_BITS
        codes = (codes << width) | _unpack_plane(words[..., start:stop], width)
        start = stop
    return codes[..., :inputs]


def _mask(width: int) -> int:
    return (1 << width) - 1


def _shifts(width: int) -> jax.Array:
    return jnp.arange(0, WORD_BITS, width, dtype=jnp.uint32)[:, None]


def _pack_plane(fields: jax.Array, width: int) -> jax.Array:
    per_word = WORD_BITS // width
    fields = fields.reshape(*fields.shape[:-1], per_word, -1)
    return jnp.sum(fields << _shifts(width), axis=-2, dtype=jnp.uint32)


def _unpack_plane(words: jax.Array, width: int) -> jax.Array:
    fields = (words[..., None, :] >> _shifts(width)) & jnp.uint32(_mask(width))
    return fields.reshape(*words.shape[:-1], -1).astype(jnp.int32)
