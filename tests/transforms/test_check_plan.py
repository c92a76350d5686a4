"""Every plan that cannot be carried out is refused before any work."""

import dataclasses
from typing import Any

import pytest

from moejax.errors import InputError
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.planning.plan import PROJECTIONS
from moejax.transforms.check_plan import check_plan
from moejax.transforms.compress import compress
from small_models import CONFIG, small_model

# 12 experts in 3 groups of 4; K is 3 and two groups are chosen, so that each needs two survivors.
EVERY_EXPERT = tuple(range(12))


def keeping(*keep: int, **changes: Any) -> BlockPlan:
    experts = {name: (KEEP,) * len(keep) for name in PROJECTIONS}
    return dataclasses.replace(BlockPlan({}, keep, experts, 3), **changes)


def plan_with(block: BlockPlan, index: int = 1) -> Plan:
    """The model's own blocks with one exchanged: the dense one, two with experts, one for drafts."""
    blocks = [BlockPlan(), *[keeping(*EVERY_EXPERT)] * 3]
    blocks[index] = block
    return Plan(KEEP, KEEP, tuple(blocks))


@pytest.mark.parametrize(
    "block",
    [
        keeping(*EVERY_EXPERT),
        keeping(0, 3, 5, 6, 10, 11),
        keeping(0, 3, 5, 6, 10, 11, experts_per_token=1, routing_scale=1e-3),
        keeping(*EVERY_EXPERT, experts_per_token=None),
        keeping(*EVERY_EXPERT, experts={"up": (KEEP,) * 12}),
        BlockPlan({}, EVERY_EXPERT),
        BlockPlan(),
    ],
)
@pytest.mark.parametrize("index", [1, 2, 3])
def test_plans_that_can_be_carried_out(block: BlockPlan, index: int) -> None:
    check_plan(plan_with(block, index), CONFIG)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (keeping(*EVERY_EXPERT, keep=None), "gives formats to experts; it must say which it keeps"),
        (keeping(*EVERY_EXPERT[:-1], 12), "keeps experts that are not ascending numbers from 0 to 11"),
        (keeping(-1, *EVERY_EXPERT[1:]), "keeps experts that are not ascending numbers from 0 to 11"),
        (keeping(*EVERY_EXPERT[:-1], 10), "keeps experts that are not ascending numbers"),
        (keeping(1, 0, *EVERY_EXPERT[2:]), "keeps experts that are not ascending numbers"),
        (keeping(*EVERY_EXPERT, experts_per_token=4), "activates 4 experts per token; 1 to 3 are accepted"),
        (keeping(*EVERY_EXPERT, experts_per_token=0), "activates 0 experts per token; 1 to 3 are accepted"),
        (keeping(*EVERY_EXPERT, experts_per_token=-1), "activates -1 experts per token; 1 to 3 are accepted"),
        (keeping(*EVERY_EXPERT, routing_scale=0.0), "has routing scale 0.0; a positive number is needed"),
        (keeping(*EVERY_EXPERT, routing_scale=-1.0), "has routing scale -1.0; a positive number"),
        (keeping(*EVERY_EXPERT, routing_scale=float("nan")), "has routing scale nan; a positive number"),
        (keeping(*EVERY_EXPERT, routing_scale=float("inf")), "has routing scale inf; a positive number"),
        (keeping(0, 1, 2, 3, 4, 8, 9), "keeps 1 experts in group 1; routing needs 2 in each"),
        (keeping(0, 1, 2, 3, 4, 5), "keeps 0 experts in group 2; routing needs 2 in each"),
        (keeping(), "keeps 0 experts in group 0; routing needs 2 in each"),
        (
            keeping(*EVERY_EXPERT, experts={name: (KEEP,) * (11 + (name != "up")) for name in PROJECTIONS}),
            "has 11 formats for up; one for each of 12 experts kept, for gate, up, down, is accepted",
        ),
        (keeping(*EVERY_EXPERT, experts={"side": (KEEP,) * 12}), "has 12 formats for side; .* for gate, up, down"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("index", [1, 3])
def test_experts_that_the_model_cannot_have(block: BlockPlan, message: str, index: int) -> None:
    with pytest.raises(InputError, match=f"^block {index} of the plan {message}"):
        check_plan(plan_with(block, index), CONFIG)


def test_k_decides_how_many_a_group_needs() -> None:
    config = dataclasses.replace(CONFIG, topk_group=1)
    check_plan(plan_with(keeping(*EVERY_EXPERT)), config)
    with pytest.raises(InputError, match="keeps 2 experts in group 1; routing needs 3 in each"):
        check_plan(plan_with(keeping(0, 1, 2, 4, 5, 8, 9, 10)), config)
    check_plan(plan_with(keeping(0, 1, 2, 4, 5, 8, 9, 10, experts_per_token=2)), config)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (keeping(*EVERY_EXPERT), "keeps experts; the model's block 0 is dense"),
        (keeping(), "keeps experts; the model's block 0 is dense"),
        (BlockPlan(experts={"gate": (KEEP,)}), "gives formats to experts; it must say which it keeps"),
        (BlockPlan(experts_per_token=2), "changes the routing; it must say which experts it keeps"),
        (BlockPlan(routing_scale=0.5), "changes the routing; it must say which experts it keeps"),
    ],
    ids=["all", "none", "formats", "per token", "scale"],
)
def test_a_dense_block_has_no_experts(block: BlockPlan, message: str) -> None:
    with pytest.raises(InputError, match=f"^block 0 of the plan {message}"):
        check_plan(plan_with(block, 0), CONFIG)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_blocks_are_the_model_s(count: int) -> None:
    plan = Plan(KEEP, KEEP, (BlockPlan(), *[keeping(*EVERY_EXPERT)] * 4)[:count])
    with pytest.raises(InputError, match=f"the plan has {count} blocks; the model has 3 layers and 1 MTP blocks"):
        check_plan(plan, CONFIG)


def test_compress_checks_first() -> None:
    statistics: Any = "not looked at"
    with pytest.raises(InputError, match="block 3 of the plan keeps 0 experts in group 0"):
        compress(small_model(), plan_with(keeping(), 3), statistics)
