"""Planar words: the bit layout of packed integers.

A row of I codes of p bits becomes I/n words of n = 32/p fields; field i of word j holds code i*(I/n) + j, so that every
field of neighbouring words is a contiguous run of codes. Widths that are no power of two are sums of planes, widest
first (3 bits = a 2-bit plane, then a 1-bit plane), stored one behind the other in the same row of words.
"""

import jax
import jax.numpy as jnp

WORD_BITS = 32
WIDTHS = range(1, 9)


def planes(bits: int) -> tuple[int, ...]:
    """Plane widths, widest first, with sum(planes(bits)) = bits."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def inputs_multiple(bits: int) -> int:
    """The number that a row's length must be a multiple of, so that every plane fills whole words."""
    return WORD_BITS // planes(bits)[-1]


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes (..., I) in [0, 2^bits) to words uint32 (..., I*bits/32).

    Raises ValueError if I is no multiple of `inputs_multiple(bits)`.
    """
    inputs = codes.shape[-1]
    if inputs % inputs_multiple(bits):
        raise ValueError(f"{bits}-bit rows hold a multiple of {inputs_multiple(bits)} inputs, not {inputs}")
    codes = codes.astype(jnp.uint32)
    words, shift = [], bits
    for width in planes(bits):
        shift -= width
        words.append(_pack_plane((codes >> shift) & _mask(width), width))
    return jnp.concatenate(words, axis=-1)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`: words uint32 (..., W) to codes int32 (..., 32*W/bits)."""
    inputs = words.shape[-1] * WORD_BITS // bits
    codes, start = jnp.zeros((*words.shape[:-1], inputs), jnp.int32), 0
    for width in planes(bits):
        stop = start + inputs * width // WORD_BITS
        codes = (codes << width) | _unpack_plane(words[..., start:stop], width)
        start = stop
    return codes


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
