"""Errors from a sample: those of everything where the sample is everything, and near them where it is not."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import BlockStatistics, calibrate
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.evaluate.divergence import evaluate
from moejax.formats import parse_format
from moejax.model import DeepseekV3, named_leaves
from moejax.model.sliced import SlicedBlock, sliced
from moejax.pipeline import sampled as module
from moejax.pipeline.check import require_original
from moejax.pipeline.job import Prepared, plan_within, prepare
from moejax.pipeline.outlook import read_outlook
from moejax.pipeline.rounded import ExpertsInFormats, InFormats, experts_in_formats, matrices_in_formats
from moejax.pipeline.sampled import Sampled, experts_to_look_at, is_sampled, seen_by_variants
from moejax.pipeline.work import work_in
from moejax.planning import KEEP
from moejax.progress import silent
from moejax.transforms.imitate import energy_by_output
from moejax.transforms.rounder import AFRESH, Wanted
from moejax.transforms.rounding import to_float32
from small_job import RECIPE, Job

LAYER, FORMATS = 2, tuple(map(parse_format, ("ternaryg128", "int2g128", "int4g128")))
NAME = f"layers.{LAYER}"
SAMPLED = replace(RECIPE, prices="sampled")


@pytest.fixture
def block(original: DeepseekV3) -> SlicedBlock:
    return sliced(original.layers[LAYER])


@pytest.fixture
def statistics(prepared: Prepared) -> BlockStatistics:
    assert prepared.trials.statistics.known is not None
    return prepared.trials.statistics.known.blocks[LAYER]


@pytest.fixture
def matrices(block: SlicedBlock, statistics: BlockStatistics) -> Mapping[str, InFormats]:
    return matrices_in_formats(NAME, named_leaves(block.trunk), statistics, FORMATS, AFRESH)


@pytest.fixture
def experts(block: SlicedBlock, statistics: BlockStatistics) -> Callable[[list[int]], Mapping[str, ExpertsInFormats]]:
    assert statistics.experts is not None
    sums = statistics.experts
    return lambda members: experts_in_formats(NAME, members, block.experts_of(members), sums, FORMATS, AFRESH)


def test_all_rows_tell_a_matrix_s_own_error(matrices: Mapping[str, InFormats]) -> None:
    for own in matrices.values():
        sampled = Sampled(FORMATS, {})
        np.testing.assert_allclose(sampled.errors(own), own.errors(), rtol=1e-4)


def test_some_rows_tell_about_as_much(matrices: Mapping[str, InFormats], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 24)
    for own in matrices.values():
        sampled = Sampled(FORMATS, {})
        np.testing.assert_allclose(sampled.errors(own), own.errors(), rtol=0.2)


def test_all_experts_tell_what_they_err_together(
    experts: Callable[[list[int]], Mapping[str, ExpertsInFormats]],
) -> None:
    for own in experts(list(range(12))).values():
        sampled = Sampled(FORMATS, {})
        sampled.look_at_experts(own)
        found_EF, expected_EF = sampled.expert_errors(own), own.errors()
        np.testing.assert_allclose(found_EF.sum(axis=0), expected_EF.sum(axis=0), rtol=1e-3)
        np.testing.assert_allclose(found_EF, expected_EF, rtol=0.3)


def test_some_experts_tell_about_all(experts: Callable[[list[int]], Mapping[str, ExpertsInFormats]]) -> None:
    some, every = experts([1, 4, 8]), experts(list(range(12)))
    for own, of_all in every.items():
        sampled = Sampled(FORMATS, {})
        sampled.look_at_experts(some[own])
        found_EF, expected_EF = sampled.expert_errors(of_all), of_all.errors()
        np.testing.assert_allclose(found_EF.sum(axis=0), expected_EF.sum(axis=0), rtol=0.15)


def test_what_it_imitates_errs_as_much_as_it_tells(
    matrices: Mapping[str, InFormats], experts: Callable[[list[int]], Mapping[str, ExpertsInFormats]]
) -> None:
    """By unit outputs, as a matrix's errors are told, and those of experts' `down`."""
    sampled, (own, *_) = Sampled(FORMATS, {}), matrices.values()
    moment_I, dense = own.inputs().second_moment, to_float32(own.leaf)
    for f, told in enumerate(sampled.errors(own)):
        error = replace(own, rounder=sampled).rounded(f) - dense
        assert float(jnp.sum(energy_by_output(error, moment_I))) == pytest.approx(told, rel=1e-3)
    down = experts(list(range(12)))["mlp.experts.down"]
    sampled.look_at_experts(down)
    ((imitated,),) = sampled.experts([Wanted(down.of, [3], FORMATS[1].name)])
    moment_I, gate2 = down.of.inputs(3).second_moment, down.of.statistics.gate2_E[3]
    error = float(gate2 * jnp.sum(energy_by_output(imitated - to_float32(down.of.weights.expert(3)), moment_I)))
    assert error == pytest.approx(sampled.expert_errors(down)[3, 1], rel=1e-3)


def test_what_is_kept_stays_as_it_is(matrices: Mapping[str, InFormats]) -> None:
    own = next(iter(matrices.values()))
    assert Sampled(FORMATS, {}).matrix(own.name, own.leaf, own.inputs(), KEEP) is own.leaf


def test_experts_are_looked_at_from_those_with_little_to_those_with_much(statistics: BlockStatistics) -> None:
    assert statistics.experts is not None
    x2_ED = jnp.asarray(np.random.RandomState(0).permutation(64)[:, None] + jnp.zeros(8))
    found = experts_to_look_at(replace(statistics.experts, x2_ED=x2_ED))
    assert found == sorted(found)
    assert sorted(np.asarray(x2_ED)[found, 0].tolist()) == [4, 12, 20, 28, 36, 44, 52, 60]
    assert experts_to_look_at(replace(statistics.experts, x2_ED=x2_ED[:3])) == [0, 1, 2]


def test_variants_see_some_of_the_chunks_held_out() -> None:
    held_out_BT = np.arange(8)[:, None]
    assert seen_by_variants(held_out_BT, AFRESH).tolist() == held_out_BT.tolist()
    assert seen_by_variants(held_out_BT, Sampled(FORMATS, {})).ravel().tolist() == [0, 2, 5, 7]
    assert seen_by_variants(held_out_BT[:2], Sampled(FORMATS, {})).ravel().tolist() == [0, 1]


@pytest.mark.slow
def test_errors_that_are_fed_back_are_told_too(original: DeepseekV3, prepared: Prepared, block: SlicedBlock) -> None:
    statistics = calibrate(original, prepared.trials.calibrated.chunks, hessians=True).blocks[LAYER]
    for own in matrices_in_formats(NAME, named_leaves(block.trunk), statistics, FORMATS[1:2], AFRESH).values():
        sampled = Sampled(FORMATS[1:2], {})
        told_F = sampled.errors(own)
        np.testing.assert_allclose(told_F, own.errors(), rtol=1e-3)
        # And imitated, by the Hessian of inputs that correlate.
        imitates = replace(own, rounder=sampled)
        np.testing.assert_allclose(imitates.errors(), told_F, rtol=1e-3)


@pytest.mark.slow
def test_experts_that_share_a_hessian_are_rounded_together(
    original: DeepseekV3, prepared: Prepared, block: SlicedBlock
) -> None:
    chunks, formats = prepared.trials.calibrated.chunks, FORMATS[1:2]
    experts = calibrate(original, chunks, hessians=True).blocks[LAYER].experts
    assert experts is not None and not experts.shares_hessian("up")
    shared = replace(experts, x_EDD=())
    assert shared.shares_hessian("up") and not shared.shares_hessian("down")
    members = [1, 4, 8]
    own = experts_in_formats(NAME, members, block.experts_of(members), shared, formats, AFRESH)["mlp.experts.up"]
    sampled = Sampled(formats, {})
    sampled.look_at_experts(own)
    found_EF, expected_EF = sampled.expert_errors(own), own.errors()
    np.testing.assert_allclose(found_EF.sum(axis=0), expected_EF.sum(axis=0), rtol=1e-3)
    together, one = AFRESH.experts([Wanted(own.of, some, formats[0].name) for some in (range(3), [1])])
    np.testing.assert_allclose(to_float32(together[1]), to_float32(one[0]), atol=1e-6)


def test_large_models_are_sampled_and_others_as_the_recipe_says(prepared: Prepared) -> None:
    small, large = prepared.shapes.model, read_outlook("deepseek_v3", None, RECIPE).shapes.model
    assert is_sampled(RECIPE, large) and not is_sampled(RECIPE, small)
    assert not is_sampled(replace(RECIPE, prices="whole"), large) and is_sampled(SAMPLED, small)


@pytest.mark.filterwarnings("ignore:.*are taken over")
def test_a_job_by_a_sample_ends_near_one_by_everything(
    small: Path,
    prepared: Prepared,
    job: Job,
    heldout_text: Path,
    tokenize: Callable[[Path], np.ndarray],
    tmp_path: Path,
) -> None:
    """And finds out nothing anew where it is begun again."""
    checkpoint, made = require_original(open_checkpoint(small)), dict(prepared.shapes.provenance)
    plans = []
    for _ in range(2):
        with work_in(tmp_path / "work", {"job": "sampled"}) as work:
            own = prepare(checkpoint, prepared.trials.calibrated, SAMPLED, made, silent, work)
            plans.append(plan_within(own, job.budget, silent))
    assert plans[0].plan == plans[1].plan and plans[0].candidates == plans[1].candidates
    assert own.write(plans[0].plan, tmp_path / "out", job.budget) <= job.budget
    chunks = tokenize(heldout_text)
    found = evaluate(load_model(open_checkpoint(tmp_path / "out")), chunks, load_model(checkpoint)).kld_mean
    assert found is not None and job.evaluation.kld_mean is not None
    assert found < 1.15 * job.evaluation.kld_mean
    assert plans[0].predicted == pytest.approx(job.planned.predicted, rel=0.3)
