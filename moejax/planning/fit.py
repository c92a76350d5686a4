"""From costs and a budget to a plan whose exact bytes, everything in the folder, are at most the budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from moejax.errors import InputError
from moejax.model import Config
from moejax.planning.allocate import choice_of_plan, plan_of_choice, smallest_choice
from moejax.planning.bucket_counts import solve_in_multiples
from moejax.planning.menus import Menus
from moejax.planning.plan import BlockPlan, Method, Plan
from moejax.planning.predict import LossCurves, Losses
from moejax.planning.raise_sensitive import raise_most_sensitive
from moejax.planning.size import format_size
from moejax.planning.solve import Choice, choice_bytes, choice_losses

SizeOf = Callable[[Plan], int]

# Prices of pruning at which plans are solved, as shares of its own: at infinity as few experts go as may. Losses of
# pruning add up to less than their sum where the survivors are rough; how much less is found by comparing whole plans.
PRUNING_WEIGHTS = (float("inf"), 1.0, 0.7, 0.5, 0.35, 0.25)
_MAX_CORRECTIONS = 8
_WEIGHINGS = 2
# What a correction leaves free, so that the next plan's own description fits too: a millionth.
_SLACK_BITS = 20
# How many weights a sentence names.
_NAMED = 3


@dataclass(frozen=True)
class Fitted:
    """A plan within its budget, its exact bytes, and what it is predicted to lose."""

    plan: Plan
    bytes: int
    losses: Losses


@dataclass(frozen=True)
class Problem:
    """What every solve shares: costs, how they add up, the model's config, and the exact bytes of a plan's folder.

    per_token: K' of a layer by its number of experts kept; None leaves the model's. overhead: what a folder takes
    beyond the arrays that the solver counts, about; a guess near it saves solves. method: every plan's. multiple: of
    what number every count of experts of one format is one (see `bucket_counts`).
    """

    costs: Menus
    curves: LossCurves
    config: Config
    size_of: SizeOf
    per_token: Callable[[int], int] | None = None
    overhead: int = 0
    method: Method = field(default_factory=Method)
    multiple: int = 1

    def solve(self, target: int, pruning_weight: float) -> tuple[Choice, float] | None:
        """The choice for so many bytes of arrays at a price of pruning, and what experts' costs weighed in its solve.

        They weigh 1 or the slope of their curve where that first choice lies, whichever is predicted to lose less.
        """
        tried: list[tuple[Choice, float]] = []
        weight = 1.0
        for _ in range(_WEIGHINGS):
            choice = self._weighted_solve(pruning_weight, weight, target)
            if choice is None:
                break
            tried.append((choice, weight))
            weight = max(1.0, self.curves.expert_weight(choice_losses(self.costs, choice)))
            if weight == 1.0:
                break
        return min(tried, key=lambda own: self.predicted(choice_losses(self.costs, own[0])), default=None)

    def fit(self, budget: int, pruning_weight: float) -> Fitted | None:
        """The solver's plan for a budget at a price of pruning, None if there is none.

        The solver knows the arrays' bytes only; what describes them depends on the plan, so the difference is fed back.
        """
        target = budget - self.overhead
        solved = self.solve(target, pruning_weight)
        if solved is None:
            return None
        choice, weight = solved
        return self._corrected(choice, budget, target, partial(self._weighted_solve, pruning_weight, weight))

    def fit_raised(self, budget: int) -> Fitted | None:
        """The plan that the paper's allocation makes (see `raise_sensitive`), None if there is none."""
        target = budget - self.overhead
        return self._corrected(
            raise_most_sensitive(self.costs, target), budget, target, partial(raise_most_sensitive, self.costs)
        )

    def _corrected(
        self, choice: Choice | None, budget: int, target: int, solve_for: Callable[[int], Choice | None]
    ) -> Fitted | None:
        """A choice made for `target` bytes, made again for fewer until its folder's exact bytes are within budget."""
        for _ in range(_MAX_CORRECTIONS):
            if choice is None:
                break
            plan = self._plan(choice)
            size = self.size_of(plan)
            if size <= budget:
                return Fitted(plan, size, choice_losses(self.costs, choice))
            target = min(target - 1, choice_bytes(self.costs, choice) - (size - budget) - (budget >> _SLACK_BITS))
            choice = solve_for(target)
        return None

    def _weighted_solve(self, pruning_weight: float, weight: float, target: int) -> Choice | None:
        weighted = self.costs.with_experts_weighing(weight)
        return solve_in_multiples(weighted, target, pruning_weight * weight, self.multiple)

    def smallest(self) -> Fitted:
        """The plan that takes the fewest bytes of all, whatever it costs."""
        choice = smallest_choice(self.costs)
        plan = self._plan(choice)
        return Fitted(plan, self.size_of(plan), choice_losses(self.costs, choice))

    def predicted(self, losses: Losses) -> float:
        """Predicted mean KL divergence, nats."""
        return self.curves.together(losses)

    def _plan(self, choice: Choice) -> Plan:
        plan = replace(plan_of_choice(self.costs, choice, self.config), method=self.method)
        if self.per_token is None:
            return plan
        return replace(plan, blocks=tuple(_activating(block, self.per_token) for block in plan.blocks))


def _activating(block: BlockPlan, per_token: Callable[[int], int]) -> BlockPlan:
    return block if block.keep is None else replace(block, experts_per_token=per_token(len(block.keep)))


def check_budget(smallest: int, budget: int, original: int, without_format: Sequence[str] = ()) -> None:
    """Raise InputError if no plan fits the budget, naming the smallest that can be met and the weights that have no
    format, or if the original fits it."""
    if budget < smallest:
        why = f"; {sentence_of(without_format)}" if without_format else ""
        raise InputError(
            f"a budget of {format_size(budget)} ({budget} bytes) cannot be met; the smallest that can is "
            f"{format_size(smallest)} ({smallest} bytes){why}"
        )
    if budget >= original:
        raise InputError(
            f"a budget of {format_size(budget)} ({budget} bytes) leaves nothing to do; the original takes "
            f"{format_size(original)} ({original} bytes), a budget below that is needed"
        )


def sentence_of(without_format: Sequence[str]) -> str:
    """What a user is told of weights that have no format."""
    names = ", ".join(without_format[:_NAMED])
    more = f" and {len(without_format) - _NAMED} more" if len(without_format) > _NAMED else ""
    return f"the recipe has no format that it allows and that saves bytes for {names}{more}, which stay as they are"


def losses_of_plan(costs: Menus, plan: Plan) -> Losses | None:
    """The summed costs of any plan; None where `choice_of_plan` finds none, or a format is not allowed."""
    choice = choice_of_plan(costs, plan)
    losses = None if choice is None else choice_losses(costs, choice)
    return losses if losses is not None and np.all(np.isfinite(losses)) else None
