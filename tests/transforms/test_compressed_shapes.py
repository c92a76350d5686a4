"""The shapes of what a plan makes of a model are those that a trace of `compress` finds."""

import dataclasses
from functools import partial

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.errors import InputError
from moejax.formats import ExpertWeights
from moejax.model import named_leaves
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.planning.plan import PROJECTIONS
from moejax.transforms.compress import compress
from moejax.transforms.compressed_shapes import compressed_shapes
from small_models import CONFIG, small_model, small_statistics

FORMATS = (KEEP, "int2g32", "int3g64e8", "ternaryg128")
MODEL = jax.eval_shape(lambda model: model, small_model())
MATRICES = [
    [name for name in own.input2 if index == CONFIG.num_hidden_layers or name != "eh_proj"]
    for index, own in enumerate(small_statistics().blocks)
]


@st.composite
def block_plans(draw: st.DrawFn, index: int) -> BlockPlan:
    some = draw(st.lists(st.sampled_from(MATRICES[index]), max_size=3, unique=True))
    plan = BlockPlan({name: draw(st.sampled_from(FORMATS)) for name in some})
    if not CONFIG.is_moe(index) or draw(st.booleans()):
        return plan
    size = CONFIG.n_routed_experts // CONFIG.n_group
    groups = [draw(st.sets(st.integers(g * size, (g + 1) * size - 1), min_size=3)) for g in range(CONFIG.n_group)]
    keep = tuple(sorted(set().union(*groups)))
    each = st.lists(st.sampled_from(FORMATS), min_size=len(keep), max_size=len(keep)).map(tuple)
    experts = {name: draw(each) for name in draw(st.sampled_from([PROJECTIONS, PROJECTIONS[:1]]))}
    return dataclasses.replace(plan, keep=keep, experts=experts, experts_per_token=draw(st.sampled_from([None, 1, 2])))


@settings(max_examples=6, deadline=None)
@given(st.tuples(*(block_plans(i) for i in range(CONFIG.num_blocks))), *[st.sampled_from(FORMATS)] * 2)
def test_they_are_those_of_a_trace(blocks: tuple[BlockPlan, ...], embed: str, head: str) -> None:
    plan = Plan(embed, head, blocks)
    traced = jax.eval_shape(partial(compress, plan=plan), MODEL, statistics=small_statistics())
    found = compressed_shapes(MODEL, plan)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, traced)


def test_what_is_kept_may_be_concrete() -> None:
    """Then it is its own shape; experts lie where `compress` puts them."""
    keep = (0, 1, 2, 4, 5, 7, 8, 9, 11)
    experts = {"down": ("int2g32", KEEP, "ternaryg128") * 3}
    plan = Plan(KEEP, KEEP, (BlockPlan(), BlockPlan(keep=keep, experts=experts), BlockPlan(), BlockPlan()))
    down = named_leaves(compressed_shapes(small_model(), plan))["layers.1.mlp.experts.down"]
    assert isinstance(down, ExpertWeights)
    assert [bucket.shape for bucket in down.buckets] == [(3, *down.shape[1:])] * 3
    assert np.asarray(down.shape)[0] == len(keep)


def test_a_plan_that_does_not_suit_the_model_is_refused() -> None:
    blocks = (BlockPlan({"self_attn.o": "int9g32"}), *[BlockPlan()] * 3)
    with pytest.raises(InputError, match="unknown format 'int9g32'"):
        compressed_shapes(MODEL, Plan(KEEP, KEEP, blocks))
