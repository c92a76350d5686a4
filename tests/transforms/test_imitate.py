import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.formats import parse_format
from moejax.transforms.imitate import _imitate, energy_by_output, imitate

# Max, "Quantizing for Minimum Distortion" (1960), table II: the mean squared error of a normal variable on so many even
# levels.
DISTORTIONS = {"int1g128": 0.3634, "ternaryg128": 0.1902, "int2g128": 0.1188, "int3g128": 0.03744, "int4g128": 0.01154}
FORMATS = [*DISTORTIONS, "int5g64", "int6g32", "int7g128", "int8g256e8"]


def weight(outputs: int = 64, inputs: int = 512, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (outputs, inputs))


def moment(inputs: int = 512) -> jax.Array:
    return jnp.exp(jax.random.normal(jax.random.key(9), (inputs,)))


def test_the_energy_is_the_expected_square_of_outputs() -> None:
    w_OI, h_I = weight(), moment()
    expected = np.asarray(w_OI, np.float64) ** 2 @ np.asarray(h_I, np.float64)
    np.testing.assert_allclose(energy_by_output(w_OI, h_I), expected, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.01])
def test_the_error_is_that_share_of_the_energy(name: str, share: float) -> None:
    w_OI, h_I = weight(), moment()
    imitated = imitate(w_OI, h_I, parse_format(name), share)
    error, energy = (jnp.sum(energy_by_output(own, h_I)) for own in (imitated - w_OI, w_OI))
    assert float(error / energy) == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_with_its_own_error_a_normal_weight_lies_on_the_format_s_levels(name: str) -> None:
    """The error known of normal variables needs no change, so values lie near the levels, and shrink by as much."""
    to, w_OI = parse_format(name), weight(outputs=256)
    imitated = imitate(w_OI, jnp.ones(512), to, DISTORTIONS[name])
    scale = jnp.sqrt(jnp.mean(w_OI.reshape(256, 4, 128) ** 2, axis=-1))
    shares = np.asarray(imitated.reshape(256, 4, 128) / scale[..., None]).reshape(-1)
    near = np.unique(np.quantile(shares, np.linspace(0.02, 0.98, 50)).round(1))
    assert len(near) <= 2 * round(2**to.bits)
    assert np.mean(shares**2) == pytest.approx(1 - DISTORTIONS[name], abs=0.01)


@given(st.integers(1, 3), st.integers(1, 300), st.sampled_from(FORMATS))
def test_any_shape(outer: int, inputs: int, name: str) -> None:
    w_EOI = jax.random.normal(jax.random.key(inputs), (outer, 2, inputs))
    imitated = imitate(w_EOI, jnp.ones(inputs), parse_format(name), 0.1)
    assert imitated.shape == w_EOI.shape and bool(jnp.all(jnp.isfinite(imitated)))


def test_nothing_becomes_of_zeros_nor_of_no_error() -> None:
    zeros, w_OI, to = jnp.zeros((4, 256)), weight(4, 256), parse_format("int2g128")
    np.testing.assert_array_equal(imitate(zeros, jnp.ones(256), to, 0.1), zeros)
    np.testing.assert_array_equal(imitate(w_OI, jnp.ones(256), to, 0.0), w_OI)


def test_it_compiles_once_for_all_formats() -> None:
    w_OI = weight(32, 384)
    before = _imitate._cache_size()  # type: ignore[attr-defined]
    for name in DISTORTIONS:
        imitate(w_OI, jnp.ones(384), parse_format(name), 0.1)
    assert _imitate._cache_size() - before == 1  # type: ignore[attr-defined]
