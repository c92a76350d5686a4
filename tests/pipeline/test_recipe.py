from pathlib import Path
from typing import Any

import pytest

from moejax.checkpoint.toml_file import read_toml
from moejax.commands.common import read_recipe
from moejax.errors import InputError
from moejax.formats import IntFormat, TernaryFormat
from moejax.pipeline.recipe import Recipe, recipe_from_toml
from moejax.planning.plan import KEEP, Method
from moejax.resources import config_path


def test_the_fast_recipe_is_what_moejax_does_without_one() -> None:
    raw = read_toml(config_path("recipes", "fast"))
    assert recipe_from_toml(raw, "fast.toml") == Recipe() == recipe_from_toml({}, "empty.toml")
    # Everything that has a value without being set is spelled out.
    assert raw.keys() == Recipe.__dataclass_fields__.keys() - {"share_kept"}


def test_the_other_recipes() -> None:
    assert read_recipe("equal_groups") == Recipe(groups="equal", share_kept=0.75)
    assert read_recipe("paper") == Recipe(
        criterion="paper",
        share_kept=0.75,
        experts_per_token="paper",
        allocation="raise",
        protect_super_experts=False,
        fit_routing_scale=False,
        min_bits_outer=1,
        min_bits_block=1,
    )
    best = read_recipe("best")
    assert best == Recipe(best.formats, error_feedback=True)
    assert [own.name.endswith("e8") for own in best.formats] == [True] * 5 + [False] * 4


def test_a_recipes_method_is_that_of_its_plans() -> None:
    assert Recipe().method == Method()
    assert Recipe(error_feedback=True).method == Method(error_feedback=True)
    assert Recipe(sequential=True).method == Method(sequential=True)
    assert Recipe(rotation=True, down_rotation=True).method == Method(rotation=True, down_rotation=True)


def test_inputs_of_down_are_rotated_only_in_a_rotated_model() -> None:
    with pytest.raises(InputError, match=r"^own.toml: down_rotation is true and rotation is not; both, or"):
        recipe_from_toml({"down_rotation": True}, "own.toml")


def test_raising_needs_a_share_to_keep() -> None:
    """Else as many experts would be pruned as may be."""
    with pytest.raises(InputError, match=r"^own.toml: allocation is 'raise', which prunes as share_kept says, and"):
        recipe_from_toml({"allocation": "raise"}, "own.toml")
    assert recipe_from_toml({"allocation": "raise", "share_kept": 1.0}, "own.toml").allocation == "raise"


def test_formats_are_ordered_by_bits_and_each_is_there_once() -> None:
    names = ["int2g128e8", "int4g64", "int2g128", "ternaryg32", "int1g128", "int4g32", "int2g128"]
    recipe = recipe_from_toml({"formats": names}, "own.toml")
    ordered = (
        IntFormat(1, 128),
        TernaryFormat(32),
        IntFormat(2, 128),
        IntFormat(2, 128, "e8"),
        IntFormat(4, 32),
        IntFormat(4, 64),
    )
    assert recipe.formats == ordered
    assert recipe.names == ("int1g128", "ternaryg32", "int2g128", "int2g128e8", "int4g32", "int4g64", KEEP)


def test_a_recipe_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        'formats = ["int4g64"]\nmin_bits_outer = 8\nmin_bits_block = 1\ncriterion = "msan"\n'
        'protect_super_experts = false\ngroups = "equal"\nshare_kept = 1\nexperts_per_token = 6\n'
        "fit_routing_scale = false\nerror_feedback = true\nsequential = true\n"
        'allocation = "raise"\n'
        "rotation = true\ndown_rotation = true\nbucket_multiple = 8\n"
    )
    assert read_recipe(str(file)) == Recipe(
        (IntFormat(4, 64),), 8, 1, "msan", False, "equal", 1, 6, False, True, True, "raise", True, True, 8
    )


BAD: list[tuple[str, Any, str]] = [
    ("formats", [], "a list of formats such as"),
    ("formats", "int2g128", "a list of formats such as"),
    ("formats", ["int2g128", 3], "a list of formats such as"),
    ("min_bits_outer", 0, "1 to 8 is accepted"),
    ("min_bits_outer", 9, "1 to 8 is accepted"),
    ("min_bits_outer", 4.0, "1 to 8 is accepted"),
    ("min_bits_block", True, "1 to 8 is accepted"),
    ("min_bits_block", "2", "1 to 8 is accepted"),
    ("criterion", "random", "one of frequency, paper, gate_mass, reap, msan is accepted"),
    ("criterion", ["reap"], "one of frequency, paper, gate_mass, reap, msan is accepted"),
    ("protect_super_experts", 1, "true or false is accepted"),
    ("groups", "even", "'ragged' or 'equal' is accepted"),
    ("groups", 8, "'ragged' or 'equal' is accepted"),
    ("share_kept", 0, "a number above 0 and at most 1"),
    ("share_kept", 1.01, "a number above 0 and at most 1"),
    ("share_kept", float("nan"), "a number above 0 and at most 1"),
    ("share_kept", True, "a number above 0 and at most 1"),
    ("share_kept", "0.75", "a number above 0 and at most 1"),
    ("experts_per_token", 0, "'measured', 'paper' or a positive integer"),
    ("experts_per_token", 1025, "'measured', 'paper' or a positive integer"),
    ("experts_per_token", 2.0, "'measured', 'paper' or a positive integer"),
    ("experts_per_token", True, "'measured', 'paper' or a positive integer"),
    ("experts_per_token", "fewer", "'measured', 'paper' or a positive integer"),
    ("fit_routing_scale", 0, "true or false is accepted"),
    ("error_feedback", "yes", "true or false is accepted"),
    ("sequential", None, "true or false is accepted"),
    ("allocation", "paper", "'solve' or 'raise' is accepted"),
    ("rotation", 1, "true or false is accepted"),
    ("down_rotation", "true", "true or false is accepted"),
    ("row_feedback", 1, "true or false is accepted"),
    ("output_fit", 1, "true or false is accepted"),
    ("bucket_multiple", 0, "1 to 1024 is accepted"),
    ("bucket_multiple", -4, "1 to 1024 is accepted"),
    ("bucket_multiple", 1025, "1 to 1024 is accepted"),
    ("bucket_multiple", 8.0, "1 to 1024 is accepted"),
    ("bucket_multiple", True, "1 to 1024 is accepted"),
    ("bucket_multiple", "8", "1 to 1024 is accepted"),
    ("prices", "guessed", "'by size', 'whole' or 'sampled' is accepted"),
]


@pytest.mark.parametrize(("key", "value", "accepted"), BAD, ids=str)
def test_a_value_that_is_not_accepted(key: str, value: Any, accepted: str) -> None:
    with pytest.raises(InputError) as error:
        recipe_from_toml({key: value}, "own.toml")
    assert str(error.value).startswith(f"own.toml: {key} is {value!r}; ") and accepted in str(error.value)


def test_every_key_has_a_value_that_is_not_accepted() -> None:
    assert {key for key, *_ in BAD} == Recipe.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", ["int9g128", "int4g100", "float4", "int4", ""])
def test_a_format_that_there_is_not(name: str) -> None:
    with pytest.raises(InputError, match=rf"^own.toml: unknown format '{name}': a format is int<1 to 8>g"):
        recipe_from_toml({"formats": ["int2g128", name]}, "own.toml")


@pytest.mark.parametrize("key", ["formatss", "names", "budget"])
def test_an_unknown_key(key: str) -> None:
    with pytest.raises(InputError, match=rf"^own.toml: '{key}' is unknown in a recipe; its keys are allocation, b"):
        recipe_from_toml({"criterion": "reap", key: 3}, "own.toml")


def test_a_recipe_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'own' among the recipes; available: best, equal_groups, fast, paper"):
        read_recipe("own")
    with pytest.raises(InputError, match=r"own.toml: cannot be read"):
        read_recipe(str(tmp_path / "own.toml"))
