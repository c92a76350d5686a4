"""Plans that measure nothing, to compare with: one width for everything, with or without pruning first."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moejax.model import Config
from moejax.model.weights import block_and_name
from moejax.pipeline.prices import LayerPruning
from moejax.planning.fit import SizeOf
from moejax.planning.menus import Menu, Menus
from moejax.planning.plan import KEEP, PROJECTIONS, BlockPlan, Plan

Kept = Mapping[int, Sequence[int]]


def uniform_plan(costs: Menus, config: Config, kept: Kept, size_of: SizeOf, budget: int) -> Plan | None:
    """The largest width that fits everywhere, the rest of the budget spent raising whole layers from layer 0.

    `kept` are the survivors of every block with experts. None if not even the smallest width fits.
    """
    ladder = range(len(costs.tensors.formats))
    fitting = [f for f in ladder if size_of(_plan(costs, config, kept, [f] * config.num_blocks, f)) <= budget]
    if not fitting:
        return None
    base = max(fitting)
    levels = [base] * config.num_blocks
    for block in range(config.num_blocks):
        raised = [*levels[:block], min(base + 1, ladder[-1]), *levels[block + 1 :]]
        if size_of(_plan(costs, config, kept, raised, base)) > budget:
            break
        levels = raised
    return _plan(costs, config, kept, levels, base)


def all_experts(costs: Menus) -> Kept:
    """Nothing pruned."""
    return {block: range(menu.num_experts) for block, menu in costs.experts.items()}


def with_pruning(costs: Menus, pruning: Mapping[int, LayerPruning]) -> Menus:
    """The costs with experts pruned in these orders, at these costs."""
    experts = {
        block: replace(menu, order=pruning[block].order, pruning_cost=pruning[block].cost)
        for block, menu in costs.experts.items()
    }
    return replace(costs, experts=experts)


def _plan(costs: Menus, config: Config, kept: Kept, levels: Sequence[int], outer: int) -> Plan:
    """Formats by their index in the ladder: per block, and for embedding and head. Floors do not apply."""
    name_of, menu = costs.tensors.formats, costs.tensors
    row_of = {name: n for n, name in enumerate(costs.names)}
    places = {block_and_name(name, costs.num_layers): n for name, n in row_of.items()}
    blocks = []
    for i, level in enumerate(levels):
        rows = {own: row for (block, own), row in places.items() if block == i}
        targets = {own: _usable(menu, row, level) for own, row in rows.items()}
        block = BlockPlan({own: target for own, target in targets.items() if target != KEEP})
        if i in costs.experts:
            experts = {name: (name_of[level],) * len(kept[i]) for name in PROJECTIONS}
            keep = tuple(int(e) for e in kept[i])
            block = replace(block, keep=keep, experts=experts, experts_per_token=config.num_experts_per_tok)
        blocks.append(block)
    return Plan(_usable(menu, row_of["embed"], outer), _usable(menu, row_of["head"], outer), tuple(blocks))


def _usable(menu: Menu, row: int, level: int) -> str:
    """The format, or KEEP where it saves nothing."""
    keep = len(menu.formats) - 1
    return menu.formats[level] if menu.bytes_NF[row, level] < menu.bytes_NF[row, keep] else KEEP
