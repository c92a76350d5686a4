"""Plans tried out: the true KL divergence of what each makes of the model, all of them in one walk over its blocks."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, Inputs
from moejax.formats import Leaf
from moejax.model import Config
from moejax.model.deepseek_v3 import Block
from moejax.model.moe import MoE
from moejax.model.source import Source, Step, walk
from moejax.pipeline.calibrated import Calibrated, KeptStatistics
from moejax.pipeline.variants import Variants
from moejax.pipeline.work import Work
from moejax.pipeline.working_copy import dense_block, in_original_slots, with_leaves
from moejax.planning import BlockPlan, Plan
from moejax.planning.plan import digest
from moejax.progress import Progress, counted
from moejax.transforms.compress import embedding_inputs
from moejax.transforms.compress_block import Rounder, compress_block, requantize_once, within
from moejax.transforms.experts_per_token import fit_routing_scale
from moejax.transforms.on_the_way import StatisticsOnTheWay

# In what is kept of a walk, the routing scales that were fitted so far, by try and layer.
_SCALES = "routing scales"


@dataclass(frozen=True)
class Try:
    """A plan with other numbers of experts per token, one a layer, and with the least-squares routing scales or 1."""

    plan: Plan
    experts_per_token: tuple[int, ...]
    is_scaled: bool

    @cached_property
    def name(self) -> str:
        per_token = ",".join(map(str, self.experts_per_token))
        return f"plan {digest(self.plan)} with {per_token} experts per token{', scaled' * self.is_scaled}"


class Tried(NamedTuple):
    """The routing scales of every layer that were tried, 1 in dense ones, and the true mean KL, nats."""

    routing_scales: tuple[float, ...]
    divergence: float


@dataclass(frozen=True)
class Trials:
    """What trying plans out needs: what is compressed, its statistics, the chunks held out, on which plans are tried.
    The rounder remembers what it has rounded, the work what was measured."""

    source: Source
    calibrated: Calibrated
    statistics: KeptStatistics
    rounder: Rounder
    work: Work

    def of(self, tries: Sequence[Try], progress: Progress) -> list[Tried]:
        """Each tried out, in one walk over the model, unless the work knows."""
        names = [own.name for own in tries]
        stage = f"trying {sha256(json.dumps(names).encode()).hexdigest()[:16]}"

        def found() -> list[tuple[Sequence[float], float]]:
            step = _Trying(self.source.config, tries, self.calibrated, self.rounder, self.work, stage)
            with counted(progress, self.source.config.num_hidden_layers, "trying plans") as tick:
                step.begin(self.statistics.on_the_way())
                walk(self.source, step, head=True, tick=tick)
            return [(step.scales[name], step.divergences[name]) for name in names]

        known = self.work.once(stage, found)
        self.work.drop_states(stage)
        return [Tried(tuple(scales), divergence) for scales, divergence in known]


class _Trying(Step):
    """The variants of a model that tries make."""

    def __init__(
        self,
        config: Config,
        tries: Sequence[Try],
        calibrated: Calibrated,
        rounder: Rounder,
        work: Work,
        stage: str,
    ):
        self.scales: dict[str, list[float]] = {own.name: [] for own in tries}
        self.divergences: dict[str, float] = {}
        self._tries, self._rounder, self._work, self._stage = tries, rounder, work, stage
        self._variants = Variants(config, calibrated.held_out)

    def begin(self, statistics: StatisticsOnTheWay) -> None:
        """With statistics on their way; behind the blocks that an earlier run has passed, if it has."""
        self._statistics, self._passed = statistics, -1
        kept = self._work.states(self._stage)
        if kept is not None:
            self._passed, states = kept
            scales_NL = states.pop(_SCALES)
            self.scales = {own.name: scales_L.tolist() for own, scales_L in zip(self._tries, scales_NL, strict=True)}
            self._variants.restore(states)

    def embedding(self, embedding: Leaf) -> None:
        self._statistics.embedding(embedding, embedding)
        if self._passed < 0:
            rounded = partial(self._outer, "embed", embedding, embedding_inputs(self._variants.config))
            self._variants.embedding(embedding, ((own.name, rounded(own.plan.embed)) for own in self._tries))

    def block(self, index: int, block: Block) -> None:
        if index <= self._passed:
            self._statistics.pass_by(index, block, lambda: block)
            return
        sums = self._statistics.block(index, block, BlockPlan())
        original = dense_block(block)
        self._variants.block(index, original, self._changed(index, block, original, sums))
        states = {**self._variants.arrays(), _SCALES: np.asarray([self.scales[own.name] for own in self._tries])}
        self._work.keep_states(self._stage, index, states)

    def norm(self, gain_D: jax.Array) -> None:
        self._statistics.norm(gain_D)
        self._gain_D = gain_D

    def head(self, head: Leaf) -> None:
        rounded = partial(self._outer, "head", head, self._statistics.head(head))
        heads = ((own.name, rounded(own.plan.head)) for own in self._tries)
        self.divergences = self._variants.divergences(self._gain_D, head, heads)

    def _outer(self, name: str, leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
        return requantize_once(self._rounder, name, leaf, inputs, target)

    def _changed(self, index: int, block: Block, original: Block, sums: BlockStatistics) -> Iterator[tuple[str, Block]]:
        """The block of every try, dense, in the original's shapes; each plan's is compressed once."""
        x_TD = self._variants.experts_input(original) if isinstance(original.mlp, MoE) else None
        rounder = partial(within, self._rounder, f"layers.{index}")
        for plan in {digest(own.plan): own.plan for own in self._tries}.values():
            compressed = compress_block(block, plan.blocks[index], sums, rounder)
            dense = in_original_slots(original, compressed, plan.blocks[index].keep)
            for own in (own for own in self._tries if own.plan == plan):
                per_token, scale = own.experts_per_token[index], 1.0
                if own.is_scaled and x_TD is not None:
                    scale = _fitted_scale(original, dense, x_TD, per_token)
                self.scales[own.name].append(scale)
                yield own.name, _adjusted(dense, per_token, scale)


def _adjusted(block: Block, experts_per_token: int, scale: float) -> Block:
    if not isinstance(block.mlp, MoE):
        return block
    return with_leaves(block, {"mlp.routing_scale": jnp.float32(scale)}, experts_per_token)


def _fitted_scale(original: Block, block: Block, x_TD: jax.Array, experts_per_token: int) -> float:
    fewer = _adjusted(block, experts_per_token, 1.0).mlp
    assert isinstance(original.mlp, MoE) and isinstance(fewer, MoE)
    return round(float(fit_routing_scale(original.mlp, fewer, x_TD)), 4)
