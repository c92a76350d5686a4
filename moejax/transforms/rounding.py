"""Rounding by what calibration collected, and its error: what each family of formats does, by the format's kind."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import Inputs
from moejax.formats import Format, GroupedCodes, GroupFormat, Levels, PackedTensor, dense
from moejax.kernels import product
from moejax.transforms.error_feedback import quantize_with_feedback, quantized_with_feedback
from moejax.transforms.hessian import damping_for
from moejax.transforms.quantize import quantization_errors, quantize
from moejax.transforms.row_feedback import quantize_with_row_feedback


class Rounding(Protocol):
    """How weights come to the formats of a family."""

    def round(self, weight: jax.Array, inputs: Inputs, to: Any) -> PackedTensor:
        """A weight (..., O, I) in one of them; weights of one shape with inputs of their own may be batched by
        `jax.vmap`."""
        ...

    def errors(
        self, weight: jax.Array, inputs: Inputs, formats: Sequence[Any], output_weight: jax.Array
    ) -> Sequence[jax.Array]:
        """About the `rounding_error` of a weight (O, I) in each of some of them."""
        ...


class EvenLevels:
    """Even levels in groups: with error feedback where there are Hessians, by second moments where not."""

    def round(self, weight: jax.Array, inputs: Inputs, to: GroupFormat) -> GroupedCodes:
        if inputs.hessian is None:
            return quantize(weight, inputs.second_moment, to)
        damping = inputs.damping * damping_for(inputs.tokens, weight.shape[-1])
        if inputs.output_hessian is None:
            return quantize_with_feedback(weight, inputs.hessian, to, damping)
        return quantize_with_row_feedback(weight, inputs.hessian, inputs.output_hessian, to, damping)

    def errors(
        self, weight: jax.Array, inputs: Inputs, formats: Sequence[GroupFormat], output_weight: jax.Array
    ) -> list[jax.Array]:
        """Formats that differ in their levels alone are rounded to together; without a Hessian, inputs never seen count
        a little (`positive`)."""
        found: dict[GroupFormat, jax.Array] = {}
        for group_size, kind in {(own.group_size, own.scale_kind) for own in formats}:
            chosen = [own for own in formats if (own.group_size, own.scale_kind) == (group_size, kind)]
            each = zip(*(own.levels for own in chosen), strict=True)
            levels_F = Levels(*(jnp.asarray(own, jnp.float32) for own in each))
            if inputs.hessian is None:
                moment = inputs.second_moment
                errors_F = list(quantization_errors(weight, moment, output_weight, levels_F, group_size, kind))
            else:
                damping = inputs.damping * damping_for(inputs.tokens, weight.shape[-1])
                rounded = quantized_with_feedback(weight, inputs.hessian, levels_F, group_size, damping, kind)
                errors_F = [rounding_error(weight, own, inputs, output_weight) for own in rounded]
            found |= dict(zip(chosen, errors_F, strict=True))
        return [found[own] for own in formats]


# A format is of the first of these kinds.
ROUNDINGS: Sequence[tuple[type, Rounding]] = ((GroupFormat, EvenLevels()),)


def round_weight(weight: jax.Array, inputs: Inputs, to: Format) -> PackedTensor:
    """A weight (..., O, I) in a format. Raises InputError as `quantize_with_feedback` does.

    Weights of one shape with inputs of their own are rounded together, in half the time, by `jax.vmap`.
    """
    return _rounding_of(to).round(weight, inputs, to)


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
    weight: jax.Array, inputs: Inputs, formats: Sequence[Format], output_weight: jax.Array
) -> np.ndarray:
    """About the `rounding_error` of what `round_weight` makes of a weight (O, I) in each of F formats, (F,)."""
    errors_F = np.zeros(len(formats))
    for rounding in dict.fromkeys(map(_rounding_of, formats)):
        chosen = [f for f, own in enumerate(formats) if _rounding_of(own) is rounding]
        errors_F[chosen] = rounding.errors(weight, inputs, [formats[f] for f in chosen], output_weight)
    return errors_F


def _rounding_of(to: Format) -> Rounding:
    return next(own for kind, own in ROUNDINGS if isinstance(to, kind))


to_float32 = jax.jit(partial(dense, dtype=jnp.float32))
