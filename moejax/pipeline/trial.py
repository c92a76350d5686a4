"""Plans tried out: the true KL divergence of what each makes of the model, all of them in one walk over its blocks."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, Inputs
from moejax.formats import Leaf
from moejax.model import Config, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.moe import Experts, MoE
from moejax.model.sliced import Entered, SlicedBlock
from moejax.model.source import Source, Step, walk
from moejax.pipeline.calibrated import Calibrated, KeptStatistics
from moejax.pipeline.crossing import AlternativeOf, Inside, Run
from moejax.pipeline.room import NO_ROOM, Room
from moejax.pipeline.sampled import seen_by_variants
from moejax.pipeline.variants import Changed, Variants
from moejax.pipeline.work import Work
from moejax.pipeline.working_copy import dense_experts, dense_trunk, in_slots
from moejax.planning import BlockPlan, Plan
from moejax.planning.plan import digest
from moejax.progress import Progress, counted
from moejax.transforms.compress import embedding_inputs
from moejax.transforms.compress_block import compressed_slice, only_survivors, rounded_leaves
from moejax.transforms.experts_per_token import fit_routing_scale
from moejax.transforms.on_the_way import StatisticsOnTheWay
from moejax.transforms.rounder import Rounder

# In what is kept of a walk, the routing scales that were fitted so far, by try and layer.
_SCALES = "routing scales"


@dataclass(frozen=True)
class Try:
    """A plan with other numbers of experts per token, one a layer, and with the least-squares routing scales or 1."""

    plan: Plan
    experts_per_token: tuple[int, ...]
    is_scaled: bool

    @cached_property
    def plan_digest(self) -> str:
        return digest(self.plan)

    @cached_property
    def name(self) -> str:
        per_token = ",".join(map(str, self.experts_per_token))
        return f"plan {self.plan_digest} with {per_token} experts per token{', scaled' * self.is_scaled}"


class Tried(NamedTuple):
    """The routing scales of every layer that were tried, 1 in dense ones, and the true mean KL, nats."""

    routing_scales: tuple[float, ...]
    divergence: float


@dataclass(frozen=True)
class Trials:
    """What trying plans out needs: what is compressed, its statistics, the chunks held out, on which plans are tried,
    or on some of them where prices come from a sample. The rounder remembers what it has rounded, the work what was
    measured, `known` what was tried, by name."""

    source: Source
    calibrated: Calibrated
    statistics: KeptStatistics
    rounder: Rounder
    work: Work
    room: Room = NO_ROOM
    known: dict[str, Tried] = field(default_factory=dict)

    def of(self, tries: Sequence[Try], progress: Progress) -> list[Tried]:
        """Each tried out, those that have not been before in one walk over the model."""
        new = list({own.name: own for own in tries if own.name not in self.known}.values())
        if new:
            self.known.update(zip((own.name for own in new), self._walked(new, progress), strict=True))
        return [self.known[own.name] for own in tries]

    def _walked(self, tries: Sequence[Try], progress: Progress) -> list[Tried]:
        """Each tried out, unless the work knows."""
        names = [own.name for own in tries]
        stage = f"trying {sha256(json.dumps(names).encode()).hexdigest()[:16]}"

        def found() -> list[tuple[Sequence[float], float]]:
            probes_BT = seen_by_variants(self.calibrated.held_out, self.rounder)
            step = _Trying(self.source.config, tries, probes_BT, self.rounder, self.work, stage, self.room)
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
        probes_BT: np.ndarray,
        rounder: Rounder,
        work: Work,
        stage: str,
        room: Room,
    ):
        self.scales: dict[str, list[float]] = {own.name: [] for own in tries}
        self.divergences: dict[str, float] = {}
        self._tries, self._rounder, self._work, self._stage = tries, rounder, work, stage
        self._variants = Variants(config, probes_BT, room)

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
            rows = self._variants.used_rows(embedding)
            rounded = partial(self._outer, self._variants.rows_name, rows, embedding_inputs(self._variants.config))
            self._variants.embedding(embedding, ((own.name, rounded(own.plan.embed)) for own in self._tries))

    def block(self, index: int, block: SlicedBlock) -> None:
        if index <= self._passed:
            self._statistics.pass_by(index, block, block.whole)
            return
        sums = self._statistics.block(index, block, BlockPlan())
        layer = _Layer(index, block, self._tries, sums, self._rounder, self._variants)
        self._variants.block(index, layer.dense, layer.changed(), layer.alternatives)
        for own in self._tries:
            self.scales[own.name].append(layer.scale_of(own))
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
        return self._rounder.matrix(name, leaf, inputs, target)


class _Layer:
    """A decoder block as tries have it, dense, in the original's shapes; each plan's is compressed once.

    An alternative of its experts is what a plan makes of them, by the plan's digest.
    """

    def __init__(
        self,
        index: int,
        block: SlicedBlock,
        tries: Sequence[Try],
        statistics: BlockStatistics,
        rounder: Rounder,
        variants: Variants,
    ):
        self.dense = replace(block, trunk=dense_trunk(block.trunk))
        self._index, self._block, self._tries, self._variants = index, block, tries, variants
        self._name = f"layers.{index}"
        self._statistics, self._rounder = statistics, rounder
        self._plans = {own.plan_digest: own.plan.blocks[index] for own in tries}
        self._fitted: dict[tuple[str, int], float] = {}
        self._trunks: dict[str, Block] = {}

    def alternatives(self, members: Sequence[int], experts: Experts) -> AlternativeOf:
        """What plans make of some experts."""
        experts = dense_experts(experts)  # once for all plans

        def of(plan: Any) -> Experts:
            if plan is None:
                return experts
            compressed = compressed_slice(
                members, experts, self._plans[plan], self._statistics, self._rounder, self._name
            )
            return in_slots(experts, members[0], compressed)

        return of

    def changed(self) -> Iterator[tuple[str, Changed] | Run]:
        """The block of every try, plan by plan; first, of those that are scaled, the runs that the scales are fitted
        by: of the model's own states through the try's experts."""
        for plan in self._plans:
            tries = [own for own in self._tries if own.plan_digest == plan]
            alternative = plan if self._block.is_moe else None
            if self._block.is_moe:
                for per_token in dict.fromkeys(self._per_token(own) for own in tries if own.is_scaled):
                    yield Run(partial(self._routed, plan, per_token), partial(self._fit, plan, per_token), alternative)
            for own in tries:
                trunk = partial(self._trunk, plan, self._per_token(own))
                yield own.name, Changed(trunk, alternative, partial(self.scale_of, own))

    def scale_of(self, own: Try) -> float:
        """The routing scale of a try, once its fit has ended; 1 in dense layers."""
        is_fitted = own.is_scaled and self._block.is_moe
        return self._fitted[own.plan_digest, self._per_token(own)] if is_fitted else 1.0

    def _per_token(self, own: Try) -> int:
        return own.experts_per_token[self._index]

    def _trunk(self, plan: str, per_token: int) -> Block:
        """Dense, its pruned experts never chosen; what its experts put out is not scaled."""
        if plan not in self._trunks:
            survivors, own = only_survivors(self._block, self._plans[plan]).trunk, self._plans[plan]
            rounded = rounded_leaves(named_leaves(survivors), own, self._statistics, self._rounder, self._name)
            self._trunks = {plan: dense_trunk(survivors.with_leaves(rounded))}
        trunk = self._trunks[plan]
        if not self._block.is_moe:
            return trunk
        return trunk.with_leaves({"mlp.routing_scale": jnp.ones((), jnp.float32)}, per_token)

    def _routed(self, plan: str, per_token: int) -> Entered:
        within, mlp = self._variants.within, self._trunk(plan, per_token).mlp
        assert isinstance(within, Entered) and isinstance(mlp, MoE)
        return within._replace(routing=_route(mlp, within.normed_TD))

    def _fit(self, plan: str, per_token: int, inside: Inside, fewer_TD: jax.Array | None) -> None:
        y_TD = self._variants.routed_TD
        assert y_TD is not None and fewer_TD is not None
        self._fitted[plan, per_token] = round(float(fit_routing_scale(y_TD, fewer_TD)), 4)


_route = jax.jit(MoE.route)
