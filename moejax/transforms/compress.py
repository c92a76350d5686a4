"""A plan carried out: prune, adjust the activated experts, quantize; block by block, matrix by matrix."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, ExpertStatistics, Inputs, Statistics
from moejax.errors import InputError
from moejax.formats import (
    ExpertWeights,
    Leaf,
    dense,
    experts_in_buckets,
    format_name,
    parse_group_format,
    select_experts,
)
from moejax.model import DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.leaves import Weight
from moejax.model.moe import MoE
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.progress import Progress, silent
from moejax.transforms.check_plan import check_plan
from moejax.transforms.experts_per_token import adjust
from moejax.transforms.prune import prune
from moejax.transforms.rounding import round_weight

# The inputs of one projection of the expert whose number is `e`.
InputsOf = Callable[..., Inputs]


def compress(model: DeepseekV3, plan: Plan, statistics: Statistics, *, progress: Progress = silent) -> DeepseekV3:
    """The model as `plan` wants it; pure, so `jax.eval_shape` of it is the compressed model's shape and bytes.

    Raises InputError if the plan's blocks, experts or weights are not the model's, or a format does not fit its weight.
    """
    check_plan(plan, model.config)
    leaves = {name: leaf for name, leaf in named_leaves(model).items() if name in ("embed", "norm", "head")}
    leaves["embed"] = requantize(leaves["embed"], Inputs(jnp.ones(model.config.hidden_size)), plan.embed)
    leaves["head"] = requantize(leaves["head"], statistics.head_inputs(), plan.head)
    blocks = [*model.layers, *(mtp.block for mtp in model.mtp)]
    names = [f"layers.{i}" for i in range(len(model.layers))] + [f"mtp.{m}.block" for m in range(len(model.mtp))]
    experts_per_token = []
    steps = list(zip(names, blocks, plan.blocks, statistics.blocks, strict=True))
    for name, block, block_plan, sums in progress(steps, "compressing"):
        compressed = compress_block(block, block_plan, sums)
        leaves |= {f"{name}.{own}": leaf for own, leaf in named_leaves(compressed).items()}
        experts_per_token.append(_experts_per_token(compressed))
    for m, (mtp, sums) in enumerate(zip(model.mtp, statistics.blocks[len(model.layers) :], strict=True)):
        own = {name: leaf for name, leaf in named_leaves(mtp).items() if not name.startswith("block.")}
        target = plan.blocks[len(model.layers) + m].formats.get("eh_proj", KEEP)
        own["eh_proj"] = requantize(own["eh_proj"], sums.inputs("eh_proj"), target)
        leaves |= {f"mtp.{m}.{name}": leaf for name, leaf in own.items()}
    return DeepseekV3(model.config, leaves.__getitem__, experts_per_token)


def compress_block(block: Block, plan: BlockPlan, statistics: BlockStatistics) -> Block:
    """One decoder block as `plan` wants it."""
    mlp = block.mlp
    if isinstance(mlp, MoE) and plan.keep is not None:
        mlp = adjust(prune(mlp, plan.keep), plan.experts_per_token or mlp.experts_per_token, plan.routing_scale)
    leaves: dict[str, Weight] = named_leaves(block) | {f"mlp.{name}": leaf for name, leaf in named_leaves(mlp).items()}
    for name, target in plan.formats.items():
        if name not in statistics.input2:
            raise InputError(f"the plan gives a format to {name!r}, which is no matrix of its block")
        if name in leaves:  # an MTP block's eh_proj lies outside its decoder block
            leaves[name] = requantize(leaves[name], statistics.inputs(name), target)
    for projection, formats in plan.experts.items():
        name = f"mlp.experts.{projection}"
        leaves[name] = _quantize_experts(leaves[name], formats, projection, plan, statistics)
    experts_per_token = mlp.experts_per_token if isinstance(mlp, MoE) else None
    return Block(block.config, leaves.__getitem__, isinstance(mlp, MoE), experts_per_token)


def requantize(leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
    """The leaf in the format named `target`, or as it is if that is KEEP."""
    if target == KEEP:
        return leaf
    return round_weight(dense(leaf, jnp.float32), inputs, parse_group_format(target))


def _quantize_experts(
    weights: ExpertWeights, formats: Sequence[str], projection: str, plan: BlockPlan, statistics: BlockStatistics
) -> ExpertWeights:
    """Survivors of one format lie in one bucket; each is rounded by itself."""
    assert statistics.experts is not None and plan.keep is not None
    own_name = format_name(weights.buckets[0])  # an original's experts are of one format
    names = [own_name if target == KEEP else target for target in formats]
    members_of = [np.flatnonzero(np.asarray(names) == name) for name in sorted(set(names))]
    round_each = _round_each_traced if isinstance(weights.index_E, jax.core.Tracer) else _round_each
    inputs_of = partial(_expert_inputs, statistics.experts, projection=projection)
    targets = [formats[members[0]] for members in members_of]
    buckets = round_each(weights, inputs_of, np.asarray(plan.keep), members_of, targets)
    return experts_in_buckets(buckets, members_of)


def _round_each(
    weights: ExpertWeights,
    inputs_of: InputsOf,
    keep: np.ndarray,
    members_of: Sequence[np.ndarray],
    targets: Sequence[str],
) -> list[Leaf]:
    """A bucket of every format, its matrices one at a time: compiled once per shape, however many there are."""

    def rounded(e: int, target: str) -> Leaf:
        return _requantize(weights.expert(e), inputs_of(e=keep[e]), target)

    buckets = []
    for members, target in zip(members_of, targets, strict=True):
        each = [rounded(e, target) for e in members.tolist()]
        buckets.append(jax.tree.map(lambda *arrays: jnp.stack(arrays), *each))
    return buckets


def _round_each_traced(
    weights: ExpertWeights,
    inputs_of: InputsOf,
    keep: np.ndarray,
    members_of: Sequence[np.ndarray],
    targets: Sequence[str],
) -> list[Leaf]:
    """The same in a trace: one loop per bucket, so that what is traced does not grow with the number of experts."""
    order = np.concatenate(members_of)
    (matrices,), original = select_experts(weights, order).buckets, jnp.asarray(keep[order])
    buckets, start = [], 0
    for members, target in zip(members_of, targets, strict=True):
        cut = partial(jax.lax.slice_in_dim, start_index=start, limit_index=start + len(members))
        own = jax.tree.map(cut, matrices)
        if target != KEEP:
            own = jax.lax.map(lambda one, to=target: _requantize(one[0], inputs_of(e=one[1]), to), (own, cut(original)))
        buckets.append(own)
        start += len(members)
    return buckets


_requantize = partial(jax.jit, static_argnames="target")(requantize)


@partial(jax.jit, static_argnames="projection")
def _expert_inputs(experts: ExpertStatistics, e: jax.Array, projection: str) -> Inputs:
    return experts.inputs(projection, e)


def _experts_per_token(block: Block) -> int:
    return block.mlp.experts_per_token if isinstance(block.mlp, MoE) else block.config.num_experts_per_tok
