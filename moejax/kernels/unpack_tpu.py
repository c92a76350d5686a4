"""Codes out of a tile of packed words in a TPU's vector memory, inputs along sublanes and outputs along lanes.

They come in runs of 16 inputs, a bfloat16 register's sublanes, which share their group: 16 divides a group's size.
Loops over runs are traced once and unrolled when they are lowered, where shifts and places become constants.
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
Put = Callable[[jax.Array, jax.Array], None]


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
        def unpack_run(run: jax.Array, _: None) -> None:
            codes, plane = jnp.uint32(0), t * (tile * bits // planar.WORD_BITS)
            for width in planar.planes(bits):
                runs = planar.WORD_BITS // width
                first = pl.multiple_of(plane + jax.lax.div(run, runs) * SUBLANES, SUBLANES)
                own = jax.lax.rem(run, runs)
                shift = 8 * jax.lax.rem(own, 4) + width * jax.lax.div(own, 4)
                fields = (words_WO[pl.ds(first, SUBLANES), :] >> shift.astype(jnp.uint32)) & ((1 << width) - 1)
                codes = (codes << width) | fields
                plane += tile * width // planar.WORD_BITS
            put(codes, t * tile + run * SUBLANES)

        jax.lax.fori_loop(0, tile // SUBLANES, unpack_run, None, unroll=True)

    jax.lax.fori_loop(0, inputs // tile, unpack_tile, None)


def _unpack_trits(words_WO: jax.Ref, put: Put, inputs: int) -> None:
    """Unit by unit. Runs of a last unit of fewer words end where no register does: they are laid out in VMEM first."""
    unit = SUBLANES * trits.CODES_PER_WORD
    whole, rest = divmod(len(words_WO), SUBLANES)

    def unpack_unit(u: jax.Array, _: None) -> None:
        _put_runs(words_WO[pl.ds(pl.multiple_of(u * SUBLANES, SUBLANES), SUBLANES), :], put, u * unit)

    def unpack_rest(codes_IO: jax.Ref) -> None:
        def lay_out(codes: jax.Array, first: jax.Array) -> None:
            codes_IO[pl.ds(first, rest), :] = codes

        def put_run(run: jax.Array, _: None) -> None:
            codes = codes_IO[pl.ds(pl.multiple_of(run * SUBLANES, SUBLANES), SUBLANES), :]
            put(codes, whole * unit + run * SUBLANES)

        _put_runs(words_WO[whole * SUBLANES :, :], lay_out, 0)
        jax.lax.fori_loop(0, (inputs - whole * unit) // SUBLANES, put_run, None, unroll=True)

    if whole:
        jax.lax.fori_loop(0, whole, unpack_unit, None)
    if rest:
        pl.run_scoped(unpack_rest, pltpu.VMEM((rest * trits.CODES_PER_WORD, words_WO.shape[1]), jnp.uint32))


def _put_runs(words: jax.Array, put: Put, first: jax.Array | int) -> None:
    """The 20 runs of a unit, from input `first` on: those of a byte are its digits, each by one multiplication."""

    def put_byte(byte: jax.Array, _: None) -> None:
        def put_digit(digit: jax.Array, fractions: jax.Array) -> jax.Array:
            thrice = fractions * 3
            put(thrice >> 8, first + (digit * trits.BYTES_PER_WORD + byte) * len(words))
            return thrice & 0xFF

        fractions = (words >> (8 * byte).astype(jnp.uint32)) & 0xFF
        jax.lax.fori_loop(0, trits.DIGITS_PER_BYTE, put_digit, fractions, unroll=True)

    jax.lax.fori_loop(0, trits.BYTES_PER_WORD, put_byte, None, unroll=True)
