"""What the solver weighs: bytes and cost of every format for every weight, and the cost of pruning for every layer.

A cost is a predicted mean KL divergence from the original, in nats; costs of different weights are taken to add up.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moejax.planning.plan import PROJECTIONS


@dataclass(frozen=True)
class Menu:
    """Of N weights and F formats: bytes_NF, and cost_NF, infinite where a format may not be used."""

    formats: tuple[str, ...]
    bytes_NF: np.ndarray
    cost_NF: np.ndarray


@dataclass(frozen=True)
class ExpertMenu:
    """The routed experts of one block.

    menus: by projection, one row per expert. order: experts in the order in which they are pruned. pruning_cost: the
    cost of pruning the first n of `order`, n = 0 .. len(order).
    """

    menus: Mapping[str, Menu]
    order: np.ndarray
    pruning_cost: np.ndarray

    @property
    def num_experts(self) -> int:
        return len(self.menus[PROJECTIONS[0]].cost_NF)


@dataclass(frozen=True)
class Costs:
    """Everything the solver needs: weights outside the routed experts by name, and the experts by block index."""

    names: tuple[str, ...]
    tensors: Menu
    experts: Mapping[int, ExpertMenu]
