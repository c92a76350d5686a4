"""Rows make up for each other's errors: what outputs' errors cost together falls, and rows alone are as ever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import Inputs
from moejax.formats import GroupedCodes, IntFormat, dense
from moejax.transforms.error_feedback import quantize_with_feedback
from moejax.transforms.rounding import round_weight
from moejax.transforms.row_feedback import quantize_with_row_feedback, row_feedback

OUTPUTS, INPUTS = 48, 64
TO = IntFormat(bits=2, group_size=32)


def second_moment(size: int, seed: int) -> np.ndarray:
    """Of vectors whose entries go together."""
    random = np.random.default_rng(seed)
    x_TN = random.normal(size=(4 * size, size)) @ (np.eye(size) + 0.5 * random.normal(size=(size, size)) / size**0.5)
    return x_TN.T @ x_TN / len(x_TN)


@pytest.fixture(scope="module")
def weight() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(OUTPUTS, INPUTS)), jnp.float32)


@pytest.fixture(scope="module")
def hessian() -> jax.Array:
    return jnp.asarray(second_moment(INPUTS, 1), jnp.float32)


@pytest.fixture(scope="module")
def outputs() -> jax.Array:
    return jnp.asarray(second_moment(OUTPUTS, 2), jnp.float32)


def test_errors_cost_less_together(weight: jax.Array, hessian: jax.Array, outputs: jax.Array) -> None:
    def cost(packed: GroupedCodes) -> float:
        error_OI = np.asarray(weight - dense(packed, jnp.float32), np.float64)
        return float(np.trace(np.asarray(outputs) @ error_OI @ np.asarray(hessian) @ error_OI.T))

    alone = cost(quantize_with_feedback(weight, hessian, TO, 0.03))
    assert cost(quantize_with_row_feedback(weight, hessian, outputs, TO, 0.03)) < 0.85 * alone


def test_outputs_that_count_apart_are_rounded_apart(weight: jax.Array, hessian: jax.Array) -> None:
    """Whatever each counts."""
    apart = jnp.diag(jnp.arange(1.0, OUTPUTS + 1))
    found = quantize_with_row_feedback(weight, hessian, apart, TO, 0.03)
    np.testing.assert_allclose(
        dense(found, jnp.float32), dense(quantize_with_feedback(weight, hessian, TO, 0.03), jnp.float32), atol=1e-6
    )


@pytest.mark.parametrize("rows", [1, 16, 48])
def test_what_is_fed_back_is_what_costs_least(rows: int, outputs: jax.Array) -> None:
    """For errors of later rows, the best errors of a block and those before it, were they free: by numpy."""
    feedback_MRO = np.asarray(row_feedback(outputs, rows), np.float64)
    wide_OO = np.asarray(outputs, np.float64)
    damped_OO = wide_OO + 0.01 * np.mean(np.diag(wide_OO)) * np.eye(OUTPUTS)
    for m in range(OUTPUTS // rows):
        later = slice((m + 1) * rows, OUTPUTS)
        before = slice(0, (m + 1) * rows)
        best = -np.linalg.solve(damped_OO[before, before], damped_OO[before, later])[m * rows :]
        np.testing.assert_allclose(-feedback_MRO[m][:, later], best, atol=2e-5)
        assert not np.any(feedback_MRO[m][:, before])


def test_experts_are_rounded_as_each_alone(weight: jax.Array, hessian: jax.Array, outputs: jax.Array) -> None:
    """Batched with their own inputs, and stacked with one."""
    weights, hessians = jnp.stack([weight, weight[::-1]]), jnp.stack([hessian, 2 * hessian + 0.1])
    inputs = Inputs(jnp.ones((2, INPUTS)), hessians, jnp.full(2, 1e6), jnp.ones(2), jnp.stack([outputs] * 2))
    batched = jax.vmap(lambda w, own: round_weight(w, own, TO))(weights, inputs)
    one = Inputs(jnp.ones(INPUTS), hessian, 1e6, 1.0, outputs)
    stacked = round_weight(weights, one, TO)
    for n in range(2):
        own = one._replace(hessian=hessians[n])
        for found, given in ((batched, own), (stacked, one)):
            expected = dense(round_weight(weights[n], given, TO), jnp.float32)
            np.testing.assert_allclose(dense(found, jnp.float32)[n], expected, atol=1e-5)
