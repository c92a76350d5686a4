"""`row_feedback` and `output_fit` in recipes and plans; outputs are weighed on the way as they would be all at once."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import chex
import numpy as np
import pytest

from command_line import run
from moejax.calibrate import calibrate, output_weights, weighing_outputs
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.toml_file import write_toml
from moejax.errors import InputError
from moejax.model import named_leaves
from moejax.model.source import ModelSource
from moejax.pipeline.job import split_calibration
from moejax.pipeline.recipe import recipe_from_toml
from moejax.planning import Method, Plan
from moejax.planning.plan import from_json, to_json
from moejax.transforms.choose_damping import choose_damping
from moejax.transforms.compress import Collected, calibrate_and_compress, compress
from native_checkpoint import files
from sequential_plan import PLAN as SEQUENTIAL

RECIPE = """
formats = ["int1g128", "int2g128", "int4g128"]
error_feedback = true
row_feedback = true
output_fit = true
"""
PLAN: Plan = replace(SEQUENTIAL, method=Method(error_feedback=True, row_feedback=True))


@pytest.mark.parametrize("own", ["row_feedback", "output_fit"])
def test_a_plan_says_so_and_one_that_does_not_is_as_before(own: str) -> None:
    plan = replace(SEQUENTIAL, method=Method(**{"error_feedback": True, own: True}))
    assert from_json(to_json(plan)) == plan and to_json(plan)["method"][own] is True
    assert from_json(to_json(SEQUENTIAL)) == SEQUENTIAL and own not in to_json(SEQUENTIAL)["method"]
    alone = to_json(plan) | {"method": to_json(plan)["method"] | {"error_feedback": False}}
    with pytest.raises(InputError, match=f"{own} without error_feedback; both, or the latter, are accepted"):
        from_json(alone)


@pytest.mark.parametrize("own", ["row_feedback", "output_fit"])
def test_a_recipe_needs_error_feedback_too(own: str) -> None:
    recipe = recipe_from_toml({"error_feedback": True, own: True}, "here")
    assert recipe.method == Method(**{"error_feedback": True, own: True})
    with pytest.raises(InputError, match=rf"^here: {own} is true and error_feedback is not; both, or the latter"):
        recipe_from_toml({own: True}, "here")


def test_on_the_way_as_all_at_once(small: Path, calibration_text: Path, tokenize: Callable[[Path], np.ndarray]) -> None:
    model, calibrated = load_model(open_checkpoint(small)), split_calibration(tokenize(calibration_text), 2, 1)
    own, held_out = (calibrate(model, chunks, hessians=True) for chunks in calibrated)
    statistics = weighing_outputs(choose_damping(model, own, held_out), output_weights(model, calibrated.chunks))
    expected, parts = named_leaves(compress(model, PLAN, statistics)), Collected()
    calibrate_and_compress(ModelSource(model), PLAN, *calibrated, parts)
    assert parts.leaves.keys() == expected.keys()
    for name, leaf in parts.leaves.items():
        chex.assert_trees_all_equal(leaf, expected[name])
    without = named_leaves(compress(model, PLAN, choose_damping(model, own, held_out)))
    differing = {name for name, leaf in expected.items() if not are_equal(leaf, without[name])}
    assert differing == {"layers.0.mlp.down", "layers.1.mlp.experts.down", "layers.1.self_attn.o"}


def are_equal(leaf: object, other: object) -> bool:
    try:
        chex.assert_trees_all_equal(leaf, other)
    except AssertionError:
        return False
    return True


@pytest.mark.slow
def test_a_recipe_and_the_plan_that_it_found_write_the_same(
    small: Path, text_options: list[object], tmp_path: Path
) -> None:
    recipe, plan = tmp_path / "recipe.toml", tmp_path / "plan.toml"
    recipe.write_text(RECIPE)
    run("compress", small, "--budget", "10x", "--recipe", recipe, "--output", tmp_path / "one", *text_options)
    found = json.loads((tmp_path / "one" / "manifest.json").read_text())["plan"]
    assert found["method"]["row_feedback"] is True and found["method"]["output_fit"] is True
    write_toml(plan, found)
    run("compress", small, "--plan", plan, "--output", tmp_path / "two", *text_options)
    one, two = (files(tmp_path / output) for output in ("one", "two"))
    assert {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)} <= {Path("manifest.json")}
