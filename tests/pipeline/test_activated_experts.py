from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import pytest

from moejax.errors import InputError
from moejax.model import DeepseekV3, config_from_hf
from moejax.pipeline.activated_experts import (
    ActivatedExperts,
    candidates,
    try_activated_experts,
    with_activated_experts,
)
from moejax.pipeline.job import Prepared
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Trials, Tried, Try
from moejax.planning import BlockPlan, Plan
from moejax.progress import Progress, silent
from moejax.transforms.experts_per_token import paper_rule
from small_checkpoint import CONFIG as RAW_CONFIG
from small_job import Job

CONFIG = config_from_hf(RAW_CONFIG)


def test_the_original_one_less_and_the_papers_are_tried_with_and_without_a_scale(job: Job) -> None:
    kept = [len(block.keep) for block in job.planned.candidates[0].plan.blocks if block.keep is not None]
    papers = tuple(paper_rule(3, own / 12) for own in (12, *kept[:2]))
    tried = [(choice.experts_per_token, choice.is_scaled) for choice in job.planned.activated]
    assert sorted(tried) == sorted((k, scaled) for k in {(3, 3, 3), (2, 2, 2), papers} for scaled in (False, True))


def test_the_best_comes_first_and_fitted_scales_make_up_for_fewer_experts(job: Job) -> None:
    activated = job.planned.activated
    assert [choice.divergence for choice in activated] == sorted(choice.divergence for choice in activated)
    for choice in activated:
        assert len(choice.routing_scales) == 3 and choice.routing_scales[0] == 1.0
    scales = {choice.experts_per_token: choice.routing_scales[1:] for choice in activated if choice.is_scaled}
    # A token's weights sum to the same for any K, and the outputs of fewer experts cancel less.
    assert all(fewer < full for fewer, full in zip(scales[2, 2, 2], scales[3, 3, 3], strict=True))


def test_a_recipe_may_do_without_fitted_scales(prepared: Prepared, job: Job) -> None:
    recipe, plan = Recipe(experts_per_token=2, fit_routing_scale=False), job.planned.candidates[0].plan
    (choice,) = try_activated_experts(prepared.trials, plan, recipe, silent)
    assert choice.experts_per_token == (2, 2, 2) and not choice.is_scaled


def test_what_has_been_tried_is_not_tried_again(prepared: Prepared, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, walks = job.planned.candidates[0].plan, list[int]()
    walked = Trials._walked

    def counted(self: Trials, tries: Sequence[Try], progress: Progress) -> list[Tried]:
        walks.append(len(tries))
        return walked(self, tries, progress)

    monkeypatch.setattr(Trials, "_walked", counted)
    trials = replace(prepared.trials, known={})
    first, again = (try_activated_experts(trials, plan, Recipe(experts_per_token=3), silent) for _ in range(2))
    assert walks == [2] and first == again
    measured = try_activated_experts(trials, plan, Recipe(experts_per_token="measured"), silent)
    assert walks[1:] == [len(measured) - 2] and set(first) < set(measured)
    assert measured == list(job.planned.activated)


@pytest.mark.parametrize("n", [0, -1])
def test_a_choices_divergence_is_that_of_the_model_it_makes(
    planned_model: Callable[[Plan], DeepseekV3], divergence: Callable[[DeepseekV3], float], job: Job, n: int
) -> None:
    choice = job.planned.activated[n]
    plan = with_activated_experts(job.planned.candidates[0].plan, choice)
    assert choice.divergence == pytest.approx(divergence(planned_model(plan)), rel=1e-4)


def test_the_plan_takes_the_best_that_fits(prepared: Prepared, job: Job) -> None:
    plans = [with_activated_experts(job.planned.candidates[0].plan, choice) for choice in job.planned.activated]
    fitting = [plan for plan in plans if prepared.shapes.size_of(plan) <= job.budget]
    assert job.planned.plan == fitting[0]


def test_mtp_blocks_take_the_last_layers_scale_and_dense_blocks_none() -> None:
    moe = BlockPlan(keep=(0, 1), experts={"gate": ("keep", "keep")}, experts_per_token=2)
    plan = Plan("keep", "keep", (BlockPlan(), moe, moe, moe))
    changed = with_activated_experts(plan, ActivatedExperts((2, 1, 1), (1.0, 0.5, 0.75), 0.0))
    assert changed.blocks[0] == BlockPlan()
    assert [block.routing_scale for block in changed.blocks] == [1.0, 0.5, 0.75, 0.75]
    assert [block.experts_per_token for block in changed.blocks] == [None, 1, 1, 1]
    assert {block.keep for block in changed.blocks[1:]} == {(0, 1)}


@pytest.mark.parametrize(
    ("asked", "kept", "expected"),
    [
        ("measured", (12, 12, 12), [(2, 2, 2), (3, 3, 3)]),
        # Three quarters and five twelfths of 3 are 2.25 and 1.25.
        ("measured", (12, 9, 5), [(2, 2, 2), (3, 2, 1), (3, 3, 3)]),
        ("paper", (12, 9, 5), [(3, 2, 1)]),
        ("paper", (12, 12, 1), [(3, 3, 1)]),
        (1, (12, 9, 5), [(1, 1, 1)]),
        (3, (12, 9, 5), [(3, 3, 3)]),
    ],
)
def test_what_a_recipe_lets_be_tried(
    asked: int | Literal["measured", "paper"], kept: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    assert candidates(Recipe(experts_per_token=asked), CONFIG, kept) == expected


def test_a_model_of_one_expert_per_token_has_none_less() -> None:
    config = config_from_hf(RAW_CONFIG | {"num_experts_per_tok": 1})
    assert candidates(Recipe(), config, (12, 6)) == [(1, 1)]


def test_more_experts_per_token_than_the_model_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"^the recipe asks for 4 experts per token; the model has 3, and fewer can"):
        candidates(Recipe(experts_per_token=4), CONFIG, (12, 12))
