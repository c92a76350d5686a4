"""Whether a plan can be carried out on a model: checked before any work, because plans are edited by hand."""

from collections.abc import Sequence

import numpy as np

from moejax.errors import InputError
from moejax.model import Config, Layout
from moejax.model.weights import IN_BLOCK, block_and_name
from moejax.planning import BlockPlan, Plan
from moejax.planning.plan import PROJECTIONS
from moejax.transforms.prune import min_per_group


def check_plan(plan: Plan, config: Config) -> None:
    """Raise InputError, naming the block and what would be accepted, if a plan's blocks, weights, survivors or K' are
    not the model's. Formats are checked where they are read."""
    if len(plan.blocks) != config.num_blocks:
        raise InputError(
            f"the plan has {len(plan.blocks)} blocks; the model has {config.num_hidden_layers} layers and "
            f"{config.num_nextn_predict_layers} MTP blocks; --drop-mtp leaves those out, here or in `moejax plan`"
        )
    for i, block in enumerate(plan.blocks):
        if wrong := block.formats.keys() - _matrices(config, i):
            raise InputError(f"the plan gives a format to {min(wrong)!r}, which is no matrix of block {i}")
        if block.keep is not None and not config.is_moe(i):
            raise InputError(f"block {i} of the plan keeps experts; the model's block {i} is dense")
        if block.keep is not None:
            _check_experts(block, block.keep, config, f"block {i} of the plan")
        elif block.experts:
            raise InputError(f"block {i} of the plan gives formats to experts; it must say which it keeps")
        elif block.experts_per_token is not None or block.routing_scale != 1.0:
            raise InputError(f"block {i} of the plan changes the routing; it must say which experts it keeps")


def _matrices(config: Config, index: int) -> set[str]:
    """The weights outside the routed experts that have an input, named within their block."""
    placed = (block_and_name(name, config.num_hidden_layers) for name in Layout(config).shapes())
    own = (IN_BLOCK[name] for block, name in placed if block == index)
    return {row.name for row in own if row.is_matrix and row.role != "routed experts"}


def _check_experts(block: BlockPlan, kept: Sequence[int], config: Config, what: str) -> None:
    experts, full = config.n_routed_experts, config.num_experts_per_tok
    keep = np.asarray(kept, int)
    for name, formats in block.experts.items():
        if name not in PROJECTIONS or len(formats) != len(keep):
            raise InputError(
                f"{what} has {len(formats)} formats for {name}; one for each of {len(keep)} experts kept, for "
                f"{', '.join(PROJECTIONS)}, is accepted"
            )
    if np.any(np.diff(keep) <= 0) or not np.all((keep >= 0) & (keep < experts)):
        raise InputError(f"{what} keeps experts that are not ascending numbers from 0 to {experts - 1}")
    per_token = full if block.experts_per_token is None else block.experts_per_token
    if not 1 <= per_token <= full:
        raise InputError(f"{what} activates {per_token} experts per token; 1 to {full} are accepted")
    if not 0 < block.routing_scale < float("inf"):
        raise InputError(f"{what} has routing scale {block.routing_scale}; a positive number is needed")
    per_group = np.bincount(keep // (experts // config.n_group), minlength=config.n_group)
    needed, least = min_per_group(config, per_token), int(per_group.argmin())
    if per_group[least] < needed:
        raise InputError(f"{what} keeps {per_group[least]} experts in group {least}; routing needs {needed} in each")
