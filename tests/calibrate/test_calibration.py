"""Calibration that follows compression, against plain calibration of the models that it comes by."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import BlockStatistics, Calibration, Statistics, calibrate
from moejax.checkpoint.shelf import shelf_beside
from moejax.formats import dense
from moejax.model import DeepseekV3, named_leaves
from moejax.model.hidden_states import Keep, as_it_is
from moejax.model.moe import Experts
from moejax.model.sliced import SlicedBlock, sliced, sliced_mtp
from seen_by_blocks import statistics_with_hessians
from small_models import CHUNKS, CONFIG, small_model

LAYERS = CONFIG.num_hidden_layers


def started(model: DeepseekV3, hessians: bool = True) -> Calibration:
    """Behind the model's embedding."""
    calibration = Calibration(CONFIG, CHUNKS, batch=2, hessians=hessians)
    calibration.embedding(model.embed.get_value())
    return calibration


def behind_all_layers(model: DeepseekV3, calibration: Calibration) -> Calibration:
    for i, layer in enumerate(model.layers):
        calibration.run(i, sliced(layer))
    calibration.norm(model.norm.get_value())
    return calibration


def assert_alike(found: Any, expected: Any) -> None:
    def alike(a: jax.Array, b: jax.Array) -> None:
        scale = float(np.max(np.abs(b))) if np.size(b) else 0.0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)

    jax.tree.map(alike, found, expected)


def test_behind_a_model_that_nothing_changed_everything_is_as_calibrated() -> None:
    expected, model = statistics_with_hessians(), small_model()
    following = started(model)
    for i, layer in enumerate(model.layers):
        assert_alike(following.observe(i, sliced(layer)), expected.blocks[i])
        following.run(i, sliced(layer))
    following.norm(model.norm.get_value())
    assert_alike(following.observe_mtp(0, sliced_mtp(model.mtp[0])), expected.blocks[LAYERS])
    assert_alike(following.head_inputs(), expected.head_inputs())


def test_without_hessians_there_are_none() -> None:
    following = started(small_model(), hessians=False)
    sums = following.observe(0, sliced(small_model().layers[0]))
    assert sums.products is None
    behind_all_layers(small_model(), following)
    assert following.head_inputs().hessian is None
    assert_alike(following.head_inputs().second_moment, statistics_with_hessians().head_inputs().second_moment)


@pytest.mark.parametrize("hessians", [False, True])
def test_a_few_batches_at_a_time_are_the_same_to_the_last_bit_and_each_time_read_the_experts(
    hessians: bool, tmp_path: Path
) -> None:
    """And so are those of which what is not at work lies on the disk."""
    model, asked = small_model(), list[int]()

    def block(layer: int) -> SlicedBlock:
        own = replace(sliced(model.layers[layer]), per_slice=5)

        def experts_of(members: Sequence[int]) -> Experts:
            asked.append(members[0])
            return own.experts_of(members)

        return replace(own, experts_of=experts_of)

    def through(within: int, kept: Keep) -> tuple[BlockStatistics, list[Any]]:
        calibration = Calibration(CONFIG, CHUNKS, batch=1, hessians=hessians, kept=kept, within=within)
        calibration.embedding(model.embed.get_value())
        calibration.run(0, sliced(model.layers[0]))
        asked.clear()
        return calibration.through(1, block(1)), calibration.states

    of_batch = 2 * 4 * CHUNKS.shape[1] * CONFIG.hidden_size
    expected = jax.tree.map(np.asarray, through(1 << 30, as_it_is))
    assert asked == [0, 5, 10]
    for batches, groups in ((1, len(CHUNKS)), (2, -(-len(CHUNKS) // 2))):
        with shelf_beside(tmp_path / "output", 0) as shelf:
            jax.tree.map(np.testing.assert_array_equal, through(batches * of_batch, shelf.put), expected)
        assert asked == [0, 5, 10] * groups and groups > 1


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
    following = started(changed)
    following.run(0, sliced(changed.layers[0]))
    sums = following.observe(1, sliced(small_model().layers[1]))
    assert_alike(sums, expected.blocks[1])
    assert not_alike(sums, statistics_with_hessians().blocks[1])


def test_the_mtp_block_sees_the_changed_embedding_too(rougher: tuple[DeepseekV3, Statistics]) -> None:
    changed, expected = rougher
    following = behind_all_layers(changed, started(changed))
    assert_alike(following.observe_mtp(0, sliced_mtp(small_model().mtp[0])), expected.blocks[LAYERS])


def not_alike(found: BlockStatistics, other: BlockStatistics) -> bool:
    return not np.allclose(found.input2["self_attn.o"], other.input2["self_attn.o"], rtol=1e-3)
