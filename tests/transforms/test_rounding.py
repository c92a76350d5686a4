import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import Inputs
from moejax.formats import IntFormat, parse_format
from moejax.transforms.error_feedback import quantize_with_feedback
from moejax.transforms.hessian import damping_for
from moejax.transforms.rounding import round_weight, rounding_error, rounding_errors, to_float32

SHAPE = (2, 5, 64)


def problem(correlated: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, Inputs]:
    """A weight, the Hessian of its input in float64, output weights, and what calibration would say."""
    random = np.random.RandomState(0)
    x_TI = random.normal(size=(200, SHAPE[-1])) @ random.normal(size=(SHAPE[-1], SHAPE[-1]))
    hessian = x_TI.T @ x_TI / len(x_TI)
    if not correlated:
        hessian = np.diag(np.diagonal(hessian))
    inputs = Inputs(
        jnp.asarray(np.diagonal(hessian), jnp.float32), jnp.asarray(hessian, jnp.float32) if correlated else None, 200.0
    )
    return random.normal(size=SHAPE), hessian, random.uniform(1, 2, size=SHAPE[:-1]), inputs


@pytest.mark.parametrize("correlated", [False, True])
def test_the_error_is_that_of_the_outputs(correlated: bool) -> None:
    weight, hessian, output_weight, inputs = problem(correlated)
    leaf = jnp.asarray(weight, jnp.float32)
    rounded = to_float32(round_weight(leaf, inputs, IntFormat(2, 32)))
    difference = weight - np.asarray(rounded, np.float64)
    expected = np.einsum("hoi,ij,hoj,ho->", difference, hessian, difference, output_weight)
    found = rounding_error(leaf, rounded, inputs, jnp.asarray(output_weight, jnp.float32))
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_no_change_is_no_error() -> None:
    weight, _, output_weight, inputs = problem(correlated=True)
    leaf = jnp.asarray(weight, jnp.float32)
    assert float(rounding_error(leaf, leaf, inputs, jnp.asarray(output_weight, jnp.float32))) == 0


def test_with_a_hessian_errors_are_fed_back() -> None:
    weight, _, output_weight, inputs = problem(correlated=True)
    leaf, ones = jnp.asarray(weight, jnp.float32), jnp.asarray(output_weight, jnp.float32)
    fed_back, alone = (
        rounding_error(leaf, to_float32(round_weight(leaf, own, IntFormat(2, 32))), inputs, ones)
        for own in (inputs, inputs._replace(hessian=None))
    )
    assert fed_back < 0.8 * alone


def test_damping_is_the_usual_one_times_the_inputs_own() -> None:
    weight, _, _, inputs = problem(correlated=True)
    leaf, to = jnp.asarray(weight, jnp.float32), IntFormat(2, 32)
    assert inputs.hessian is not None
    expected = quantize_with_feedback(leaf, inputs.hessian, to, 0.1 * damping_for(200.0, SHAPE[-1]))
    found = round_weight(leaf, inputs._replace(damping=0.1), to)
    assert np.array_equal(to_float32(found), to_float32(expected))
    assert not np.array_equal(to_float32(found), to_float32(round_weight(leaf, inputs, to)))


@pytest.mark.parametrize("correlated", [False, True])
def test_errors_in_many_formats_are_those_in_each(correlated: bool) -> None:
    weight, _, output_weight, inputs = problem(correlated)
    leaf, counts = jnp.asarray(weight[0], jnp.float32), jnp.asarray(output_weight[0], jnp.float32)
    formats = [parse_format(name) for name in ("int2g32", "int3g64e8", "ternaryg32", "int4g32", "int2g64e8")]
    each = [rounding_error(leaf, to_float32(round_weight(leaf, inputs, own)), inputs, counts) for own in formats]
    assert rounding_errors(leaf, inputs, formats, counts) == pytest.approx(np.asarray(each), rel=1e-4)


def test_a_shorter_last_group_has_its_error_too() -> None:
    weight, _, _, inputs = problem(correlated=True)
    leaf, counts, to = jnp.asarray(weight[0], jnp.float32), jnp.ones(SHAPE[1]), IntFormat(2, 128)
    expected = rounding_error(leaf, to_float32(round_weight(leaf, inputs, to)), inputs, counts)
    assert rounding_errors(leaf, inputs, [to], counts) == pytest.approx(np.asarray([expected]), rel=1e-4)
