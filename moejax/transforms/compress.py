"""A plan carried out: prune, adjust the activated experts, quantize; block by block, matrix by matrix."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moejax.calibrate import BlockStatistics, Statistics
from moejax.errors import InputError
from moejax.formats import ExpertWeights, Leaf, dense, gather_experts, parse_int_format
from moejax.model import DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.leaves import Weight
from moejax.model.moe import MoE
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.progress import Progress, silent
from moejax.transforms.experts_per_token import adjust
from moejax.transforms.prune import prune
from moejax.transforms.quantize import quantize


def compress(model: DeepseekV3, plan: Plan, statistics: Statistics, *, progress: Progress = silent) -> DeepseekV3:
    """The model as `plan` wants it; pure, so `jax.eval_shape` of it is the compressed model's shape and bytes.

    Raises InputError if the plan names a weight that its block does not have, or a format that does not fit it.
    """
    leaves = {name: leaf for name, leaf in named_leaves(model).items() if name in ("embed", "norm", "head")}
    leaves["embed"] = requantize(leaves["embed"], jnp.ones(model.config.hidden_size), plan.embed)
    leaves["head"] = requantize(leaves["head"], statistics.head_input2 / statistics.tokens, plan.head)
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
        own["eh_proj"] = requantize(own["eh_proj"], sums.input_second_moment("eh_proj"), target)
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
            leaves[name] = requantize(leaves[name], statistics.input_second_moment(name), target)
    for projection, formats in plan.experts.items():
        name = f"mlp.experts.{projection}"
        leaves[name] = _quantize_experts(leaves[name], formats, projection, plan, statistics)
    experts_per_token = mlp.experts_per_token if isinstance(mlp, MoE) else None
    return Block(block.config, leaves.__getitem__, isinstance(mlp, MoE), experts_per_token)


def requantize(leaf: Leaf, second_moment: jax.Array, target: str) -> Leaf:
    """The leaf in the format named `target`, or as it is if that is KEEP."""
    if target == KEEP:
        return leaf
    return quantize(dense(leaf, jnp.float32), second_moment, parse_int_format(target))


def _quantize_experts(
    weights: ExpertWeights, formats: Sequence[str], projection: str, plan: BlockPlan, statistics: BlockStatistics
) -> ExpertWeights:
    """Survivor by survivor, one matrix at a time."""
    assert statistics.experts is not None and plan.keep is not None
    moment_EI = statistics.experts.input_second_moment(projection)
    return gather_experts(
        [
            requantize(weights.expert(new), moment_EI[old], target)
            for new, (old, target) in enumerate(zip(plan.keep, formats, strict=True))
        ]
    )


def _experts_per_token(block: Block) -> int:
    return block.mlp.experts_per_token if isinstance(block.mlp, MoE) else block.config.num_experts_per_tok
