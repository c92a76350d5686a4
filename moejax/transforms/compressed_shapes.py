"""What a plan makes of a model in shapes alone, so that its bytes are known without a trace of how it is rounded."""

from collections.abc import Sequence

import jax
import numpy as np

from moejax.formats import ExpertWeights, Leaf, format_name, parse_format
from moejax.formats.arrays import abstract_array
from moejax.model import DeepseekV3, named_leaves
from moejax.model.leaves import Weight
from moejax.model.weights import IN_BLOCK, block_and_name
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.transforms.check_plan import check_plan


def compressed_shapes(model: DeepseekV3, plan: Plan) -> DeepseekV3:
    """`jax.eval_shape` of `compress(model, plan, ...)`, for a model that is in shapes alone.

    Raises InputError as `compress` does.
    """
    check_plan(plan, model.config)
    blocks = [*model.layers, *(mtp.block for mtp in model.mtp)]
    outer, leaves = {"embed": plan.embed, "head": plan.head}, named_leaves(model)
    for name, leaf in leaves.items():
        index, own = block_and_name(name, len(model.layers))
        leaves[name] = _in_format(leaf, outer.get(name, KEEP)) if index is None else _of(leaf, own, plan.blocks[index])
    per_token = [
        own.experts_per_token or block.experts_per_token for own, block in zip(plan.blocks, blocks, strict=True)
    ]
    return DeepseekV3(model.config, leaves.__getitem__, per_token)


def _of(leaf: Weight, name: str, plan: BlockPlan) -> Weight:
    """What a block's plan makes of its weight `name`."""
    if plan.keep is not None and isinstance(leaf, ExpertWeights):
        return _experts(leaf, plan.experts.get(name.rpartition(".")[2], (KEEP,) * len(plan.keep)))
    if plan.keep is not None and IN_BLOCK[name].is_per_expert:
        leaf = _first(leaf, len(plan.keep))
    return _in_format(leaf, plan.formats.get(name, KEEP))


def _in_format(leaf: Leaf, target: str) -> Leaf:
    return leaf if target == KEEP else parse_format(target).abstract(leaf.shape)


def _experts(weights: ExpertWeights, formats: Sequence[str]) -> ExpertWeights:
    """Survivors of one format lie in one bucket, in order of the formats' names."""
    (bucket,), slots = weights.buckets, abstract_array((len(formats),), np.int32)
    names = np.asarray([format_name(bucket) if target == KEEP else target for target in formats])
    buckets = []
    for name in np.unique(names):
        members = np.flatnonzero(names == name)
        kept = _first(bucket, len(members))
        buckets.append(_in_format(kept, formats[members[0]]))
    return ExpertWeights(tuple(buckets), slots, slots)


def _first(leaf: Leaf, count: int) -> Leaf:
    """The shapes of so many of what lies along the first axis."""
    return jax.tree.map(lambda a: abstract_array((count, *a.shape[1:]), a.dtype), leaf)
