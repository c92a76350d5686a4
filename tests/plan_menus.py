"""What may be done to the weights of a model with two layers of experts and an MTP block, in made-up bytes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_cases import BASE
from moejax.model import config_from_hf
from moejax.planning import KEEP, Plan
from moejax.planning.menus import ExpertMenu, Menu, Menus
from moejax.planning.plan import PROJECTIONS

FORMATS = ("int2g32", "int4g32", "int8g32", KEEP)
CONFIG = config_from_hf(BASE | {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1})
EXPERTS = CONFIG.n_routed_experts
# Bytes by format; `tiny` is no smaller at 8 bits than as it is.
SIZES = {
    "embed": (200, 400, 800, 1600),
    "layers.0.self_attn.o": (20, 40, 80, 160),
    "layers.0.mlp.up": (30, 60, 120, 240),
    "layers.1.self_attn.o": (20, 40, 80, 160),
    "layers.2.self_attn.o": (20, 40, 80, 160),
    "layers.2.tiny": (5, 6, 7, 7),
    "head": (200, 400, 800, 1600),
    "mtp.0.block.self_attn.o": (20, 40, 80, 160),
    "mtp.0.eh_proj": (50, 100, 200, 400),
}
EXPERT_SIZES = {"gate": (10, 20, 40, 80), "up": (11, 22, 44, 88), "down": (12, 24, 48, 96)}


def block_and_name(full: str) -> tuple[int, str]:
    """`mtp.0.block.self_attn.o` to (3, "self_attn.o")."""
    kind, index, own = full.split(".", 2)
    return int(index) + (CONFIG.num_hidden_layers if kind == "mtp" else 0), own.removeprefix("block.")


def made_up_costs() -> Menus:
    """Costs fall with bytes; two of six experts may go, the last ones first."""

    def menu(sizes: Any) -> Menu:
        bytes_NF: NDArray[Any] = np.asarray(sizes)
        return Menu(FORMATS, bytes_NF, 1 / bytes_NF - 1 / bytes_NF[:, -1:])

    def experts() -> ExpertMenu:
        menus = {name: menu([EXPERT_SIZES[name]] * EXPERTS) for name in PROJECTIONS}
        return ExpertMenu(menus, np.asarray([5, 4]), np.asarray([0.0, 0.1, 0.3]))

    by_block = {block: experts() for block in range(1, CONFIG.num_blocks)}
    return Menus(tuple(SIZES), menu([*SIZES.values()]), by_block, CONFIG.num_hidden_layers)


def size_of(plan: Plan) -> int:
    """The made-up bytes of a plan."""
    total = SIZES["embed"][FORMATS.index(plan.embed)] + SIZES["head"][FORMATS.index(plan.head)]
    for full, sizes in SIZES.items():
        if full not in ("embed", "head"):
            block, own = block_and_name(full)
            total += sizes[FORMATS.index(plan.blocks[block].formats.get(own, KEEP))]
    for block_plan in plan.blocks:
        for name, formats in block_plan.experts.items():
            total += sum(EXPERT_SIZES[name][FORMATS.index(own)] for own in formats)
    return total
