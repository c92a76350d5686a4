"""A plan carried out: prune, adjust the activated experts, quantize; block by block, matrix by matrix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, Calibration, Inputs, Statistics
from moejax.formats import Leaf
from moejax.model import Config, DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block, MtpBlock
from moejax.model.hidden_states import HiddenStates
from moejax.model.leaves import Weight
from moejax.model.source import ModelSource, Source, Step, walk
from moejax.planning import BlockPlan, Plan
from moejax.progress import Progress, counted, silent
from moejax.transforms.check_plan import check_plan
from moejax.transforms.choose_damping import (
    choose_damping_of_block,
    choose_damping_of_matrix,
    has_few_tokens,
)
from moejax.transforms.compress_block import (
    Rounder,
    afresh,
    around,
    compress_block,
    compress_mtp,
    only_survivors,
    requantize_once,
    within,
)

# Takes the weights of one part of the compressed model, by name in the model.
Finished = Callable[[Mapping[str, Weight]], object]


def compress(
    model: DeepseekV3,
    plan: Plan,
    statistics: Statistics,
    *,
    rounder: Rounder = afresh,
    progress: Progress = silent,
) -> DeepseekV3:
    """The model as `plan` wants it; pure, so `jax.eval_shape` of it is the compressed model's shape and bytes.

    Weights are rounded with error feedback where the statistics hold Hessians. What the plan's method says of how a
    model is calibrated and made ready is up to whoever did it.

    Raises InputError if the plan's blocks, experts or weights are not the model's.
    """
    leaves: dict[str, Weight] = {}
    step = _Compression(model.config, plan, _Known(statistics), leaves.update, rounder)
    _walk(ModelSource(model), step, progress)
    return DeepseekV3(model.config, leaves.__getitem__, step.experts_per_token)


def calibrate_and_compress(
    source: Source,
    plan: Plan,
    chunks: np.ndarray,
    held_out: np.ndarray,
    finished: Finished,
    *,
    known: Statistics | None = None,
    rounder: Rounder = afresh,
    batch: int = 8,
    progress: Progress = silent,
) -> None:
    """`compress` with the statistics that the plan's method asks for, made of token chunks (N, T) on the way: of the
    model, one part and its statistics are in memory. Every compressed part is handed to `finished` and let go of.

    Statistics are those of `calibrate` and, where tokens are few, `choose_damping` on the chunks `held_out`. If the
    method is sequential, every block is calibrated on what the compressed blocks before it put out, with the experts
    and the routing that the plan gives it; its damping is chosen for the original's states all the same. Statistics of
    those that are `known`, damping chosen, are not made again, nor is what the rounder knows.

    Raises InputError as `compress` and `calibrate` do.
    """
    config, method = source.config, plan.method
    begun = partial(Calibration, config, batch=batch, hessians=method.error_feedback)
    is_damped = method.error_feedback and has_few_tokens(config, chunks.size)
    statistics: _StatisticsOnTheWay | None = None
    if known is not None:
        statistics = _Known(known)
    elif is_damped or not method.sequential:
        statistics = _Observed(begun(chunks), begun(held_out) if is_damped else None)
    if method.sequential:
        statistics = _Followed(begun(chunks), statistics)
    assert statistics is not None
    _walk(source, _Compression(config, plan, statistics, finished, rounder), progress)


def _walk(source: Source, step: "_Compression", progress: Progress) -> None:
    check_plan(step.plan, source.config)
    with counted(progress, source.config.num_blocks, "compressing") as tick:
        walk(source, step, mtp=source.config.num_nextn_predict_layers, head=True, tick=tick)


class _StatisticsOnTheWay(Protocol):
    """Where statistics come from while a model is compressed from its embedding to its head."""

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None: ...

    def block(self, index: int, block: Block, plan: BlockPlan) -> BlockStatistics: ...

    def behind(self, index: int, compressed: Block) -> None: ...

    def norm(self, gain_D: jax.Array) -> None: ...

    def mtp(self, depth: int, mtp: MtpBlock, plan: BlockPlan) -> BlockStatistics: ...

    def head(self, head: Leaf) -> Inputs: ...


class _Compression(Step):
    """A plan on its way through a model, every part handed to `finished`."""

    def __init__(
        self, config: Config, plan: Plan, statistics: _StatisticsOnTheWay, finished: Finished, rounder: Rounder
    ):
        self.plan = plan
        self.experts_per_token: list[int] = []
        self._config, self._statistics, self._finished, self._rounder = config, statistics, finished, rounder

    def embedding(self, embedding: Leaf) -> None:
        inputs = embedding_inputs(self._config)
        compressed = requantize_once(self._rounder, "embed", embedding, inputs, self.plan.embed)
        self._statistics.embedding(embedding, compressed)
        self._finished({"embed": compressed})

    def block(self, index: int, block: Block) -> None:
        name, plan = f"layers.{index}", self.plan.blocks[index]
        sums = self._statistics.block(index, block, plan)
        compressed = compress_block(block, plan, sums, partial(within, self._rounder, name))
        self._statistics.behind(index, compressed)
        self._finish(name, compressed, {})

    def norm(self, gain_D: jax.Array) -> None:
        self._statistics.norm(gain_D)
        self._finished({"norm": gain_D})

    def mtp(self, depth: int, mtp: MtpBlock) -> None:
        name, plan = f"mtp.{depth}", self.plan.blocks[self._config.num_hidden_layers + depth]
        sums = self._statistics.mtp(depth, mtp, plan)
        outer = compress_mtp(mtp, plan, sums, partial(within, self._rounder, name))
        compressed = compress_block(mtp.block, plan, sums, partial(within, self._rounder, f"{name}.block"))
        self._finish(f"{name}.block", compressed, {f"{name}.{own}": leaf for own, leaf in outer.items()})

    def head(self, head: Leaf) -> None:
        inputs = self._statistics.head(head)
        self._finished({"head": requantize_once(self._rounder, "head", head, inputs, self.plan.head)})

    def _finish(self, name: str, block: Block, beside: Mapping[str, Weight]) -> None:
        self.experts_per_token.append(block.experts_per_token)
        self._finished({**beside, **{f"{name}.{own}": leaf for own, leaf in named_leaves(block).items()}})


@dataclass(frozen=True)
class _Known:
    """All statistics are there already."""

    statistics: Statistics

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None:
        pass

    def block(self, index: int, block: Block, plan: BlockPlan) -> BlockStatistics:
        return self.statistics.blocks[index]

    def behind(self, index: int, compressed: Block) -> None:
        pass

    def norm(self, gain_D: jax.Array) -> None:
        pass

    def mtp(self, depth: int, mtp: MtpBlock, plan: BlockPlan) -> BlockStatistics:
        return self.statistics.blocks[mtp.config.num_hidden_layers + depth]

    def head(self, head: Leaf) -> Inputs:
        return self.statistics.head_inputs()


@dataclass(frozen=True)
class _Observed:
    """Statistics of the original's hidden states, which go along; damping is chosen on those of chunks held out."""

    calibration: Calibration
    held_out: Calibration | None

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None:
        for own in self._all():
            own.embedding(embedding)

    def block(self, index: int, block: Block, plan: BlockPlan) -> BlockStatistics:
        sums = self.calibration.through(index, block)
        if self.held_out is None:
            return sums
        return choose_damping_of_block(block, sums, self.held_out.through(index, block))

    def behind(self, index: int, compressed: Block) -> None:
        pass

    def norm(self, gain_D: jax.Array) -> None:
        for own in self._all():
            own.norm(gain_D)

    def mtp(self, depth: int, mtp: MtpBlock, plan: BlockPlan) -> BlockStatistics:
        sums = self.calibration.observe_mtp(depth, mtp)
        if self.held_out is None:
            return sums
        return choose_damping_of_block(mtp, sums, self.held_out.observe_mtp(depth, mtp))

    def head(self, head: Leaf) -> Inputs:
        inputs = self.calibration.head_inputs()
        if self.held_out is None:
            return inputs
        damping = choose_damping_of_matrix(head, inputs, self.held_out.head_inputs())
        return inputs if damping is None else inputs._replace(damping=damping)

    def _all(self) -> list[Calibration]:
        return [self.calibration] if self.held_out is None else [self.calibration, self.held_out]


@dataclass(frozen=True)
class _Followed:
    """Statistics of the compressed model's hidden states, which go along; damping is chosen for the original's."""

    calibration: Calibration
    original: _StatisticsOnTheWay | None

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None:
        self.calibration.embedding(compressed)
        if self.original is not None:
            self.original.embedding(embedding, compressed)

    def block(self, index: int, block: Block, plan: BlockPlan) -> BlockStatistics:
        sums = self.calibration.observe(index, only_survivors(block, plan))
        return sums if self.original is None else sums.damped_as(self.original.block(index, block, plan))

    def behind(self, index: int, compressed: Block) -> None:
        HiddenStates.block(self.calibration, index, compressed)

    def norm(self, gain_D: jax.Array) -> None:
        self.calibration.norm(gain_D)
        if self.original is not None:
            self.original.norm(gain_D)

    def mtp(self, depth: int, mtp: MtpBlock, plan: BlockPlan) -> BlockStatistics:
        sums = self.calibration.observe_mtp(depth, around(mtp, only_survivors(mtp.block, plan)))
        return sums if self.original is None else sums.damped_as(self.original.mtp(depth, mtp, plan))

    def head(self, head: Leaf) -> Inputs:
        inputs = self.calibration.head_inputs()
        return inputs if self.original is None else inputs._replace(damping=self.original.head(head).damping)


def embedding_inputs(config: Config) -> Inputs:
    """The embedding's input is a choice of a row: all its columns weigh alike."""
    return Inputs(jnp.ones(config.hidden_size))
