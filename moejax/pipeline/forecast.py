"""What a plan would make of a model, in figures: everything that `moejax plan` prints."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moejax.checkpoint.native_bytes import NativeBytes
from moejax.checkpoint.summary import KindSummary
from moejax.formats import ByteParts
from moejax.model import Config
from moejax.planning import Plan
from moejax.planning.expert_scores import ExpertScores
from moejax.planning.memory import DeviceMemory
from moejax.planning.parameters import Parameters
from moejax.planning.predict import Losses


@dataclass(frozen=True)
class LayerForecast:
    """One layer's experts: how many stay in every group, K', and the shares of gate mass and of choices they had."""

    block: int
    kept_per_group: tuple[int, ...]
    experts_per_token: int
    gate_mass_kept: float
    choices_kept: float

    @property
    def kept(self) -> int:
        return sum(self.kept_per_group)


@dataclass(frozen=True)
class Split:
    """The best plan of the same budget that keeps the same share of experts in every layer, or as little more as the
    recipe lets: bits per weight of the
    experts kept, what is lost, and the predicted KL; the last three are None where no plan fits."""

    share_kept: float
    expert_bits: float | None
    losses: Losses | None
    predicted: float | None


@dataclass(frozen=True)
class Forecast:
    """A plan and what it makes of the model. budget: bytes that its folder may take, None if all that `memory_limit`,
    the device's memory, allows. elements: numbers of the original checkpoint, two bytes each in BF16.
    dropped_mtp: how many of its MTP blocks were left out. without_format: weights that no plan of the recipe rounds."""

    plan: Plan
    config: Config
    budget: int | None
    elements: int
    dropped_mtp: int
    before: Parameters
    after: Parameters
    kinds: tuple[KindSummary, ...]
    bytes: NativeBytes
    parts: ByteParts
    layers: tuple[LayerForecast, ...]
    memory: DeviceMemory
    memory_limit: int | None
    losses: Losses
    predicted: float
    splits: tuple[Split, ...]
    pruned_by: str
    scores_source: str | None
    sensitivity_source: str
    without_format: tuple[str, ...]

    @property
    def longest_context(self) -> int | None:
        """The most tokens of context that fit the device's memory, if that was given."""
        if self.memory_limit is None:
            return None
        return self.memory.longest_context(self.memory_limit, self.config.max_position_embeddings)


def layer_forecasts(plan: Plan, config: Config, scores: ExpertScores) -> tuple[LayerForecast, ...]:
    """Of every block with experts."""
    return tuple(
        _layer(i, block.keep, block.experts_per_token or config.num_experts_per_tok, config, scores)
        for i, block in enumerate(plan.blocks)
        if block.keep is not None
    )


def _layer(block: int, keep: Sequence[int], per_token: int, config: Config, scores: ExpertScores) -> LayerForecast:
    kept = np.asarray(keep, int)
    group_size = config.n_routed_experts // config.n_group
    return LayerForecast(
        block=block,
        kept_per_group=tuple(np.bincount(kept // group_size, minlength=config.n_group).tolist()),
        experts_per_token=per_token,
        gate_mass_kept=float(np.sum(scores.gate_share(block)[kept])),
        choices_kept=float(np.sum(scores.choice_share(block)[kept])),
    )
