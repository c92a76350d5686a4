"""How losses add up: the model's true KL divergence with all weights of a family rounded, or all layers pruned, at
once, against the sum of what they cost one at a time."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from moejax.pipeline.trial import Trial
from moejax.planning.allocate import plan_of_choice
from moejax.planning.costs import Costs, Menu
from moejax.planning.plan import PROJECTIONS, digest
from moejax.planning.predict import LossCurves, Losses, curve_of
from moejax.planning.solve import Choice, choice_losses
from moejax.progress import Progress

_FAMILIES = Losses._fields
# The levels at which a family is probed: formats, and shares of the experts that may be pruned.
_BITS = (1, 2, 3)
_SHARES = (0.5, 1.0)


def measure_curves(costs: Costs, trial: Trial, bits_F: Sequence[float], progress: Progress) -> LossCurves:
    """The curve of every family; bits_F are the bits of the candidate formats, KEEP left out."""
    formats = sorted({int(np.argmin(np.abs(np.asarray(bits_F) - bits))) for bits in _BITS})
    levels = {"others": formats, "experts": formats, "pruning": _SHARES}
    jobs = [(family, level) for family in _FAMILIES for level in levels[family]]
    measured: dict[str, tuple[list[float], list[float]]] = {family: ([], []) for family in _FAMILIES}
    for family, level in progress(jobs, "measuring sums"):
        choice = _joint_choice(costs, family, level)
        sums, together = measured[family]
        sums.append(getattr(choice_losses(costs, choice), family))
        plan = plan_of_choice(costs, choice, trial.model.config)
        together.append(trial.work.once(f"divergence of plan {digest(plan)}", partial(trial.divergence, plan)))
    return LossCurves(**{family: curve_of(*own) for family, own in measured.items()})


def _joint_choice(costs: Costs, family: str, level: float) -> Choice:
    """Everything kept as it is but one family: in format number `level`, or with that share of what can go pruned."""
    rounded = {name: int(level) if name == family else -1 for name in _FAMILIES}
    pruned = {block: 0 for block in costs.experts}
    if family == "pruning":
        allowed = {block: np.flatnonzero(np.isfinite(menu.pruning_cost)) for block, menu in costs.experts.items()}
        pruned = {block: int(own[round(level * (len(own) - 1))]) for block, own in allowed.items()}
    expert = {
        block: {name: _in_format(menu.menus[name], rounded["experts"]) for name in PROJECTIONS}
        for block, menu in costs.experts.items()
    }
    return Choice(_in_format(costs.tensors, rounded["others"]), pruned, expert)


def _in_format(menu: Menu, level: int) -> np.ndarray:
    """Format `level` of every row, KEEP (the last) where it is not allowed or saves nothing."""
    keep = len(menu.formats) - 1
    usable_N = np.isfinite(menu.cost_NF[:, level]) & (menu.bytes_NF[:, level] < menu.bytes_NF[:, keep])
    return np.where(usable_N, level % len(menu.formats), keep)
