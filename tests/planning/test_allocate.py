import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moejax.planning import KEEP, BlockPlan
from moejax.planning.allocate import choice_of_plan, plan_of_choice, smallest_choice
from moejax.planning.plan import PROJECTIONS
from moejax.planning.solve import Choice, choice_bytes, menu_survivors, solve
from plan_menus import CONFIG, EXPERTS, FORMATS, SIZES, block_and_name, made_up_costs, size_of

COSTS = made_up_costs()


def random_choice(seed: int, pruned: tuple[int, int, int]) -> Choice:
    """Any formats, and so many experts pruned in each block that has any."""
    random = np.random.RandomState(seed)
    expert = {block: {name: random.randint(4, size=EXPERTS) for name in PROJECTIONS} for block in COSTS.experts}
    return Choice(random.randint(4, size=len(SIZES)), dict(zip(COSTS.experts, pruned, strict=True)), expert)


choices = st.builds(random_choice, st.integers(0, 10**6), st.tuples(*[st.integers(0, 2)] * 3))


def test_a_plan_says_what_was_chosen() -> None:
    costs, choice = COSTS, random_choice(0, (0, 1, 2))
    expert = choice.expert
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


@given(choices)
def test_a_plan_s_choice_is_the_one_it_was_made_of(choice: Choice) -> None:
    """Up to the formats of experts that are gone."""
    plan = plan_of_choice(COSTS, choice, CONFIG)
    found = choice_of_plan(COSTS, plan)
    assert found is not None
    np.testing.assert_array_equal(found.tensor_N, choice.tensor_N)
    assert found.pruned == choice.pruned
    for block, menu in COSTS.experts.items():
        kept = menu_survivors(menu, choice.pruned[block])
        for name in PROJECTIONS:
            np.testing.assert_array_equal(found.expert[block][name][kept], choice.expert[block][name][kept])
    assert plan_of_choice(COSTS, found, CONFIG) == plan


@given(choices)
def test_what_the_solver_does_not_choose_is_left_out_of_a_plan_s_choice(choice: Choice) -> None:
    """K', routing scales, and that a weight stays as it is, which a plan may say or not."""
    plan = plan_of_choice(COSTS, choice, CONFIG)
    edited = tuple(
        block if block.keep is None else dataclasses.replace(block, experts_per_token=1, routing_scale=1.5)
        for block in plan.blocks
    )
    edited = (dataclasses.replace(edited[0], formats={"mlp.up": KEEP} | dict(edited[0].formats)), *edited[1:])
    found = choice_of_plan(COSTS, dataclasses.replace(plan, blocks=edited))
    assert found is not None and plan_of_choice(COSTS, found, CONFIG) == plan


def test_a_plan_that_the_solver_cannot_choose_has_no_choice() -> None:
    plan = plan_of_choice(COSTS, random_choice(1, (1, 0, 2)), CONFIG)
    first, block = plan.blocks[:2]

    def without(survivor: int) -> BlockPlan:
        """Block 1 with another survivor gone than those of the menu's order, or one more than it holds."""
        assert block.keep is not None
        stay = [n for n, e in enumerate(block.keep) if e != survivor]
        experts = {name: tuple(own[n] for n in stay) for name, own in block.experts.items()}
        return dataclasses.replace(block, keep=tuple(block.keep[n] for n in stay), experts=experts)

    foreign = {"gate": ("int3g32",) * 5}
    edited = [
        dataclasses.replace(plan, embed="int3g32"),
        dataclasses.replace(plan, head="int4g64"),
        dataclasses.replace(plan, blocks=(BlockPlan({"mlp.up": "int3g32"}), *plan.blocks[1:])),
        *(
            dataclasses.replace(plan, blocks=(first, own, *plan.blocks[2:]))
            for own in (
                dataclasses.replace(block, experts={**block.experts, **foreign}),
                without(3),
                dataclasses.replace(without(0), keep=(1, 2, 3, 4)),
                dataclasses.replace(block, keep=(0, 1, 2, 3, 5)),
                dataclasses.replace(without(4), keep=(0, 1, 2, 5)),
                dataclasses.replace(block, keep=(), experts=dict.fromkeys(PROJECTIONS, ())),
            )
        ),
    ]
    assert choice_of_plan(COSTS, plan) is not None
    assert choice_of_plan(COSTS, dataclasses.replace(plan, blocks=(first, without(4), *plan.blocks[2:]))) is not None
    assert [choice_of_plan(COSTS, own) for own in edited] == [None] * len(edited)


def test_a_model_whose_weights_outside_the_experts_all_stay() -> None:
    costs = dataclasses.replace(COSTS, names=(), tensors=dataclasses.replace(COSTS.tensors, bytes_NF=np.zeros((0, 4))))
    choice = Choice(np.zeros(0, int), {1: 1, 2: 0, 3: 0}, random_choice(2, (1, 0, 0)).expert)
    found = choice_of_plan(costs, plan_of_choice(costs, choice, CONFIG))
    assert found is not None and found.tensor_N.dtype == int and found.tensor_N.shape == (0,)
