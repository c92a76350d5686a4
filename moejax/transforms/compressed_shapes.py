"""What a plan makes of a model in shapes alone, so that its bytes are known without a trace of how it is rounded."""

from collections.abc import Sequence

import jax
import numpy as np

from moejax.formats import ExpertWeights, Leaf, format_name, parse_group_format
from moejax.formats.abstract import abstract_array
from moejax.model import DeepseekV3, named_leaves
from moejax.model.leaves import Weight
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.planning.plan import PROJECTIONS
from moejax.transforms.check_plan import check_plan

_PER_SURVIVOR = ("mlp.router", "mlp.bias", "mlp.group_id")


def compressed_shapes(model: DeepseekV3, plan: Plan) -> DeepseekV3:
    """`jax.eval_shape` of `compress(model, plan, ...)`, for a model that is in shapes alone.

    Raises InputError as `compress` does.
    """
    check_plan(plan, model.config)
    leaves = named_leaves(model)
    leaves |= {name: _in_format(leaves[name], target) for name, target in (("embed", plan.embed), ("head", plan.head))}
    layers = len(model.layers)
    experts_per_token = []
    for i, own in enumerate(plan.blocks):
        part = f"layers.{i}" if i < layers else f"mtp.{i - layers}"
        prefix = part if i < layers else f"{part}.block"
        for name, target in own.formats.items():
            full = f"{part if name == 'eh_proj' else prefix}.{name}"
            leaves[full] = _in_format(leaves[full], target)
        if own.keep is not None:
            leaves |= _survivors(leaves, f"{prefix}.", own, own.keep)
        block = model.layers[i] if i < layers else model.mtp[i - layers].block
        experts_per_token.append(own.experts_per_token or block.experts_per_token)
    return DeepseekV3(model.config, leaves.__getitem__, experts_per_token)


def _in_format(leaf: Leaf, target: str) -> Leaf:
    return leaf if target == KEEP else parse_group_format(target).abstract(leaf.shape)


def _survivors(leaves: dict[str, Weight], prefix: str, plan: BlockPlan, keep: Sequence[int]) -> dict[str, Weight]:
    """What there is one of for every expert, of those that `plan` keeps."""
    own: dict[str, Weight] = {f"{prefix}{name}": _first(leaves[f"{prefix}{name}"], len(keep)) for name in _PER_SURVIVOR}
    for projection in PROJECTIONS:
        name = f"{prefix}mlp.experts.{projection}"
        own[name] = _experts(leaves[name], plan.experts.get(projection, (KEEP,) * len(keep)))
    return own


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
