"""What a model is calibrated on, and its statistics for walks that come one after another."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from moejax.calibrate import BlockStatistics, Inputs, OutputWeights, Statistics
from moejax.formats import Leaf, payload_bytes
from moejax.model import Config
from moejax.model.deepseek_v3 import Block
from moejax.model.hidden_states import WITHIN, Keep, as_it_is
from moejax.model.sliced import SlicedBlock, SlicedMtp
from moejax.planning import BlockPlan, Method
from moejax.transforms.on_the_way import Known, Observed, StatisticsOnTheWay, Weighed, observed


class Calibrated(NamedTuple):
    """Token chunks (N, T) that a model is calibrated on, and those held out, on which damping is chosen and plans are
    tried."""

    chunks: np.ndarray
    held_out: np.ndarray


class KeptStatistics:
    """Statistics of the original's states: the first walk over its parts makes them and keeps them, if they take no
    more than `most_bytes`; if they do, every walk makes them again. They are the same. outputs: what layers' outputs
    are weighed by, if they are."""

    def __init__(
        self,
        config: Config,
        method: Method,
        calibrated: Calibrated,
        most_bytes: int,
        kept: Keep = as_it_is,
        within: int = WITHIN,
        outputs: Sequence[OutputWeights] | None = None,
    ):
        self.known: Statistics | None = None
        self.outputs = outputs
        self._put, self._within = kept, within
        self._config, self._method, self._calibrated, self._most_bytes = config, method, calibrated, most_bytes

    def on_the_way(self) -> StatisticsOnTheWay:
        """For one walk."""
        own = self._unweighed()
        return own if self.outputs is None else Weighed(own, self.outputs)

    def _unweighed(self) -> StatisticsOnTheWay:
        if self.known is not None:
            return Known(self.known)
        made = observed(
            self._config, *self._calibrated, hessians=self._method.error_feedback, kept=self._put, within=self._within
        )
        return _Keeping(made, self, self._config.num_blocks) if self._most_bytes > 0 else made

    def keep(self, statistics: Statistics) -> None:
        """From now on these are known."""
        self.known = statistics

    def fit(self, kept: list[BlockStatistics]) -> bool:
        """Whether so many may be kept; if not, nothing is kept from now on."""
        if payload_bytes(kept) > self._most_bytes:
            self._most_bytes = 0
        return self._most_bytes > 0


class _Keeping(StatisticsOnTheWay):
    """Statistics that are made, and kept as long as they fit."""

    def __init__(self, made: Observed, kept: KeptStatistics, num_blocks: int):
        self._made, self._kept, self._num_blocks = made, kept, num_blocks
        self._blocks: list[BlockStatistics] | None = []

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None:
        self._made.embedding(embedding, compressed)

    def block(self, index: int, block: SlicedBlock, plan: BlockPlan) -> BlockStatistics:
        return self._keep(self._made.block(index, block, plan))

    def pass_by(self, index: int, block: SlicedBlock, compressed: Callable[[], Block]) -> None:
        if self._blocks is None:
            self._made.pass_by(index, block, compressed)
        else:
            self.block(index, block, BlockPlan())

    def norm(self, gain_D: jax.Array) -> None:
        self._made.norm(gain_D)

    def mtp(self, depth: int, mtp: SlicedMtp, plan: BlockPlan) -> BlockStatistics:
        return self._keep(self._made.mtp(depth, mtp, plan))

    def head(self, head: Leaf) -> Inputs:
        inputs = self._made.head(head)
        if self._blocks is not None and len(self._blocks) == self._num_blocks:
            outer = self._made.calibration.statistics()
            damping = None if self._made.held_out is None else jax.numpy.float32(inputs.damping)
            self._kept.keep(replace(outer, blocks=tuple(self._blocks), head_damping=damping))
        return inputs

    def _keep(self, sums: BlockStatistics) -> BlockStatistics:
        if self._blocks is not None:
            self._blocks.append(sums)
            if not self._kept.fit(self._blocks):
                self._blocks = None
        return sums
