"""Plans tried out: the true KL divergence of what a plan makes of the model, on the probe's text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import jax.numpy as jnp

from moejax.calibrate import Statistics
from moejax.formats import dense
from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import Block
from moejax.pipeline.probe import Probe
from moejax.pipeline.rounded import RoundedWeights
from moejax.pipeline.work import Work
from moejax.pipeline.working_copy import in_original_slots
from moejax.planning import Plan
from moejax.transforms.compress import compress
from moejax.transforms.compress_block import Rounder


@dataclass(frozen=True)
class Trial:
    """What trying plans out needs. The rounder remembers what it has rounded, the work what was measured."""

    model: DeepseekV3
    probe: Probe
    statistics: Statistics
    rounder: Rounder = field(default_factory=RoundedWeights)
    work: Work = field(default_factory=Work)

    def compressed(self, plan: Plan) -> DeepseekV3:
        """The plan's model."""
        return compress(self.model, plan, self.statistics, rounder=self.rounder)

    def divergence(self, plan: Plan) -> float:
        """True mean KL of the plan's model, nats."""
        planned = PlannedModel(self, plan)
        return planned.divergence_with(planned.blocks)


@dataclass(frozen=True)
class PlannedModel:
    """A plan's model on trial, compressed when it is first needed."""

    trial: Trial
    plan: Plan

    @cached_property
    def compressed(self) -> DeepseekV3:
        return self.trial.compressed(self.plan)

    @cached_property
    def blocks(self) -> list[Block]:
        """Its layers in the original's shapes, dense."""
        layers = zip(self.trial.probe.blocks, self.compressed.layers, self.plan.blocks, strict=False)
        return [in_original_slots(original, block, own.keep) for original, block, own in layers]

    def divergence_with(self, blocks: Sequence[Block]) -> float:
        """True mean KL with these layers in place of `blocks`, nats."""
        embed, head = self.compressed.embed.get_value(), self.compressed.head.get_value()
        return self.trial.probe.divergence_of_model(blocks, dense(embed, jnp.float32), dense(head, jnp.float32))
