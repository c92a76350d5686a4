"""From the solver's choice to a plan."""

import numpy as np

from moejax.model import Config
from moejax.planning.costs import Costs, Menu
from moejax.planning.plan import KEEP, PROJECTIONS, BlockPlan, Plan
from moejax.planning.solve import Choice, menu_survivors


def plan_of_choice(costs: Costs, choice: Choice, config: Config) -> Plan:
    """The plan that carries a choice out, K and routing scale as in the original."""
    name_of = costs.tensors.formats
    chosen = {name: name_of[f] for name, f in zip(costs.names, choice.tensor_N, strict=True)}
    blocks = []
    for i in range(config.num_blocks):
        prefix = f"layers.{i}." if i < config.num_hidden_layers else f"mtp.{i - config.num_hidden_layers}."
        own = {name.removeprefix(prefix): target for name, target in chosen.items() if name.startswith(prefix)}
        formats = {name.removeprefix("block."): target for name, target in own.items() if target != KEEP}
        if i not in costs.experts:
            blocks.append(BlockPlan(formats))
            continue
        kept = menu_survivors(costs.experts[i], choice.pruned[i])
        experts = {name: tuple(name_of[f] for f in choice.expert[i][name][kept]) for name in PROJECTIONS}
        blocks.append(BlockPlan(formats, tuple(kept.tolist()), experts, config.num_experts_per_tok))
    return Plan(chosen.get("embed", KEEP), chosen.get("head", KEEP), tuple(blocks))


def smallest_choice(costs: Costs) -> Choice:
    """Every weight in its smallest allowed format, as many experts pruned as can be."""
    pruned = {block: len(menu.order) for block, menu in costs.experts.items()}
    expert = {
        block: {name: _smallest(own) for name, own in menu.menus.items()} for block, menu in costs.experts.items()
    }
    return Choice(_smallest(costs.tensors), pruned, expert)


def _smallest(menu: Menu) -> np.ndarray:
    return np.argmin(np.where(np.isfinite(menu.cost_NF), menu.bytes_NF, np.inf), axis=1)
