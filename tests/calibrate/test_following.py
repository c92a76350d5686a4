"""Calibration that follows compression, against plain calibration of the models that it comes by."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import BlockStatistics, Following, Statistics, calibrate
from moejax.formats import dense
from moejax.model import DeepseekV3, named_leaves
from seen_by_blocks import statistics_with_hessians
from small_models import CHUNKS, CONFIG, small_model

LAYERS = CONFIG.num_hidden_layers


def started(hessians: bool = True) -> Following:
    model = small_model()
    return Following.of(model, CHUNKS, batch=2, hessians=hessians).behind_embedding(model.embed.get_value())


def behind_all_layers(following: Following) -> Following:
    for layer in small_model().layers:
        following = following.behind_block(layer)
    return following


def assert_alike(found: Any, expected: Any) -> None:
    def alike(a: jax.Array, b: jax.Array) -> None:
        scale = float(np.max(np.abs(b))) if np.size(b) else 0.0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)

    jax.tree.map(alike, found, expected)


def test_behind_a_model_that_nothing_changed_everything_is_as_calibrated() -> None:
    expected, following, model = statistics_with_hessians(), started(), small_model()
    for layer, sums in zip(model.layers, expected.blocks, strict=False):
        assert_alike(following.block_statistics(layer), sums)
        following = following.behind_block(layer)
    assert_alike(following.mtp_statistics(0, model.mtp[0].block), expected.blocks[LAYERS])
    assert_alike(following.head_inputs(), expected.head_inputs())


def test_without_hessians_there_are_none() -> None:
    following = started(hessians=False)
    sums = following.block_statistics(small_model().layers[0])
    assert sums.products is None
    following = behind_all_layers(following)
    assert following.head_inputs().hessian is None
    assert_alike(following.head_inputs().second_moment, statistics_with_hessians().head_inputs().second_moment)


@pytest.fixture(scope="module")
def rougher() -> tuple[DeepseekV3, Statistics]:
    """The small model with another embedding and another first layer, and its own calibration."""
    model = small_model()
    leaves = named_leaves(model)
    leaves["embed"] = jnp.round(dense(leaves["embed"], jnp.float32), 1)
    for name in ("layers.0.mlp.down", "layers.0.self_attn.o"):
        leaves[name] = jnp.round(dense(leaves[name], jnp.float32), 1)
    changed = DeepseekV3(CONFIG, leaves.__getitem__)
    return changed, calibrate(changed, CHUNKS, batch=2, hessians=True)


def test_a_block_sees_what_the_changed_parts_before_it_put_out(rougher: tuple[DeepseekV3, Statistics]) -> None:
    changed, expected = rougher
    following = Following.of(small_model(), CHUNKS, batch=2, hessians=True)
    following = following.behind_embedding(changed.embed.get_value()).behind_block(changed.layers[0])
    sums = following.block_statistics(small_model().layers[1])
    assert_alike(sums, expected.blocks[1])
    assert not_alike(sums, statistics_with_hessians().blocks[1])


def test_the_mtp_block_sees_the_changed_embedding_too(rougher: tuple[DeepseekV3, Statistics]) -> None:
    changed, expected = rougher
    following = Following.of(small_model(), CHUNKS, batch=2, hessians=True)
    following = following.behind_embedding(changed.embed.get_value())
    for layer in changed.layers:
        following = following.behind_block(layer)
    assert_alike(following.mtp_statistics(0, small_model().mtp[0].block), expected.blocks[LAYERS])


def not_alike(found: BlockStatistics, other: BlockStatistics) -> bool:
    return not np.allclose(found.input2["self_attn.o"], other.input2["self_attn.o"], rtol=1e-3)
