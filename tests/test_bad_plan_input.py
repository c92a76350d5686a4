"""What `moejax plan` and `moejax compress --plan` do not take: one sentence, exit code 2, and nothing left behind."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import moejax, refused
from moejax.checkpoint.toml_file import read_toml, write_toml
from moejax.pipeline.outlook import read_outlook
from moejax.pipeline.recipe import Recipe
from moejax.planning.plan import to_json
from small_checkpoint import CONFIG, random_scores

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def small_plan(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the small checkpoint."""
    file = tmp_path_factory.mktemp("plan") / "plan.toml"
    write_toml(file, to_json(read_outlook(small / "config.json", None, Recipe()).problem.smallest().plan))
    return file


def plan_of(small: Path, *options: object, budget: str = "1MB") -> list[object]:
    """The smaller model's context is 2048 tokens, which `options` may override."""
    return ["plan", small / "config.json", "--budget", budget, "--context", 1024, *options]


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can(small: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, *plan_of(small, budget="100KB"))
    named = re.search(r"a budget of 100.00 KB \(100000 bytes\) cannot be met; .* \((\d+) bytes\)$", message.strip())
    assert named is not None, message
    assert int(named[1]) == read_outlook(small / "config.json", None, Recipe()).smallest
    assert f"({named[1]} bytes)" in refused(tmp_path, *plan_of(small, budget=f"{int(named[1]) - 1}B"))
    ran = moejax(*plan_of(small, "--json", tmp_path / "figures.json", budget=f"{named[1]}B"))
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "figures.json").read_text())["bytes"] == int(named[1])


@pytest.mark.parametrize("budget", ["1GB", "1x"])
def test_a_budget_above_the_original(small: Path, tmp_path: Path, budget: str) -> None:
    assert "leaves nothing to do; the original takes 4.93 MB (4930700 bytes)" in refused(
        tmp_path, *plan_of(small, budget=budget)
    )


@pytest.mark.parametrize("budget", ["", "103", "10 parsecs"])
def test_a_malformed_budget(small: Path, tmp_path: Path, budget: str) -> None:
    assert f"{budget!r} is no budget" in refused(tmp_path, *plan_of(small, budget=budget))


@pytest.mark.parametrize("memory", ["lots", "128", "6x", ""])
def test_a_memory_that_is_no_size(small: Path, tmp_path: Path, memory: str) -> None:
    message = refused(tmp_path, *plan_of(small, "--fit", memory))
    assert f"{memory!r} is no size; accepted are sizes such as 103GB" in message


@pytest.mark.parametrize("context", [2049, 0, -5])
def test_a_context_the_model_was_not_made_for(small: Path, tmp_path: Path, context: int) -> None:
    message = refused(tmp_path, *plan_of(small, f"--context={context}"))
    assert f"a context of {context} tokens is beyond the model; 1 to 2048 are accepted" in message


@pytest.mark.parametrize("batch", [0, -1])
def test_no_sequences(small: Path, tmp_path: Path, batch: int) -> None:
    assert f"a batch of {batch} is none; at least 1 is needed" in refused(tmp_path, *plan_of(small, f"--batch={batch}"))


def test_an_unknown_model_lists_the_known_ones(tmp_path: Path) -> None:
    message = refused(tmp_path, "plan", "deepseek_v9", "--budget", "103GB")
    assert "no configuration 'deepseek_v9' among the models; available: deepseek_v3, kimi_k2, moonlight" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ("[]", "config.json"),
        (json.dumps(CONFIG | {"model_type": "llama"}), "model_type is 'llama'; accepted are deepseek_v3"),
        (json.dumps({"model_type": "deepseek_v3"}), "config.json"),
        (json.dumps(CONFIG | {"torch_dtype": "int8"}), "torch_dtype is 'int8'; accepted are bfloat16"),
        (json.dumps(CONFIG | {"n_group": 5}), "n_group 5 must divide n_routed_experts 12"),
    ],
    ids=["missing", "no json", "no object", "llama", "no fields", "int8", "groups"],
)
def test_a_config_that_describes_no_such_model(tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    message = refused(tmp_path, "plan", file, "--budget", "1MB", "--context", 1024)
    assert str(file) in message and reason in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1, 2]", "scores.json"),
        (b"{}", "layer_1 is missing; the model has experts in layers 1 to 2"),
    ],
    ids=["missing", "cut off", "no text", "no object", "empty"],
)
def test_scores_that_cannot_be_read(small: Path, tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "scores.json"
    if content is not None:
        file.write_bytes(content)
    message = refused(tmp_path, *plan_of(small, "--expert-scores", file))
    assert str(file) in message and reason in message


def set_score(value: object) -> Change:
    return lambda raw: raw["layer_1"]["scores"].__setitem__(3, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: raw.pop("layer_2"), "layer_2 is missing; the model has experts in layers 1 to 2"),
        (lambda raw: raw.update(layer_0=raw["layer_1"]), "'layer_0' is no layer with experts; those are layer_1 to"),
        (lambda raw: raw["layer_2"]["scores"].pop(), "layer_2: scores has 11 values; one for each of the model's 12"),
        (lambda raw: raw["layer_1"]["activations"].append(1), "layer_1: activations has 13 values; one for each"),
        (set_score(float("nan")), "layer_1: scores holds nan; finite numbers from 0 are needed"),
        (set_score(-1.0), "layer_1: scores holds -1.0; finite numbers from 0 are needed"),
        (set_score("many"), "layer_1: scores holds 'many'; finite numbers from 0 are needed"),
        (lambda raw: raw["layer_1"].update(scores=[0] * 12), "layer_1: no expert was ever chosen"),
    ],
    ids=["layer missing", "dense layer", "expert missing", "expert too many", "nan", "negative", "text", "nothing"],
)
def test_scores_that_are_not_the_models(small: Path, tmp_path: Path, change: Change, reason: str) -> None:
    file, raw = tmp_path / "scores.json", random_scores(seed=1)
    change(raw)
    file.write_text(json.dumps(raw))
    message = refused(tmp_path, *plan_of(small, "--expert-scores", file))
    assert f"{file}: {reason}" in message


def test_the_published_models_scores_are_not_the_small_ones(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(random_scores(seed=1)))
    message = refused(tmp_path, "plan", "moonlight_16b_a3b", "--budget", "8GB", "--expert-scores", file)
    assert f"{file}: layer_3 is missing; the model has experts in layers 1 to 26" in message


def test_an_unknown_recipe_lists_the_known_ones(small: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, *plan_of(small, "--recipe", "own"))
    assert "no configuration 'own' among the recipes; available: best, equal_groups, fast, paper" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("groups = ", "is not valid TOML"),
        ("colour = 3", "'colour' is unknown in a recipe; its keys are allocation"),
        ('criterion = "random"', "criterion is 'random'; one of frequency, paper"),
        ('formats = ["int9g128"]', "unknown format 'int9g128'"),
    ],
    ids=["missing", "no toml", "unknown key", "bad value", "bad format"],
)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_a_recipe_file_that_cannot_be_used(
    small: Path, text_options: list[object], tmp_path: Path, command: str, content: str | None, reason: str
) -> None:
    file = tmp_path / "own.toml"
    if content is not None:
        file.write_text(content)
    arguments = {
        "plan": plan_of(small),
        "compress": ["compress", small, "--budget", "6x", "--output", tmp_path / "out", *text_options],
    }
    message = refused(tmp_path, *arguments[command], "--recipe", file)
    assert f"{file}: " in message and reason in message


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_a_recipe_that_does_not_suit_the_model(
    small: Path, text_options: list[object], tmp_path: Path, command: str
) -> None:
    file = tmp_path / "own.toml"
    arguments = {
        "plan": plan_of(small),
        "compress": ["compress", small, "--budget", "6x", "--output", tmp_path / "out", *text_options],
    }
    file.write_text("experts_per_token = 4")
    message = refused(tmp_path, *arguments[command], "--recipe", file)
    assert "asks for 4 experts per token; the model has 3" in message
    file.write_text("share_kept = 0.25")
    message = refused(tmp_path, *arguments[command], "--recipe", file)
    assert "share_kept 0.25 keeps 3 of 12 experts; routing needs at least 6 of them" in message


def test_places_that_cannot_be_written_to(small: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("mine")
    message = refused(tmp_path, *plan_of(small, "--output", tmp_path / "plan.toml"))
    assert f"{tmp_path / 'plan.toml'}: exists already; give a path that is free" in message
    assert (tmp_path / "plan.toml").read_text() == "mine"
    for option in ("--output", "--json"):
        file = tmp_path / "no" / "file"
        assert f"{file}: cannot be written" in refused(tmp_path, *plan_of(small, option, file))
        assert f"{tmp_path}: cannot be written" in refused(tmp_path, *plan_of(small, option, tmp_path))


def compress_by(small: Path, plan: Path, folder: Path, text_options: list[object]) -> list[object]:
    return ["compress", small, "--plan", plan, "--output", folder / "out", *text_options]


def test_a_plan_and_a_recipe(small: Path, text_options: list[object], tmp_path: Path) -> None:
    both = ["--plan", tmp_path / "plan.toml", "--recipe", "fast"]
    message = refused(tmp_path, "compress", small, "--output", tmp_path / "out", *both, *text_options)
    assert "--recipe says how a plan is made and --plan gives one; only one of them is accepted" in message


def test_neither_a_budget_nor_a_plan(small: Path, text_options: list[object], tmp_path: Path) -> None:
    message = refused(tmp_path, "compress", small, "--output", tmp_path / "out", *text_options)
    assert "neither --budget nor --fit nor --plan is given; a budget such as 6x or a plan is needed" in message


def test_neither_a_budget_nor_a_devices_memory(small: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, "plan", small / "config.json", "--context", 1024)
    assert "neither --budget nor --fit is given; a budget such as 103GB or a device's memory is needed" in message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--fit", "1MB", "--budget", "6x"], "--budget and --fit each say how large the result may be"),
        (["--fit", "1MB", "--plan"], "--fit says how large a plan is to be and --plan gives one"),
        (
            ["--budget", "6x", "--context", 64],
            "--context and --batch say what a device is to decode; its memory, --fit",
        ),
        (["--budget", "6x", "--batch", 2], "--context and --batch say what a device is to decode; its memory"),
        (["--fit", "1MB", "--context", 10**9], "a context of 1000000000 tokens is beyond the model"),
        (["--fit", "1MB", "--batch", 0], "a batch of 0 is none"),
        (["--fit", "much"], "'much' is no size"),
        (["--fit", "9KB"], "no plan decodes 1 x 2048 tokens in 9.00 KB"),
    ],
)
def test_sizes_by_a_device_that_do_not_go(
    small: Path, small_plan: Path, text_options: list[object], tmp_path: Path, options: list[object], reason: str
) -> None:
    given = [*options, small_plan] if options[-1] == "--plan" else options
    message = refused(tmp_path, "compress", small, "--output", tmp_path / "out", *given, *text_options)
    assert reason in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"embed = ", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
    ],
    ids=["missing", "no toml", "no text"],
)
def test_a_small_plan_that_cannot_be_read(
    small: Path, text_options: list[object], tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "plan.toml"
    if content is not None:
        file.write_bytes(content)
    message = refused(tmp_path, *compress_by(small, file, tmp_path, text_options))
    assert f"{file}: {reason}" in message


def in_block(block: int, **fields: object) -> Change:
    return lambda raw: raw["blocks"][block].update(fields)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: raw.clear(), "'blocks' is missing in the plan"),
        (
            lambda raw: raw.update(colour=3),
            "'colour' is unknown in the plan; its keys are blocks, embed, formats, head",
        ),
        (in_block(1, colour=3), "'colour' is unknown in block 1 of the plan"),
        (lambda raw: raw["blocks"][1].pop("routing_scale"), "'routing_scale' is missing in block 1 of the plan"),
        (lambda raw: raw["blocks"].pop(), "the plan has 3 blocks; the model has 3 layers and 1 MTP blocks"),
        (lambda raw: raw.update(embed="z"), "the plan cannot be read: KeyError('z')"),
        (lambda raw: raw["formats"].update(a="int9g128"), "unknown format 'int9g128'"),
        (in_block(1, keep="0-4"), "formats for gate; one for each of 5 experts kept"),
        (in_block(1, keep="5 0-4"), "'0-4' in a list of experts is out of order"),
        (in_block(1, keep="all"), "'all' in a list of experts is no number and no range"),
        (in_block(1, keep="7-12"), "keeps experts that are not ascending numbers from 0 to 11"),
        (in_block(1, keep="0-5"), "keeps 0 experts in group 2; routing needs 2 in each"),
        (in_block(1, experts_per_token=4), "activates 4 experts per token; 1 to 3 are accepted"),
        (in_block(1, routing_scale=0.0), "has routing scale 0.0; a positive number is needed"),
        (lambda raw: raw["blocks"][0]["formats"].update(gate="a"), "gives a format to 'gate', which is no matrix"),
    ],
    ids=lambda own: own if isinstance(own, str) else "",
)
def test_a_plan_that_is_none_of_the_model(
    small: Path, small_plan: Path, text_options: list[object], tmp_path: Path, change: Change, reason: str
) -> None:
    file, raw = tmp_path / "plan.toml", read_toml(small_plan)
    change(raw)
    write_toml(file, raw)
    assert reason in refused(tmp_path, *compress_by(small, file, tmp_path, text_options))
