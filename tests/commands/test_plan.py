"""`moejax plan`, and `moejax compress --plan` after it: what is written is what was planned, byte for byte."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import refused, run
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.store import folder_bytes
from moejax.checkpoint.toml_file import read_toml, write_toml
from moejax.model import named_leaves
from moejax.model.moe import MoE
from moejax.planning import Method, Plan
from moejax.planning.plan import from_json, to_json
from moejax.resources import config_path


@dataclass(frozen=True)
class Done:
    """A plan that was made from a config and carried out on the checkpoint; the figures of both commands."""

    plan: Path
    planned: dict[str, Any]
    printed: str
    output: Path
    compressed: dict[str, Any]

    @property
    def bytes_by_part(self) -> dict[str, int]:
        return dict(self.planned["bytes_by_part"])


def options_of(small_scores: Path) -> list[object]:
    """Without a context: the smaller model's limit of 2048 tokens is below the usual one."""
    return ["--expert-scores", small_scores]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("fast", "512KB"), id="fast"),
        pytest.param(("equal_groups", "515KB"), id="equal_groups"),
        pytest.param(("rotated", "520KB"), id="rotated", marks=pytest.mark.slow),
    ],
)
def done(
    request: pytest.FixtureRequest,
    small_fp8: Path,
    small_scores: Path,
    text_options: list[object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Done:
    recipe, budget = request.param
    folder = tmp_path_factory.mktemp(recipe)
    if recipe == "rotated":
        recipe = folder / "rotated.toml"
        recipe.write_text(config_path("recipes", "best").read_text() + "rotation = true\n")
    plan, output = folder / "plan.toml", folder / "out"
    arguments = [small_fp8 / "config.json", "--budget", budget, "--recipe", recipe, *options_of(small_scores)]
    printed = run("plan", *arguments, "--fit", "8MB", "--output", plan, "--json", folder / "plan.json")
    planned = json.loads((folder / "plan.json").read_text())
    run("compress", small_fp8, "--plan", plan, "--output", output, "--json", folder / "out.json", *text_options)
    return Done(plan, planned, printed, output, json.loads((folder / "out.json").read_text()))


def array_files(output: Path) -> list[Path]:
    """What holds numbers and no description of them."""
    return [path for path in (output / "items").rglob("*") if path.is_file() and path.name[0].isdigit()]


def test_the_folder_has_the_bytes_that_were_planned(done: Done) -> None:
    assert (
        done.planned["bytes"] == folder_bytes(done.output) == done.compressed["bytes"] <= done.planned["budget_bytes"]
    )
    assert done.planned["bytes"] == sum(path.stat().st_size for path in done.output.rglob("*") if path.is_file())
    assert done.planned["bytes"] > done.planned["budget_bytes"] - 6000
    for figure in ("ratio", "bits_per_weight"):
        assert done.planned[figure] == done.compressed[figure]


def test_every_part_has_the_bytes_that_were_planned(done: Done) -> None:
    parts, files = done.bytes_by_part, array_files(done.output)
    arrays = sum(file.stat().st_size for file in files)
    scales = sum(file.stat().st_size for file in files if file.parent.name.endswith((".scale", ".scale_inv")))
    described = sum(path.stat().st_size for path in (done.output / "items").rglob("*") if path.is_file()) - arrays
    copied = [done.output / name for name in ("tokenizer.json", "tokenizer_config.json")]
    assert sum(parts.values()) == done.planned["bytes"]
    assert parts["codes"] + parts["scales"] + parts["padding"] == arrays
    assert parts["scales"] == scales
    assert parts["descriptions"] == described
    assert parts["manifest"] == (done.output / "manifest.json").stat().st_size
    assert parts["tokenizer"] == sum(file.stat().st_size for file in copied)


def test_every_kind_of_weight_has_the_bytes_that_were_planned(done: Done) -> None:
    for figures in ("bytes_by_kind", "numbers_by_kind", "bits_by_kind"):
        assert done.planned[figures] == done.compressed[figures]
    assert sum(done.planned["bytes_by_kind"].values()) == sum(file.stat().st_size for file in array_files(done.output))


def test_what_was_carried_out_is_the_plan_in_the_file(done: Done) -> None:
    plan = from_json(read_toml(done.plan))
    assert from_json(json.loads((done.output / "manifest.json").read_text())["plan"]) == plan
    kept = [len(block.keep) for block in plan.blocks if block.keep is not None]
    assert kept == [layer["experts_kept"] for layer in done.planned["layers"]] == done.compressed["experts_kept"]
    per_token = [layer["experts_per_token"] for layer in done.planned["layers"]]
    assert per_token == done.compressed["experts_per_token"] == list(open_checkpoint(done.output).experts_per_token[1:])
    assert "tried_plans" not in done.compressed and "kld_predicted" not in done.compressed


def test_something_was_pruned_and_ternary(done: Done) -> None:
    """Or the figures would be those of a plan that does not try much."""
    assert all(layer["experts_kept"] < 12 for layer in done.planned["layers"])
    if "rotated" not in str(done.plan):  # whose estimated errors leave no place for ternary weights
        assert done.bytes_by_part["padding"] > 0


def test_the_plan_says_how_its_recipe_rounds(done: Done) -> None:
    method, config = from_json(read_toml(done.plan)).method, open_checkpoint(done.output).raw_config
    if "rotated" in str(done.plan):
        assert method == Method(error_feedback=True, rotation=True)
        assert config["residual_rotation"] == "hadamard" and "down_input_transform" not in config
    else:
        assert method == Method() and "residual_rotation" not in config


def test_equal_groups_stay_equal(done: Done) -> None:
    groups = [layer["kept_per_group"] for layer in done.planned["layers"]]
    if "equal" in str(done.plan):
        assert groups == [[3, 3, 3]] * 3
    else:
        assert any(len(set(own)) > 1 for own in groups)
    kept = [block.keep for block in from_json(read_toml(done.plan)).blocks if block.keep is not None]
    assert groups == [np.bincount(np.asarray(own) // 4, minlength=3).tolist() for own in kept]


def test_what_is_printed(done: Done) -> None:
    assert f"({done.planned['bytes']} bytes)" in done.printed
    for title in ("experts, layer by layer", "weights", "pruning or bits, at this budget"):
        assert f"\n{title} " in f"\n{done.printed}"
    assert "made up" in done.printed and "fits, " in done.printed
    for key, value in done.bytes_by_part.items():
        assert f" {value} bytes" in done.printed, key


def edited(done: Done, file: Path) -> Plan:
    """The plan with another routing scale and K' in layer 1, and one expert less in layer 2."""
    plan = from_json(read_toml(done.plan))
    blocks = list(plan.blocks)
    keep = blocks[2].keep
    assert keep is not None
    crowded = int(np.bincount(np.asarray(keep) // 4).argmax())
    gone = next(e for e in keep if e // 4 == crowded)
    blocks[1] = replace(blocks[1], routing_scale=1.5, experts_per_token=2)
    experts = {name: own[: keep.index(gone)] + own[keep.index(gone) + 1 :] for name, own in blocks[2].experts.items()}
    blocks[2] = replace(blocks[2], keep=tuple(e for e in keep if e != gone), experts=experts)
    changed = replace(plan, blocks=tuple(blocks))
    write_toml(file, to_json(changed))
    return changed


def test_an_edited_plan_is_carried_out(done: Done, small_fp8: Path, text_options: list[object], tmp_path: Path) -> None:
    file, output = tmp_path / "edited.toml", tmp_path / "out"
    plan = edited(done, file)
    run("compress", small_fp8, "--plan", file, "--output", output, "--json", tmp_path / "figures.json", *text_options)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert from_json(json.loads((output / "manifest.json").read_text())["plan"]) == plan
    assert figures["experts_kept"][1] == done.compressed["experts_kept"][1] - 1
    assert (figures["routing_scale"][0], figures["experts_per_token"][0]) == (1.5, 2)
    assert figures["bytes"] == figures["budget_bytes"] == folder_bytes(output)
    model = load_model(open_checkpoint(output))
    first, second = (model.layers[i].mlp for i in (1, 2))
    assert isinstance(first, MoE) and isinstance(second, MoE)
    assert (first.experts_per_token, second.num_experts) == (2, figures["experts_kept"][1])
    assert float(named_leaves(model)["layers.1.mlp.routing_scale"]) == 1.5


def test_a_budget_below_the_plans_bytes_is_refused(
    done: Done, small_fp8: Path, text_options: list[object], tmp_path: Path
) -> None:
    size = done.planned["bytes"]
    arguments = ["compress", small_fp8, "--plan", done.plan, "--output", tmp_path / "out", *text_options]
    message = refused(tmp_path, *arguments, "--budget", f"{size - 1}B")
    assert f"the plan takes {size} bytes; the budget is {size - 1}, a plan that fits it is needed" in message


def test_a_plan_of_another_model_is_refused(done: Done, tiny: Path, text_options: list[object], tmp_path: Path) -> None:
    arguments = ["compress", tiny, "--plan", done.plan, "--output", tmp_path / "out", *text_options]
    message = refused(tmp_path, *arguments)
    assert "the plan" in message and "the model" in message
