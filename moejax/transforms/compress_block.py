"""One block as a plan wants it, matrix by matrix."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, ExpertStatistics, Inputs
from moejax.formats import (
    ExpertWeights,
    Leaf,
    experts_in_buckets,
    format_name,
    gather_experts,
    parse_group_format,
    row_parts,
    rows,
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
from moejax.transforms.rounding import round_weight, to_float32

# Gives matrices of one shape, by their names, in the format of a name. The last argument rounds those at some positions
# of the list, should they not be known already. Experts are numbered as in the original.
Rounder = Callable[[Sequence[str], str, Callable[[Sequence[int]], list[Leaf]]], list[Leaf]]

# Numbers of a matrix that are in float32 together, at most; its rows are rounded each by itself.
MOST_NUMBERS = 1 << 26

# How many experts are rounded together, at most, and in how many bytes of weights and Hessians.
_EXPERTS_TOGETHER, _BYTES_TOGETHER = 8, 1 << 28


def afresh(names: Sequence[str], target: str, rounded: Callable[[Sequence[int]], list[Leaf]]) -> list[Leaf]:
    """The rounder that knows nothing yet."""
    return rounded(range(len(names)))


def compress_block(
    block: SlicedBlock, plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder = afresh
) -> Block:
    """One decoder block as `plan` wants it, whole: its experts are asked for slice by slice."""
    mlp = block.trunk.mlp
    leaves: dict[str, Weight] = named_leaves(block.trunk)
    if isinstance(mlp, MoE):
        mlp = _planned_routing(prune(mlp, _survivors(block, plan)), plan)
        leaves |= prefixed("mlp", named_leaves(mlp))
    leaves |= rounded_leaves(leaves, plan, statistics, rounder)
    if isinstance(mlp, MoE):
        leaves |= prefixed("mlp.experts", _compressed_experts(block, plan, statistics, rounder))
    experts_per_token = mlp.experts_per_token if isinstance(mlp, MoE) else None
    return Block(block.config, leaves.__getitem__, isinstance(mlp, MoE), experts_per_token)


def rounded_leaves(
    leaves: Mapping[str, Weight], plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder
) -> dict[str, Leaf]:
    """Those of a trunk's weights that the plan names, in the format that it gives them."""
    # An MTP block's eh_proj lies outside its decoder block.
    formats = {name: target for name, target in plan.formats.items() if name in leaves}
    return {
        name: requantize_once(rounder, name, leaves[name], statistics.inputs(name), target)
        for name, target in formats.items()
    }


def compressed_slice(
    members: Sequence[int], experts: Experts, plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder
) -> dict[str, dict[int, Leaf]]:
    """What the plan makes of the experts `members` of a block: by projection, the survivors among them by number."""
    assert statistics.experts is not None
    sums, kept = statistics.experts.of(members), np.asarray(members if plan.keep is None else plan.keep)
    is_here, found = np.isin(kept, members), {}
    for name, weights in named_leaves(experts).items():
        formats = np.asarray(plan.experts.get(name, (KEEP,) * len(kept)))[is_here]
        within_name = partial(within, rounder, f"mlp.experts.{name}")
        found[name] = _rounded_slice(weights, sums, name, formats, kept[is_here], members[0], within_name)
    return found


def as_planned(block: SlicedBlock, plan: BlockPlan, leaves: Mapping[str, Weight]) -> Block:
    """What `compress_block` made of the block, from its weights by name."""
    per_token = plan.experts_per_token or block.experts_per_token
    return Block(block.config, leaves.__getitem__, block.is_moe, per_token)


def compress_mtp(outer: MtpBlock, plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder) -> dict[str, Weight]:
    """The leaves of an MTP block that lie outside its decoder block."""
    leaves = {name: leaf for name, leaf in named_leaves(outer).items() if not name.startswith("block.")}
    target = plan.formats.get("eh_proj", KEEP)
    inputs = statistics.inputs("eh_proj")
    return leaves | {"eh_proj": requantize_once(rounder, "eh_proj", leaves["eh_proj"], inputs, target)}


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


def requantize(leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
    """The leaf in the format named `target`, or as it is if that is KEEP."""
    if target == KEEP:
        return leaf
    to, parts = parse_group_format(target), row_parts(leaf, MOST_NUMBERS)
    if len(parts) == 1:
        return round_weight(to_float32(leaf), inputs, to)
    each = (rows(leaf, own.start, own.stop - own.start) for own in parts)
    return jax.tree.map(lambda *own: jnp.concatenate(own), *(round_weight(to_float32(own), inputs, to) for own in each))


def requantize_once(rounder: Rounder, name: str, leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
    """`requantize`, unless the rounder knows the result."""
    (rounded,) = rounder([name], target, lambda _: [requantize(leaf, inputs, target)])
    return rounded


def requantize_experts(
    weights: ExpertWeights,
    experts: ExpertStatistics,
    projection: str,
    target: str,
    members: Sequence[int] | np.ndarray,
) -> list[Leaf]:
    """The matrices of some of these experts in the format named `target`; the statistics are the same experts'.
    Several are rounded together; the last of them beside some that were rounded already, so that the number of experts
    compiles nothing anew."""
    if target == KEEP:
        return [weights.expert(e) for e in members]
    rounded_together = jax.vmap(partial(round_weight, to=parse_group_format(target)))
    together, leaves = experts_together(weights.shape), []
    for start in range(0, len(members), together):
        some = np.resize(list(members)[start : start + together], together)
        rounded = jax.device_get(rounded_together(*_matrices_and_inputs(weights, experts, some, projection)))
        own = range(min(together, len(members) - start))
        leaves += [jax.tree.map(lambda a, k=k: jnp.asarray(a[k]), rounded) for k in own]
    return leaves


def experts_together(shape: tuple[int, ...]) -> int:
    """How many of a layer's experts (E, O, I) are rounded together."""
    _, outputs, inputs = shape
    return max(1, min(_EXPERTS_TOGETHER, _BYTES_TOGETHER // (4 * inputs * (outputs + inputs))))


def _compressed_experts(
    block: SlicedBlock, plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder
) -> dict[str, ExpertWeights]:
    """Every projection's survivors; those of one format lie in one bucket. Each is rounded by itself."""
    if _is_traced(block):
        every = named_leaves(block.experts_of(range(block.num_experts)))
        return {name: _rounded_traced(own, name, plan, statistics) for name, own in every.items()}
    compressed: dict[str, list[Leaf]] = {name: [] for name in PROJECTIONS}
    for members, experts in block.slices():
        for name, survivors in compressed_slice(members, experts, plan, statistics, rounder).items():
            compressed[name] += survivors.values()
    return {name: gather_experts(compressed.pop(name)) for name in PROJECTIONS}


def _rounded_slice(
    weights: ExpertWeights,
    sums: ExpertStatistics,
    projection: str,
    formats: np.ndarray,
    kept: np.ndarray,
    first: int,
    rounder: Rounder,
) -> dict[int, Leaf]:
    """The survivors `kept` among experts of which the first has that number, each in its format."""
    each: dict[int, Leaf] = {}
    for target in sorted(set(formats)):
        own = kept[formats == target]

        def rounded(some: Sequence[int], own: np.ndarray = own, target: str = target) -> list[Leaf]:
            return requantize_experts(weights, sums, projection, target, own[list(some)] - first)

        each |= zip(own.tolist(), rounder([str(e) for e in own], target, rounded), strict=True)
    return {e: each[e] for e in kept.tolist()}


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


def within(
    rounder: Rounder, prefix: str, names: Sequence[str], target: str, rounded: Callable[[Sequence[int]], list[Leaf]]
) -> list[Leaf]:
    """The same rounder for names within a part of the model."""
    return rounder([f"{prefix}.{name}" for name in names], target, rounded)


@partial(jax.jit, static_argnames="projection")
def _matrices_and_inputs(
    weights: ExpertWeights, experts: ExpertStatistics, member_B: jax.Array, projection: str
) -> tuple[jax.Array, Inputs]:
    """Matrices (B, O, I) of some experts of an original, and their inputs."""
    (bucket,) = weights.buckets
    matrices = jax.tree.map(lambda a: a[weights.index_E[member_B]], bucket)
    return to_float32(matrices), jax.vmap(lambda e: experts.inputs(projection, e))(member_B)
