"""The four operations tiled for XLA: a weight is unpacked, or converted, a tile of output rows at a time.

On CPU `jax.lax.ragged_dot` computes every expert for every row; `expert_matmul` here visits only the experts hit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats import ExpertWeights, Leaf, PackedTensor, dense, matrix, rows, take_rows
from moejax.kernels.hadamard_matrix import hadamard_factors, hadamard_order
from moejax.kernels.reference import PRECISION, accumulator

# A tile is worth two cores, and whole vectors wide: XLA takes a product of few outputs on one core, and 36 of them in
# kernels for narrow matrices (6 x 2048 x 7168 with 64 rows each, two cores: 217 ms by tiles of 1 MB, 118 by tiles of 4;
# one row of 4-bit weights 14 and 11 ms).
TILE_BYTES, VECTORS = 1 << 22, 64
# Of an expert's last block of rows some are not its own: with blocks of 64 most shapes take 0.6 to 0.85 of the time
# that they take with 256, and 256 x 128 a third more. Smaller blocks gain on large matrices and lose on small ones.
MAX_ROW_BLOCK = 64
# On a GPU no cache is so close, and every step of a loop costs some 50 us.
GPU_TILE_BYTES, GPU_ROW_BLOCK = 1 << 27, 256

Carry = TypeVar("Carry")
Tied = TypeVar("Tied")


def matmul(x: jax.Array, w: Leaf) -> jax.Array:
    return _wide_on_cpu(_matmul, x, w)


def matmul_transposed(x: jax.Array, w: Leaf) -> jax.Array:
    return _wide_on_cpu(_matmul_transposed, x, w)


def expert_matmul(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array, only: Sequence[int] | None = None) -> jax.Array:
    """Of experts in the buckets `only`, if those are given; others' rows are zeros."""
    return _wide_on_cpu(partial(_expert_matmul, only=range(len(w.buckets)) if only is None else only), x_RI, w, rows_E)


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    def einsum(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(equation, a, b.astype(a.dtype), precision=PRECISION, preferred_element_type=accumulator(a))

    return _wide_on_cpu(einsum, a, b, dtype=accumulator(a))


def take(w: Leaf, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return dense(take_rows(w, index), jnp.dtype(dtype))


def hadamard(x: jax.Array, inverse: bool) -> jax.Array:
    """Factor by factor from the last, which then lies before the others: every product is one of rows, and after all
    of them the axes are where they were."""
    order = hadamard_order(x.shape[-1])
    y = x.astype(accumulator(x)) * order**-0.5
    for factor in reversed(hadamard_factors(x.shape[-1])):
        y = y.reshape(x.size // order, order // len(factor), len(factor))
        signs = jnp.asarray(factor.T if inverse else factor, y.dtype)
        y = jnp.einsum("rbi,ij->rjb", y, signs, precision=PRECISION)
    return y.reshape(x.shape).astype(x.dtype)


def _wide_on_cpu(
    operation: Callable[..., jax.Array], x: jax.Array, *others: object, dtype: jnp.dtype | None = None
) -> jax.Array:
    """The operation, on a CPU with x in float32 at least: XLA takes 15 times as long to multiply bfloat16 there as to
    convert and multiply it (measured on one row and 8192 x 2048)."""
    if x.dtype == accumulator(x):
        return operation(x, *others)

    def widened(x: jax.Array, *others: object) -> jax.Array:
        return operation(x.astype(accumulator(x)), *others).astype(dtype or x.dtype)

    return jax.lax.platform_dependent(x, *others, cpu=widened, default=operation)


def _matmul(x: jax.Array, w: Leaf) -> jax.Array:
    if w.ndim == 3:
        return _per_matrix(_matmul, x, w)
    if not isinstance(w, PackedTensor) and w.dtype == x.dtype:
        return _dot(x, w, contract=1)

    def tile(start: jax.Array | int, size: int, y: jax.Array) -> jax.Array:
        y_tile = _dot(x, _unpacked_rows(w, start, size, x.dtype), contract=1)
        return jax.lax.dynamic_update_slice_in_dim(y, y_tile, start, axis=y.ndim - 1)

    return _over_tiles(w.shape, tile, jnp.zeros((*x.shape[:-1], w.shape[0]), x.dtype))


def _matmul_transposed(x: jax.Array, w: Leaf) -> jax.Array:
    if w.ndim == 3:
        return _per_matrix(_matmul_transposed, x, w)
    if not isinstance(w, PackedTensor) and w.dtype == x.dtype:
        return _dot(x, w, contract=0)

    def tile(start: jax.Array | int, size: int, y: jax.Array) -> jax.Array:
        x_tile = jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 1)
        w_tile = _unpacked_rows(w, start, size, x.dtype)
        return y + _dot(x_tile, w_tile, contract=0, out_dtype=y.dtype)

    return _over_tiles(w.shape, tile, jnp.zeros((*x.shape[:-1], w.shape[1]), accumulator(x))).astype(x.dtype)


def _expert_matmul(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array, only: Sequence[int]) -> jax.Array:
    """Experts are visited in order and in whole blocks of rows: a block's surplus rows belong to later experts, which
    overwrite them, and the last expert's fall into padding."""
    num_rows, (num_experts, outputs, _) = x_RI.shape[0], w.shape
    block = _row_block(num_rows, num_experts)
    x = jnp.pad(x_RI, ((0, block), (0, 0)))
    first_row_E = jnp.cumsum(rows_E) - rows_E
    branch_of = np.searchsorted(np.asarray(only), np.arange(len(w.buckets)))
    if len(only) < len(w.buckets):
        rows_E = jnp.where(jnp.isin(w.bucket_E, jnp.asarray(only)), rows_E, 0)
    hit_E = jnp.nonzero(rows_E, size=min(num_experts, num_rows))[0]

    def visit(hit: jax.Array, y: jax.Array) -> jax.Array:
        e = hit_E[hit]

        def tile(start: jax.Array | int, size: int, y: jax.Array) -> jax.Array:
            unpack = [
                partial(_expert_tile, bucket, size=size, dtype=x.dtype) for bucket in map(w.buckets.__getitem__, only)
            ]
            w_tile = jax.lax.switch(jnp.asarray(branch_of)[w.bucket_E[e]], unpack, w.index_E[e], start)

            def row_block(b: jax.Array, y: jax.Array) -> jax.Array:
                row = first_row_E[e] + b * block
                y_block = _dot(jax.lax.dynamic_slice_in_dim(x, row, block), w_tile, contract=1)
                return jax.lax.dynamic_update_slice(y, y_block, (row, start))

            return jax.lax.fori_loop(0, -(-rows_E[e] // block), row_block, y)

        return _over_tiles(w.shape[1:], tile, y)

    y = jnp.zeros((num_rows + block, outputs), x.dtype)
    return jax.lax.fori_loop(0, jnp.count_nonzero(rows_E), visit, y)[:num_rows]


def _dot(x: jax.Array, w: jax.Array, contract: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
    dims = (((x.ndim - 1,), (contract,)), ((), ()))
    y = jax.lax.dot_general(x, w, dims, precision=PRECISION, preferred_element_type=accumulator(x))
    return y.astype(out_dtype or x.dtype)


def _per_matrix(operation: Callable[[jax.Array, Leaf], jax.Array], x: jax.Array, w: Leaf) -> jax.Array:
    """One matrix after another, so that no more than one of them is unpacked at a time.

    Plain ones too: XLA for CPU has no batched product of bfloat16."""

    def one(x_and_index: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_b, index = x_and_index
        return operation(x_b, matrix(*_tied((w, index))))

    return jnp.moveaxis(jax.lax.map(one, (jnp.moveaxis(x, -2, 0), jnp.arange(w.shape[0]))), 0, -2)


def _over_tiles(shape: tuple[int, ...], tile: Callable[[jax.Array | int, int, Carry], Carry], init: Carry) -> Carry:
    """tile(start, size, carry) for consecutive tiles of the output rows of a matrix (O, I)."""
    outputs, inputs = shape
    most = (GPU_TILE_BYTES if _is_on_gpu() else TILE_BYTES) // (4 * inputs)
    size = min(outputs, most // VECTORS * VECTORS or max(1, most))
    whole = outputs // size
    if whole == 1 and size == outputs:
        return tile(0, size, init)
    carry = jax.lax.fori_loop(0, whole, lambda t, carry: tile(t * size, size, carry), init)
    rest = outputs - whole * size
    return tile(whole * size, rest, carry) if rest else carry


@partial(jax.jit, static_argnames=("size", "dtype"))
def _expert_tile(bucket: Leaf, index: jax.Array, start: jax.Array | int, size: int, dtype: jnp.dtype) -> jax.Array:
    bucket, index, start = _tied((bucket, index, start))
    return _unpacked(rows(matrix(bucket, index), start, size), dtype)


def _unpacked_rows(w: Leaf, start: jax.Array | int, size: int, dtype: jnp.dtype) -> jax.Array:
    w, start = _tied((w, start))
    return _unpacked(rows(w, start, size), dtype)


@partial(jax.jit, static_argnames="dtype")
def _unpacked(tile: Leaf, dtype: jnp.dtype) -> jax.Array:
    """Under jit, as `_expert_tile` is, so that it is traced once for all tiles of a format and shape: unpacking is most
    of what a model is traced for."""
    return dense(tile, dtype)


def _tied(weight_and_place: Tied) -> Tied:
    """The same. XLA would see that the weight does not change in the loop, and unpack it all ahead of it."""
    return jax.lax.optimization_barrier(weight_and_place)


def _row_block(num_rows: int, num_experts: int) -> int:
    """Rows multiplied at once: the power of two next above an expert's mean share, or fewer."""
    mean = -(-num_rows // num_experts)
    return min(GPU_ROW_BLOCK if _is_on_gpu() else MAX_ROW_BLOCK, 1 << (mean - 1).bit_length())


def _is_on_gpu() -> bool:
    return jax.default_backend() == "gpu"
