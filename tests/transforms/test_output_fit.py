"""The least-squares fit of one weight, by numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import Inputs
from moejax.transforms.hessian import damped
from moejax.transforms.output_fit import Lacking, fitted, lacking

TOKENS, OUTPUTS, INPUTS = 400, 6, 10
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(TOKENS, INPUTS)) @ RANDOM.normal(size=(INPUTS, INPUTS))
WEIGHT = RANDOM.normal(size=(OUTPUTS, INPUTS))
ROUNDED = np.round(WEIGHT)


def fit(r: np.ndarray, damping: float = 1.0, share: float = 1.0) -> np.ndarray:
    """The fitted weight, where its outputs lack r."""
    sums = lacking(jnp.asarray(X.reshape(4, -1, INPUTS)), jnp.asarray(r.reshape(4, -1, OUTPUTS)))
    means = Lacking(*(own / TOKENS for own in sums))
    inputs = Inputs(jnp.diagonal(means.products_II), means.products_II, TOKENS, damping)
    return np.asarray(fitted(jnp.asarray(WEIGHT), jnp.asarray(ROUNDED), means, inputs, share), np.float64)


def test_sums_are_over_tokens() -> None:
    r = RANDOM.normal(size=(TOKENS, OUTPUTS))
    found = lacking(jnp.asarray(X.reshape(2, 2, -1, INPUTS)), jnp.asarray(r.reshape(2, 2, -1, OUTPUTS)))
    np.testing.assert_allclose(found.products_II, X.T @ X, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found.lacking_OI, r.T @ X, rtol=1e-4, atol=1e-2)


def test_what_lacks_by_its_own_rounding_alone_asks_for_the_original() -> None:
    np.testing.assert_allclose(fit(X @ (WEIGHT - ROUNDED).T), WEIGHT, atol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_lack_that_follows_the_inputs_is_made_up_for(share: float) -> None:
    more = RANDOM.normal(size=WEIGHT.shape)
    found = fit(X @ (WEIGHT + more - ROUNDED).T, damping=1e-6, share=share)
    np.testing.assert_allclose(found, WEIGHT + share * more, atol=2e-3)


@pytest.mark.parametrize("damping", [0.3, 3.0])
def test_a_fit_is_the_damped_least_squares(damping: float) -> None:
    """That numpy finds for as many tokens more, whose squares are what damping adds and whose outputs lack nothing."""
    r = RANDOM.normal(size=(TOKENS, OUTPUTS)) + X @ RANDOM.normal(size=(INPUTS, OUTPUTS))
    hessian = X.T @ X / TOKENS
    added_I = np.diag(np.asarray(damped(jnp.asarray(hessian), 0.03 * damping), np.float64) - hessian)
    more = np.diag(np.sqrt(TOKENS * added_I))
    taken, wanted = (
        np.concatenate([X, more]),
        np.concatenate([r - X @ (WEIGHT - ROUNDED).T, np.zeros((INPUTS, OUTPUTS))]),
    )
    best, *_ = np.linalg.lstsq(taken, wanted)
    np.testing.assert_allclose(fit(r, damping), WEIGHT + best.T, atol=2e-3)
