"""What is kept of what was measured: values, a few kilobytes a block."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moejax.transforms.prune import PruningError


@dataclass(frozen=True)
class Pruned:
    """So many of a layer's experts masked: the layer's own errors, and how much of the block's output is spoiled."""

    count: int
    error: PruningError
    spoiled: float


@dataclass(frozen=True)
class BlockMeasures:
    """What is kept of a block.

    errors: by weight, of every format, (F,), or of every expert and format, (E, F). spoiled: by weight, the mean over
    tokens of |y' - y|^2 / |y|^2, y the block's output and y' that with the weight, or a projection of all experts, in
    its family's probed format; none in MTP blocks. scores_E: by which experts are pruned, peak_E: their largest
    outputs, pruned: what pruning by the scores does, rising; None and empty in blocks without experts. relative: where
    errors come from a sample, by weight its relative error in every format (`Sampled`); else empty.
    """

    errors: Mapping[str, np.ndarray]
    spoiled: Mapping[str, float]
    scores_E: np.ndarray | None
    peak_E: np.ndarray | None
    pruned: tuple[Pruned, ...]
    relative: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """Of blocks by index, MTP blocks behind the layers; of embedding and head by name, errors and, where they come from
    a sample, relative errors; and the KL divergence of every probe by its name."""

    blocks: Mapping[int, BlockMeasures]
    outer: Mapping[str, np.ndarray]
    divergence: Mapping[str, float]
    outer_relative: Mapping[str, np.ndarray] = field(default_factory=dict)

    def relative(self, layers: int) -> dict[str, np.ndarray]:
        """Relative errors by name in a model of so many layers, MTP blocks' apart."""
        of_layers = {f"layers.{i}.{own}": x for i in range(layers) for own, x in self.blocks[i].relative.items()}
        return {**self.outer_relative, **of_layers}


def block_measures(raw: Mapping[str, Any]) -> BlockMeasures:
    """From what JSON holds of them: the fields by name, arrays as lists."""
    scores_E, peak_E = (None if raw[name] is None else np.asarray(raw[name]) for name in ("scores_E", "peak_E"))
    pruned = tuple(Pruned(count, PruningError(*error), spoiled) for count, error, spoiled in raw["pruned"])
    errors, relative = ({own: np.asarray(x) for own, x in raw[name].items()} for name in ("errors", "relative"))
    return BlockMeasures(errors, raw["spoiled"], scores_E, peak_E, pruned, relative)
