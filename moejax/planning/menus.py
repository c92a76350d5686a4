"""What the solver weighs: bytes and cost of every format for every weight, and the cost of pruning for every layer.

A cost is a predicted mean KL divergence from the original, in nats. Costs of different weights are taken to add up
while the solver compares them; `predict` says what they come to together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moejax.model.weights import block_name
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
    cost of pruning the first n of `order`, n = 0 .. len(order), infinite where that number may not be pruned.
    """

    menus: Mapping[str, Menu]
    order: np.ndarray
    pruning_cost: np.ndarray

    @property
    def num_experts(self) -> int:
        return len(self.menus[PROJECTIONS[0]].cost_NF)

    @property
    def most_pruned(self) -> int:
        """The largest number of experts that may be pruned."""
        return int(np.flatnonzero(np.isfinite(self.pruning_cost))[-1])


@dataclass(frozen=True)
class Menus:
    """Everything the solver needs: weights outside the routed experts by name, and the experts by block index.

    Blocks from `num_layers` on are MTP blocks: the model's own predictions do not depend on them.
    """

    names: tuple[str, ...]
    tensors: Menu
    experts: Mapping[int, ExpertMenu]
    num_layers: int

    @property
    def without_format(self) -> tuple[str, ...]:
        """The weights that stay as they are, whatever the budget, because no format may be used for them; experts by
        layer and projection."""
        tensors = zip(self.names, _has_format(self.tensors), strict=True)
        experts = (
            (f"{block_name(block, self.num_layers)}.mlp.experts.{name}", _has_format(own).any())
            for block, menu in self.experts.items()
            for name, own in menu.menus.items()
        )
        return tuple(name for name, has_format in (*tensors, *experts) if not has_format)

    def within(self, allowed: "Menus") -> "Menus":
        """The same costs where formats are allowed (0 in `allowed`), infinite where they are not."""

        def limited(menu: Menu, by: Menu) -> Menu:
            return replace(menu, cost_NF=menu.cost_NF + by.cost_NF)

        menus = {
            block: {name: limited(menu, allowed.experts[block].menus[name]) for name, menu in own.menus.items()}
            for block, own in self.experts.items()
        }
        return replace(self._with_menus(menus), tensors=limited(self.tensors, allowed.tensors))

    def with_experts_weighing(self, weight: float) -> "Menus":
        """The same with the costs of rounding experts multiplied."""
        menus = {
            block: {name: replace(menu, cost_NF=weight * menu.cost_NF) for name, menu in own.menus.items()}
            for block, own in self.experts.items()
        }
        return self._with_menus(menus)

    def _with_menus(self, menus: Mapping[int, Mapping[str, Menu]]) -> "Menus":
        experts = {block: replace(own, menus=menus[block]) for block, own in self.experts.items()}
        return replace(self, experts=experts)


def _has_format(menu: Menu) -> np.ndarray:
    """Whether one of the formats before the last, KEEP, may be used, (N,)."""
    return np.isfinite(menu.cost_NF[:, :-1]).any(axis=1)
