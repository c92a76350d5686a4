"""Plans tried out: the true KL divergence of what a plan makes of the model, on the probe's text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp

from moejax.calibrate import Statistics
from moejax.formats import dense
from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import Block
from moejax.pipeline.probe import Probe
from moejax.pipeline.rounded import RoundedWeights
from moejax.pipeline.working_copy import in_original_slots
from moejax.planning import Plan
from moejax.transforms.compress import compress
from moejax.transforms.compress_block import Rounder


@dataclass(frozen=True)
class Trial:
    """What trying plans out needs. The rounder remembers what it has rounded."""

    model: DeepseekV3
    probe: Probe
    statistics: Statistics
    rounder: Rounder = field(default_factory=RoundedWeights)

    def compressed(self, plan: Plan) -> DeepseekV3:
        """The plan's model."""
        return compress(self.model, plan, self.statistics, rounder=self.rounder)

    def divergence(self, plan: Plan) -> float:
        """True mean KL of the plan's model, nats."""
        compressed = self.compressed(plan)
        return divergence_of(self.probe, compressed, masked_blocks(self.probe, compressed, plan))


def masked_blocks(probe: Probe, compressed: DeepseekV3, plan: Plan) -> list[Block]:
    """A compressed model's layers in the original's shapes."""
    layers = zip(probe.blocks, compressed.layers, plan.blocks, strict=False)
    return [in_original_slots(original, block, own.keep) for original, block, own in layers]


def divergence_of(probe: Probe, compressed: DeepseekV3, blocks: Sequence[Block]) -> float:
    """True mean KL of a compressed model on the probe's text, its layers given as `masked_blocks`."""
    return probe.divergence_of_model(
        blocks, dense(compressed.embed.get_value(), jnp.float32), dense(compressed.head.get_value(), jnp.float32)
    )
