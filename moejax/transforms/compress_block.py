"""One block as a plan wants it, matrix by matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics
from moejax.formats import (
    ExpertWeights,
    Leaf,
    experts_in_buckets,
    format_name,
    gather_experts,
    select_experts,
)
from moejax.model import named_leaves
from moejax.model.deepseek_v3 import Block, MtpBlock
from moejax.model.leaves import Weight, prefixed
from moejax.model.moe import Experts, MoE
from moejax.model.sliced import SlicedBlock
from moejax.planning import KEEP, BlockPlan
from moejax.planning.plan import PROJECTIONS
from moejax.transforms.experts_per_token import adjust
from moejax.transforms.prune import masked_bias, prune
from moejax.transforms.rounder import AFRESH, Projection, Rounder, Wanted, requantize


def compress_block(
    block: SlicedBlock, plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder = AFRESH, name: str = ""
) -> Block:
    """One decoder block, `name` in the model, as `plan` wants it, whole: its experts are asked for slice by slice."""
    mlp = block.trunk.mlp
    leaves: dict[str, Weight] = named_leaves(block.trunk)
    if isinstance(mlp, MoE):
        mlp = _planned_routing(prune(mlp, _survivors(block, plan)), plan)
        leaves |= prefixed("mlp", named_leaves(mlp))
    leaves |= rounded_leaves(leaves, plan, statistics, rounder, name)
    if isinstance(mlp, MoE):
        leaves |= prefixed("mlp.experts", _compressed_experts(block, plan, statistics, rounder, name))
    experts_per_token = mlp.experts_per_token if isinstance(mlp, MoE) else None
    return Block(block.config, leaves.__getitem__, isinstance(mlp, MoE), experts_per_token)


def rounded_leaves(
    leaves: Mapping[str, Weight], plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder, block: str
) -> dict[str, Leaf]:
    """Those of a trunk's weights, by name in the block of that name, that the plan names, in the format that it gives
    them."""
    # An MTP block's eh_proj lies outside its decoder block.
    formats = {name: target for name, target in plan.formats.items() if name in leaves}
    return {
        name: rounder.matrix(f"{block}.{name}", leaves[name], statistics.inputs(name), target)
        for name, target in formats.items()
    }


def compressed_slice(
    members: Sequence[int],
    experts: Experts,
    plan: BlockPlan,
    statistics: BlockStatistics,
    rounder: Rounder,
    block: str,
) -> dict[str, dict[int, Leaf]]:
    """What the plan makes of the experts `members` of the block of that name: by projection, the survivors among them
    by number."""
    assert statistics.experts is not None
    sums, kept = statistics.experts.of(members), np.asarray(members if plan.keep is None else plan.keep)
    is_here, wanted = np.isin(kept, members), []
    survivors = kept[is_here]
    for name, weights in named_leaves(experts).items():
        formats = np.asarray(plan.experts.get(name, (KEEP,) * len(kept)))[is_here]
        own = Projection(f"{block}.mlp.experts.{name}", members, weights, sums)
        for target in sorted(set(formats)):
            wanted.append(Wanted(own, (survivors[formats == target] - members[0]).tolist(), target))
    found: dict[str, dict[int, Leaf]] = {name: {} for name in named_leaves(experts)}
    for one, leaves in zip(wanted, rounder.experts(wanted), strict=True):
        found[one.of.own] |= {one.of.members[k]: leaf for k, leaf in zip(one.some, leaves, strict=True)}
    return {name: {e: each[e] for e in survivors.tolist()} for name, each in found.items()}


def as_planned(block: SlicedBlock, plan: BlockPlan, leaves: Mapping[str, Weight]) -> Block:
    """What `compress_block` made of the block, from its weights by name."""
    per_token = plan.experts_per_token or block.experts_per_token
    return Block(block.config, leaves.__getitem__, block.is_moe, per_token)


def compress_mtp(
    outer: MtpBlock, plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder, name: str
) -> dict[str, Weight]:
    """The leaves of an MTP block, `name` in the model, that lie outside its decoder block."""
    leaves = {name: leaf for name, leaf in named_leaves(outer).items() if not name.startswith("block.")}
    target = plan.formats.get("eh_proj", KEEP)
    inputs = statistics.inputs("eh_proj")
    return leaves | {"eh_proj": rounder.matrix(f"{name}.eh_proj", leaves["eh_proj"], inputs, target)}


def only_survivors(block: SlicedBlock, plan: BlockPlan) -> SlicedBlock:
    """The block with its pruned experts never chosen and the plan's routing, every matrix as it was."""
    mlp = block.trunk.mlp
    if not isinstance(mlp, MoE) or plan.keep is None:
        return block
    mlp = _planned_routing(mlp, plan)
    pruned_E = np.isin(np.arange(mlp.num_experts), plan.keep, invert=True)
    leaves = prefixed("mlp", named_leaves(mlp)) | {"mlp.bias": masked_bias(mlp.bias.get_value(), pruned_E)}
    return replace(block, trunk=block.trunk.with_leaves(leaves, mlp.experts_per_token))


def _planned_routing(mlp: MoE, plan: BlockPlan) -> MoE:
    if plan.keep is None:
        return mlp
    return adjust(mlp, plan.experts_per_token or mlp.experts_per_token, plan.routing_scale)


def _survivors(block: SlicedBlock, plan: BlockPlan) -> Sequence[int]:
    return range(block.num_experts) if plan.keep is None else plan.keep


def _compressed_experts(
    block: SlicedBlock, plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder, block_name: str
) -> dict[str, ExpertWeights]:
    """Every projection's survivors; those of one format lie in one bucket. Each is rounded by itself."""
    if _is_traced(block):
        every = named_leaves(block.experts_of(range(block.num_experts)))
        return {name: _rounded_traced(own, name, plan, statistics) for name, own in every.items()}
    compressed: dict[str, list[Leaf]] = {name: [] for name in PROJECTIONS}
    for members, experts in block.slices():
        for name, survivors in compressed_slice(members, experts, plan, statistics, rounder, block_name).items():
            compressed[name] += survivors.values()
    return {name: gather_experts(compressed.pop(name)) for name in PROJECTIONS}


def _is_traced(block: SlicedBlock) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(block.trunk))


def _rounded_traced(
    weights: ExpertWeights, projection: str, plan: BlockPlan, statistics: BlockStatistics
) -> ExpertWeights:
    """A bucket of every format in a trace: one loop each, so that what is traced does not grow with the experts."""
    assert statistics.experts is not None
    keep = np.arange(weights.num_experts) if plan.keep is None else np.asarray(plan.keep)
    formats = plan.experts.get(projection, (KEEP,) * len(keep))
    # An original's experts are of one format, which those that are kept have.
    names = np.asarray([format_name(weights.buckets[0]) if target == KEEP else target for target in formats])
    members_of = [np.flatnonzero(names == name) for name in sorted(set(names))]
    inputs_of, buckets = partial(statistics.experts.inputs, projection), []
    for members in members_of:
        target, original = formats[members[0]], jnp.asarray(keep[members])
        (own,) = select_experts(weights, keep[members]).buckets
        if target != KEEP:
            own = jax.lax.map(lambda one, to=target: _requantize(one[0], inputs_of(e=one[1]), to), (own, original))
        buckets.append(own)
    return experts_in_buckets(buckets, members_of)


# For traces, which then see every shape and format once.
_requantize = partial(jax.jit, static_argnames="target")(requantize)
