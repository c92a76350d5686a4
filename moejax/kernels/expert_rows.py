"""Products of experts' rows that go backwards: how `expert_matmul` is differentiated, whatever backend computes it.

    y[r] = W[e(r)] x[r],    dx[r] = W[e(r)]^T dy[r],    dW[e] = sum of dy[r] x[r]^T over the expert's rows

Its own loops run as often as experts have rows, and JAX cannot run such a loop backwards. Rows are sorted by expert, as
`expert_matmul` has them; those behind all experts' count nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats import ExpertWeights, Leaf, PackedTensor, dense, matrix
from moejax.kernels.reference import PRECISION, accumulator

# Rows of an expert that are multiplied at once, at most.
_ROW_BLOCK = 128

Operation = Callable[[jax.Array, ExpertWeights, jax.Array], jax.Array]
Carry = TypeVar("Carry")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(operation: Operation, x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array) -> jax.Array:
    """operation(x, w, rows), an `expert_matmul`, with derivatives by the rows and by dense weights, which go backwards
    alone (`jax.grad`, `jax.vjp`); packed weights have none."""
    return operation(x_RI, w, rows_E)


Kept = tuple[jax.Array, ExpertWeights, jax.Array]


def _forwards(operation: Operation, *given: Any) -> tuple[jax.Array, Kept]:
    return operation(*given), given


def _backwards(operation: Operation, kept: Kept, dy_RO: jax.Array) -> tuple[jax.Array, ExpertWeights, Any]:
    x_RI, w, rows_E = kept
    is_any_dense = any(not isinstance(bucket, PackedTensor) for bucket in w.buckets)
    dw_EOI = expert_outer_products(dy_RO, x_RI, rows_E) if is_any_dense else None
    buckets = [
        jax.tree.map(_nothing, own)
        if dw_EOI is None or isinstance(own, PackedTensor)
        else _in_bucket(dw_EOI, w, b, own)
        for b, own in enumerate(w.buckets)
    ]
    dw = ExpertWeights(tuple(buckets), _nothing(w.bucket_E), _nothing(w.index_E))
    return expert_matmul_transposed(dy_RO, w, rows_E), dw, _nothing(rows_E)


differentiable.defvjp(_forwards, _backwards)


def expert_matmul_transposed(y_RO: jax.Array, w: ExpertWeights, rows_E: jax.Array) -> jax.Array:
    """x[r, i] = sum_o w[e(r), o, i] * y[r, o], (R, I); one expert's matrix is unpacked at a time."""
    wide_RO = y_RO.astype(accumulator(y_RO))
    unpack = [partial(_unpacked, bucket, dtype=wide_RO.dtype) for bucket in w.buckets]
    first_row_E, hit_E = jnp.cumsum(rows_E) - rows_E, jnp.nonzero(rows_E, size=min(len(rows_E), len(y_RO)))[0]

    def of_expert(hit: jax.Array, x_RI: jax.Array) -> jax.Array:
        e = hit_E[hit]
        w_OI = jax.lax.switch(w.bucket_E[e], unpack, w.index_E[e])

        def of_block(start: jax.Array, is_own_B: jax.Array, x_RI: jax.Array) -> jax.Array:
            before_BI, y_BO = (jax.lax.dynamic_slice_in_dim(a, start, len(is_own_B)) for a in (x_RI, wide_RO))
            x_BI = jnp.einsum("bo,oi->bi", y_BO, w_OI, precision=PRECISION)
            return jax.lax.dynamic_update_slice_in_dim(x_RI, jnp.where(is_own_B[:, None], x_BI, before_BI), start, 0)

        return _over_blocks(first_row_E[e], rows_E[e], len(x_RI), of_block, x_RI)

    x_RI = jnp.zeros((len(y_RO), w.shape[2]), wide_RO.dtype)
    return jax.lax.fori_loop(0, jnp.count_nonzero(rows_E), of_expert, x_RI).astype(y_RO.dtype)


def expert_outer_products(a_RI: jax.Array, b_RJ: jax.Array, rows_E: jax.Array) -> jax.Array:
    """sum of a[r] b[r]^T over each expert's rows, (E, I, J), in at least float32. Blocks of rows are visited, so that
    the work is one product per row, however many experts."""
    a_RI, b_RJ = (own.astype(accumulator(own)) for own in (a_RI, b_RJ))

    def of_expert(first_and_rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        def add_block(start: jax.Array, is_own_B: jax.Array, sum_IJ: jax.Array) -> jax.Array:
            a_BI, b_BJ = (jax.lax.dynamic_slice_in_dim(own, start, len(is_own_B)) for own in (a_RI, b_RJ))
            own_BI = jnp.where(is_own_B[:, None], a_BI, 0)
            return sum_IJ + jnp.einsum("bi,bj->ij", own_BI, b_BJ, precision=PRECISION)

        return _over_blocks(
            *first_and_rows, len(a_RI), add_block, jnp.zeros((a_RI.shape[1], b_RJ.shape[1]), a_RI.dtype)
        )

    return jax.lax.map(of_expert, (jnp.cumsum(rows_E) - rows_E, rows_E))


def _over_blocks(
    first: jax.Array,
    rows: jax.Array,
    num_rows: int,
    of_block: Callable[[jax.Array, jax.Array, Carry], Carry],
    init: Carry,
) -> Carry:
    """of_block(start, which of its rows are the expert's, carry) for blocks of rows that hold the expert's; the last
    begins earlier where it would go beyond all rows."""
    block = min(_ROW_BLOCK, num_rows)

    def visit(b: jax.Array, carry: Carry) -> Carry:
        own_start = first + b * block
        start = jnp.minimum(own_start, num_rows - block)
        row_B = start + jnp.arange(block)
        return of_block(start, (own_start <= row_B) & (row_B < first + rows), carry)

    return jax.lax.fori_loop(0, -(-rows // block), visit, init)


def _in_bucket(dw_EOI: jax.Array, w: ExpertWeights, b: int, bucket: jax.Array) -> jax.Array:
    """Of all experts' matrices those in bucket number b."""
    place_E = jnp.where(w.bucket_E == b, w.index_E, len(bucket))
    return jnp.zeros(bucket.shape, bucket.dtype).at[place_E].set(dw_EOI.astype(bucket.dtype), mode="drop")


def _unpacked(bucket: Leaf, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return dense(matrix(bucket, index), dtype)


def _nothing(array: jax.Array) -> Any:
    """The derivative by what has none."""
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.zeros_like(array) if is_float else np.zeros(array.shape, jax.dtypes.float0)
