"""Planar words: the bit layout of packed integers.

A plane is packed integers of p = 1, 2, 4 or 8 bits. It comes in units of 16 words, the last with fewer; a unit of w
words holds 32/p runs of w codes, and code j of run i is in word j, at bit

    8 (i mod 4) + p (i div 4)

so that every run comes out of neighbouring words by one shift: 16 codes, which fill a register's sublanes on a TPU. The
four bytes of a word hold four neighbouring runs: 64 codes in a row for whole units, which one instruction of a CPU may
add up, since they share their scale.

Other widths are sums of planes, widest first (3 bits = a 2-bit plane and a 1-bit plane). A row is cut into tiles whose
narrowest plane is one unit, the last shorter, and a tile's planes are stored one behind the other: a row is read in one
stream, and may be cut after any tile. A row's length is first rounded up to what fills the words of every plane. Fields
beyond I are padding and hold code 0.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

WORD_BITS = 32
WIDTHS = range(1, 9)
UNIT_WORDS = 16
_BYTES = 4


def planes(bits: int) -> tuple[int, ...]:
    """Plane widths, widest first, with sum(planes(bits)) = bits."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def inputs_multiple(bits: int) -> int:
    """The number of inputs whose codes fill whole words in every plane."""
    return WORD_BITS // planes(bits)[-1]


def tile_inputs(bits: int) -> int:
    """The number of inputs in a tile: a row may be cut after a multiple of it."""
    return UNIT_WORDS * inputs_multiple(bits)


def padded(inputs: int, bits: int) -> int:
    """A row's length with its padding: the next multiple of `inputs_multiple`."""
    return -(-inputs // inputs_multiple(bits)) * inputs_multiple(bits)


def words_per_row(inputs: int, bits: int) -> int:
    """The words of all planes of a row of that many codes."""
    return padded(inputs, bits) * bits // WORD_BITS


def shift_of_run(run: int, width: int) -> int:
    """At which bit of its words a unit's run lies in a plane of that width."""
    return 8 * (run % _BYTES) + width * (run // _BYTES)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes (..., I) in [0, 2^bits) to words uint32 (..., `words_per_row`)."""
    *outer, inputs = codes.shape
    codes = codes.astype(jnp.uint32)
    if more := padded(inputs, bits) - inputs:
        codes = jnp.concatenate([codes, jnp.zeros((*outer, more), jnp.uint32)], axis=-1)
    return by_parts(codes, tile_inputs(bits), partial(_pack_tiles, bits=bits))


def unpack(words: jax.Array, bits: int, inputs: int) -> jax.Array:
    """The inverse of `pack`: words uint32 (..., W) to codes int32 (..., inputs)."""
    codes = by_parts(words, UNIT_WORDS * bits // planes(bits)[-1], partial(_unpack_tiles, bits=bits))
    return codes[..., :inputs].astype(jnp.int32)


def by_parts(x: jax.Array, size: int, of: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """What a function makes of parts of so many along the last axis, and of the shorter rest, one behind the other."""
    *outer, length = x.shape
    whole, rest = length // size, length % size
    made = [of(x[..., : whole * size].reshape(*outer, whole, size)).reshape(*outer, -1)] if whole else []
    return jnp.concatenate([*made, *([of(x[..., whole * size :])] if rest else [])], axis=-1)


def _pack_tiles(codes: jax.Array, bits: int) -> jax.Array:
    """Tiles (..., n) of as many codes each."""
    words, shift = [], bits
    for width in planes(bits):
        shift -= width
        fields = (codes >> shift) & _mask(width)
        words.append(by_parts(fields, UNIT_WORDS * WORD_BITS // width, partial(_pack_units, width=width)))
    return jnp.concatenate(words, axis=-1)


def _unpack_tiles(words: jax.Array, bits: int) -> jax.Array:
    """Tiles (..., w) of as many words each."""
    length = words.shape[-1] * WORD_BITS // bits
    codes, start = jnp.zeros((*words.shape[:-1], length), jnp.uint8), 0
    for width in planes(bits):
        stop = start + length * width // WORD_BITS
        fields = by_parts(words[..., start:stop], UNIT_WORDS, partial(_unpack_units, width=width))
        codes = (codes << width) | fields
        start = stop
    return codes


def _pack_units(fields: jax.Array, width: int) -> jax.Array:
    runs = fields.reshape(*fields.shape[:-1], WORD_BITS // width, -1)
    return jnp.sum(runs << _shifts(width), axis=-2, dtype=jnp.uint32)


def _unpack_units(words: jax.Array, width: int) -> jax.Array:
    runs = WORD_BITS // width
    if runs <= 8:
        fields = ((words[..., None, :] >> _shifts(width)) & _mask(width)).astype(jnp.uint8)
    else:  # XLA for CPU takes a third of the time for many shifts one by one, and twice it for few
        fields = jnp.stack(
            [((words >> shift_of_run(run, width)) & _mask(width)).astype(jnp.uint8) for run in range(runs)], axis=-2
        )
    return fields.reshape(*words.shape[:-1], -1)


def _mask(width: int) -> int:
    return (1 << width) - 1


def _shifts(width: int) -> np.ndarray:
    return np.asarray([[shift_of_run(run, width)] for run in range(WORD_BITS // width)], np.uint32)
