"""Routing statistics of a model whose weights are not at hand: per expert how often it was chosen, and its gate mass.

As published for DeepSeek-V3-0324 by CC-MoE (github.com/moxin-org/CC-MoE): a JSON object with `layer_<index>` for every
layer with experts, each with `scores` (sum of gate weights, normalized and scaled) and `activations` (counts), and
perhaps `source`, a text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.errors import InputError
from moejax.model import Config

_KEYS = {"scores", "activations"}
# Beyond this, sums of squares would overflow.
_LARGEST = 1e100


@dataclass(frozen=True)
class ExpertScores:
    """Sums over tokens t by block: gate_mass sum_t g_te and count sum_t [t chose e], (E,) float64.

    `source` says where they come from; None if nothing was measured and all experts are taken to be alike.
    """

    gate_mass: Mapping[int, np.ndarray]
    count: Mapping[int, np.ndarray]
    source: str | None

    def importance(self, block: int) -> np.ndarray:
        """Each expert's share of its layer's squared gate weights, (E,), summing to 1.

        i_e = n_e * g_e^2 / sum of the same, g_e = gate_mass / n_e its mean weight: what an error of one relative size
        in its outputs adds to the layer's, if all experts' outputs have one norm.
        """
        chosen_E = np.maximum(self.count[block], 1.0)
        energy_E = self.gate_mass[block] ** 2 / chosen_E
        return energy_E / max(energy_E.sum(), 1e-300)

    def gate_share(self, block: int) -> np.ndarray:
        """Each expert's share of its layer's gate mass, (E,)."""
        return self.gate_mass[block] / max(self.gate_mass[block].sum(), 1e-300)

    def choice_share(self, block: int) -> np.ndarray:
        """Each expert's share of all choices, (E,)."""
        return self.count[block] / max(self.count[block].sum(), 1.0)


def equal_scores(config: Config) -> ExpertScores:
    """All experts alike: what is assumed where nothing was measured."""
    ones = {block: np.ones(config.n_routed_experts) for block in range(config.num_blocks) if config.is_moe(block)}
    return ExpertScores(ones, ones, None)


def expert_scores_from_json(raw: Mapping[str, Any], config: Config, source: str) -> ExpertScores:
    """Read and check scores against the model. MTP blocks, of which none are published, take the last layer's.

    Raises InputError naming the layer and what it has where layers or experts are not the config's, or values are no
    finite numbers from 0.
    """
    layers = [block for block in range(config.num_hidden_layers) if config.is_moe(block)]
    expected = [f"layer_{block}" for block in layers]
    if missing := [name for name in expected if name not in raw]:
        raise InputError(
            f"{source}: {missing[0]} is missing; the model has experts in layers {layers[0]} to {layers[-1]}"
        )
    if unknown := sorted(raw.keys() - {"source", *expected}):
        raise InputError(
            f"{source}: {unknown[0]!r} is no layer with experts; those are layer_{layers[0]} to layer_{layers[-1]}"
        )
    read = {block: _read_layer(raw[f"layer_{block}"], config, f"{source}: layer_{block}") for block in layers}
    for block in range(config.num_hidden_layers, config.num_blocks):
        read[block] = read[layers[-1]]
    return ExpertScores(
        {block: mass for block, (mass, _) in read.items()},
        {block: count for block, (_, count) in read.items()},
        str(raw.get("source", source)),
    )


def _read_layer(raw: Any, config: Config, what: str) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(raw, Mapping) or raw.keys() != _KEYS:
        raise InputError(f"{what} must be an object with the lists 'scores' and 'activations' and nothing else")
    mass, count = (_read_list(raw[key], config.n_routed_experts, f"{what}: {key}") for key in ("scores", "activations"))
    if not (count.sum() > 0 and mass.sum() > 0):
        raise InputError(f"{what}: no expert was ever chosen; scores of at least one token are needed")
    return mass, count


def _read_list(raw: Any, experts: int, what: str) -> np.ndarray:
    if not isinstance(raw, list) or len(raw) != experts:
        found = f"{len(raw)} values" if isinstance(raw, list) else "no list"
        raise InputError(f"{what} has {found}; one for each of the model's {experts} experts is needed")
    for value in raw:
        if type(value) not in (int, float) or not 0 <= value <= _LARGEST:
            raise InputError(f"{what} holds {value!r}; finite numbers from 0 are needed")
    return np.asarray(raw, np.float64)
