"""Plans from configs alone, of models that no test could load."""

import inspect
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import moejax
from moejax.errors import InputError
from moejax.pipeline.forecast import Forecast
from moejax.pipeline.outlook import SHARES, plan, read_outlook
from moejax.pipeline.recipe import Recipe
from moejax.planning.parameters import count_parameters
from moejax.planning.plan import Plan, from_json, to_json
from moejax.report.forecast import forecast_figures, forecast_rows
from small_checkpoint import CONFIG

GB = 10**9


@pytest.fixture(scope="module")
def large() -> Forecast:
    """DeepSeek-V3 at 103 GB: the one expensive plan of the tests."""
    return plan("deepseek_v3", "103GB", fit="128GB", context=32768, batch=2)


@pytest.fixture(scope="module")
def moonlight() -> Forecast:
    return plan("moonlight_16b_a3b", "8GB")


def test_the_published_model_has_its_published_sizes(large: Forecast) -> None:
    assert (round(large.before.total / 1e9, 1), round(large.before.active / 1e9, 1)) == (671.0, 36.6)
    assert large.elements == 684489845504


def test_the_budget_is_kept_and_used(large: Forecast) -> None:
    assert large.budget == 103 * GB
    assert 103 * GB * (1 - 1e-4) < large.bytes.total <= 103 * GB
    assert sum(large.parts) == large.bytes.arrays
    assert sum(kind.bytes for kind in large.kinds) == large.bytes.arrays
    assert large.bytes.copied == 0
    assert large.after.total < large.before.total and large.after.active <= large.before.active


def test_every_layer_keeps_what_routing_needs_and_most_of_what_was_chosen(large: Forecast) -> None:
    assert [layer.block for layer in large.layers] == list(range(3, 62))
    for layer in large.layers:
        assert len(layer.kept_per_group) == 8 and min(layer.kept_per_group) >= 2 and max(layer.kept_per_group) <= 32
        # The experts that stay are those that are chosen more than the others.
        assert layer.kept / 256 < layer.choices_kept < 1 and layer.kept / 256 < layer.gate_mass_kept < 1
        assert layer.experts_per_token == 8
    keeps = [block.keep for block in large.plan.blocks if block.keep is not None]
    assert [layer.kept for layer in large.layers] == [len(keep) for keep in keeps]
    # Layers are not alike: those behind lose more.
    kept = [layer.kept for layer in large.layers]
    assert np.mean(kept[-10:]) < np.mean(kept[:40])


def test_pruning_some_is_better_than_none_and_than_most(large: Forecast) -> None:
    assert tuple(own.share_kept for own in large.splits) == SHARES
    best = min(large.splits, key=lambda own: float("inf") if own.predicted is None else own.predicted)
    assert best.predicted is not None and SHARES[-1] < best.share_kept < SHARES[0]
    # Layer by layer it is better still.
    assert 0 < large.predicted <= best.predicted
    pairs = zip(large.splits, large.splits[1:], strict=False)
    for more, fewer in pairs:
        assert more.losses is not None and fewer.losses is not None
        assert more.losses.pruning < fewer.losses.pruning and more.losses.experts > fewer.losses.experts
        assert more.expert_bits is not None and fewer.expert_bits is not None and more.expert_bits < fewer.expert_bits
    assert large.splits[0].losses is not None and large.splits[0].losses.pruning == 0


def test_memory_is_that_of_the_plans_model(large: Forecast) -> None:
    memory = large.memory
    assert (memory.context, memory.batch) == (32768, 2)
    assert memory.cache == (512 + 64) * 2 * 61 * 32768 * 2
    mtp = next(kind.bytes for kind in large.kinds if kind.kind == "mtp")
    assert memory.weights == large.bytes.arrays - mtp
    assert large.memory_limit == 128 * GB and memory.total < 128 * GB
    assert large.longest_context is not None and 32768 < large.longest_context <= 163840


def test_the_plan_can_be_written_down_and_read(large: Forecast) -> None:
    assert from_json(json.loads(json.dumps(to_json(large.plan)))) == large.plan


def test_its_figures_are_complete_and_finite(large: Forecast) -> None:
    figures = json.loads(json.dumps(forecast_figures(large), allow_nan=False))
    assert figures["bytes"] == large.bytes.total == sum(figures["bytes_by_part"].values())
    assert len(figures["layers"]) == 59 and len(figures["splits"]) == len(SHARES)
    assert figures["parameters"]["before"]["total"] == large.before.total
    assert figures["memory"]["fits"] is True
    assert figures["kld_predicted"] == large.predicted and all(value > 0 for value in figures["losses"].values())
    assert "CC-MoE" in figures["expert_scores"] and "GGUF-Tool-Suite" in figures["sensitivity"]
    assert None not in figures.values()


def test_without_a_budget_a_plan_takes_all_that_a_device_holds(small_fp8: Path) -> None:
    config = small_fp8 / "config.json"
    limited = plan(config, "600KB", context=512)
    sized = plan(config, fit=limited.memory.total, context=512)
    assert sized.budget is None and sized.memory_limit == limited.memory.total
    assert 0.99 * limited.memory.total < sized.memory.total <= limited.memory.total
    assert sized.predicted == pytest.approx(limited.predicted, rel=0.02)
    assert ("budget", "what the device holds") in forecast_rows(sized)
    assert forecast_figures(sized)["budget_bytes"] is None


def test_three_quarters_of_the_experts_are_the_papers_sizes() -> None:
    asked = read_outlook("deepseek_v3", None, Recipe(share_kept=0.75))
    smallest = asked.problem.smallest()
    after = count_parameters(asked.shapes.compressed(smallest.plan))
    assert (round(after.total / 1e9, 1), round(after.with_mtp / 1e9, 1)) == (507.5, 516.3)
    assert {len(block.keep) for block in smallest.plan.blocks if block.keep is not None} == {192}
    assert asked.smallest == smallest.bytes


def test_moonlight(moonlight: Forecast) -> None:
    assert (round(moonlight.before.total / 1e9, 2), round(moonlight.before.active / 1e9, 2)) == (15.96, 2.58)
    assert 8 * GB * (1 - 1e-4) < moonlight.bytes.total <= 8 * GB
    assert [layer.block for layer in moonlight.layers] == list(range(1, 27))
    assert moonlight.memory_limit is None and moonlight.longest_context is None


def test_without_statistics_all_experts_are_taken_to_be_alike(moonlight: Forecast) -> None:
    assert moonlight.scores_source is None
    assert ("routing statistics", "none: all experts taken to be alike") in forecast_rows(moonlight)
    for layer in moonlight.layers:
        assert layer.gate_mass_kept == layer.choices_kept == pytest.approx(layer.kept / 64)


def test_kimi_k2_can_be_read() -> None:
    asked = read_outlook("kimi_k2", None, Recipe())
    assert asked.config.n_routed_experts == 384 and asked.scores.source is None
    before = count_parameters(asked.shapes.model)
    assert (round(before.total / 1e9, 1), round(before.active / 1e9, 1)) == (1026.4, 31.7)
    # One group, of which 8 are chosen.
    assert {len(block.keep) for block in asked.problem.smallest().plan.blocks if block.keep is not None} == {8}


def test_it_is_moejaxs_own_function() -> None:
    assert moejax.plan is plan and moejax.__all__ == ["__version__", "plan"]
    assert list(inspect.signature(moejax.plan).parameters)[:2] == ["config", "budget"]
    with pytest.raises(AttributeError, match="has no attribute 'plans'"):
        moejax.plans  # noqa: B018


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


def test_sizes_are_texts_or_numbers_and_the_default_recipe_is_the_default(config_file: Path) -> None:
    written = plan(str(config_file), "1MB", fit="8MB", context=512, recipe=Recipe())
    number = plan(config_file, 10**6, fit=8 * 10**6, context=512)
    assert written == number
    assert written.bytes.total <= 10**6 and written.memory_limit == 8 * 10**6


@pytest.mark.parametrize(("asked", "per_token"), [("measured", {3}), ("paper", {2, 3}), (2, {2})])
def test_as_many_experts_per_token_as_the_recipe_lets_be_tried(
    config_file: Path, asked: int | str, per_token: set[int]
) -> None:
    recipe = Recipe(experts_per_token=asked)  # type: ignore[arg-type]
    plans = read_outlook(config_file, None, recipe).problem.smallest().plan
    found = {block.experts_per_token for block in plans.blocks if block.keep is not None}
    assert found <= per_token and found
    # Half of the experts are left: the paper's rule takes round(1.5) = 2.
    assert asked != "paper" or found == {2}


def test_a_recipe_that_does_not_suit_the_model_is_refused(config_file: Path) -> None:
    with pytest.raises(InputError, match="the recipe asks for 4 experts per token; the model has 3"):
        read_outlook(config_file, None, Recipe(experts_per_token=4))
    with pytest.raises(InputError, match=r"share_kept 0\.25 keeps 3 of 12 experts; routing needs at least 6"):
        read_outlook(config_file, None, Recipe(share_kept=0.25))


def counts_by_format(plan: Plan) -> list[int]:
    """How many experts have a format in common, by block, projection and format."""
    experts = (formats for block in plan.blocks for formats in block.experts.values())
    return [count for formats in experts for count in Counter(formats).values()]


@pytest.mark.parametrize("multiple", [2, 3, 4])
@pytest.mark.parametrize("groups", ["ragged", "equal"])
def test_experts_and_those_of_a_format_are_as_many_as_are_a_multiple(
    config_file: Path, multiple: int, groups: str
) -> None:
    recipe = Recipe(bucket_multiple=multiple, groups="equal" if groups == "equal" else "ragged")
    outlook = read_outlook(config_file, None, recipe)
    for budget in (outlook.smallest, 800_000, 10**6):
        found = plan(config_file, budget, recipe=recipe)
        counts = counts_by_format(found.plan)
        assert found.bytes.total <= budget and counts and all(own % multiple == 0 for own in counts)
        kept = [len(block.keep) for block in found.plan.blocks if block.keep is not None]
        assert all(own % (3 if groups == "equal" else 1) == 0 for own in kept)
    assert any(own % multiple for own in counts_by_format(plan(config_file, 10**6, recipe=Recipe()).plan))


def test_counts_that_no_multiple_is_leave_all_experts_in_one_format(config_file: Path) -> None:
    """12 experts in multiples of 16."""
    recipe = Recipe(bucket_multiple=16)
    outlook = read_outlook(config_file, None, recipe)
    assert set(counts_by_format(plan(config_file, outlook.smallest * 5 // 4, recipe=recipe).plan)) == {12}
    assert outlook.smallest > read_outlook(config_file, None, Recipe()).smallest
    with pytest.raises(InputError, match=rf"the smallest that can is .*\({outlook.smallest} bytes\)"):
        plan(config_file, outlook.smallest - 1, recipe=recipe)


def test_tensors_that_are_raised_have_counts_in_multiples_too(config_file: Path) -> None:
    recipe = Recipe(bucket_multiple=5, share_kept=0.75, allocation="raise")
    assert set(counts_by_format(plan(config_file, 10**6, recipe=recipe).plan)) == {10}


def test_mtp_blocks_can_be_dropped(config_file: Path) -> None:
    """The model has one block less; what it is measured against keeps it."""
    whole, without = (read_outlook(config_file, None, Recipe(), drop_mtp=drop) for drop in (False, True))
    assert (whole.dropped_mtp, without.dropped_mtp) == (0, 1)
    assert whole.elements == without.elements and whole.smallest > without.smallest
    smallest = without.problem.smallest().plan
    assert len(smallest.blocks) == without.config.num_hidden_layers == without.config.num_blocks
    assert without.shapes.raw_config["num_nextn_predict_layers"] == 0


def test_tokenizer_files_beside_a_config_are_counted(config_file: Path, small: Path) -> None:
    alone = read_outlook(config_file, None, Recipe()).smallest
    beside = read_outlook(small / "config.json", None, Recipe()).smallest
    names = ("tokenizer.json", "tokenizer_config.json")
    copied = sum((small / name).stat().st_size for name in names)
    checksums = len(json.dumps(dict.fromkeys(names, "0" * 8), separators=(",", ":"))) - len("{}")
    assert json.loads((small / "config.json").read_text()) == json.loads(config_file.read_text())
    assert beside - alone == copied + checksums
