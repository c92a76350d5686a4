"""The search for a plan: solve under the budget for several prices of pruning, try each plan out, keep the best.

The solver adds costs up, but losses add up to less than their sum: where the surviving weights are rough, pruning
costs less than its own probes say. How much less is found by trying: the solver runs with pruning at full price, at
discounts, and forbidden, and the plan whose true KL divergence on the probe's text is lowest wins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from moejax.calibrate import Statistics
from moejax.errors import InputError
from moejax.formats import dense
from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import Block
from moejax.pipeline.probe import Probe
from moejax.pipeline.working_copy import in_original_slots
from moejax.planning import Plan
from moejax.planning.allocate import plan_of_choice, smallest_choice
from moejax.planning.costs import Costs
from moejax.planning.size import format_size
from moejax.planning.solve import choice_bytes, choice_cost, solve
from moejax.progress import Progress
from moejax.transforms.compress import compress

SizeOf = Callable[[Plan], int]

PRUNING_WEIGHTS = (float("inf"), 1.0, 0.7, 0.5, 0.35, 0.25)
_MAX_CORRECTIONS = 8


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried, the pruning weight it was solved with, its predicted and true KL on the probe's text."""

    pruning_weight: float
    plan: Plan
    predicted: float
    divergence: float


def check_budget(free: Costs, model: DeepseekV3, size_of: SizeOf, budget: int, original_bytes: int) -> None:
    """Raise InputError if no plan fits the budget, naming the smallest that can be met, or if the original fits it."""
    smallest = size_of(plan_of_choice(free, smallest_choice(free), model.config))
    if budget < smallest:
        raise InputError(
            f"a budget of {format_size(budget)} ({budget} bytes) cannot be met; the smallest that can is "
            f"{format_size(smallest)} ({smallest} bytes)"
        )
    if budget >= original_bytes:
        raise InputError(
            f"a budget of {format_size(budget)} ({budget} bytes) leaves nothing to do; the original takes "
            f"{format_size(original_bytes)} ({original_bytes} bytes), a budget below that is needed"
        )


def search(
    costs: Costs,
    model: DeepseekV3,
    probe: Probe,
    statistics: Statistics,
    size_of: SizeOf,
    budget: int,
    progress: Progress,
) -> list[Candidate]:
    """Candidate plans within the budget, the best first."""
    tried: list[Candidate] = []
    for weight in progress(PRUNING_WEIGHTS, "trying plans"):
        fitted = fit_to_budget(costs, model, size_of, budget, weight)
        if fitted is None or any(fitted[0] == other.plan for other in tried):
            continue
        tried.append(_try_out(weight, *fitted, model, probe, statistics))
    return sorted(tried, key=lambda candidate: candidate.divergence)


def smallest_candidate(costs: Costs, model: DeepseekV3, probe: Probe, statistics: Statistics) -> Candidate:
    """The plan that takes the fewest bytes of all, whatever it costs."""
    choice = smallest_choice(costs)
    plan = plan_of_choice(costs, choice, model.config)
    return _try_out(0.0, plan, choice_cost(costs, choice), model, probe, statistics)


def fit_to_budget(
    costs: Costs, model: DeepseekV3, size_of: SizeOf, budget: int, pruning_weight: float
) -> tuple[Plan, float] | None:
    """The solver's plan whose exact bytes, everything in the folder, are at most the budget; and its predicted KL.

    The solver knows the arrays' bytes only; what describes them depends on the plan, so the difference is fed back.
    """
    target = budget
    for _ in range(_MAX_CORRECTIONS):
        choice = solve(costs, target, pruning_weight)
        if choice is None:
            break
        plan = plan_of_choice(costs, choice, model.config)
        size = size_of(plan)
        if size <= budget:
            return plan, choice_cost(costs, choice)
        target = min(target - 1, choice_bytes(costs, choice) - (size - budget))
    return None


def _try_out(
    pruning_weight: float, plan: Plan, predicted: float, model: DeepseekV3, probe: Probe, statistics: Statistics
) -> Candidate:
    compressed = compress(model, plan, statistics)
    divergence = divergence_of(probe, compressed, masked_blocks(probe, compressed, plan))
    return Candidate(pruning_weight, plan, predicted, divergence)


def masked_blocks(probe: Probe, compressed: DeepseekV3, plan: Plan) -> list[Block]:
    """A compressed model's layers in the original's shapes."""
    layers = zip(probe.blocks, compressed.layers, plan.blocks, strict=False)
    return [in_original_slots(original, block, own.keep) for original, block, own in layers]


def divergence_of(probe: Probe, compressed: DeepseekV3, blocks: Sequence[Block]) -> float:
    """True mean KL of a compressed model on the probe's text, its layers given as `masked_blocks`."""
    return probe.divergence_of_model(
        blocks, dense(compressed.embed.get_value(), jnp.float32), dense(compressed.head.get_value(), jnp.float32)
    )
