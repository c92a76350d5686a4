import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.model import named_leaves
from moejax.model.moe import MoE, Routing
from moejax.transforms.experts_per_token import adjust, fit_routing_scale, paper_rule
from small_models import CONFIG, small_model

X_TD = np.random.RandomState(0).randn(50, CONFIG.hidden_size).astype(np.float32)


@jax.jit
def routed(moe: MoE, x_TD: jax.Array) -> tuple[jax.Array, Routing]:
    assert moe.experts is not None
    routing = moe.route(x_TD)
    return moe.experts(x_TD, routing)[0], routing


def moe_layer() -> MoE:
    mlp = small_model().layers[1].mlp
    assert isinstance(mlp, MoE) and mlp.experts_per_token == 3
    return mlp


@pytest.mark.parametrize(
    ("experts_per_token", "share_kept", "expected"),
    [(8, 0.75, 6), (8, 1.0, 8), (8, 0.7, 6), (8, 0.68, 5), (4, 0.1, 1), (1, 0.01, 1), (6, 0.5, 3)],
)
def test_the_paper_scales_k_with_the_share_kept(experts_per_token: int, share_kept: float, expected: int) -> None:
    assert paper_rule(experts_per_token, share_kept) == expected


@given(st.integers(1, 64), st.floats(0, 1))
def test_the_paper_s_k_is_at_least_one_and_never_grows(experts_per_token: int, share_kept: float) -> None:
    fewer = paper_rule(experts_per_token, share_kept)
    assert 1 <= fewer <= experts_per_token
    assert fewer == 1 or abs(fewer - share_kept * experts_per_token) <= 0.5


def test_adjusting_changes_k_and_the_scale_only() -> None:
    moe = moe_layer()
    fewer = adjust(moe, 2, 1.5)
    assert (moe.experts_per_token, fewer.experts_per_token) == (3, 2)
    before, after = named_leaves(moe), named_leaves(fewer)
    assert before.pop("routing_scale") == 1.0 and after.pop("routing_scale") == 1.5
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert adjust(fewer, 2, 2.0).routing_scale.get_value() == 3.0
    assert adjust(moe, 3).routing_scale.get_value() == 1.0


def test_a_token_goes_to_the_first_of_its_experts_and_their_weights_add_up_to_the_scale() -> None:
    _, full = routed(moe_layer(), X_TD)
    _, fewer = routed(adjust(moe_layer(), 2, 1.5), X_TD)
    np.testing.assert_array_equal(fewer.experts_TK, full.experts_TK[:, :2])
    np.testing.assert_allclose(jnp.sum(full.weights_TK, axis=1), CONFIG.routed_scaling_factor, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(fewer.weights_TK, axis=1), 1.5 * CONFIG.routed_scaling_factor, rtol=1e-6)


@pytest.mark.parametrize("scale_so_far", [1.0, 0.25])
def test_the_fitted_scale_is_that_of_least_squares(scale_so_far: float) -> None:
    full, fewer = moe_layer(), adjust(moe_layer(), 2, scale_so_far)
    y, y_fewer = (np.asarray(routed(moe, X_TD)[0], np.float64).reshape(-1) for moe in (full, fewer))
    expected = np.linalg.lstsq(y_fewer[:, None], y)[0][0]
    fitted = fit_routing_scale(*(routed(moe, X_TD)[0] for moe in (full, fewer)))
    assert fitted.shape == ()
    assert fitted == pytest.approx(expected, rel=1e-5)
    assert abs(fitted * scale_so_far - 1) > 1e-3, "fewer experts should need another scale"


def test_a_layer_fits_itself_and_silence_fits_anything() -> None:
    moe = moe_layer()
    y_TD, silence_TD = (routed(own, X_TD)[0] for own in (moe, adjust(moe, 3, 0.0)))
    assert fit_routing_scale(y_TD, y_TD) == pytest.approx(1.0, rel=1e-6)
    assert fit_routing_scale(y_TD, silence_TD) == 0.0
