"""Statistics of a model's parts while they are compressed one after another: known before, or made on the way.

Which hidden states go along and are handed on is all that tells parallel calibration, on what the original's blocks put
out, from sequential calibration, on what the compressed ones do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, Calibration, Inputs, OutputWeights, Statistics, unseen_experts
from moejax.formats import Leaf
from moejax.model import Config, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.hidden_states import WITHIN, Keep, as_it_is
from moejax.model.leaves import Weight
from moejax.model.sliced import SlicedBlock, SlicedMtp, sliced
from moejax.model.weights import IN_BLOCK
from moejax.planning import BlockPlan
from moejax.transforms.choose_damping import choose_damping_of_block, choose_damping_of_matrix, has_few_tokens
from moejax.transforms.compress_block import only_survivors


class StatisticsOnTheWay:
    """Where statistics come from while a model is compressed from its embedding to its head. What goes along is told of
    every part in the order of the methods; nothing does unless a class says so."""

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None:
        """The embedding, and what it has become."""

    def block(self, index: int, block: SlicedBlock, plan: BlockPlan) -> BlockStatistics:
        """Of decoder block `index`, which comes next."""
        raise NotImplementedError

    def fitted(self, index: int, block: SlicedBlock, plan: BlockPlan, compressed: Block) -> Block:
        """What becomes of what the block was rounded to."""
        return compressed

    def behind(self, index: int, compressed: Block) -> None:
        """What the block has become."""

    def pass_by(self, index: int, block: SlicedBlock, compressed: Callable[[], Block]) -> None:
        """In place of both: a block that an earlier run has compressed, and how that is read."""

    def norm(self, gain_D: jax.Array) -> None:
        """The final norm's gain."""

    def mtp(self, depth: int, mtp: SlicedMtp, plan: BlockPlan) -> BlockStatistics:
        """Of MTP block `depth`."""
        raise NotImplementedError

    def head(self, head: Leaf) -> Inputs:
        """Of the head."""
        raise NotImplementedError


@dataclass(frozen=True)
class Known(StatisticsOnTheWay):
    """All statistics are there already."""

    statistics: Statistics

    def block(self, index: int, block: SlicedBlock, plan: BlockPlan) -> BlockStatistics:
        return self.statistics.blocks[index]

    def mtp(self, depth: int, mtp: SlicedMtp, plan: BlockPlan) -> BlockStatistics:
        return self.statistics.blocks[mtp.config.num_hidden_layers + depth]

    def head(self, head: Leaf) -> Inputs:
        return self.statistics.head_inputs()


@dataclass(frozen=True)
class Weighed(StatisticsOnTheWay):
    """Others' statistics, with what every layer's outputs are weighed by: `OutputWeights` of arrays, or what keeps
    them."""

    others: StatisticsOnTheWay
    outputs: Sequence[OutputWeights]

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None:
        self.others.embedding(embedding, compressed)

    def block(self, index: int, block: SlicedBlock, plan: BlockPlan) -> BlockStatistics:
        by = OutputWeights(*map(jnp.asarray, self.outputs[index]))
        return self.others.block(index, block, plan).weighing_outputs(by)

    def behind(self, index: int, compressed: Block) -> None:
        self.others.behind(index, compressed)

    def pass_by(self, index: int, block: SlicedBlock, compressed: Callable[[], Block]) -> None:
        self.others.pass_by(index, block, compressed)

    def norm(self, gain_D: jax.Array) -> None:
        self.others.norm(gain_D)

    def mtp(self, depth: int, mtp: SlicedMtp, plan: BlockPlan) -> BlockStatistics:
        return self.others.mtp(depth, mtp, plan)

    def head(self, head: Leaf) -> Inputs:
        return self.others.head(head)


@dataclass(frozen=True)
class Unseen(StatisticsOnTheWay):
    """Nothing went through the model: every input counts alike, every expert as if one token had chosen it."""

    config: Config

    def block(self, index: int, block: SlicedBlock, plan: BlockPlan) -> BlockStatistics:
        return self._of(named_leaves(block.trunk), block.is_moe)

    def mtp(self, depth: int, mtp: SlicedMtp, plan: BlockPlan) -> BlockStatistics:
        own = {name: leaf for name, leaf in named_leaves(mtp.outer).items() if not name.startswith("block.")}
        return self._of(own | named_leaves(mtp.block.trunk), mtp.block.is_moe)

    def head(self, head: Leaf) -> Inputs:
        return Inputs(jnp.ones(head.shape[-1]))

    def _of(self, leaves: Mapping[str, Weight], is_moe: bool) -> BlockStatistics:
        input2 = {name: jnp.ones(own.shape[-1]) for name, own in leaves.items() if IN_BLOCK[name].may_be_rounded}
        return BlockStatistics(jnp.ones(()), input2, unseen_experts(self.config) if is_moe else None)


@dataclass(frozen=True)
class Observed(StatisticsOnTheWay):
    """Statistics of the original's hidden states, which go along; damping is chosen on those of chunks held out."""

    calibration: Calibration
    held_out: Calibration | None

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None:
        for own in self._all():
            own.embedding(embedding)

    def block(self, index: int, block: SlicedBlock, plan: BlockPlan) -> BlockStatistics:
        return self._damped(block, lambda own: own.through(index, block))

    def pass_by(self, index: int, block: SlicedBlock, compressed: Callable[[], Block]) -> None:
        for own in self._all():
            own.through(index, block)  # as in `block`: what another compilation puts out may differ in its last bits

    def norm(self, gain_D: jax.Array) -> None:
        for own in self._all():
            own.norm(gain_D)

    def mtp(self, depth: int, mtp: SlicedMtp, plan: BlockPlan) -> BlockStatistics:
        return self._damped(mtp, lambda own: own.observe_mtp(depth, mtp))

    def head(self, head: Leaf) -> Inputs:
        inputs = self.calibration.head_inputs()
        if self.held_out is None:
            return inputs
        damping = choose_damping_of_matrix(head, inputs, self.held_out.head_inputs())
        return inputs if damping is None else inputs._replace(damping=damping)

    def _damped(
        self, part: SlicedBlock | SlicedMtp, observe: Callable[[Calibration], BlockStatistics]
    ) -> BlockStatistics:
        sums = observe(self.calibration)
        return sums if self.held_out is None else choose_damping_of_block(part, sums, observe(self.held_out))

    def _all(self) -> list[Calibration]:
        return [self.calibration] if self.held_out is None else [self.calibration, self.held_out]


def observed(
    config: Config,
    chunks: np.ndarray,
    held_out: np.ndarray,
    *,
    hessians: bool,
    batch: int = 8,
    kept: Keep = as_it_is,
    within: int = WITHIN,
) -> Observed:
    """On token chunks (N, T); with Hessians, and where tokens are few, damping is chosen on those held out. `kept` and
    `within` as in `Calibration`."""
    begun = partial(Calibration, config, batch=batch, hessians=hessians, kept=kept, within=within)
    is_damped = hessians and has_few_tokens(config, chunks.size)
    return Observed(begun(chunks), begun(held_out) if is_damped else None)


@dataclass(frozen=True)
class Followed(StatisticsOnTheWay):
    """Statistics of the compressed model's hidden states, which go along; damping is chosen for the original's."""

    calibration: Calibration
    original: StatisticsOnTheWay | None

    def embedding(self, embedding: Leaf, compressed: Leaf) -> None:
        self.calibration.embedding(compressed)
        if self.original is not None:
            self.original.embedding(embedding, compressed)

    def block(self, index: int, block: SlicedBlock, plan: BlockPlan) -> BlockStatistics:
        damped = None if self.original is None else self.original.block(index, block, plan).without_hessians()
        sums = self.calibration.observe(index, only_survivors(block, plan))
        return sums if damped is None else sums.damped_as(damped)

    def behind(self, index: int, compressed: Block) -> None:
        self.calibration.run(index, sliced(compressed))

    def pass_by(self, index: int, block: SlicedBlock, compressed: Callable[[], Block]) -> None:
        self.behind(index, compressed())
        if self.original is not None:
            self.original.pass_by(index, block, compressed)

    def norm(self, gain_D: jax.Array) -> None:
        self.calibration.norm(gain_D)
        if self.original is not None:
            self.original.norm(gain_D)

    def mtp(self, depth: int, mtp: SlicedMtp, plan: BlockPlan) -> BlockStatistics:
        damped = None if self.original is None else self.original.mtp(depth, mtp, plan).without_hessians()
        sums = self.calibration.observe_mtp(depth, replace(mtp, block=only_survivors(mtp.block, plan)))
        return sums if damped is None else sums.damped_as(damped)

    def head(self, head: Leaf) -> Inputs:
        inputs = self.calibration.head_inputs()
        return inputs if self.original is None else inputs._replace(damping=self.original.head(head).damping)
