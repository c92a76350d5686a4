"""The Pallas kernel for TPU: rows in blocks, each times one of several matrices of packed integers or ternary weights.

A tile of a matrix's outputs is unpacked once into VMEM and multiplied with all blocks of that matrix. It is unpacked
with inputs along sublanes and outputs along lanes: then a field is shifted out of whole registers, a group's scales are
one row that broadcasts over the group's inputs, and the matrix unit takes the tile as it is. Which matrices they are is
known before the kernel starts (scalar prefetch), so that the next packed tile is fetched while one is at work, and what
no row needs is not read.

Packed words are read in the order in which XLA stores them (`_order`). Where a word of all matrices lies side by side,
no block of the grid holds one matrix alone, and the kernel fetches its words itself, at the last rows of the matrix
before: beside the product, not beside the unpacking.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.formats import GroupedCodes, GroupedInt, GroupedTernary, Leaf, planar
from moejax.formats.scales import decode_scales
from moejax.kernels.reference import PRECISION
from moejax.kernels.unpack_tpu import SUBLANES, Put, unpack_of

LANES = 128
WORD_SUBLANES = 8
MAX_INPUTS = 24576
MAX_ROW_BLOCK, MAX_OUTPUT_TILE = 256, 512
TILE_BYTES = 5 << 20  # of the unpacked weights and of the rows, but no fewer than LANES outputs and SUBLANES rows
VMEM_BYTES = 48 << 20

# Which of a bucket's words (N, O, W) lie side by side: those of a row, or the outputs', a matrix or a word at a time.
Order = Literal["NOW", "NWO", "WNO"]


def takes(dtype: jax.typing.DTypeLike, w: Leaf) -> bool:
    """Whether the kernel multiplies rows of that dtype with a matrix (O, I), or experts' matrices (N, O, I), itself."""
    if not isinstance(w, GroupedInt | GroupedTernary) or dtype not in (jnp.float32, jnp.bfloat16):
        return False
    multiple = planar.tile_inputs(w.bits) if isinstance(w, GroupedInt) else SUBLANES
    return not (w.inputs % w.group_size or w.inputs % multiple) and w.inputs <= MAX_INPUTS


def multiply(
    x_BTI: jax.Array,
    w: GroupedCodes,
    own_B: jax.Array,
    index_B: jax.Array,
    count: jax.Array | int,
    y_BTO: jax.Array,
    interpret: bool | pltpu.InterpretParams,
    transposed: bool = False,
) -> jax.Array:
    """y with its blocks `own_B`, of which there are `count`, replaced by those of x times the matrices `index_B` of w;
    blocks of one matrix come one behind the other.

    x (B, T, I), w (N, O, I), y (B, T, O). Transposed, x is (B, T, O) and y (B, T, I), and a matrix must be one tile:
    see `is_one_tile`.
    """
    (_, block, width), (_, outputs, num_words) = x_BTI.shape, w.words.shape
    inputs, num_groups = w.inputs, w.scale.shape[-1]
    output_tile = outputs_together(outputs, inputs, x_BTI.dtype)
    if (order := _order(w.words.shape)) == "WNO":  # what the kernel fetches does not end where a row does
        output_tile = math.gcd(output_tile, outputs)
    y_tile = inputs if transposed else output_tile
    words = w.words.transpose(["NOW".index(axis) for axis in order])
    words_spec = {
        "NOW": pl.BlockSpec((None, output_tile, num_words), lambda o, n, own_B, index_B: (index_B[n], o, 0)),
        "NWO": pl.BlockSpec((None, num_words, output_tile), lambda o, n, own_B, index_B: (index_B[n], 0, o)),
        "WNO": pl.BlockSpec(memory_space=pl.ANY),
    }[order]
    return pl.pallas_call(
        partial(_kernel, unpack=unpack_of(w), zero=float(w.levels.zero), order=order, transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(outputs, output_tile), count),
            in_specs=[
                pl.BlockSpec((None, block, width), lambda o, n, own_B, index_B: (own_B[n], 0, 0)),
                words_spec,
                pl.BlockSpec((None, num_groups, output_tile), lambda o, n, own_B, index_B: (index_B[n], 0, o)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((None, block, y_tile), lambda o, n, own_B, index_B: (own_B[n], 0, o)),
            scratch_shapes=[
                pltpu.VMEM((num_words, output_tile), jnp.uint32),
                pltpu.VMEM((num_groups, output_tile), jnp.float32),
                pltpu.VMEM((inputs, output_tile), x_BTI.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(y_BTO.shape, y_BTO.dtype),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
    )(own_B, index_B, x_BTI, words, w.scale.swapaxes(1, 2), y_BTO)


def _order(words: tuple[int, ...]) -> Order:
    """The order in which XLA for TPU stores words (N, O, W), as far as its choice is known: that which pads the two
    last axes least. In any other the weights would be copied at every call, and all of them."""
    experts, outputs, num_words = words
    if num_words % LANES == 0:
        return "NOW"
    experts_fill = experts in (2, 4) or experts % WORD_SUBLANES == 0
    return "WNO" if experts_fill and num_words % WORD_SUBLANES and outputs % LANES == 0 else "NWO"


def rows_together(width: int, dtype: jax.typing.DTypeLike) -> int:
    """How many rows of that many numbers are in a block, at most."""
    return min(MAX_ROW_BLOCK, _tile(width * jnp.dtype(dtype).itemsize, SUBLANES))


def outputs_together(outputs: int, inputs: int, dtype: jax.typing.DTypeLike) -> int:
    """How many outputs of a matrix (O, I) are unpacked together, for rows of that dtype."""
    return min(outputs, MAX_OUTPUT_TILE, _tile(inputs * jnp.dtype(dtype).itemsize, LANES))


def is_one_tile(w: Leaf, dtype: jax.typing.DTypeLike) -> bool:
    """Whether all outputs of a matrix (N, O, I) are unpacked together, for rows of that dtype."""
    return outputs_together(w.shape[1], w.shape[2], dtype) == w.shape[1]


def _tile(bytes_each: int, multiple: int) -> int:
    """How many things of `bytes_each` fill TILE_BYTES: a multiple of `multiple`, at least one."""
    return multiple * max(1, TILE_BYTES // (bytes_each * multiple))


def _kernel(
    own_B: jax.Ref,
    index_B: jax.Ref,
    x_TI: jax.Ref,
    words_ref: jax.Ref,
    scale_ref: jax.Ref,
    y_before: jax.Ref,
    y_TO: jax.Ref,
    words_WO: jax.Ref,
    scale_GO: jax.Ref,
    w_IO: jax.Ref,
    arrived: jax.Ref,
    *,
    unpack: Callable[[jax.Ref, Put], None],
    zero: float,
    order: Order,
    transposed: bool,
) -> None:
    """y = x @ w, or x @ w^T, for a block of rows and a tile of outputs, unpacked at the first block that takes them."""
    o, n = pl.program_id(0), pl.program_id(1)
    group_size = w_IO.shape[0] // scale_GO.shape[0]

    def put(codes: jax.Array, first: jax.Array) -> None:
        """The weights of SUBLANES inputs, which share their group."""
        first = pl.multiple_of(first, SUBLANES)
        levels = codes.astype(jnp.int32).astype(jnp.float32) - zero
        scale = scale_GO[pl.ds(jax.lax.div(first, group_size), 1), :]
        w_IO[pl.ds(first, SUBLANES), :] = (levels * scale).astype(w_IO.dtype)

    def begin(n: jax.Array) -> None:
        pltpu.make_async_copy(words_of(n), words_WO, arrived).start()

    def words_of(n: jax.Array) -> jax.Ref:
        """Those of the n-th block's tile, which do not lie together."""
        return words_ref.at[:, index_B[n], pl.ds(o * words_WO.shape[1], words_WO.shape[1])]

    def fetch() -> None:
        if order == "WNO":
            pl.when(n == 0)(partial(begin, n))
            pltpu.make_async_copy(words_of(n), words_WO, arrived).wait()
        else:
            words_WO[...] = words_ref[...] if order == "NWO" else words_ref[...].T

    @pl.when((n == 0) | (index_B[n] != index_B[jnp.maximum(n - 1, 0)]))
    def _() -> None:
        fetch()
        scale_GO[...] = decode_scales(scale_ref[...], jnp.float32)
        unpack(words_WO, put)

    if order == "WNO":
        after = jnp.minimum(n + 1, pl.num_programs(1) - 1)
        pl.when(index_B[after] != index_B[n])(partial(begin, after))

    precision = PRECISION if x_TI.dtype == jnp.float32 else None
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    y = jax.lax.dot_general(x_TI[...], w_IO[...], dims, precision=precision, preferred_element_type=jnp.float32)
    y_TO[...] = y.astype(y_TO.dtype)
