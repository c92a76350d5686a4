import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines import Kept, all_experts, uniform_plan
from moejax.planning import KEEP, Plan
from moejax.planning.plan import PROJECTIONS
from plan_menus import CONFIG, EXPERT_SIZES, EXPERTS, FORMATS, SIZES, block_and_name, made_up_costs, size_of

COSTS = made_up_costs()
KEPT: dict[str, Kept] = {"all": all_experts(COSTS), "some": {1: [0, 2, 3, 5], 2: [4], 3: [0, 1, 2]}}
BLOCKS, LAST = CONFIG.num_blocks, len(FORMATS) - 1


def uniform(kept: str, budget: int) -> Plan | None:
    return uniform_plan(COSTS, CONFIG, KEPT[kept], size_of, budget)


def levels(plan: Plan) -> list[int]:
    """The number of the one format of every block, then that of embedding and head."""
    targets: list[set[str]] = [{own for formats in block.experts.values() for own in formats} for block in plan.blocks]
    for full in SIZES:
        # The tiny weight stays as it is where a format saves nothing.
        if full not in ("embed", "head", "layers.2.tiny"):
            block, own = block_and_name(full)
            targets[block].add(plan.blocks[block].formats.get(own, KEEP))
    return [FORMATS.index(target) for (target,) in [*targets, {plan.embed, plan.head}]]


def exact_size(kept: str, of_levels: list[int]) -> int:
    """Bytes of everything at its block's level, embedding and head at the last one given."""
    total = sum(SIZES[name][of_levels[-1]] for name in ("embed", "head"))
    total += sum(SIZES[name][of_levels[block_and_name(name)[0]]] for name in SIZES.keys() - {"embed", "head"})
    return total + sum(
        len(experts) * sum(EXPERT_SIZES[name][of_levels[block]] for name in PROJECTIONS)
        for block, experts in KEPT[kept].items()
    )


@pytest.mark.parametrize("kept", KEPT)
@given(data=st.data())
def test_the_largest_width_that_fits_and_as_many_layers_raised_as_fit(kept: str, data: st.DataObject) -> None:
    smallest, largest = (exact_size(kept, [level] * (BLOCKS + 1)) for level in (0, LAST))
    budget = data.draw(st.integers(smallest, largest + 100))
    plan = uniform(kept, budget)
    assert plan is not None
    *blocks, base = found = levels(plan)
    assert exact_size(kept, found) == size_of(plan) <= budget
    raised = sum(level > base for level in blocks)
    assert blocks == [base + 1] * raised + [base] * (BLOCKS - raised)
    if base < LAST:
        assert exact_size(kept, [base + 1] * (BLOCKS + 1)) > budget
    if base < LAST and raised < BLOCKS:
        blocks[raised] += 1
        assert exact_size(kept, [*blocks, base]) > budget


def test_raising_stops_at_the_first_layer_that_does_not_fit() -> None:
    plan = uniform("some", exact_size("some", [1, 0, 1, 0, 0]))
    assert plan is not None and levels(plan) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("kept", KEPT)
def test_none_where_not_even_the_smallest_width_fits(kept: str) -> None:
    smallest = exact_size(kept, [0] * (BLOCKS + 1))
    assert uniform(kept, smallest - 1) is None
    plan = uniform(kept, smallest)
    assert plan is not None and levels(plan) == [0] * (BLOCKS + 1)


def test_a_weight_stays_as_it_is_where_a_format_saves_nothing() -> None:
    found = []
    for level in range(LAST):
        plan = uniform("all", exact_size("all", [level] * (BLOCKS + 1)))
        assert plan is not None
        found.append(plan.blocks[2].formats.get("tiny", KEEP))
    assert found == ["int2g32", "int4g32", KEEP]


def test_the_survivors_are_those_given_and_k_is_the_original_s() -> None:
    plan = uniform("some", 10**6)
    assert plan is not None
    assert [block.keep for block in plan.blocks] == [None, (0, 2, 3, 5), (4,), (0, 1, 2)]
    assert [block.experts_per_token for block in plan.blocks] == [None, *[CONFIG.num_experts_per_tok] * 3]


def test_all_experts() -> None:
    assert {block: list(kept) for block, kept in all_experts(COSTS).items()} == {
        block: list(range(EXPERTS)) for block in (1, 2, 3)
    }
