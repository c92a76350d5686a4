"""`matmul` and `expert_matmul` of integer and ternary groups as one Pallas kernel for TPU; the rest is XLA's.

Rows come in blocks, each of one expert; a plain matrix is the only expert. A tile of an expert's outputs is unpacked
once into VMEM and multiplied with all blocks of that expert. It is unpacked with inputs along sublanes and outputs
along lanes: then a field is shifted out of whole registers, a group's scales are one row that broadcasts over the
group's inputs, and the matrix unit takes the tile as it is. Experts' numbers are known before the kernel starts (scalar
prefetch), so that the next packed tile is fetched while one is at work, and what no row needs is not read.

Packed words are read in the order in which XLA stores them (`_order`). Where a word of all experts lies side by side,
no block of the grid holds one expert alone, and the kernel fetches its words itself, at the last rows of the expert
before: beside the product, not beside the unpacking.

Lowered for TPU it is the Mosaic kernel, in a process without a TPU too (ahead-of-time compilation); lowered for another
platform the same kernel is interpreted, which serves tests alone. To shard it, call it under `jax.shard_map`.

The other operations go to XLA, and so do weights that `takes` is false of, of experts bucket by bucket: other than
`GroupedInt` and `GroupedTernary`, inputs other than float32 and bfloat16, rows too long for VMEM or with a shorter last
group, and rows of integers of no whole number of tiles: I must be a multiple of 512 at odd widths, of 256 at 2 and 6
bits, of 128 at 4 and 64 at 8. Ternary rows may end in a unit of fewer words.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.formats import ExpertWeights, GroupedCodes, GroupedInt, GroupedTernary, Leaf, planar
from moejax.formats.scales import decode_scales
from moejax.kernels import xla
from moejax.kernels.reference import PRECISION
from moejax.kernels.unpack_tpu import SUBLANES, Put, unpack_of
from moejax.kernels.xla import hadamard, matmul_transposed, product, take

__all__ = ["expert_matmul", "hadamard", "matmul", "matmul_transposed", "product", "take", "takes"]

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


def matmul(x: jax.Array, w: Leaf, interpret: bool | None = None) -> jax.Array:
    """As `api.matmul`. The kernel is interpreted or compiled as is said, else by what the program is lowered for."""
    if w.ndim != 2 or not x.size or not takes(x.dtype, w):
        return xla.matmul(x, w)
    return _compiled_or_interpreted(_matmul, interpret, x, w)


def expert_matmul(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array, interpret: bool | None = None) -> jax.Array:
    """As `api.expert_matmul`; `interpret` as in `matmul`."""
    if not x_RI.size or not any(takes(x_RI.dtype, bucket) for bucket in w.buckets):
        return xla.expert_matmul(x_RI, w, rows_E)
    return _compiled_or_interpreted(_expert_matmul, interpret, x_RI, w, rows_E)


def _compiled_or_interpreted(operation: Callable[..., jax.Array], interpret: bool | None, *given: object) -> jax.Array:
    if interpret is not None:
        return operation(*given, interpret)
    compiled, interpreted = (lambda *given: operation(*given, False)), (lambda *given: operation(*given, True))
    return jax.lax.platform_dependent(*given, tpu=compiled, default=interpreted)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, w: GroupedCodes, interpret: bool) -> jax.Array:
    x_RI = x.reshape(-1, x.shape[-1])
    blocks = pl.cdiv(len(x_RI), _rows_together(x_RI))
    block = pl.cdiv(len(x_RI), blocks)
    x_BTI = jnp.pad(x_RI, ((0, blocks * block - len(x_RI)), (0, 0))).reshape(blocks, block, -1)
    of_one = jax.tree.map(lambda a: a[None], w)
    every_B = jnp.arange(blocks, dtype=jnp.int32)
    y_BTO = jnp.zeros((blocks, block, w.shape[0]), x.dtype)
    y_BTO = _multiply(x_BTI, of_one, every_B, jnp.zeros_like(every_B), blocks, y_BTO, interpret)
    return y_BTO.reshape(blocks * block, -1)[: len(x_RI)].reshape(*x.shape[:-1], -1)


@_matmul.defjvp
def _derivative(
    interpret: bool, given: tuple[jax.Array, GroupedCodes], by: tuple[jax.Array, GroupedCodes]
) -> tuple[jax.Array, jax.Array]:
    """Derivatives are the tiled path's."""
    return _matmul(*given, interpret), jax.jvp(xla.matmul, given, by)[1]


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _expert_matmul(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array, interpret: bool) -> jax.Array:
    """Experts' rows in blocks of their own, bucket by bucket those that the kernel takes; XLA the other buckets'."""
    num_rows = len(x_RI)
    taken = [b for b, bucket in enumerate(w.buckets) if takes(x_RI.dtype, bucket)]
    others = [b for b in range(len(w.buckets)) if b not in taken]
    mean = pl.cdiv(num_rows, min(num_rows, w.num_experts))
    blocks = _in_blocks(
        rows_E, w.bucket_E, w.index_E, num_rows, min(_rows_together(x_RI), 1 << (mean - 1).bit_length())
    )
    x_BTI = jnp.take(x_RI, blocks.row_BT, axis=0, mode="clip")
    y_BTO = jnp.zeros((*blocks.row_BT.shape, w.shape[1]), x_RI.dtype)
    for b in taken:
        bucket = w.buckets[b]
        assert isinstance(bucket, GroupedCodes)
        y_BTO = _multiply_bucket(x_BTI, bucket, b, blocks.bucket_B, blocks.index_B, y_BTO, interpret)
    y_RO = jnp.take(y_BTO.reshape(-1, w.shape[1]), blocks.place_R, axis=0, mode="clip")
    if not others:
        return y_RO
    is_taken_R = jnp.isin(w.bucket_E, jnp.asarray(taken))[blocks.expert_R][:, None]
    return jnp.where(is_taken_R, y_RO, xla.expert_matmul(x_RI, w, rows_E, others))


@_expert_matmul.defjvp
def _derivative_of_experts(
    interpret: bool,
    given: tuple[jax.Array, ExpertWeights, jax.Array],
    by: tuple[jax.Array, ExpertWeights, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Derivatives are the tiled path's."""
    return _expert_matmul(*given, interpret), jax.jvp(xla.expert_matmul, given, by)[1]


class _Blocks(NamedTuple):
    """Rows sorted by expert in blocks of T, each of one expert's rows; there are B of them at most.

    row_BT: what a block holds, its last rows perhaps other experts'. bucket_B, index_B: the matrix that it takes; the
    bucket is -1 where no rows are left. expert_R, place_R: a row's expert, and where among all blocks' rows it is.
    """

    row_BT: jax.Array
    bucket_B: jax.Array
    index_B: jax.Array
    expert_R: jax.Array
    place_R: jax.Array


# Functions of their own under jit are traced and lowered once for all projections and layers of equal shapes.
@partial(jax.jit, static_argnames=("num_rows", "block"))
def _in_blocks(rows_E: jax.Array, bucket_E: jax.Array, index_E: jax.Array, num_rows: int, block: int) -> _Blocks:
    num_experts = len(rows_E)
    hit = min(num_rows, num_experts)
    num_blocks = (num_rows - hit) // block + hit
    blocks_E = pl.cdiv(rows_E, block)
    first_block_E, first_row_E = jnp.cumsum(blocks_E) - blocks_E, jnp.cumsum(rows_E) - rows_E
    expert_B = jnp.repeat(jnp.arange(num_experts), blocks_E, total_repeat_length=num_blocks)
    expert_R = jnp.repeat(jnp.arange(num_experts), rows_E, total_repeat_length=num_rows)
    start_B = first_row_E[expert_B] + (jnp.arange(num_blocks) - first_block_E[expert_B]) * block
    bucket_B = jnp.where(jnp.arange(num_blocks) < jnp.sum(blocks_E), bucket_E[expert_B], -1)
    # Blocks behind one another hold an expert's rows behind one another.
    place_R = first_block_E[expert_R] * block + jnp.arange(num_rows) - first_row_E[expert_R]
    return _Blocks(start_B[:, None] + jnp.arange(block), bucket_B, index_E[expert_B], expert_R, place_R)


@partial(jax.jit, static_argnames="interpret")
def _multiply_bucket(
    x_BTI: jax.Array,
    w: GroupedCodes,
    bucket: jax.Array | int,
    bucket_B: jax.Array,
    index_B: jax.Array,
    y_BTO: jax.Array,
    interpret: bool,
) -> jax.Array:
    """y with the blocks of one bucket replaced by those of x times their matrices, of which w has as many."""
    is_own_B = bucket_B == bucket
    (own_B,) = jnp.nonzero(is_own_B, size=len(bucket_B), fill_value=0)
    own_B = own_B.astype(jnp.int32)
    own_index_B = jnp.take(index_B, own_B).astype(jnp.int32)
    return _multiply(x_BTI, w, own_B, own_index_B, jnp.count_nonzero(is_own_B), y_BTO, interpret)


def _multiply(
    x_BTI: jax.Array,
    w: GroupedCodes,
    own_B: jax.Array,
    index_B: jax.Array,
    count: jax.Array | int,
    y_BTO: jax.Array,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """y with its blocks `own_B`, of which there are `count`, replaced by those of x times the matrices `index_B` of w;
    blocks of one matrix come one behind the other."""
    (_, block, inputs), (_, outputs, num_words), num_groups = x_BTI.shape, w.words.shape, w.scale.shape[-1]
    output_tile = outputs_together(outputs, inputs, x_BTI.dtype)
    if (order := _order(w.words.shape)) == "WNO":  # what the kernel fetches does not end where a row does
        output_tile = math.gcd(output_tile, outputs)
    words = w.words.transpose(["NOW".index(axis) for axis in order])
    words_spec = {
        "NOW": pl.BlockSpec((None, output_tile, num_words), lambda o, n, own_B, index_B: (index_B[n], o, 0)),
        "NWO": pl.BlockSpec((None, num_words, output_tile), lambda o, n, own_B, index_B: (index_B[n], 0, o)),
        "WNO": pl.BlockSpec(memory_space=pl.ANY),
    }[order]
    return pl.pallas_call(
        partial(_kernel, unpack=unpack_of(w), zero=float(w.levels.zero), order=order),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(outputs, output_tile), count),
            in_specs=[
                pl.BlockSpec((None, block, inputs), lambda o, n, own_B, index_B: (own_B[n], 0, 0)),
                words_spec,
                pl.BlockSpec((None, num_groups, output_tile), lambda o, n, own_B, index_B: (index_B[n], 0, o)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((None, block, output_tile), lambda o, n, own_B, index_B: (own_B[n], 0, o)),
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


def _rows_together(x_RI: jax.Array) -> int:
    """How many rows are in a block, at most."""
    return min(MAX_ROW_BLOCK, _tile(x_RI.shape[1] * x_RI.dtype.itemsize, SUBLANES))


def outputs_together(outputs: int, inputs: int, dtype: jax.typing.DTypeLike) -> int:
    """How many outputs of a matrix (O, I) are unpacked together, for rows of that dtype."""
    return min(outputs, MAX_OUTPUT_TILE, _tile(inputs * jnp.dtype(dtype).itemsize, LANES))


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
) -> None:
    """y = x @ w for a block of rows and a tile of outputs, whose weights are unpacked at their first block."""
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
    y = jnp.dot(x_TI[...], w_IO[...], precision=precision, preferred_element_type=jnp.float32)
    y_TO[...] = y.astype(y_TO.dtype)
