"""What is measured of a model: one walk over its blocks, of each of which a few kilobytes are kept.

Of every block: the error that every format makes of every weight's outputs, rounded as it will be if the plan says so;
how much of the block's own output one format of each weight spoils, and so many experts pruned. Variants of the model
(`probes`) go along; their true KL divergence says in the end what spoiled outputs cost. `prices` puts it together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics
from moejax.formats import Leaf
from moejax.model import Config, Layout, named_leaves
from moejax.model.leaves import Weight
from moejax.model.moe import Experts
from moejax.model.sliced import SlicedBlock, SlicedMtp, experts_in_slice, slices_of
from moejax.model.source import Source, Step, walk
from moejax.model.weights import row_of
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.measured import Measured, block_measures
from moejax.pipeline.measured_layer import Errors, ExpertsIn, MeasuredLayer, scores_of
from moejax.pipeline.probes import changes_of, family_of
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.room import NO_ROOM, Room
from moejax.pipeline.rounded import ExpertsInFormats, InFormats, experts_in_formats, matrices_in_formats
from moejax.pipeline.sampled import OUTER, Sampled, experts_to_look_at, seen_by_variants
from moejax.pipeline.variants import Variants
from moejax.pipeline.work import Work
from moejax.pipeline.working_copy import dense_trunk
from moejax.planning import BlockPlan
from moejax.progress import Progress, counted
from moejax.transforms.compress import embedding_inputs
from moejax.transforms.on_the_way import StatisticsOnTheWay
from moejax.transforms.rounder import Rounder, experts_together

_STAGE = "measuring"


def measure(
    source: Source,
    recipe: Recipe,
    calibrated: Calibrated,
    statistics: Callable[[], StatisticsOnTheWay],
    rounder: Rounder,
    work: Work,
    progress: Progress,
    room: Room = NO_ROOM,
    sampled: Sampled | None = None,
) -> Measured:
    """Walk over what is compressed; probes are made on the chunks held out. What the work knows is not measured again.
    With `sampled`, which is the rounder then, errors come from a sample, which it remembers.

    A recipe without formats measures pruning alone. Raises InputError where a weight, an output or a divergence is not
    finite.
    """
    config = source.config
    step = _Measuring(config, recipe, calibrated, rounder, work, room, sampled)
    if not work.knows(_name("divergences")):
        # Rounding takes most of the time, where all is rounded, else what goes through the blocks.
        with counted(progress, _steps(config) if sampled is None else config.num_blocks, "measuring") as tick:
            step.begin(statistics(), tick)
            of_block = tick if sampled is not None else _nothing
            walk(source, step, mtp=config.num_nextn_predict_layers, head=True, tick=of_block)
    work.drop_states(_STAGE)
    return step.measured()


def _name(part: str | int) -> str:
    return f"measures of block {part}" if isinstance(part, int) else f"measures of {part}"


class _Measuring(Step):
    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        calibrated: Calibrated,
        rounder: Rounder,
        work: Work,
        room: Room,
        sampled: Sampled | None,
    ):
        self.config, self.recipe, self.rounder, self.work, self.sampled = config, recipe, rounder, work, sampled
        self.tokens_C = np.bincount(calibrated.chunks.reshape(-1), minlength=config.vocab_size)
        self.changes = changes_of(config, recipe.formats)
        self.variants = Variants(config, seen_by_variants(calibrated.held_out, rounder), room)
        self.found: dict[str, Any] = {}

    def begin(self, statistics: StatisticsOnTheWay, tick: Callable[[], object]) -> None:
        self.statistics, self.tick = statistics, tick
        self.passed = -1
        kept = self.work.states(_STAGE)
        if kept is not None and all(self.work.knows(_name(index)) for index in range(kept[0] + 1)):
            self.passed, states = kept
            self.variants.restore(states)

    def measured(self) -> Measured:
        def of(part: str | int) -> Any:
            name = _name(part)
            return self.found[name] if name in self.found else self.work.known(name)

        errors, relative = (
            {name: np.asarray(of(name)[kind][name]) for name in OUTER if of(name)[kind]}
            for kind in ("errors", "relative")
        )
        blocks = {i: block_measures(of(i)) for i in range(self.config.num_blocks)}
        return Measured(blocks, errors, of("divergences"), relative)

    def embedding(self, embedding: Leaf) -> None:
        self.statistics.embedding(embedding, embedding)
        inputs, weight_C = embedding_inputs(self.config), jnp.asarray(self.tokens_C, jnp.float32)
        own = InFormats(self.recipe.formats, self.rounder, "embed", embedding, lambda: inputs, weight_C)
        self._find("embed", lambda: self._errors_of(own))
        if self.passed < 0:
            rows = replace(own, name=self.variants.rows_name, leaf=self.variants.used_rows(embedding))
            self.variants.embedding(embedding, self._changed("embed", rows))

    def block(self, index: int, block: SlicedBlock) -> None:
        if index <= self.passed:
            self.statistics.pass_by(index, block, block.whole)
            return
        name, sums = f"layers.{index}", self.statistics.block(index, block, BlockPlan())
        weights = self._in_formats(name, named_leaves(block.trunk), sums)
        dense = replace(block, trunk=dense_trunk(block.trunk))
        in_formats = self._experts_in_formats(name, sums)
        errors = Errors(self.tick, self.sampled)
        errors.add(weights)
        self._look_at(block, sums, in_formats, errors)
        layer = MeasuredLayer(
            self.recipe, weights, dense.trunk, self.variants, sums, in_formats, errors, self.work.crew
        )
        self.variants.block(index, dense, chain(layer.runs(), layer.changed(index, self.changes)), layer.alternatives)
        self._find(index, layer.measures)
        self.work.keep_states(_STAGE, index, self.variants.arrays())

    def norm(self, gain_D: jax.Array) -> None:
        self.statistics.norm(gain_D)
        self.gain_D = gain_D

    def mtp(self, depth: int, mtp: SlicedMtp) -> None:
        name, sums = f"mtp.{depth}", self.statistics.mtp(depth, mtp, BlockPlan())
        around = {own: leaf for own, leaf in named_leaves(mtp.outer).items() if not own.startswith("block.")}

        def found() -> dict[str, Any]:
            errors = Errors(self.tick, self.sampled)
            errors.add(self._in_formats(name, around, sums))
            errors.add(self._in_formats(f"{name}.block", named_leaves(mtp.block.trunk), sums))
            in_formats = self._experts_in_formats(f"{name}.block", sums)
            self._look_at(mtp.block, sums, in_formats, errors)
            for members, experts in mtp.block.slices():
                errors.add_slice(members, in_formats(members, experts))
            return {**errors.measured(), "spoiled": {}, **scores_of(sums, self.recipe), "pruned": []}

        self._find(self.config.num_hidden_layers + depth, found)

    def head(self, head: Leaf) -> None:
        inputs = self.statistics.head(head)
        own = InFormats(self.recipe.formats, self.rounder, "head", head, lambda: inputs, jnp.ones(len(self.tokens_C)))
        self._find("head", lambda: self._errors_of(own))
        changed = self._changed("head", own)
        self._find("divergences", lambda: self.variants.divergences(self.gain_D, head, changed))

    def _errors_of(self, own: InFormats) -> dict[str, Any]:
        """Of embedding or head."""
        errors = Errors(lambda: None, self.sampled)
        errors.add({own.name: own})
        return errors.measured()

    def _look_at(self, block: SlicedBlock, sums: BlockStatistics, in_formats: ExpertsIn, errors: Errors) -> None:
        """At a sample of the block's experts, if that is how errors are found."""
        if self.sampled is not None and sums.experts is not None:
            members = experts_to_look_at(sums.experts)
            errors.look_at(in_formats(members, block.experts_of(members)))

    def _changed(self, name: str, own: InFormats) -> Iterator[tuple[str, Leaf]]:
        """What variants have in place of the embedding or the head."""
        for change in self.changes:
            if family_of(name) in change.families:
                yield change.name, own.rounded(int(change.level))

    def _in_formats(self, part: str, leaves: Mapping[str, Weight], sums: BlockStatistics) -> dict[str, InFormats]:
        return matrices_in_formats(part, leaves, sums, self.recipe.formats, self.rounder)

    def _experts_in_formats(self, block: str, sums: BlockStatistics) -> ExpertsIn:
        def of(members: Sequence[int], experts: Experts) -> Mapping[str, ExpertsInFormats]:
            assert sums.experts is not None
            return experts_in_formats(block, members, experts, sums.experts, self.recipe.formats, self.rounder)

        return of

    def _find(self, part: str | int, find: Callable[[], Any]) -> None:
        self.found[_name(part)] = self.work.once(_name(part), find)


def _nothing() -> None:
    """No step is done."""


def _steps(config: Config) -> int:
    """How often `tick` is called where all is rounded."""
    shapes = Layout(config).shapes()
    experts = [shape for name, shape in shapes.items() if row_of(name).role == "routed experts"]
    in_blocks = [
        name for name in shapes if row_of(name).may_be_rounded and row_of(name).role not in ("embedding", "head")
    ]
    slices = [len(own) for own in slices_of(config.n_routed_experts, experts_in_slice(config))] if experts else []
    return len(in_blocks) + sum(-(-own // experts_together(shape)) for shape in experts for own in slices)
