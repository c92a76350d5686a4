import numpy as np

from moejax.planning import KEEP
from moejax.planning.allocate import plan_of_choice, smallest_choice
from moejax.planning.plan import PROJECTIONS
from moejax.planning.solve import Choice, choice_bytes, solve
from plan_menus import CONFIG, EXPERTS, FORMATS, SIZES, block_and_name, made_up_costs, size_of


def test_a_plan_says_what_was_chosen() -> None:
    costs, random = made_up_costs(), np.random.RandomState(0)
    expert = {block: {name: random.randint(4, size=EXPERTS) for name in PROJECTIONS} for block in costs.experts}
    choice = Choice(random.randint(4, size=len(SIZES)), {1: 0, 2: 1, 3: 2}, expert)
    plan = plan_of_choice(costs, choice, CONFIG)
    tensors = dict(zip(SIZES, (FORMATS[f] for f in choice.tensor_N), strict=True))
    assert (plan.embed, plan.head) == (tensors.pop("embed"), tensors.pop("head"))
    for full, target in tensors.items():
        block, own = block_and_name(full)
        assert plan.blocks[block].formats.get(own, KEEP) == target
    assert sum(len(block.formats) for block in plan.blocks) == sum(target != KEEP for target in tensors.values())
    assert [block.keep for block in plan.blocks] == [None, (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4), (0, 1, 2, 3)]
    for block, own_plan in enumerate(plan.blocks[1:], 1):
        assert (own_plan.experts_per_token, own_plan.routing_scale) == (CONFIG.num_experts_per_tok, 1.0)
        for name in PROJECTIONS:
            kept = expert[block][name][: EXPERTS - choice.pruned[block]]
            assert own_plan.experts[name] == tuple(FORMATS[f] for f in kept)
    assert plan.blocks[0].experts == {}
    assert size_of(plan) == choice_bytes(costs, choice)


def test_the_smallest_choice_is_the_least_that_the_solver_can_meet() -> None:
    costs = made_up_costs()
    smallest = choice_bytes(costs, smallest_choice(costs))
    assert size_of(plan_of_choice(costs, smallest_choice(costs), CONFIG)) == smallest
    assert solve(costs, smallest) is not None and solve(costs, smallest - 1) is None


def test_the_smallest_choice_takes_no_format_that_is_not_allowed() -> None:
    costs = made_up_costs()
    costs.tensors.cost_NF[0, 0] = np.inf
    costs.experts[2].menus["up"].cost_NF[3, :2] = np.inf
    choice = smallest_choice(costs)
    assert choice.tensor_N.tolist() == [1] + [0] * (len(SIZES) - 1)
    assert choice.expert[2]["up"].tolist() == [0, 0, 0, 2, 0, 0]
    assert choice.pruned == {1: 2, 2: 2, 3: 2}
