"""Rounding by what calibration collected: with error feedback where there are Hessians, by second moments where not."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import Inputs
from moejax.formats import GroupedCodes, GroupFormat, dense
from moejax.kernels import product
from moejax.transforms.error_feedback import quantize_with_feedback, quantized_with_feedback
from moejax.transforms.hessian import damping_for
from moejax.transforms.quantize import quantization_errors, quantize


def round_weight(weight: jax.Array, inputs: Inputs, to: GroupFormat) -> GroupedCodes:
    """A weight (..., O, I) in a format, by `quantize_with_feedback` or `quantize`. Raises InputError as they do.

    Weights of one shape with inputs of their own are rounded together, in half the time, by `jax.vmap`.
    """
    if inputs.hessian is None:
        return quantize(weight, inputs.second_moment, to)
    damping = inputs.damping * damping_for(inputs.tokens, weight.shape[-1])
    return quantize_with_feedback(weight, inputs.hessian, to, damping)


@jax.jit
def rounding_error(weight: jax.Array, rounded: jax.Array, inputs: Inputs, output_weight: jax.Array) -> jax.Array:
    """sum_o r_o E[(d_o x)^2], d = weight - rounded (..., O, I): the expected squared error of the outputs, each
    weighted by r = `output_weight` (..., O). Inputs without a Hessian are taken as uncorrelated.

    Both in float32, whatever their formats, so that it compiles once per shape.
    """
    error_OI = (weight - rounded).reshape(-1, weight.shape[-1])
    if inputs.hessian is None:
        error_O = product("oi,i->o", error_OI**2, inputs.second_moment.astype(jnp.float32))
    else:
        passed_OI = product("oi,ij->oj", error_OI, inputs.hessian.astype(jnp.float32))
        error_O = jnp.maximum(jnp.sum(error_OI * passed_OI, axis=1), 0)  # a sum of squares, but for rounding
    return product("o,o->", error_O, output_weight.astype(jnp.float32).reshape(-1))


def rounding_errors(
    weight: jax.Array, inputs: Inputs, formats: Sequence[GroupFormat], output_weight: jax.Array
) -> np.ndarray:
    """About the `rounding_error` of what `round_weight` makes of a weight (O, I) in each of F formats, (F,): without a
    Hessian, inputs never seen count a little (`positive`). Formats that differ in their levels alone are rounded to
    together."""
    errors_F = np.zeros(len(formats))
    for group_size, kind in {(own.group_size, own.scale_kind) for own in formats}:
        chosen = [f for f, own in enumerate(formats) if (own.group_size, own.scale_kind) == (group_size, kind)]
        levels_F = jnp.asarray([formats[f].levels for f in chosen], jnp.float32)
        if inputs.hessian is None:
            moment = inputs.second_moment
            errors_F[chosen] = quantization_errors(weight, moment, output_weight, levels_F, group_size, kind)
        else:
            damping = inputs.damping * damping_for(inputs.tokens, weight.shape[-1])
            rounded = quantized_with_feedback(weight, inputs.hessian, levels_F, group_size, damping, kind)
            errors_F[chosen] = [rounding_error(weight, own, inputs, output_weight) for own in rounded]
    return errors_F


to_float32 = jax.jit(partial(dense, dtype=jnp.float32))
