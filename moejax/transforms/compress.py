"""A plan carried out: prune, adjust the activated experts, quantize; block by block, matrix by matrix."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import jax.numpy as jnp

from moejax.calibrate import BlockStatistics, Following, Inputs, Statistics
from moejax.formats import Leaf
from moejax.model import DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.planning import BlockPlan, Plan
from moejax.progress import Progress, silent
from moejax.transforms.check_plan import check_plan
from moejax.transforms.compress_block import (
    Rounder,
    afresh,
    compress_block,
    compress_mtp,
    only_survivors,
    requantize_once,
    within,
)


def compress(
    model: DeepseekV3,
    plan: Plan,
    statistics: Statistics,
    *,
    rounder: Rounder = afresh,
    progress: Progress = silent,
) -> DeepseekV3:
    """The model as `plan` wants it; pure, so `jax.eval_shape` of it is the compressed model's shape and bytes.

    Weights are rounded with error feedback where the statistics hold Hessians.

    Raises InputError if the plan's blocks, experts or weights are not the model's.
    """
    check_plan(plan, model.config)
    return _compressed(model, plan, _Known(statistics), rounder, progress)


def compress_in_sequence(
    model: DeepseekV3, plan: Plan, start: Following, statistics: Statistics, *, progress: Progress = silent
) -> DeepseekV3:
    """The model as `plan` wants it, every block calibrated on what the compressed blocks before it put out, with the
    experts and the routing that the plan gives it.

    `start` has seen nothing compressed yet. Of `statistics`, those of `compress`, the damping counts alone: it was
    chosen on chunks that calibration left out. Raises InputError as `compress` does.
    """
    check_plan(plan, model.config)
    return _compressed(model, plan, _Followed(start, statistics), afresh, progress)


class _Source(Protocol):
    """Where statistics come from while a model is compressed from its embedding to its head."""

    def behind_embedding(self, embed: Leaf) -> "_Source": ...

    def behind_block(self, compressed: Block) -> "_Source": ...

    def block(self, index: int, block: Block, plan: BlockPlan) -> BlockStatistics: ...

    def mtp(self, depth: int, block: Block, plan: BlockPlan) -> BlockStatistics: ...

    def head_inputs(self) -> Inputs: ...


@dataclass(frozen=True)
class _Known:
    """Statistics of the original's own hidden states."""

    statistics: Statistics

    def behind_embedding(self, embed: Leaf) -> "_Known":
        return self

    def behind_block(self, compressed: Block) -> "_Known":
        return self

    def block(self, index: int, block: Block, plan: BlockPlan) -> BlockStatistics:
        return self.statistics.blocks[index]

    def mtp(self, depth: int, block: Block, plan: BlockPlan) -> BlockStatistics:
        return self.statistics.blocks[block.config.num_hidden_layers + depth]

    def head_inputs(self) -> Inputs:
        return self.statistics.head_inputs()


@dataclass(frozen=True)
class _Followed:
    """Statistics of the compressed model's hidden states, with the damping chosen for the original's."""

    following: Following
    original: Statistics

    def behind_embedding(self, embed: Leaf) -> "_Followed":
        return replace(self, following=self.following.behind_embedding(embed))

    def behind_block(self, compressed: Block) -> "_Followed":
        return replace(self, following=self.following.behind_block(compressed))

    def block(self, index: int, block: Block, plan: BlockPlan) -> BlockStatistics:
        return self.following.block_statistics(only_survivors(block, plan)).damped_as(self.original.blocks[index])

    def mtp(self, depth: int, block: Block, plan: BlockPlan) -> BlockStatistics:
        original = self.original.blocks[block.config.num_hidden_layers + depth]
        return self.following.mtp_statistics(depth, only_survivors(block, plan)).damped_as(original)

    def head_inputs(self) -> Inputs:
        return self.following.head_inputs()._replace(damping=self.original.head_inputs().damping)


def _compressed(model: DeepseekV3, plan: Plan, source: _Source, rounder: Rounder, progress: Progress) -> DeepseekV3:
    leaves, layers = {"norm": model.norm.get_value()}, len(model.layers)
    leaves["embed"] = requantize_once(rounder, "embed", model.embed.get_value(), embedding_inputs(model), plan.embed)
    source = source.behind_embedding(leaves["embed"])
    experts_per_token = []
    for i, block_plan in progress(list(enumerate(plan.blocks)), "compressing"):
        if i < layers:
            name, block = f"layers.{i}", model.layers[i]
            sums = source.block(i, block, block_plan)
        else:
            name, mtp = f"mtp.{i - layers}.block", model.mtp[i - layers]
            block = mtp.block
            sums = source.mtp(i - layers, block, block_plan)
            own = compress_mtp(mtp, block_plan, sums, partial(within, rounder, f"mtp.{i - layers}"))
            leaves |= {f"mtp.{i - layers}.{name}": leaf for name, leaf in own.items()}
        compressed = compress_block(block, block_plan, sums, partial(within, rounder, name))
        if i < layers:
            source = source.behind_block(compressed)
        leaves |= {f"{name}.{own}": leaf for own, leaf in named_leaves(compressed).items()}
        experts_per_token.append(compressed.experts_per_token)
    leaves["head"] = requantize_once(rounder, "head", model.head.get_value(), source.head_inputs(), plan.head)
    return DeepseekV3(model.config, leaves.__getitem__, experts_per_token)


def embedding_inputs(model: DeepseekV3) -> Inputs:
    """The embedding's input is a choice of a row: all its columns weigh alike."""
    return Inputs(jnp.ones(model.config.hidden_size))
