"""Rounding by what calibration collected: with error feedback where there are Hessians, by second moments where not."""

import jax

from moejax.calibrate import Inputs
from moejax.formats import GroupedCodes, GroupFormat
from moejax.transforms.error_feedback import damping_for, quantize_with_feedback
from moejax.transforms.quantize import quantize


def round_weight(weight: jax.Array, inputs: Inputs, to: GroupFormat) -> GroupedCodes:
    """A weight (..., O, I) in a format, by `quantize_with_feedback` or `quantize`. Raises InputError as they do."""
    if inputs.hessian is None:
        return quantize(weight, inputs.second_moment, to)
    return quantize_with_feedback(weight, inputs.hessian, to, damping_for(inputs.tokens, weight.shape[-1]))
