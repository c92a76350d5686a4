"""One block as a plan wants it, matrix by matrix."""

from collections.abc import Callable, Mapping, Sequence
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
    parse_group_format,
    select_experts,
)
from moejax.model import named_leaves
from moejax.model.deepseek_v3 import Block, MtpBlock
from moejax.model.leaves import Weight
from moejax.model.moe import MoE
from moejax.planning import KEEP, BlockPlan
from moejax.transforms.experts_per_token import adjust
from moejax.transforms.prune import masked_bias, prune
from moejax.transforms.rounding import round_weight, to_float32

# The inputs of one projection of the expert whose number is `e`.
InputsOf = Callable[..., Inputs]

# Gives matrices of one shape, by their names, in the format of a name. The last argument rounds those at some positions
# of the list, should they not be known already. Experts are numbered as in the original.
Rounder = Callable[[Sequence[str], str, Callable[[Sequence[int]], list[Leaf]]], list[Leaf]]

# How many experts are rounded together, at most, and in how many bytes of weights and Hessians.
_EXPERTS_TOGETHER, _BYTES_TOGETHER = 8, 1 << 28


def afresh(names: Sequence[str], target: str, rounded: Callable[[Sequence[int]], list[Leaf]]) -> list[Leaf]:
    """The rounder that knows nothing yet."""
    return rounded(range(len(names)))


def compress_block(block: Block, plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder = afresh) -> Block:
    """One decoder block as `plan` wants it."""
    mlp = block.mlp
    if isinstance(mlp, MoE) and plan.keep is not None:
        mlp = adjust(prune(mlp, plan.keep), plan.experts_per_token or mlp.experts_per_token, plan.routing_scale)
    leaves: dict[str, Weight] = named_leaves(block) | {f"mlp.{name}": leaf for name, leaf in named_leaves(mlp).items()}
    for name, target in plan.formats.items():
        if name in leaves:  # an MTP block's eh_proj lies outside its decoder block
            leaves[name] = requantize_once(rounder, name, leaves[name], statistics.inputs(name), target)
    for projection, formats in plan.experts.items():
        name = f"mlp.experts.{projection}"
        leaves[name] = _quantize_experts(
            leaves[name], formats, projection, plan, statistics, partial(within, rounder, name)
        )
    experts_per_token = mlp.experts_per_token if isinstance(mlp, MoE) else None
    return Block(block.config, leaves.__getitem__, isinstance(mlp, MoE), experts_per_token)


def as_planned(block: Block, plan: BlockPlan, leaves: Mapping[str, Weight]) -> Block:
    """What `compress_block` made of the block, from its weights by name."""
    per_token = plan.experts_per_token or block.experts_per_token
    return Block(block.config, leaves.__getitem__, isinstance(block.mlp, MoE), per_token)


def compress_mtp(mtp: MtpBlock, plan: BlockPlan, statistics: BlockStatistics, rounder: Rounder) -> dict[str, Weight]:
    """The leaves of an MTP block that lie outside its decoder block."""
    leaves = {name: leaf for name, leaf in named_leaves(mtp).items() if not name.startswith("block.")}
    target = plan.formats.get("eh_proj", KEEP)
    inputs = statistics.inputs("eh_proj")
    return leaves | {"eh_proj": requantize_once(rounder, "eh_proj", leaves["eh_proj"], inputs, target)}


def only_survivors(block: Block, plan: BlockPlan) -> Block:
    """The block with its pruned experts never chosen and the plan's routing, every matrix as it was."""
    if not isinstance(block.mlp, MoE) or plan.keep is None:
        return block
    mlp = adjust(block.mlp, plan.experts_per_token or block.mlp.experts_per_token, plan.routing_scale)
    leaves = named_leaves(block) | {f"mlp.{name}": leaf for name, leaf in named_leaves(mlp).items()}
    pruned_E = np.isin(np.arange(mlp.num_experts), plan.keep, invert=True)
    leaves["mlp.bias"] = masked_bias(leaves["mlp.bias"], pruned_E)
    return Block(block.config, leaves.__getitem__, True, mlp.experts_per_token)


def around(mtp: MtpBlock, block: Block) -> MtpBlock:
    """The MTP block with another decoder block in it."""
    leaves = named_leaves(mtp) | {f"block.{name}": leaf for name, leaf in named_leaves(block).items()}
    per_token = block.mlp.experts_per_token if isinstance(block.mlp, MoE) else None
    return MtpBlock(mtp.config, leaves.__getitem__, isinstance(block.mlp, MoE), per_token)


def requantize(leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
    """The leaf in the format named `target`, or as it is if that is KEEP."""
    if target == KEEP:
        return leaf
    return round_weight(to_float32(leaf), inputs, parse_group_format(target))


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
    originals: Sequence[int] | np.ndarray,
) -> list[Leaf]:
    """The matrices of the experts `members`, whose numbers in the original were `originals`, in the format named
    `target`. Several are rounded together; the last of them beside some that were rounded already, so that the number
    of experts compiles nothing anew."""
    if target == KEEP:
        return [weights.expert(e) for e in members]
    rounded_together = jax.vmap(partial(round_weight, to=parse_group_format(target)))
    together, leaves = experts_together(weights.shape), []
    for start in range(0, len(members), together):
        some, original = (np.resize(list(e)[start : start + together], together) for e in (members, originals))
        rounded = jax.device_get(rounded_together(*_matrices_and_inputs(weights, experts, some, original, projection)))
        own = range(min(together, len(members) - start))
        leaves += [jax.tree.map(lambda a, k=k: jnp.asarray(a[k]), rounded) for k in own]
    return leaves


def experts_together(shape: tuple[int, ...]) -> int:
    """How many of a layer's experts (E, O, I) are rounded together."""
    _, outputs, inputs = shape
    return max(1, min(_EXPERTS_TOGETHER, _BYTES_TOGETHER // (4 * inputs * (outputs + inputs))))


def _quantize_experts(
    weights: ExpertWeights,
    formats: Sequence[str],
    projection: str,
    plan: BlockPlan,
    statistics: BlockStatistics,
    rounder: Rounder,
) -> ExpertWeights:
    """Survivors of one format lie in one bucket; each is rounded by itself."""
    assert statistics.experts is not None and plan.keep is not None
    own_name = format_name(weights.buckets[0])  # an original's experts are of one format
    names = [own_name if target == KEEP else target for target in formats]
    members_of = [np.flatnonzero(np.asarray(names) == name) for name in sorted(set(names))]
    targets = [formats[members[0]] for members in members_of]
    keep, experts = np.asarray(plan.keep), statistics.experts
    if isinstance(weights.index_E, jax.core.Tracer):
        inputs_of = partial(experts.inputs, projection)
        buckets = _round_each_traced(weights, inputs_of, keep, members_of, targets)
        return experts_in_buckets(buckets, members_of)
    buckets = []
    for members, target in zip(members_of, targets, strict=True):

        def rounded(some: Sequence[int], members: np.ndarray = members, target: str = target) -> list[Leaf]:
            own = members[list(some)]
            return requantize_experts(weights, experts, projection, target, own, keep[own])

        each = rounder([str(e) for e in keep[members]], target, rounded)
        buckets.append(jax.tree.map(lambda *arrays: jnp.stack(arrays), *each))
    return experts_in_buckets(buckets, members_of)


def _round_each_traced(
    weights: ExpertWeights,
    inputs_of: InputsOf,
    keep: np.ndarray,
    members_of: Sequence[np.ndarray],
    targets: Sequence[str],
) -> list[Leaf]:
    """A bucket of every format in a trace: one loop each, so that what is traced does not grow with the experts."""
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


# For traces, which then see every shape and format once.
_requantize = partial(jax.jit, static_argnames="target")(requantize)


def within(
    rounder: Rounder, prefix: str, names: Sequence[str], target: str, rounded: Callable[[Sequence[int]], list[Leaf]]
) -> list[Leaf]:
    """The same rounder for names within a part of the model."""
    return rounder([f"{prefix}.{name}" for name in names], target, rounded)


@partial(jax.jit, static_argnames="projection")
def _matrices_and_inputs(
    weights: ExpertWeights, experts: ExpertStatistics, member_B: jax.Array, original_B: jax.Array, projection: str
) -> tuple[jax.Array, Inputs]:
    """Matrices (B, O, I) of some experts of an original, and their inputs."""
    (bucket,) = weights.buckets
    matrices = jax.tree.map(lambda a: a[weights.index_E[member_B]], bucket)
    return to_float32(matrices), jax.vmap(lambda e: experts.inputs(projection, e))(original_B)
