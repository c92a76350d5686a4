"""The operations of the model: four that a weight knows, dispatched on its type and the backend; an einsum; a rotation.

Without a `backend`, programs lowered for TPU multiply by Pallas kernels what these take, and all others by XLA. Every
backend computes the same thing: the weight's dense value times the input, accumulated in at least float32 and
returned in the input's dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Protocol

import jax

from moejax.formats import ExpertWeights, Leaf
from moejax.kernels import pallas_tpu, reference, xla
from moejax.kernels.expert_rows import differentiable


class Backend(Protocol):
    """What a backend's module holds."""

    def matmul(self, x: jax.Array, w: Leaf) -> jax.Array: ...

    def matmul_transposed(self, x: jax.Array, w: Leaf) -> jax.Array: ...

    def expert_matmul(self, x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array) -> jax.Array: ...

    def take(self, w: Leaf, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array: ...

    def product(self, equation: str, a: jax.Array, b: jax.Array) -> jax.Array: ...

    def hadamard(self, x: jax.Array, inverse: bool) -> jax.Array: ...


BACKENDS: dict[str, Backend] = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu}

# Backends by what a program is lowered for, the first that takes a weight multiplies it; `xla` takes what they leave.
LISTS: Mapping[str, Sequence[str]] = MappingProxyType({"tpu": ("pallas_tpu",)})
_TAKES: Mapping[str, Callable[[jax.typing.DTypeLike, Leaf], bool]] = MappingProxyType({"pallas_tpu": pallas_tpu.takes})


def matmul(x: jax.Array, w: Leaf, *, backend: str | None = None) -> jax.Array:
    """Contract the weight's inputs: y[..., b, o] = sum_i w[b, o, i] * x[..., b, i].

    x (..., *batch, I), w (*batch, O, I) with at most one batch axis -> (..., *batch, O).
    """
    return _matmul_by_platform(x, w) if backend is None else BACKENDS[backend].matmul(x, w)


def matmul_transposed(x: jax.Array, w: Leaf, *, backend: str | None = None) -> jax.Array:
    """Contract the weight's outputs: y[..., b, i] = sum_o w[b, o, i] * x[..., b, o].

    x (..., *batch, O), w (*batch, O, I) with at most one batch axis -> (..., *batch, I).
    """
    return _transposed_by_platform(x, w) if backend is None else BACKENDS[backend].matmul_transposed(x, w)


def expert_matmul(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array, *, backend: str | None = None) -> jax.Array:
    """Multiply every row by its expert's matrix: y[r, o] = sum_i w[e(r), o, i] * x[r, i].

    Rows are sorted by expert, the first rows_E[0] belong to expert 0 and so on; rows_E sums to R. -> (R, O).
    """
    operation = _expert_matmul_by_platform if backend is None else BACKENDS[backend].expert_matmul
    return differentiable(operation, x_RI, w, rows_E)


def take(w: Leaf, index: jax.Array, dtype: jax.typing.DTypeLike, *, backend: str = "xla") -> jax.Array:
    """Rows of a matrix w (O, I) at index (...), as (..., I) of `dtype`: the embedding."""
    return BACKENDS[backend].take(w, index, dtype)


def product(equation: str, a: jax.Array, b: jax.Array, *, backend: str = "xla") -> jax.Array:
    """einsum(equation, a, b) of two arrays of one dtype, summed and returned in at least float32: attention."""
    return BACKENDS[backend].product(equation, a, b)


def hadamard(x: jax.Array, *, inverse: bool = False, backend: str = "xla") -> jax.Array:
    """x (..., n) times the orthogonal matrix H / sqrt(b) (n, n), or its transpose if `inverse`: y_j = sum_i x_i H_ij.

    H is the Hadamard matrix of order n, or as many of order b as n holds along the diagonal: see `hadamard_factors`,
    which raises InputError where n is odd.
    """
    return BACKENDS[backend].hadamard(x, inverse)


def kernel_of(w: Leaf | ExpertWeights, dtype: jax.typing.DTypeLike, platform: str) -> dict[str, list[Leaf]]:
    """By which backend a program lowered for a platform multiplies a weight with inputs of that dtype, of experts
    bucket by bucket: the first of the platform's list (`LISTS`, else `xla`) that takes it."""
    found: dict[str, list[Leaf]] = {}
    for leaf in w.buckets if isinstance(w, ExpertWeights) else (w,):
        names = [name for name in LISTS.get(platform, ()) if _TAKES[name](dtype, leaf)]
        found.setdefault([*names, "xla"][0], []).append(leaf)
    return found


@jax.jit
def _matmul_by_platform(x: jax.Array, w: Leaf) -> jax.Array:
    """By what the program is lowered for, which need not be what this process runs on."""
    if not x.size or "xla" in kernel_of(w, x.dtype, "tpu"):
        return xla.matmul(x, w)
    return jax.lax.platform_dependent(x, w, tpu=partial(pallas_tpu.matmul, interpret=False), default=xla.matmul)


@jax.jit
def _transposed_by_platform(x: jax.Array, w: Leaf) -> jax.Array:
    if not x.size or "xla" in kernel_of(w, x.dtype, "tpu"):
        return xla.matmul_transposed(x, w)
    compiled = partial(pallas_tpu.matmul_transposed, interpret=False)
    return jax.lax.platform_dependent(x, w, tpu=compiled, default=xla.matmul_transposed)


@jax.jit
def _expert_matmul_by_platform(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array) -> jax.Array:
    if not x_RI.size or set(kernel_of(w, x_RI.dtype, "tpu")) == {"xla"}:
        return xla.expert_matmul(x_RI, w, rows_E)
    compiled = partial(pallas_tpu.expert_matmul, interpret=False)
    return jax.lax.platform_dependent(x_RI, w, rows_E, tpu=compiled, default=xla.expert_matmul)
