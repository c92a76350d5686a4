from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest

from moejax.calibrate import BlockStatistics, Statistics
from moejax.formats import ExpertWeights, dense
from moejax.model import DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.sliced import sliced, with_experts
from moejax.model.steps import run_block
from moejax.pipeline.job import Prepared
from moejax.pipeline.variants import Variants
from moejax.pipeline.working_copy import dense_experts, dense_trunk, in_slots, one_bucket
from moejax.planning import BlockPlan
from moejax.transforms.compress_block import (
    compress_block,
    compressed_slice,
    only_survivors,
    rounded_leaves,
)
from moejax.transforms.rounder import AFRESH

# Of 512 tokens: rounding differs between two ways to compute the same, and may send a token to another expert.
MAY_DIFFER = 2
PLAN = BlockPlan(
    formats={"self_attn.q_b": "int4g128", "self_attn.v_b": "int3g128", "mlp.shared.up": "int2g128"},
    keep=(0, 3, 5, 6, 9, 10, 11),
    experts={
        "gate": ("int2g128", "int1g128", "int2g128", "int2g128", "int1g128", "int2g128", "int1g128"),
        "up": ("int3g128",) * 7,
        "down": ("keep", "int2g128", "keep", "keep", "keep", "int2g128", "keep"),
    },
    experts_per_token=2,
    routing_scale=1.25,
)


def assert_same_outputs(found: jax.Array, expected: jax.Array) -> None:
    """Token by token, but for those that may go to other experts."""
    error_T = np.max(np.abs(np.asarray(found - expected)), axis=-1).ravel()
    scale = float(np.std(np.asarray(expected)))
    assert np.sum(error_T > 1e-4 * scale) <= MAY_DIFFER, np.sort(error_T)[-10:]


@pytest.fixture(scope="module")
def run(prepared: Prepared, original: DeepseekV3) -> Callable[[Block], jax.Array]:
    """A block's output for what layer 2 takes in."""
    variants = Variants(original.config, prepared.trials.calibrated.held_out)
    variants.embedding(original.embed.get_value())
    for index in range(2):
        variants.block(index, sliced(original.layers[index]))
    return lambda block: run_block(block, variants.original, variants.by)


@pytest.fixture(scope="module")
def statistics(prepared: Prepared) -> Statistics:
    assert prepared.trials.statistics.known is not None
    return prepared.trials.statistics.known


def dense_copy(block: Block) -> Block:
    own = sliced(block)
    return with_experts(dense_trunk(own.trunk), dense_experts(own.experts_of(range(own.num_experts))))


def in_original_slots(block: Block, plan: BlockPlan, statistics: BlockStatistics) -> Block:
    """As tries have it, but with the plan's routing scale."""
    own = sliced(block)
    every = range(own.num_experts)
    experts = own.experts_of(every)
    compressed = compressed_slice(every, experts, plan, statistics, AFRESH, "")
    survivors = only_survivors(own, plan).trunk
    trunk = survivors.with_leaves(rounded_leaves(named_leaves(survivors), plan, statistics, AFRESH, ""))
    return with_experts(dense_trunk(trunk), in_slots(experts, 0, compressed))


def test_a_dense_copy_computes_the_same_and_is_dense(original: DeepseekV3, run: Callable[[Block], jax.Array]) -> None:
    block = original.layers[2]
    copy = dense_copy(block)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(named_leaves(copy))} == {"float32", "int32"}
    assert_same_outputs(run(copy), run(block))


@pytest.mark.parametrize("layer", [1, 2])
def test_survivors_in_their_original_slots_compute_what_the_compressed_block_does(
    original: DeepseekV3, statistics: Statistics, run: Callable[[Block], jax.Array], layer: int
) -> None:
    block = original.layers[layer]
    compressed = compress_block(sliced(block), PLAN, statistics.blocks[layer])
    masked = in_original_slots(block, PLAN, statistics.blocks[layer])
    shapes = {name: leaf.shape for name, leaf in named_leaves(block).items()}
    assert {name: leaf.shape for name, leaf in named_leaves(masked).items()} == shapes
    assert_same_outputs(run(masked), run(compressed))


def test_a_block_without_pruning_in_its_slots(original: DeepseekV3, statistics: Statistics) -> None:
    every = tuple(range(12))
    plan = replace(PLAN, keep=every, experts={"up": ("int3g128",) * 12}, experts_per_token=3, routing_scale=1.0)
    compressed = compress_block(sliced(original.layers[1]), plan, statistics.blocks[1])
    masked = in_original_slots(original.layers[1], plan, statistics.blocks[1])
    up = named_leaves(masked)["mlp.experts.up"]
    for e in every:
        expected = dense(named_leaves(compressed)["mlp.experts.up"].expert(e), np.dtype(np.float32))
        np.testing.assert_array_equal(up.expert(e), expected)
    np.testing.assert_array_equal(
        named_leaves(masked)["mlp.bias"], named_leaves(dense_copy(original.layers[1]))["mlp.bias"]
    )


def test_some_experts_in_their_slots(original: DeepseekV3) -> None:
    """Those from the fourth on: of five, two have survived."""
    five = sliced(original.layers[1]).experts_of(range(4, 9))
    survivors = {name: {5: leaf.expert(1), 8: leaf.expert(4)} for name, leaf in named_leaves(five).items()}
    for name, found in named_leaves(in_slots(five, 4, survivors)).items():
        assert [bool(np.any(found.expert(k))) for k in range(5)] == [False, True, False, False, True]
        np.testing.assert_array_equal(found.expert(4), dense(survivors[name][8], np.dtype(np.float32)))


def test_weights_are_replaced_by_name_and_the_rest_stays(original: DeepseekV3) -> None:
    for block in (dense_copy(original.layers[1]), dense_trunk(sliced(original.layers[1]).trunk)):
        o = 2 * named_leaves(block)["self_attn.o"]
        changed = named_leaves(block.with_leaves({"self_attn.o": o}, experts_per_token=1))
        assert changed.keys() == named_leaves(block).keys()
        for name, leaf in named_leaves(block).items():
            jax.tree.map(np.testing.assert_array_equal, changed[name], o if name == "self_attn.o" else leaf)
        assert block.with_leaves({}, experts_per_token=1).experts_per_token == 1


def test_one_bucket_has_every_expert_in_its_own_slot() -> None:
    experts = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    weights = one_bucket(jax.numpy.asarray(experts))
    assert isinstance(weights, ExpertWeights) and weights.num_experts == 4
    for e in range(4):
        np.testing.assert_array_equal(weights.expert(e), experts[e])
