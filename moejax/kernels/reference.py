"""The operations in plain jnp: what every other backend is compared with. Materializes whole weights."""

import jax
import jax.numpy as jnp

from moejax.formats import ExpertWeights, Leaf, dense
from moejax.kernels.hadamard_matrix import hadamard_matrix, hadamard_order

# Without it a TPU would round float32 inputs to bfloat16.
PRECISION = jax.lax.Precision.HIGHEST


def accumulator(x: jax.Array) -> jnp.dtype:
    """The dtype sums are kept in: x's own, but no less than float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def matmul(x: jax.Array, w: Leaf) -> jax.Array:
    acc = accumulator(x)
    equation = "...i,oi->...o" if w.ndim == 2 else "...bi,boi->...bo"
    return jnp.einsum(equation, x.astype(acc), dense(w, acc), precision=PRECISION).astype(x.dtype)


def matmul_transposed(x: jax.Array, w: Leaf) -> jax.Array:
    acc = accumulator(x)
    equation = "...o,oi->...i" if w.ndim == 2 else "...bo,boi->...bi"
    return jnp.einsum(equation, x.astype(acc), dense(w, acc), precision=PRECISION).astype(x.dtype)


def expert_matmul(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array) -> jax.Array:
    acc = accumulator(x_RI)
    slots = jnp.concatenate([dense(bucket, acc) for bucket in w.buckets])
    first_slot = jnp.cumsum(jnp.asarray([0] + [bucket.shape[0] for bucket in w.buckets]))
    w_EOI = slots[first_slot[w.bucket_E] + w.index_E]
    expert_R = jnp.repeat(jnp.arange(w.num_experts), rows_E, total_repeat_length=x_RI.shape[0])
    return jnp.einsum("ri,roi->ro", x_RI.astype(acc), w_EOI[expert_R], precision=PRECISION).astype(x_RI.dtype)


def take(w: Leaf, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return dense(w, jnp.dtype(dtype))[index]


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a.astype(accumulator(a)), b.astype(accumulator(a)), precision=PRECISION)


def hadamard(x: jax.Array, inverse: bool) -> jax.Array:
    n, acc = x.shape[-1], accumulator(x)
    matrix = jnp.asarray(hadamard_matrix(n).T if inverse else hadamard_matrix(n), acc) / hadamard_order(n) ** 0.5
    return jnp.einsum("...i,ij->...j", x.astype(acc), matrix, precision=PRECISION).astype(x.dtype)
