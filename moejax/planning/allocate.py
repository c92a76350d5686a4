"""From the solver's choice to a plan, and back."""

import numpy as np

from moejax.model import Config
from moejax.model.weights import block_and_name
from moejax.planning.menus import Menu, Menus
from moejax.planning.plan import KEEP, PROJECTIONS, BlockPlan, Plan
from moejax.planning.solve import Choice, menu_survivors


def plan_of_choice(costs: Menus, choice: Choice, config: Config) -> Plan:
    """The plan that carries a choice out, K and routing scale as in the original."""
    name_of = costs.tensors.formats
    chosen = {name: name_of[f] for name, f in zip(costs.names, choice.tensor_N, strict=True)}
    formats: list[dict[str, str]] = [{} for _ in range(config.num_blocks)]
    for name, target in chosen.items():
        block, own = block_and_name(name, costs.num_layers)
        if block is not None and target != KEEP:
            formats[block][own] = target
    blocks = []
    for i, own_formats in enumerate(formats):
        if i not in costs.experts:
            blocks.append(BlockPlan(own_formats))
            continue
        kept = menu_survivors(costs.experts[i], choice.pruned[i])
        experts = {name: tuple(name_of[f] for f in choice.expert[i][name][kept]) for name in PROJECTIONS}
        blocks.append(BlockPlan(own_formats, tuple(kept.tolist()), experts, config.num_experts_per_tok))
    return Plan(chosen.get("embed", KEEP), chosen.get("head", KEEP), tuple(blocks))


def choice_of_plan(costs: Menus, plan: Plan) -> Choice | None:
    """The choice that a plan carries out, K' and routing scales left out; None if it is none of the solver's: formats
    that are no candidates, or experts pruned in another order than the menus'."""
    index_of = {name: f for f, name in enumerate(costs.tensors.formats)}
    outer = {"embed": plan.embed, "head": plan.head}
    targets = []
    for name in costs.names:
        block, own = block_and_name(name, costs.num_layers)
        targets.append(outer[own] if block is None else plan.blocks[block].formats.get(own, KEEP))
    pruned: dict[int, int] = {}
    expert: dict[int, dict[str, np.ndarray]] = {}
    for i, menu in costs.experts.items():
        keep = plan.blocks[i].keep or ()
        pruned[i] = menu.num_experts - len(keep)
        if pruned[i] > len(menu.order) or tuple(menu_survivors(menu, pruned[i])) != keep:
            return None
        expert[i] = {}
        for name, own_formats in plan.blocks[i].experts.items():
            if not set(own_formats) <= index_of.keys():
                return None
            expert[i][name] = np.zeros(menu.num_experts, int)
            expert[i][name][list(keep)] = [index_of[target] for target in own_formats]
    if not set(targets) <= index_of.keys():
        return None
    return Choice(np.asarray([index_of[target] for target in targets], int), pruned, expert)


def smallest_choice(costs: Menus) -> Choice:
    """Every weight in its smallest allowed format, as many experts pruned as can be."""
    pruned = {block: menu.most_pruned for block, menu in costs.experts.items()}
    expert = {
        block: {name: _smallest(own) for name, own in menu.menus.items()} for block, menu in costs.experts.items()
    }
    return Choice(_smallest(costs.tensors), pruned, expert)


def _smallest(menu: Menu) -> np.ndarray:
    return np.argmin(np.where(np.isfinite(menu.cost_NF), menu.bytes_NF, np.inf), axis=1)
