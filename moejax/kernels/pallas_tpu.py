"""`matmul` of integer groups as one Pallas kernel for TPU, whatever the width; the rest is the tiled XLA backend.

A tile of outputs is unpacked once into VMEM and multiplied with every tile of rows. It is unpacked with inputs along
sublanes and outputs along lanes: then a field is shifted out of whole registers, a group's scales are one row that
broadcasts over the group's inputs, and the matrix unit takes the tile as it is.

Lowered for TPU it is the Mosaic kernel, in a process without a TPU too (ahead-of-time compilation); lowered for another
platform the same kernel is interpreted, which serves tests alone. To shard it, call it under `jax.shard_map`.

The other operations go to XLA, and so does `matmul` where `takes` is false: for weights other than one `GroupedInt`
matrix, inputs other than float32 and bfloat16, rows too long for VMEM or with a shorter last group, and rows of no
whole number of tiles: I must be a multiple of 512 at odd widths, of 256 at 2 and 6 bits, of 128 at 4 and 64 at 8.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.formats import GroupedInt, Leaf, planar
from moejax.formats.scales import decode_scales
from moejax.kernels import xla
from moejax.kernels.reference import PRECISION
from moejax.kernels.xla import expert_matmul, hadamard, matmul_transposed, product, take

__all__ = ["expert_matmul", "hadamard", "matmul", "matmul_transposed", "product", "take", "takes"]

LANES = 128
SUBLANES = planar.UNIT_WORDS  # of a bfloat16 register
MAX_INPUTS = 24576
MAX_ROW_TILE, MAX_OUTPUT_TILE = 256, 512
TILE_BYTES = 5 << 20  # of the unpacked weights and of the rows, but no fewer than LANES outputs and SUBLANES rows
VMEM_BYTES = 48 << 20


def takes(x: jax.Array, w: Leaf) -> bool:
    """Whether the kernel multiplies these rows with this weight itself."""
    if not isinstance(w, GroupedInt) or w.ndim != 2 or not x.size or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    return not (w.inputs % w.group_size or w.inputs % planar.tile_inputs(w.bits)) and w.inputs <= MAX_INPUTS


@jax.custom_jvp
def matmul(x: jax.Array, w: Leaf) -> jax.Array:
    if not isinstance(w, GroupedInt) or not takes(x, w):
        return xla.matmul(x, w)
    y_RO = jax.lax.platform_dependent(
        x.reshape(-1, x.shape[-1]),
        w.words,
        w.scale,
        tpu=partial(_multiply, bits=w.bits, zero=float(w.levels.zero), interpret=False),
        default=partial(_multiply, bits=w.bits, zero=float(w.levels.zero), interpret=True),
    )
    return y_RO.reshape(*x.shape[:-1], w.shape[0])


@matmul.defjvp
def _derivative(given: tuple[jax.Array, Leaf], by: tuple[jax.Array, Leaf]) -> tuple[jax.Array, jax.Array]:
    """Derivatives are the tiled path's."""
    return matmul(*given), jax.jvp(xla.matmul, given, by)[1]


def _multiply(
    x_RI: jax.Array, words_OW: jax.Array, scale_OG: jax.Array, bits: int, zero: float, interpret: bool
) -> jax.Array:
    (num_rows, inputs), (outputs, num_words), num_groups = x_RI.shape, words_OW.shape, scale_OG.shape[1]
    row_tile = min(num_rows, MAX_ROW_TILE, _tile(inputs * x_RI.dtype.itemsize, SUBLANES))
    output_tile = min(outputs, MAX_OUTPUT_TILE, _tile(inputs * x_RI.dtype.itemsize, LANES))
    # On TPU, XLA stores by column a matrix whose rows would not fill the lanes: transposed, it is read where it lies.
    by_column = num_words % LANES != 0
    words = words_OW.T if by_column else words_OW
    words_block = (num_words, output_tile) if by_column else (output_tile, num_words)
    return pl.pallas_call(
        partial(_kernel, bits=bits, zero=zero, by_column=by_column),
        grid=(pl.cdiv(outputs, output_tile), pl.cdiv(num_rows, row_tile)),
        in_specs=[
            pl.BlockSpec((row_tile, inputs), lambda o, r: (r, 0)),
            pl.BlockSpec(words_block, lambda o, r: (0, o) if by_column else (o, 0)),
            pl.BlockSpec((num_groups, output_tile), lambda o, r: (0, o)),
        ],
        out_specs=pl.BlockSpec((row_tile, output_tile), lambda o, r: (r, o)),
        out_shape=jax.ShapeDtypeStruct((num_rows, outputs), x_RI.dtype),
        scratch_shapes=[
            pltpu.VMEM((num_words, output_tile), jnp.uint32),
            pltpu.VMEM((num_groups, output_tile), jnp.float32),
            pltpu.VMEM((inputs, output_tile), x_RI.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
    )(x_RI, words, scale_OG.T)


def _tile(bytes_each: int, multiple: int) -> int:
    """How many things of `bytes_each` fill TILE_BYTES: a multiple of `multiple`, at least one."""
    return multiple * max(1, TILE_BYTES // (bytes_each * multiple))


def _kernel(
    x_RI: jax.Ref,
    words_ref: jax.Ref,
    scale_ref: jax.Ref,
    y_RO: jax.Ref,
    words_WO: jax.Ref,
    scale_GO: jax.Ref,
    w_IO: jax.Ref,
    *,
    bits: int,
    zero: float,
    by_column: bool,
) -> None:
    """y = x @ w for a tile of rows and one of outputs, whose weights are unpacked at their first tile of rows."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        words_WO[...] = words_ref[...] if by_column else words_ref[...].T
        scale_GO[...] = decode_scales(scale_ref[...], jnp.float32)
        _unpack(words_WO, scale_GO, w_IO, bits, zero)

    precision = PRECISION if x_RI.dtype == jnp.float32 else None
    y = jnp.dot(x_RI[...], w_IO[...], precision=precision, preferred_element_type=jnp.float32)
    y_RO[...] = y.astype(y_RO.dtype)


def _unpack(words_WO: jax.Ref, scale_GO: jax.Ref, w_IO: jax.Ref, bits: int, zero: float) -> None:
    """Tile by tile, and run by run in each: 16 inputs that share their group, out of 16 words by one shift a plane."""
    inputs, outputs = w_IO.shape
    group_size, tile = inputs // scale_GO.shape[0], planar.tile_inputs(bits)

    def unpack_tile(t: jax.Array, _: None) -> None:
        for run in range(tile // SUBLANES):
            codes, plane = jnp.zeros((SUBLANES, outputs), jnp.uint32), t * (tile * bits // planar.WORD_BITS)
            for width in planar.planes(bits):
                unit, own = divmod(run, planar.WORD_BITS // width)
                words = words_WO[pl.ds(pl.multiple_of(plane + unit * SUBLANES, SUBLANES), SUBLANES), :]
                fields = (words >> planar.shift_of_run(own, width)) & ((1 << width) - 1)
                codes = (codes << width) | fields
                plane += tile * width // planar.WORD_BITS
            first = pl.multiple_of(t * tile + run * SUBLANES, SUBLANES)
            levels = codes.astype(jnp.int32).astype(jnp.float32) - zero
            scale = scale_GO[pl.ds(jax.lax.div(first, group_size), 1), :]
            w_IO[pl.ds(first, SUBLANES), :] = (levels * scale).astype(w_IO.dtype)

    jax.lax.fori_loop(0, inputs // tile, unpack_tile, None)
