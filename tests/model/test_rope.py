import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_cases import BASE, YARN
from moejax.model.config import Config, config_from_hf
from moejax.model.rope import Angles, angles, frequencies, turn

R = 16
PLAIN = config_from_hf(BASE | {"rope_scaling": None, "qk_rope_head_dim": R, "rope_theta": 500.0})
STRETCHED = config_from_hf(BASE | {"qk_rope_head_dim": R})
LOG_4 = np.log(4)
DEEPSEEK_YARN = YARN | {"factor": 40, "original_max_position_embeddings": 4096}


def vectors(seed: int, count: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).randn(count, R))


def rotated(x: jax.Array, position: int, config: Config) -> jax.Array:
    return turn(x, angles(config, jnp.asarray([position]), x.dtype), config.rope_interleave)


def test_plain_frequencies_are_a_geometric_series_from_1() -> None:
    plain = frequencies(PLAIN)
    assert plain.shape == (R // 2,) and plain[0] == 1
    np.testing.assert_allclose(plain[1:] / plain[:-1], 500.0 ** (-2 / R), rtol=1e-14)


def test_yarn_keeps_fast_turns_and_stretches_slow_ones_by_its_factor() -> None:
    config = config_from_hf(BASE | {"qk_rope_head_dim": 64, "rope_scaling": DEEPSEEK_YARN})
    plain = 10000.0 ** (-np.arange(32) / 32)
    stretch = plain / frequencies(config)
    # Within the original 4096 positions, dims up to 10 turn 32 times and more, dims from 23 on less than once.
    turns = 4096 * plain / (2 * np.pi)
    assert turns[10] > 32 > turns[11] and turns[22] > 1 > turns[23]
    np.testing.assert_allclose(stretch[:11], 1, rtol=1e-14)
    np.testing.assert_allclose(stretch[23:], 40, rtol=1e-14)
    assert np.all(np.diff(stretch[10:24]) > 0)
    np.testing.assert_allclose(np.diff(1 / stretch[10:24]), -(1 - 1 / 40) / 13, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "scale"),
    [(1, 1, 1), (0.5, 1.5, (0.05 * LOG_4 + 1) / (0.15 * LOG_4 + 1)), (0.5, None, 0.1 * LOG_4 + 1)],
)
def test_yarn_scales_cos_and_sin(mscale: float, mscale_all_dim: float | None, scale: float) -> None:
    yarn = YARN | {"factor": 4, "mscale": mscale, "mscale_all_dim": mscale_all_dim}
    by = angles(config_from_hf(BASE | {"rope_scaling": yarn}), jnp.arange(50), jnp.dtype(jnp.float64))
    np.testing.assert_allclose(by.cos**2 + by.sin**2, scale**2, rtol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("interleave", [True, False])
def test_each_pair_turns_as_a_complex_number(interleave: bool) -> None:
    x = vectors(0, 5)
    pairs = x.reshape(5, R // 2, 2) if interleave else jnp.stack(jnp.split(x, 2, axis=-1), axis=-1)
    angle_J = 3 * 500.0 ** (-np.arange(0, R, 2) / R)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle_J)
    y = turn(x, angles(PLAIN, jnp.asarray([3]), x.dtype), interleave)
    np.testing.assert_allclose(y, jnp.concatenate([turned.real, turned.imag], axis=-1), atol=1e-14)


@pytest.mark.usefixtures("x64")
@given(st.integers(0, 2**16), st.integers(0, 100_000))
def test_rotation_preserves_norms(seed: int, position: int) -> None:
    x = vectors(seed, 4)
    for config in (PLAIN, STRETCHED):
        norms = jnp.linalg.norm(rotated(x, position, config), axis=-1)
        np.testing.assert_allclose(norms, jnp.linalg.norm(x, axis=-1), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@given(st.integers(0, 2**16), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_inner_products_depend_on_the_distance_alone(seed: int, i: int, j: int, shift: int) -> None:
    x, y = vectors(seed, 2)
    for config in (PLAIN, STRETCHED):
        here = rotated(x, i, config) @ rotated(y, j, config).T
        there = rotated(x, i + shift, config) @ rotated(y, j + shift, config).T
        np.testing.assert_allclose(here, there, atol=1e-10)


@pytest.mark.usefixtures("x64")
@given(st.integers(0, 2**16))
def test_neighbours_and_halves_agree_up_to_the_order_of_dims(seed: int) -> None:
    x = vectors(seed, 4)
    by = angles(PLAIN, jnp.arange(4), x.dtype)
    first_parts_first = jnp.concatenate([x[:, 0::2], x[:, 1::2]], axis=-1)
    np.testing.assert_array_equal(turn(x, by, interleave=True), turn(first_parts_first, by, interleave=False))


def test_a_rotation_broadcasts_over_heads_and_keeps_the_inputs_dtype() -> None:
    x = jnp.ones((2, 3, 4, R), jnp.bfloat16)
    by = angles(PLAIN, jnp.arange(3), jnp.dtype(jnp.float32))
    y = turn(x, Angles(by.cos[:, None], by.sin[:, None]), interleave=True)
    assert y.shape == x.shape and y.dtype == x.dtype and by.cos.dtype == jnp.float32
