import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.checkpoint.toml_file import read_toml, write_toml
from moejax.errors import InputError
from moejax.planning import KEEP, BlockPlan, Method, Plan
from moejax.planning.plan import PROJECTIONS, from_json, parse_ranges, ranges, to_json

CODES = ["ternary", *(f"int{bits}" for bits in range(1, 9))]
NAMES = [KEEP, *(f"{code}g{size}" for code in CODES for size in (32, 64, 128, 256))]
WEIGHTS = ["self_attn.q_a", "self_attn.o", "mlp.gate", "mlp.shared.down", "eh_proj"]
formats = st.sampled_from(NAMES)


@st.composite
def block_plans(draw: st.DrawFn) -> BlockPlan:
    named = draw(st.dictionaries(st.sampled_from(WEIGHTS), formats))
    if draw(st.booleans()):
        return BlockPlan(named)
    keep = tuple(sorted(draw(st.sets(st.integers(0, 255), max_size=40))))
    experts = {name: tuple(draw(st.lists(formats, min_size=len(keep), max_size=len(keep)))) for name in PROJECTIONS}
    return BlockPlan(named, keep, experts, draw(st.integers(1, 8)), draw(st.floats(0.1, 4)))


# What plans say of it: the newer two only where they are true.
NEWER = ("row_feedback", "output_fit")
METHOD: dict[str, Any] = {n: own for n, own in dataclasses.asdict(Method()).items() if n not in NEWER}
methods = st.builds(Method, *[st.booleans()] * 3)
plans = st.builds(Plan, formats, formats, st.lists(block_plans(), max_size=6).map(tuple), methods)


def raw_plan() -> dict[str, Any]:
    """A dense block and one with experts."""
    experts = {"gate": ("int2g64", KEEP, "int2g64"), "up": (KEEP,) * 3, "down": ("int3g32",) * 3}
    return to_json(
        Plan("int4g64", KEEP, (BlockPlan({"mlp.up": "int2g64"}), BlockPlan({}, (0, 2, 5), experts, 2, 1.25)))
    )


@given(plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert from_json(json.loads(json.dumps(to_json(plan)))) == plan


@given(plan=plans)
def test_a_plan_survives_toml(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "plan.toml"
    write_toml(file, to_json(plan))
    assert from_json(read_toml(file)) == plan


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((), ""),
        ((0,), "0"),
        ((7, 8), "7-8"),
        ((0, 1, 2, 5), "0-2 5"),
        ((0, 2, 4, 5), "0 2 4-5"),
        (tuple(range(256)), "0-255"),
    ],
)
def test_what_ranges_look_like(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text
    assert parse_ranges(text) == numbers


@given(st.sets(st.integers(0, 300)).map(sorted).map(tuple))
def test_ranges_read_back_and_no_shorter_ones_would(numbers: tuple[int, ...]) -> None:
    text = ranges(numbers)
    assert parse_ranges(text) == parse_ranges(f"  {text} ") == numbers
    assert len(text.split()) == sum(n - 1 not in numbers for n in numbers)


@pytest.mark.parametrize(
    "text", ["a", "1,2", "1-", "-1", "1--3", "1-2-3", "0x1", "1.5", "1 - 3", "1234567", "0-1000000", "٣", "1 and 2"]
)
def test_what_is_no_range_is_named(text: str) -> None:
    with pytest.raises(
        InputError, match="in a list of experts is no number and no range; accepted are such as 7 and 0-5"
    ):
        parse_ranges(text)


@pytest.mark.parametrize(
    ("text", "part"), [("3-2", "3-2"), ("1 1", "1"), ("0-5 5", "5"), ("0-5 3-9", "3-9"), ("4 2-3", "2-3"), ("2 1", "1")]
)
def test_ranges_out_of_order_are_named(text: str, part: str) -> None:
    with pytest.raises(
        InputError, match=f"^'{part}' in a list of experts is out of order; experts are listed once each"
    ):
        parse_ranges(text)


def test_a_bad_range_in_a_plan_is_named() -> None:
    raw = raw_plan()
    raw["blocks"][1]["keep"] = "0 two 5"
    with pytest.raises(InputError, match="'two' in a list of experts"):
        from_json(raw)


def test_what_a_plan_looks_like() -> None:
    assert raw_plan() == {
        "formats": {"a": "int2g64", "b": "int3g32", "c": "int4g64", "d": "keep"},
        "embed": "c",
        "head": "d",
        "method": METHOD,
        "blocks": [
            {"formats": {"mlp.up": "a"}},
            {
                "formats": {},
                "keep": "0 2 5",
                "experts": {"gate": "ada", "up": "ddd", "down": "bbb"},
                "experts_per_token": 2,
                "routing_scale": 1.25,
            },
        ],
    }


@pytest.mark.parametrize("key", ["formats", "embed", "head", "method", "blocks"])
def test_a_missing_key_is_named(key: str) -> None:
    raw = raw_plan()
    del raw[key]
    with pytest.raises(
        InputError, match=f"'{key}' is missing in the plan; its keys are blocks, embed, formats, head, m"
    ):
        from_json(raw)


@pytest.mark.parametrize("key", ["formats", "keep", "experts", "experts_per_token", "routing_scale"])
def test_a_missing_key_of_a_block_is_named(key: str) -> None:
    raw = raw_plan()
    del raw["blocks"][1][key]
    # Without `keep` it is a dense block, which has no other keys than formats.
    found = "'experts' is unknown in" if key == "keep" else f"'{key}' is missing in"
    with pytest.raises(InputError, match=f"{found} block 1 of the plan; its keys are"):
        from_json(raw)


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(
        InputError, match="'comment' is unknown in the plan; its keys are blocks, embed, formats, head, m"
    ):
        from_json(raw_plan() | {"comment": "mine"})
    for block in (0, 1):
        raw = raw_plan()
        raw["blocks"][block]["bits"] = 3
        with pytest.raises(InputError, match=f"'bits' is unknown in block {block} of the plan; its keys are"):
            from_json(raw)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"gate": "aaa", "up": "aaa"}, "'down' is missing in experts in block 1 of the plan"),
        ({"gate": "aaa", "up": "aaa", "down": "aaa", "side": "aaa"}, "'side' is unknown in experts in block 1"),
        ({"gate": "aaa", "up": "aa", "down": "aaa"}, "block 1 of the plan has 2 formats for up; one for each of 3"),
        ({"gate": "aaa", "up": "aza", "down": "aaa"}, r"the plan cannot be read: KeyError\('z'\) in it; expected"),
        ("aaa", "the plan cannot be read: AttributeError"),
    ],
)
def test_experts_that_cannot_be_read(experts: Any, message: str) -> None:
    raw = raw_plan()
    raw["blocks"][1]["experts"] = experts
    with pytest.raises(InputError, match=message):
        from_json(raw)


@pytest.mark.parametrize(
    "changed",
    [
        {"embed": "z"},
        {"head": ["a"]},
        {"formats": "abcd"},
        {"formats": {"a": "int2g64", "b": 3, "c": "int4g64", "d": KEEP}},
        {"method": None},
        {"blocks": None},
        {"blocks": [7]},
        {"blocks": [{"formats": None}]},
        {"blocks": [{"formats": {"mlp.up": "z"}}]},
    ],
)
def test_a_value_that_cannot_be_read(changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"the plan cannot be read: .* in it; expected what `plan.to_json` writes"):
        from_json(raw_plan() | changed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keep", ["one"]),
        ("keep", 7),
        ("experts_per_token", None),
        ("experts_per_token", 2.5),
        ("experts_per_token", float("inf")),
        ("experts_per_token", float("nan")),
        ("routing_scale", "much"),
    ],
)
def test_a_number_that_cannot_be_read(key: str, value: Any) -> None:
    raw = raw_plan()
    raw["blocks"][1][key] = value
    with pytest.raises(InputError, match=r"the plan cannot be read: .* in it; expected what `plan.to_json` writes"):
        from_json(raw)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({}, "'down_rotation' is missing in method in the plan; its keys are down_rotation, err"),
        (METHOD | {"twice": True}, "'twice' is unknown in method in the plan; its keys are down_rotation, err"),
        (
            METHOD | {"down_rotation": True},
            "the plan's method has down_rotation without rotation; both, or rotation alone",
        ),
        (METHOD | {"error_feedback": 1}, "error_feedback in the plan's method is 1; true or false is accepted"),
    ],
)
def test_a_method_that_there_is_not(method: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_json(raw_plan() | {"method": method})


def test_a_method_reads_back() -> None:
    method = METHOD | {"error_feedback": True}
    plan = from_json(raw_plan() | {"method": method})
    assert plan.method == Method(error_feedback=True)
    assert to_json(plan)["method"] == method
