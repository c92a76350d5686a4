"""Products as Pallas kernels for TPU, of weights in integer and ternary groups; the rest is XLA's.

There is one kernel, `multiply_tpu`: rows in blocks, each times one matrix. Of experts, a block holds rows of one; of
one matrix per head, those of a head; a plain matrix is the only one.

Lowered for TPU it is the Mosaic kernel, in a process without a TPU too (ahead-of-time compilation); lowered for another
platform the same kernel is interpreted, which serves tests alone. To shard it, call it under `jax.shard_map`.

The other operations go to XLA, and so do weights that `takes` is false of, of experts bucket by bucket: other than
`GroupedInt` and `GroupedTernary`, inputs other than float32 and bfloat16, rows too long for VMEM or with a shorter last
group, and rows of integers of no whole number of tiles: I must be a multiple of 512 at odd widths, of 256 at 2 and 6
bits, of 128 at 4 and 64 at 8. Ternary rows may end in a unit of fewer words.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moejax.formats import ExpertWeights, GroupedCodes, Leaf
from moejax.kernels import xla
from moejax.kernels.multiply_tpu import is_one_tile, multiply, rows_together, takes
from moejax.kernels.xla import hadamard, product, take

__all__ = [
    "expert_matmul",
    "hadamard",
    "matmul",
    "matmul_transposed",
    "product",
    "take",
    "takes",
]


def matmul(x: jax.Array, w: Leaf, interpret: bool | None = None) -> jax.Array:
    """As `api.matmul`. The kernel is interpreted or compiled as is said, else by what the program is lowered for."""
    if not x.size or not takes(x.dtype, w):
        return xla.matmul(x, w)
    if w.ndim == 2:
        return matmul(x[..., None, :], jax.tree.map(lambda a: a[None], w), interpret)[..., 0, :]
    return _compiled_or_interpreted(partial(_per_matrix, transposed=False), interpret, x, w)


def matmul_transposed(x: jax.Array, w: Leaf, interpret: bool | None = None) -> jax.Array:
    """As `api.matmul_transposed`, of one small matrix per head: all its outputs are unpacked together."""
    if not x.size or w.ndim != 3 or not takes(x.dtype, w) or not is_one_tile(w, x.dtype):
        return xla.matmul_transposed(x, w)
    return _compiled_or_interpreted(partial(_per_matrix, transposed=True), interpret, x, w)


def expert_matmul(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array, interpret: bool | None = None) -> jax.Array:
    """As `api.expert_matmul`; `interpret` as in `matmul`."""
    if not x_RI.size or not any(takes(x_RI.dtype, bucket) for bucket in w.buckets):
        return xla.expert_matmul(x_RI, w, rows_E)
    return _compiled_or_interpreted(_expert_matmul, interpret, x_RI, w, rows_E)


def _compiled_or_interpreted(operation: Callable[..., jax.Array], interpret: bool | None, *given: object) -> jax.Array:
    if interpret is not None:
        return operation(*given, interpret=interpret)
    compiled, interpreted = partial(operation, interpret=False), partial(operation, interpret=True)
    return jax.lax.platform_dependent(*given, tpu=compiled, default=interpreted)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _per_matrix(x: jax.Array, w: GroupedCodes, transposed: bool, interpret: bool) -> jax.Array:
    """x (..., N, I) times matrices (N, O, I) to (..., N, O); transposed, x (..., N, O) to (..., N, I)."""
    matrices, outputs, inputs = w.shape
    x_NRI = jnp.moveaxis(x, -2, 0).reshape(matrices, -1, x.shape[-1])
    num_rows = x_NRI.shape[1]
    blocks = pl.cdiv(num_rows, rows_together(x.shape[-1], x.dtype))
    block = pl.cdiv(num_rows, blocks)
    x_BTI = jnp.pad(x_NRI, ((0, 0), (0, blocks * block - num_rows), (0, 0))).reshape(-1, block, x.shape[-1])
    every_B = jnp.arange(len(x_BTI), dtype=jnp.int32)
    y_BTO = jnp.zeros((len(x_BTI), block, inputs if transposed else outputs), x.dtype)
    y_BTO = multiply(x_BTI, w, every_B, every_B // blocks, len(x_BTI), y_BTO, interpret, transposed)
    y_NRO = y_BTO.reshape(matrices, blocks * block, -1)[:, :num_rows]
    return jnp.moveaxis(y_NRO.reshape(matrices, *x.shape[:-2], -1), 0, -2)


@_per_matrix.defjvp
def _derivative(
    transposed: bool, interpret: bool, given: tuple[jax.Array, GroupedCodes], by: tuple[jax.Array, GroupedCodes]
) -> tuple[jax.Array, jax.Array]:
    """Derivatives are the tiled path's."""
    tiled = xla.matmul_transposed if transposed else xla.matmul
    return _per_matrix(*given, transposed, interpret), jax.jvp(tiled, given, by)[1]


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _expert_matmul(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array, interpret: bool) -> jax.Array:
    """Experts' rows in blocks of their own, bucket by bucket those that the kernel takes; XLA the other buckets'."""
    num_rows = len(x_RI)
    taken = [b for b, bucket in enumerate(w.buckets) if takes(x_RI.dtype, bucket)]
    others = [b for b in range(len(w.buckets)) if b not in taken]
    mean = pl.cdiv(num_rows, min(num_rows, w.num_experts))
    blocks = _in_blocks(
        rows_E,
        w.bucket_E,
        w.index_E,
        num_rows,
        min(rows_together(x_RI.shape[1], x_RI.dtype), 1 << (mean - 1).bit_length()),
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
    return multiply(x_BTI, w, own_B, own_index_B, jnp.count_nonzero(is_own_B), y_BTO, interpret)
