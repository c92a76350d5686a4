"""Derivatives of experts' products, of every backend, are those of the dense products in float64."""

from collections.abc import Iterator
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import random_leaf, to_numpy
from moejax import kernels
from moejax.formats import ExpertWeights, gather_experts
from moejax.kernels import expert_rows

ROWS = [0, 5, 1, 0, 9, 4]
DENSE = ["f32", "f32", "f32", "f32", "f32", "f32"]
MIXED = ["bf16", "f32", "f32", "bf16", "bf16", "f32"]
PACKED = ["int3g32", "fp8b32x32", "int3g32", "ternaryg32", "f32", "fp8b32x32"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(expert_rows, "_ROW_BLOCK", 4)
    with jax.enable_x64(True):
        yield


def weights(formats: list[str]) -> ExpertWeights:
    return gather_experts([random_leaf(f"{own}[24,64]", seed) for seed, own in enumerate(formats)])


def dense(w: ExpertWeights) -> jax.Array:
    return jnp.asarray(np.stack([to_numpy(w.expert(e)) for e in range(w.num_experts)]))


def reference(x_RI: jax.Array, w_EOI: jax.Array) -> jax.Array:
    expert_R = np.repeat(np.arange(len(ROWS)), ROWS)
    used = jnp.einsum("ri,roi->ro", x_RI[: len(expert_R)], w_EOI[expert_R])
    return jnp.concatenate([used, jnp.zeros((len(x_RI) - len(expert_R), w_EOI.shape[1]))])


@pytest.mark.parametrize("formats", [DENSE, MIXED, PACKED])
@pytest.mark.parametrize(
    ("backend", "beside"),  # rows of no expert, which the reference does not take
    [(None, 3), (None, 0), ("xla", 3), ("pallas_tpu", 3), ("reference", 0)],
)
def test_by_rows(formats: list[str], backend: str | None, beside: int) -> None:
    w, dtype = weights(formats), jnp.float32 if backend == "pallas_tpu" else jnp.float64
    x_RI = jnp.asarray(np.random.default_rng(0).normal(size=(sum(ROWS) + beside, 64)), dtype)
    x_RI = x_RI.at[sum(ROWS) :].set(0)

    def loss(x_RI: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(kernels.expert_matmul(x_RI, w, jnp.asarray(ROWS), backend=backend)))

    expected = jax.grad(lambda x_RI: jnp.sum(jnp.sin(reference(x_RI, dense(w)))))(x_RI.astype(jnp.float64))
    found = jax.jit(jax.grad(loss))(x_RI)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=1e-9 if dtype == jnp.float64 else 1e-4, atol=1e-4)
    if dtype == jnp.float64:
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_by_dense_weights(backend: str) -> None:
    """In several buckets, with packed ones beside, which have none."""
    w = weights(["f32", "int3g32", "f32", "f32", "bf16", "f32"])
    x_RI = jnp.asarray(np.random.default_rng(0).normal(size=(sum(ROWS), 64)))

    def loss(w: ExpertWeights) -> jax.Array:
        return jnp.sum(jnp.sin(kernels.expert_matmul(x_RI, w, jnp.asarray(ROWS), backend=backend)))

    found = jax.grad(loss, allow_int=True)(w)
    expected_EOI = jax.grad(lambda w_EOI: jnp.sum(jnp.sin(reference(x_RI, w_EOI))))(dense(w))
    for e, expected_OI in enumerate(expected_EOI):
        own = w.buckets[int(w.bucket_E[e])]
        gradient = jax.tree.leaves(found.buckets[int(w.bucket_E[e])])
        if isinstance(own, jax.Array):
            rtol = 1e-2 if own.dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(
                np.asarray(gradient[0][w.index_E[e]], np.float64), expected_OI, rtol=rtol, atol=rtol
            )
        else:
            assert all(array.dtype == jax.dtypes.float0 or not np.any(array) for array in gradient)


def test_a_batch_of_rows_has_a_batch_of_derivatives() -> None:
    w = weights(DENSE)
    x_BRI = jnp.asarray(np.random.default_rng(0).normal(size=(2, sum(ROWS), 64)))
    rows_BE = jnp.asarray([ROWS, ROWS[::-1]])

    def loss(x_RI: jax.Array, rows_E: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(kernels.expert_matmul(x_RI, w, rows_E)))

    found = jax.vmap(jax.grad(loss))(x_BRI, rows_BE)
    each = [jax.grad(loss)(*own) for own in zip(x_BRI, rows_BE, strict=True)]
    np.testing.assert_allclose(found, each, rtol=1e-12)


def test_outer_products() -> None:
    random = np.random.default_rng(0)
    a_RI, b_RJ = random.normal(size=(sum(ROWS) + 3, 5)), random.normal(size=(sum(ROWS) + 3, 7))
    found = expert_rows.expert_outer_products(jnp.asarray(a_RI), jnp.asarray(b_RJ), jnp.asarray(ROWS))
    starts = np.cumsum([0, *ROWS])
    expected = [a_RI[i:j].T @ b_RJ[i:j] for i, j in pairwise(starts)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
