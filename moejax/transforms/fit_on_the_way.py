"""Blocks fitted (see `fit_block`) while a model is compressed from its embedding to its head."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, Inputs
from moejax.formats import Leaf
from moejax.model import Config
from moejax.model.deepseek_v3 import Block
from moejax.model.hidden_states import HiddenStates, Keep
from moejax.model.sliced import SlicedBlock, SlicedMtp, sliced, through
from moejax.model.steps import run_attention
from moejax.planning import BlockPlan
from moejax.transforms.fit_block import Passing, fit_block
from moejax.transforms.on_the_way import StatisticsOnTheWay
from moejax.transforms.rounder import Rounder


class Fitted(StatisticsOnTheWay):
    """Others' statistics; and every decoder block is fitted, by states of the compressed model and of the original,
    which go along, and stays so where that brings it nearer to the original on chunks held out too."""

    def __init__(
        self,
        others: StatisticsOnTheWay,
        config: Config,
        chunks: np.ndarray,
        held_out: np.ndarray,
        rounder: Rounder,
        batch: int,
        kept: Keep,
    ):
        self._others, self._rounder, self._kept = others, rounder, kept
        self._fit, self._held_out = (_Beside(config, own, batch, kept) for own in (chunks, held_out))
        self._statistics: BlockStatistics | None = None

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None:
        for own in (self._fit, self._held_out):
            own.original.embedding(embedding)
            own.compressed.embedding(compressed)
        self._others.embedding(embedding, compressed)

    def block(self, index: int, block: SlicedBlock, plan: BlockPlan) -> BlockStatistics:
        self._statistics = self._others.block(index, block, plan)
        return self._statistics

    def fitted(self, index: int, block: SlicedBlock, plan: BlockPlan, compressed: Block) -> Block:
        assert self._statistics is not None, "a block is fitted behind what its statistics are asked for"
        own, by = self._fit.original, self._fit.original.by
        attended = [self._kept(run_attention(block.trunk, jnp.asarray(x_BTD), by)) for x_BTD in own.states]
        for beside in (self._fit, self._held_out):
            beside.original.run(index, block)
        passing = Passing(self._fit.compressed.states, attended, own.states, by)
        survivors = range(block.num_experts) if plan.keep is None else plan.keep
        given = passing, self._statistics, self._rounder, f"layers.{index}", self._kept
        found = fit_block(block, compressed, survivors, *given)
        return min((found, compressed), key=self._held_out.lack)

    def behind(self, index: int, compressed: Block) -> None:
        self._statistics = None
        for own in (self._fit, self._held_out):
            own.compressed.run(index, sliced(compressed))
        self._others.behind(index, compressed)

    def pass_by(self, index: int, block: SlicedBlock, compressed: Callable[[], Block]) -> None:
        become = sliced(compressed())
        for own in (self._fit, self._held_out):
            own.original.run(index, block)
            own.compressed.run(index, become)
        self._others.pass_by(index, block, compressed)

    def norm(self, gain_D: jax.Array) -> None:
        self._others.norm(gain_D)

    def mtp(self, depth: int, mtp: SlicedMtp, plan: BlockPlan) -> BlockStatistics:
        return self._others.mtp(depth, mtp, plan)

    def head(self, head: Leaf) -> Inputs:
        return self._others.head(head)


class _Beside:
    """States of the original and of the compressed model, on some chunks."""

    def __init__(self, config: Config, chunks: np.ndarray, batch: int, kept: Keep):
        batches = [jnp.asarray(chunks[i : i + batch]) for i in range(0, len(chunks), batch)]
        begun = partial(HiddenStates, config, batches, jnp.float32, kept=kept)
        self.original, self.compressed = begun(), begun()

    def lack(self, block: Block) -> float:
        """What the outputs of the next block, whose original's are there already, lack of them: the sum of squares."""
        given: Iterator[jax.Array] = map(jnp.asarray, self.compressed.states)
        pairs = zip(through(sliced(block), given, self.compressed.by), self.original.states, strict=True)
        return sum(float(_squares(y_BTD, jnp.asarray(wanted_BTD))) for y_BTD, wanted_BTD in pairs)


@jax.jit
def _squares(y_BTD: jax.Array, wanted_BTD: jax.Array) -> jax.Array:
    return jnp.sum((y_BTD - wanted_BTD) ** 2)
