import pytest

from moejax.pipeline.activated_experts import ActivatedExperts, with_activated_experts
from moejax.pipeline.compress import Prepared
from moejax.pipeline.search import divergence_of, masked_blocks
from moejax.planning import BlockPlan, Plan
from moejax.transforms.compress import compress
from moejax.transforms.experts_per_token import paper_rule
from small_job import Job


def test_the_original_one_less_and_the_papers_are_tried_with_and_without_a_scale(job: Job) -> None:
    kept = [len(block.keep) for block in job.planned.candidates[0].plan.blocks if block.keep is not None]
    papers = paper_rule(3, sum(kept) / (12 * len(kept)))
    tried = [(choice.experts_per_token, choice.is_scaled) for choice in job.planned.activated]
    assert sorted(tried) == sorted((k, scaled) for k in {3, 2, papers} for scaled in (False, True))


def test_the_best_comes_first_and_fitted_scales_make_up_for_fewer_experts(job: Job) -> None:
    activated = job.planned.activated
    assert [choice.divergence for choice in activated] == sorted(choice.divergence for choice in activated)
    for choice in activated:
        assert len(choice.routing_scales) == 3 and choice.routing_scales[0] == 1.0
    scales = {choice.experts_per_token: choice.routing_scales[1:] for choice in activated if choice.is_scaled}
    # A token's weights sum to the same for any K, and the outputs of fewer experts cancel less.
    assert all(fewer < full for fewer, full in zip(scales[2], scales[3], strict=True))


@pytest.mark.parametrize("n", [0, -1])
def test_a_choices_divergence_is_that_of_the_model_it_makes(prepared: Prepared, job: Job, n: int) -> None:
    choice = job.planned.activated[n]
    plan = with_activated_experts(job.planned.candidates[0].plan, choice)
    compressed = compress(prepared.model, plan, prepared.statistics)
    blocks = masked_blocks(prepared.probe, compressed, plan)
    assert choice.divergence == pytest.approx(divergence_of(prepared.probe, compressed, blocks), rel=1e-4)


def test_the_plan_takes_the_best_that_fits(prepared: Prepared, job: Job) -> None:
    plans = [with_activated_experts(job.planned.candidates[0].plan, choice) for choice in job.planned.activated]
    fitting = [plan for plan in plans if prepared.size_of(plan) <= job.budget]
    assert job.planned.plan == fitting[0]


def test_mtp_blocks_take_the_last_layers_scale_and_dense_blocks_none() -> None:
    moe = BlockPlan(keep=(0, 1), experts={"gate": ("keep", "keep")}, experts_per_token=2)
    plan = Plan("keep", "keep", (BlockPlan(), moe, moe, moe))
    changed = with_activated_experts(plan, ActivatedExperts(1, (1.0, 0.5, 0.75), 0.0))
    assert changed.blocks[0] == BlockPlan()
    assert [block.routing_scale for block in changed.blocks] == [1.0, 0.5, 0.75, 0.75]
    assert [block.experts_per_token for block in changed.blocks] == [None, 1, 1, 1]
    assert {block.keep for block in changed.blocks[1:]} == {(0, 1)}
