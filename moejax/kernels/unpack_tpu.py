"""Codes out of a tile of packed words in a TPU's vector memory, inputs along sublanes and outputs along lanes.

They come in runs of 16 inputs, a bfloat16 register's sublanes, which share their group: 16 divides a group's size.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.formats import GroupedCodes, GroupedInt, GroupedTernary, planar, trits

SUBLANES = planar.UNIT_WORDS

# What puts the codes of neighbouring inputs, from the first on, (n, O).
Put = Callable[[jax.Array, jax.Array | int], None]


def unpack_of(w: GroupedCodes) -> Callable[[jax.Ref, Put], None]:
    """What puts the codes of a tile of outputs, of all inputs and SUBLANES at a time, out of its words (W, O)."""
    if isinstance(w, GroupedTernary):
        return partial(_unpack_trits, inputs=w.inputs)
    assert isinstance(w, GroupedInt)
    return partial(_unpack_ints, bits=w.bits, inputs=w.inputs)


def _unpack_ints(words_WO: jax.Ref, put: Put, bits: int, inputs: int) -> None:
    """Tile by tile, and run by run in each: out of 16 words by one shift a plane."""
    tile = planar.tile_inputs(bits)

    def unpack_tile(t: jax.Array, _: None) -> None:
        for run in range(tile // SUBLANES):
            codes, plane = jnp.uint32(0), t * (tile * bits // planar.WORD_BITS)
            for width in planar.planes(bits):
                unit, own = divmod(run, planar.WORD_BITS // width)
                words = words_WO[pl.ds(pl.multiple_of(plane + unit * SUBLANES, SUBLANES), SUBLANES), :]
                fields = (words >> planar.shift_of_run(own, width)) & ((1 << width) - 1)
                codes = (codes << width) | fields
                plane += tile * width // planar.WORD_BITS
            put(codes, t * tile + run * SUBLANES)

    jax.lax.fori_loop(0, inputs // tile, unpack_tile, None)


def _unpack_trits(words_WO: jax.Ref, put: Put, inputs: int) -> None:
    """Unit by unit. Runs of a last unit of fewer words end where no register does: they are laid out in VMEM first."""
    unit = SUBLANES * trits.CODES_PER_WORD
    whole, rest = divmod(len(words_WO), SUBLANES)

    def unpack_unit(u: jax.Array, _: None) -> None:
        _put_runs(words_WO[pl.ds(pl.multiple_of(u * SUBLANES, SUBLANES), SUBLANES), :], put, u * unit)

    def unpack_rest(codes_IO: jax.Ref) -> None:
        def lay_out(codes: jax.Array, first: jax.Array | int) -> None:
            codes_IO[pl.ds(first, rest), :] = codes

        _put_runs(words_WO[whole * SUBLANES :, :], lay_out, 0)
        for first in range(0, inputs - whole * unit, SUBLANES):
            put(codes_IO[first : first + SUBLANES, :], whole * unit + first)

    if whole:
        jax.lax.fori_loop(0, whole, unpack_unit, None)
    if rest:
        pl.run_scoped(unpack_rest, pltpu.VMEM((rest * trits.CODES_PER_WORD, words_WO.shape[1]), jnp.uint32))


def _put_runs(words: jax.Array, put: Put, first: jax.Array | int) -> None:
    """The 20 runs of a unit, from input `first` on: those of a byte are its digits, each by one multiplication."""
    for byte in range(trits.BYTES_PER_WORD):
        fractions = (words >> (8 * byte)) & 0xFF
        for digit in range(trits.DIGITS_PER_BYTE):
            thrice = fractions * 3
            put(thrice >> 8, first + (digit * trits.BYTES_PER_WORD + byte) * len(words))
            fractions = thrice & 0xFF
