"""Weights whose outputs are hidden states (`o`, every `down`) fitted, before they are rounded once more, to what makes
attention's and the block's outputs the original's: so they make up for what rounding and pruning spoiled before them.

In a compressed block let r be what a token's outputs lack of the original's, and x what a weight W takes that was
rounded to Q: with W + D in its place, outputs lack r - (W + D - Q) x, least where

    D = (E[r x^T] - (W - Q) E[x x^T]) H^-1,    H = E[x x^T], damped

and W + D is what is rounded. That r is of the original's own states, and x of those that the compressed model has, is
asymmetric calibration as in GPTAQ (arXiv:2504.02692), which fits every matrix to its own outputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.calibrate import Inputs
from moejax.kernels import product
from moejax.transforms.hessian import damped, damping_for, factor


class Lacking(NamedTuple):
    """x x^T (I, I) and r x^T (O, I), sums or means over tokens, of a weight's inputs x and of what outputs lack, r."""

    products_II: jax.Array
    lacking_OI: jax.Array


def lacking(x: jax.Array, r: jax.Array) -> Lacking:
    """Sums over all but the last axis of x (..., I) and r (..., O), in float32."""
    x_TI, r_TO = (own.reshape(-1, own.shape[-1]).astype(jnp.float32) for own in (x, r))
    return Lacking(product("ti,tj->ij", x_TI, x_TI), product("to,ti->oi", r_TO, x_TI))


@jax.jit
def fitted(
    weight: jax.Array, rounded: jax.Array, means: Lacking, inputs: Inputs, share: jax.Array | float = 1.0
) -> jax.Array:
    """W + share * D of a weight W (O, I) that is Q, `rounded`, so far, in float32. `inputs` has H, which may know of
    more tokens than `means`, and how it is damped. share: what of the outputs' lack is this weight's to make up for."""
    assert inputs.hessian is not None, "a fit asks for Hessians"
    weight_OI, rounded_OI = weight.astype(jnp.float32), rounded.astype(jnp.float32)
    own_OI = means.lacking_OI - product("oi,ij->oj", weight_OI - rounded_OI, means.products_II)
    damping = inputs.damping * damping_for(inputs.tokens, weight_OI.shape[-1])
    upper_II = factor(damped(inputs.hessian, damping))
    return weight_OI + share * jax.scipy.linalg.cho_solve((upper_II, False), own_OI.T).T
