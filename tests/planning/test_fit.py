"""Plans within a budget, of made-up bytes with metadata that the solver does not know."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.errors import InputError
from moejax.planning import KEEP, Plan
from moejax.planning.allocate import plan_of_choice, smallest_choice
from moejax.planning.fit import PRUNING_WEIGHTS, Fitted, Problem, check_budget, losses_of_plan
from moejax.planning.menus import Menu, Menus
from moejax.planning.plan import PROJECTIONS
from moejax.planning.predict import Curve, LossCurves, Losses
from moejax.planning.solve import solve
from plan_menus import CONFIG, EXPERT_SIZES, EXPERTS, FORMATS, SIZES, block_and_name, made_up_costs, size_of

COSTS = made_up_costs()
NOTHING = LossCurves()
METADATA = 300
every_weight = st.sampled_from(PRUNING_WEIGHTS)


def with_constant_metadata(plan: Plan) -> int:
    return size_of(plan) + METADATA


def with_metadata(plan: Plan) -> int:
    """A plan is described by every format it names; experts' take a byte each, others' seven."""
    named = sum(7 * len(block.formats) + len(block.experts.get("up", ())) for block in plan.blocks)
    return size_of(plan) + 100 + named


SMALLEST, LARGEST = (
    with_constant_metadata(plan_of_choice(COSTS, choice, CONFIG))
    for choice in (smallest_choice(COSTS), solve(COSTS, 10**9))
    if choice is not None
)


def losses_by_hand(plan: Plan) -> Losses:
    """Made-up costs are 1/bytes, less that of the weight as it is; of the MTP block nothing counts."""

    def cost(sizes: tuple[int, ...], target: str) -> float:
        return 1 / sizes[FORMATS.index(target)] - 1 / sizes[-1]

    others = cost(SIZES["embed"], plan.embed) + cost(SIZES["head"], plan.head)
    for full, sizes in SIZES.items():
        if full.startswith("layers."):
            block, own = block_and_name(full)
            others += cost(sizes, plan.blocks[block].formats.get(own, KEEP))
    blocks = [plan.blocks[block] for block in (1, 2)]
    experts = sum(
        cost(EXPERT_SIZES[name], own) for block in blocks for name in PROJECTIONS for own in block.experts[name]
    )
    return Losses(others, experts, sum((0.0, 0.1, 0.3)[EXPERTS - len(block.keep or ())] for block in blocks))


def assert_losses(found: Losses, expected: Losses) -> None:
    assert found == pytest.approx(expected, abs=1e-12)


@given(st.integers(SMALLEST - 250, LARGEST + 100), every_weight)
def test_a_plan_s_exact_bytes_are_within_the_budget(budget: int, weight: float) -> None:
    problem = Problem(COSTS, NOTHING, CONFIG, with_metadata)
    fitted = problem.fit(budget, weight)
    if fitted is None:
        assert budget < SMALLEST + 100
        return
    assert fitted.bytes == with_metadata(fitted.plan) <= budget
    assert_losses(fitted.losses, losses_by_hand(fitted.plan))
    assert problem.smallest().bytes <= fitted.bytes
    if np.isinf(weight):
        assert [len(block.keep or ()) for block in fitted.plan.blocks] == [0, EXPERTS, EXPERTS, EXPERTS]


@given(st.integers(SMALLEST, LARGEST), every_weight)
def test_constant_metadata_is_taken_off_the_budget(budget: int, weight: float) -> None:
    fitted = Problem(COSTS, NOTHING, CONFIG, with_constant_metadata).fit(budget, weight)
    choice = solve(COSTS, budget - METADATA, weight)
    assert (fitted is None) == (choice is None)
    if fitted is not None and choice is not None:
        assert fitted.plan == plan_of_choice(COSTS, choice, CONFIG)


def test_none_fits_below_the_smallest() -> None:
    problem = Problem(COSTS, NOTHING, CONFIG, with_constant_metadata)
    smallest = problem.smallest()
    assert smallest.bytes == with_constant_metadata(smallest.plan) == SMALLEST
    assert_losses(smallest.losses, losses_by_hand(smallest.plan))
    for weight in (1.0, 0.25):
        assert problem.fit(SMALLEST - 1, weight) is None
        assert problem.fit(SMALLEST, weight) == smallest
    assert problem.fit(SMALLEST, np.inf) is None, "at which no expert may go"


@contextmanager
def counted_sizes() -> Iterator[tuple[list[Plan], Problem]]:
    """A problem and the plans whose exact bytes it asked for."""
    asked: list[Plan] = []

    def counting(plan: Plan) -> int:
        asked.append(plan)
        return with_constant_metadata(plan)

    yield asked, Problem(COSTS, NOTHING, CONFIG, counting)


@given(st.integers(SMALLEST, LARGEST), every_weight, st.integers(0, METADATA))
def test_a_guess_of_the_overhead_saves_solves_and_changes_nothing(budget: int, weight: float, overhead: int) -> None:
    plans: list[Fitted | None] = []
    numbers = []
    for guess in (0, overhead, METADATA):
        with counted_sizes() as (asked, problem):
            plans.append(dataclasses.replace(problem, overhead=guess).fit(budget, weight))
            numbers.append(len(asked))
    assert plans[0] == plans[1] == plans[2]
    assert numbers[0] >= numbers[1] >= numbers[2] == (plans[2] is not None)


def untied_costs() -> Menus:
    """No two weights' alike, so that a weight a rounding error away chooses the same."""
    random = np.random.RandomState(0)

    def untied(menu: Menu) -> Menu:
        return dataclasses.replace(menu, cost_NF=menu.cost_NF * random.uniform(0.9, 1.1, (len(menu.cost_NF), 1)))

    experts = {
        block: dataclasses.replace(own, menus={name: untied(menu) for name, menu in own.menus.items()})
        for block, own in COSTS.experts.items()
    }
    return dataclasses.replace(COSTS, tensors=untied(COSTS.tensors), experts=experts)


UNTIED = untied_costs()


def experts_times(factor: float) -> LossCurves:
    """Rounded experts lose so many times their sum."""
    return LossCurves(experts=Curve(((1.0, factor),)))


def weighted_plan(budget: int, pruning_weight: float, experts: float) -> Plan:
    """The best of costs where experts' weigh more, pruning in proportion."""
    choice = solve(UNTIED.with_experts_weighing(experts), budget, pruning_weight * experts)
    assert choice is not None
    return plan_of_choice(UNTIED, choice, CONFIG)


def predicted(plan: Plan, curves: LossCurves) -> float:
    losses = losses_of_plan(UNTIED, plan)
    assert losses is not None
    return curves.together(losses)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("weight", [np.inf, 1.0, 0.25])
def test_experts_weigh_one_or_what_their_curve_says_whichever_is_better(share: float, weight: float) -> None:
    budget = round(SMALLEST + share * (LARGEST - SMALLEST))
    plain = weighted_plan(budget, weight, 1.0)
    for factor in (0.25, 1.0, 8.0):
        curves = experts_times(factor)
        problem = Problem(UNTIED, curves, CONFIG, size_of)
        fitted = problem.fit(budget, weight)
        assert fitted is not None and problem.predicted(fitted.losses) == predicted(fitted.plan, curves)
        # Never less than they cost by themselves.
        weighing = weighted_plan(budget, weight, max(factor, 1.0))
        assert fitted.plan == min(plain, weighing, key=lambda plan: predicted(plan, curves))


def test_where_they_weigh_more_rounded_experts_lose_less_and_other_weights_more() -> None:
    budget = (2 * SMALLEST + LARGEST) // 3
    plain, weighing = (
        Problem(COSTS, curves, CONFIG, size_of).fit(budget, np.inf) for curves in (NOTHING, experts_times(8))
    )
    assert plain is not None and weighing is not None
    assert weighing.losses.experts < plain.losses.experts and weighing.losses.others > plain.losses.others
    assert experts_times(8).together(weighing.losses) < experts_times(8).together(plain.losses)


def test_k_follows_the_experts_kept() -> None:
    per_token = {6: 3, 5: 2, 4: 1}
    problem = Problem(COSTS, NOTHING, CONFIG, size_of, per_token.__getitem__)
    for fitted in (problem.smallest(), problem.fit(LARGEST, 1.0), problem.fit(LARGEST - 900, 0.25)):
        assert fitted is not None
        dense, *others = fitted.plan.blocks
        assert dense.experts_per_token is None
        assert [block.experts_per_token for block in others] == [per_token[len(block.keep or ())] for block in others]
    assert problem.smallest().plan.blocks[1].experts_per_token == 1


def test_a_budget_below_the_smallest_plan_names_it() -> None:
    check_budget(1000, 1000, 5000)
    check_budget(1000, 4999, 5000)
    message = r"a budget of 999 B \(999 bytes\) cannot be met; the smallest that can is 1.00 KB \(1000 bytes\)$"
    with pytest.raises(InputError, match=message):
        check_budget(1000, 999, 5000)


@pytest.mark.parametrize(
    ("names", "named"),
    [(["head"], "head"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d", "e"], "a, b, c and 2 more")],
)
def test_a_budget_that_weights_without_a_format_forbid_names_them(names: list[str], named: str) -> None:
    message = rf"\(1000 bytes\); the recipe has no format that .* saves bytes for {named}, which stay as they are$"
    with pytest.raises(InputError, match=message):
        check_budget(1000, 999, 5000, names)


@pytest.mark.parametrize("budget", [5000, 10**6])
def test_a_budget_that_the_original_fits_leaves_nothing_to_do(budget: int) -> None:
    message = rf"\({budget} bytes\) leaves nothing to do; the original takes 5.00 KB \(5000 bytes\), a budget below"
    with pytest.raises(InputError, match=message):
        check_budget(1000, budget, 5000)


@given(st.integers(SMALLEST, LARGEST), st.sampled_from([1.0, 0.25]))
def test_the_losses_of_a_plan_are_those_it_was_fitted_with(budget: int, weight: float) -> None:
    fitted = Problem(COSTS, NOTHING, CONFIG, size_of, lambda kept: 1).fit(budget, weight)
    assert fitted is not None
    assert losses_of_plan(COSTS, fitted.plan) == fitted.losses


def forbidding_first_format() -> Menus:
    cost_NF = COSTS.tensors.cost_NF.copy()
    cost_NF[0, 0] = np.inf
    return dataclasses.replace(COSTS, tensors=dataclasses.replace(COSTS.tensors, cost_NF=cost_NF))


def test_a_plan_that_is_no_choice_has_no_losses() -> None:
    plan = Problem(COSTS, NOTHING, CONFIG, size_of).smallest().plan
    assert plan.embed == FORMATS[0]
    assert losses_of_plan(COSTS, plan) is not None
    assert losses_of_plan(COSTS, dataclasses.replace(plan, head="int3g32")) is None
    assert losses_of_plan(forbidding_first_format(), plan) is None
    assert losses_of_plan(forbidding_first_format(), dataclasses.replace(plan, embed=FORMATS[1])) is not None
