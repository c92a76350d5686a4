"""A plan carried out: prune, adjust the activated experts, quantize; block by block, matrix by matrix."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import Calibration, Inputs, OutputWeights, Statistics, output_weights
from moejax.formats import Leaf
from moejax.model import Config, DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.hidden_states import WITHIN, Keep, as_it_is
from moejax.model.leaves import Weight, prefixed
from moejax.model.sliced import SlicedBlock, SlicedMtp
from moejax.model.source import ModelSource, Source, Step, walk
from moejax.planning import Plan
from moejax.progress import Progress, counted, silent
from moejax.transforms.check_plan import check_plan
from moejax.transforms.compress_block import as_planned, compress_block, compress_mtp
from moejax.transforms.fit_on_the_way import Fitted
from moejax.transforms.on_the_way import Followed, Known, StatisticsOnTheWay, Weighed, observed
from moejax.transforms.rounder import AFRESH, Rounder


class Parts(Protocol):
    """Where the parts of a compressed model go, each as its weights by name in the model."""

    def add(self, leaves: Mapping[str, Weight]) -> object:
        """Takes a part."""
        ...

    def known(self, name: str) -> Callable[[], Mapping[str, Weight]] | None:
        """Reads the weights of the block called `name`, by name within it, if an earlier run has made them."""
        ...


class Collected:
    """All the weights of a compressed model, by name."""

    def __init__(self) -> None:
        self.leaves: dict[str, Weight] = {}

    def add(self, leaves: Mapping[str, Weight]) -> None:
        self.leaves.update(leaves)

    def known(self, name: str) -> None:
        """Nothing is."""


def compress(
    model: DeepseekV3,
    plan: Plan,
    statistics: Statistics,
    *,
    rounder: Rounder = AFRESH,
    progress: Progress = silent,
) -> DeepseekV3:
    """The model as `plan` wants it; pure, so `jax.eval_shape` of it is the compressed model's shape and bytes.

    Weights are rounded with error feedback where the statistics hold Hessians. What the plan's method says of how a
    model is calibrated and made ready is up to whoever did it.

    Raises InputError if the plan's blocks, experts or weights are not the model's.
    """
    parts = Collected()
    step = _Compression(model.config, plan, Known(statistics), parts, rounder)
    _walk(ModelSource(model), step, progress)
    return DeepseekV3(model.config, parts.leaves.__getitem__, step.experts_per_token)


def calibrate_and_compress(
    source: Source,
    plan: Plan,
    chunks: np.ndarray,
    held_out: np.ndarray,
    parts: Parts,
    *,
    known: Statistics | None = None,
    outputs: Sequence[OutputWeights] | None = None,
    rounder: Rounder = AFRESH,
    batch: int = 8,
    kept: Keep = as_it_is,
    within: int = WITHIN,
    progress: Progress = silent,
) -> None:
    """`compress` with the statistics that the plan's method asks for, made of token chunks (N, T) on the way: of the
    model, one part and its statistics are in memory. Every compressed part is added to `parts` and let go of; a block
    that is known there is not compressed again.

    Statistics are those of `calibrate` and, where tokens are few, `choose_damping` on the chunks `held_out`. If the
    method is sequential, every block is calibrated on what the compressed blocks before it put out, with the experts
    and the routing that the plan gives it; its damping is chosen for the original's states all the same. If it has
    output_fit, what gives hidden states in a rounded block is fitted to the original's (`fit_block`), where that holds
    on `held_out` too. Statistics that are `known`, damping chosen, are not made again, nor what `outputs` are weighed
    by, nor what the rounder knows. `kept` puts states and experts' Hessians away until they are needed, and about
    `within` bytes of states are in memory within a block.

    Raises InputError as `compress` and `calibrate` do.
    """
    config, method = source.config, plan.method
    statistics: StatisticsOnTheWay | None = None
    if known is not None:
        statistics = Known(known)
    else:
        made = observed(config, chunks, held_out, hessians=method.error_feedback, batch=batch, kept=kept, within=within)
        statistics = made if made.held_out is not None or not method.sequential else None
    if method.sequential:
        followed = Calibration(config, chunks, batch, hessians=method.error_feedback, kept=kept, within=within)
        statistics = Followed(followed, statistics)
    assert statistics is not None
    if method.row_feedback:
        outputs = outputs or output_weights(source, chunks, batch, kept=kept, progress=progress)
        statistics = Weighed(statistics, outputs)
    if method.output_fit:
        statistics = Fitted(statistics, config, chunks, held_out, rounder.afresh, batch, kept)
    compress_by(source, plan, statistics, parts, rounder=rounder, progress=progress)


def compress_by(
    source: Source,
    plan: Plan,
    statistics: StatisticsOnTheWay,
    parts: Parts,
    *,
    rounder: Rounder = AFRESH,
    progress: Progress = silent,
) -> None:
    """`compress` with statistics on their way; every compressed part is added to `parts` and let go of."""
    _walk(source, _Compression(source.config, plan, statistics, parts, rounder), progress)


def _walk(source: Source, step: "_Compression", progress: Progress) -> None:
    check_plan(step.plan, source.config)
    with counted(progress, source.config.num_blocks, "compressing") as tick:
        walk(source, step, mtp=source.config.num_nextn_predict_layers, head=True, tick=tick)


class _Compression(Step):
    """A plan on its way through a model."""

    def __init__(self, config: Config, plan: Plan, statistics: StatisticsOnTheWay, parts: Parts, rounder: Rounder):
        self.plan = plan
        self.experts_per_token: list[int] = []
        self._config, self._statistics, self._parts, self._rounder = config, statistics, parts, rounder

    def embedding(self, embedding: Leaf) -> None:
        inputs = embedding_inputs(self._config)
        compressed = self._rounder.matrix("embed", embedding, inputs, self.plan.embed)
        self._statistics.embedding(embedding, compressed)
        self._parts.add({"embed": compressed})

    def block(self, index: int, block: SlicedBlock) -> None:
        name, plan = f"layers.{index}", self.plan.blocks[index]
        known = self._parts.known(name)
        if known is not None:
            self._statistics.pass_by(index, block, lambda: as_planned(block, plan, known()))
            return
        sums = self._statistics.block(index, block, plan)
        compressed = compress_block(block, plan, sums, self._rounder, name)
        compressed = self._statistics.fitted(index, block, plan, compressed)
        self._statistics.behind(index, compressed)
        self._finish(name, compressed, {})

    def norm(self, gain_D: jax.Array) -> None:
        self._statistics.norm(gain_D)
        self._parts.add({"norm": gain_D})

    def mtp(self, depth: int, mtp: SlicedMtp) -> None:
        name, plan = f"mtp.{depth}", self.plan.blocks[self._config.num_hidden_layers + depth]
        if self._parts.known(name) is not None:
            return
        sums = self._statistics.mtp(depth, mtp, plan)
        outer = compress_mtp(mtp.outer, plan, sums, self._rounder, name)
        compressed = compress_block(mtp.block, plan, sums, self._rounder, f"{name}.block")
        self._finish(f"{name}.block", compressed, prefixed(name, outer))

    def head(self, head: Leaf) -> None:
        inputs = self._statistics.head(head)
        self._parts.add({"head": self._rounder.matrix("head", head, inputs, self.plan.head)})

    def _finish(self, name: str, block: Block, beside: Mapping[str, Weight]) -> None:
        self.experts_per_token.append(block.experts_per_token)
        self._parts.add({**beside, **prefixed(name, named_leaves(block))})


def embedding_inputs(config: Config) -> Inputs:
    """The embedding's input is a choice of a row: all its columns weigh alike."""
    return Inputs(jnp.ones(config.hidden_size))
