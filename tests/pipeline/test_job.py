import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax import __version__
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.store import folder_bytes
from moejax.errors import InputError
from moejax.evaluate.text import read_text
from moejax.formats import ExpertWeights, describe, format_name
from moejax.model import DeepseekV3, named_leaves
from moejax.pipeline.activated_experts import with_activated_experts
from moejax.pipeline.check import check_limit, require_original
from moejax.pipeline.job import (
    Prepared,
    plan_within,
    provenance,
    split_calibration,
)
from moejax.pipeline.options import options, order_of_pruning
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.shapes import copied_files, shapes_for
from moejax.pipeline.trial import Try
from moejax.planning import Plan
from moejax.planning.fit import Problem
from moejax.planning.plan import KEEP, from_json
from moejax.planning.predict import LossCurves
from moejax.progress import silent
from small_job import RECIPE, Job


@given(st.integers(2, 60), st.integers(1, 60), st.integers(1, 10))
def test_calibration_and_probe_are_disjoint_and_spread_over_the_text(given_: int, wanted: int, probed: int) -> None:
    chunks = np.arange(given_)[:, None] + np.zeros(4, np.int32)
    calibrated, held_out = split_calibration(chunks, wanted, probed)
    numbers = [part[:, 0].tolist() for part in (calibrated, held_out)]
    assert len(set(numbers[0]) | set(numbers[1])) == len(numbers[0]) + len(numbers[1])
    assert all(own == sorted(own) and own for own in numbers)
    if given_ >= wanted + probed:
        assert [len(own) for own in numbers] == [wanted, probed]
        assert {0, given_ - 1} <= set(numbers[0] + numbers[1])
    else:
        assert [len(own) for own in numbers] == [given_ - max(1, given_ // 8), max(1, given_ // 8)]


def test_a_single_chunk_cannot_be_split() -> None:
    with pytest.raises(InputError, match="has 1 chunk of 512 tokens; 2 are needed"):
        split_calibration(np.zeros((1, 512), np.int32), 8, 8)


def test_only_an_original_can_be_compressed(small: Path, job: Job) -> None:
    assert require_original(open_checkpoint(small)).path == small
    with pytest.raises(InputError, match="compressed already; compress takes an original"):
        require_original(open_checkpoint(job.output))


def test_what_goes_along_from_the_original(prepared: Prepared, job: Job) -> None:
    copied = copied_files(prepared.checkpoint.path)
    assert [file.name for file in copied] == ["tokenizer.json", "tokenizer_config.json"]
    assert all((job.output / file.name).read_bytes() == file.read_bytes() for file in copied)
    assert {path.name for path in job.output.iterdir()} == {"items", "manifest.json", *(file.name for file in copied)}


def test_the_bytes_written_are_those_predicted_and_within_the_budget(prepared: Prepared, job: Job) -> None:
    assert job.written == prepared.shapes.size_of(job.planned.plan) == folder_bytes(job.output) <= job.budget


def test_every_prediction_before_measuring_is_kept(small: Path, prepared: Prepared, smallest_bytes: int) -> None:
    """`check`, which sees shapes alone, names a budget that the measured plan meets."""
    checkpoint = require_original(open_checkpoint(small))
    with pytest.raises(InputError, match="cannot be met") as error:
        check_limit(checkpoint, 1000, RECIPE)
    named = int(str(error.value).rpartition("(")[2].split(" ")[0])
    check_limit(checkpoint, named, RECIPE)
    planned = plan_within(prepared, named, silent)
    assert smallest_bytes <= prepared.shapes.size_of(planned.plan) <= named


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(share_kept=0.75), Recipe(share_kept=0.6), Recipe(groups="equal", share_kept=0.75)],
    ids=["default", "0.75", "0.6", "equal"],
)
def test_the_smallest_budget_named_is_enough_whichever_experts_stay(small: Path, recipe: Recipe) -> None:
    """Which they are is measured later, and lists of scattered survivors are longer."""
    checkpoint = require_original(open_checkpoint(small))
    with pytest.raises(InputError, match="cannot be met") as error:
        check_limit(checkpoint, 1000, recipe)
    named = int(str(error.value).rpartition("(")[2].split(" ")[0])
    copied = copied_files(checkpoint.path)
    shapes = shapes_for(checkpoint.abstract_model(), recipe.method, checkpoint.raw_config, copied)
    costs = options(shapes.model, recipe)
    sizes = []
    for score_E in (np.arange(12) % 3, np.arange(12) % 2, *map(np.random.RandomState(0).permutation, [12] * 5)):
        order = order_of_pruning(score_E, shapes.config, recipe)
        experts = {block: replace(menu, order=order) for block, menu in costs.experts.items()}
        problem = Problem(replace(costs, experts=experts), LossCurves(), shapes.config, shapes.size_of)
        sizes.append(problem.smallest().bytes)
    assert len(set(sizes)) > 1 and named - 3 * 12 <= max(sizes) <= named


def test_the_manifest_holds_the_plan_and_where_it_came_from(
    prepared: Prepared, job: Job, calibration_text: Path
) -> None:
    manifest = json.loads((job.output / "manifest.json").read_text())
    assert from_json(manifest["plan"]) == job.planned.plan
    made = manifest["provenance"]
    text = read_text(calibration_text)
    assert made == provenance(text, 2, Recipe()) == prepared.shapes.provenance
    assert "criterion" not in provenance(text, 2, None)
    assert made["calibration"] == {"source": "calibration.txt", "sha256": text.sha256, "chunks": 2}
    assert (made["moejax"], made["criterion"]) == (__version__, "reap")


def test_what_is_written_is_what_the_plan_says(original: DeepseekV3, job: Job) -> None:
    plan, before = job.planned.plan, named_leaves(original)
    leaves = named_leaves(load_model(open_checkpoint(job.output)))
    prefixes = ["layers.0.", "layers.1.", "layers.2.", "mtp.0.block."]
    for prefix, block in zip(prefixes, plan.blocks, strict=True):
        for name, target in block.formats.items():
            whole = f"mtp.0.{name}" if name == "eh_proj" else prefix + name
            assert format_name(leaves.pop(whole)) == target
        for projection, formats in block.experts.items():
            experts = leaves.pop(f"{prefix}mlp.experts.{projection}")
            assert isinstance(experts, ExpertWeights)
            kept = format_name(before["layers.1.mlp.experts.gate"].expert(0))
            expected = [kept if target == KEEP else target for target in formats]
            assert [format_name(experts.expert(e)) for e in range(experts.num_experts)] == expected
        if block.keep is not None:
            for name in ("router", "bias", "group_id"):
                rows = before[f"{prefix}mlp.{name}"][np.asarray(block.keep)]
                np.testing.assert_array_equal(leaves.pop(f"{prefix}mlp.{name}"), rows)
            assert leaves.pop(f"{prefix}mlp.routing_scale") == pytest.approx(block.routing_scale, rel=1e-6)
    assert format_name(leaves.pop("embed")) == plan.embed and format_name(leaves.pop("head")) == plan.head
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


def test_mtp_blocks_are_compressed_like_the_others(job: Job) -> None:
    block = job.planned.plan.blocks[3]
    assert block.keep is not None and block.experts_per_token is not None
    checkpoint = open_checkpoint(job.output)
    mtp = load_model(checkpoint).mtp[0]
    assert getattr(mtp.block.mlp, "num_experts", None) == len(block.keep) < 12
    assert checkpoint.experts_per_token[3] == getattr(mtp.block.mlp, "experts_per_token", None)
    assert checkpoint.experts_per_token[3] == block.experts_per_token
    assert not describe(mtp.eh_proj.get_value()).startswith("bf16")


def test_it_is_written_as_compress_makes_it(planned_model: Callable[[Plan], DeepseekV3], job: Job) -> None:
    made = named_leaves(planned_model(job.planned.plan))
    for name, leaf in named_leaves(load_model(open_checkpoint(job.output))).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, made[name])


def test_a_second_job_writes_the_same_bytes(prepared: Prepared, job: Job, tmp_path: Path) -> None:
    prepared.write(job.planned.plan, tmp_path / "again", job.budget)
    files = [path.relative_to(job.output) for path in job.output.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (job.output / file).read_bytes()


def test_experts_that_a_tried_plan_keeps_are_written_as_they_were(prepared: Prepared, job: Job, tmp_path: Path) -> None:
    made, source = job.planned.plan, prepared.trials.source
    blocks = [replace(own, experts={**own.experts, "down": (KEEP,) * len(own.keep or ())}) for own in made.blocks]
    plan = replace(made, blocks=tuple(own if own.keep else old for own, old in zip(blocks, made.blocks, strict=True)))
    per_token = tuple(own.experts_per_token or 0 for own in plan.blocks[: source.config.num_hidden_layers])
    prepared.trials.of([Try(plan, per_token, is_scaled=False)], silent)
    prepared.write(plan, tmp_path / "kept", prepared.shapes.size_of(plan))
    index = source.config.num_hidden_layers - 1
    written = named_leaves(load_model(open_checkpoint(tmp_path / "kept")))[f"layers.{index}.mlp.experts.down"]
    assert isinstance(written, ExpertWeights)
    original = source.block(index).experts_of(plan.blocks[index].keep or ()).down.get_value()
    jax.tree.map(np.testing.assert_array_equal, written.buckets, original.buckets)


def test_a_plan_over_the_budget_is_not_written(prepared: Prepared, job: Job, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="over the budget"):
        prepared.write(job.planned.plan, tmp_path / "out", job.written - 1)
    assert not list(tmp_path.iterdir())


def test_the_compressed_model_still_predicts_what_the_original_does(prepared: Prepared, job: Job) -> None:
    evaluation = job.evaluation
    assert evaluation.tokens == 255 and evaluation.base_ppl is not None
    assert evaluation.kld_mean is not None and evaluation.kld_p999 is not None and evaluation.same_top1 is not None
    assert evaluation.ln_ppl_ratio == pytest.approx(np.log(evaluation.ppl / evaluation.base_ppl), rel=1e-6)
    # By chance two models of 320 tokens would agree on 0.3 %.
    assert 0 < evaluation.kld_mean < evaluation.kld_p999 and evaluation.kld_mean < 0.3
    assert evaluation.same_top1 > 10


def test_the_divergence_seen_while_planning_is_that_of_what_was_written(
    divergence: Callable[[DeepseekV3], float], job: Job
) -> None:
    written = load_model(open_checkpoint(job.output))
    chosen = next(
        choice
        for choice in job.planned.activated
        if with_activated_experts(job.planned.plan, choice) == job.planned.plan
    )
    assert divergence(written) == pytest.approx(chosen.divergence, rel=0.01)
