import json
import math
from dataclasses import Field, fields
from typing import Any

import pytest

from model_cases import BASE, YARN
from moejax.errors import InputError
from moejax.model import Config, Yarn, config_from_hf
from moejax.resources import config_path


def refusal(raw: dict[str, Any]) -> str:
    """The message, which must be one line that begins with the file."""
    with pytest.raises(InputError) as error:
        config_from_hf(raw, "here/config.json")
    message = str(error.value)
    assert message.startswith("here/config.json: ") and "\n" not in message
    return message


def yarn(**changes: Any) -> dict[str, Any]:
    return BASE | {"rope_scaling": YARN | changes}


def test_the_real_config() -> None:
    raw = json.loads(config_path("models", "deepseek_v3").read_text())
    config = config_from_hf(raw)
    sizes = config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group, config.num_blocks
    assert sizes == (256, 8, 8, 4, 62)
    assert config.yarn == Yarn(40, 4096, 32, 1, 1, 1)
    assert config.rope_interleave
    assert math.isclose(config.softmax_scale, 192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel_tol=1e-15)
    assert [config.is_moe(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]


def test_without_yarn_the_softmax_scale_is_that_of_the_dims() -> None:
    config = config_from_hf(BASE | {"rope_scaling": None})
    assert config.yarn is None and config.softmax_scale == (24 + 16) ** -0.5


def test_without_mscale_all_dim_yarn_leaves_the_softmax_scale() -> None:
    for absent in ({"mscale_all_dim": None}, {"mscale_all_dim": 0}):
        assert config_from_hf(yarn(**absent)).softmax_scale == (24 + 16) ** -0.5


def test_rope_parameters_of_transformers_5() -> None:
    scaling = {key: value for key, value in YARN.items() if key != "type"}
    old = BASE | {"rope_theta": 50000.0}
    new = {key: value for key, value in BASE.items() if key not in ("rope_theta", "rope_scaling")}
    stretched = new | {"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 50000.0}}
    assert config_from_hf(stretched) == config_from_hf(old)
    plain = new | {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
    assert config_from_hf(plain) == config_from_hf(old | {"rope_scaling": None})


def test_fields_that_older_configs_lack_have_hugging_faces_defaults() -> None:
    raw = {key: value for key, value in BASE.items() if key not in ("rope_theta", "num_nextn_predict_layers")}
    config = config_from_hf(raw)
    assert (config.rope_theta, config.num_nextn_predict_layers, config.rope_interleave) == (10000, 0, True)
    short = {key: YARN[key] for key in ("type", "factor", "original_max_position_embeddings")}
    assert config_from_hf(BASE | {"rope_scaling": short}).yarn == Yarn(4, 512, beta_fast=32, beta_slow=1)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v2", None])
def test_an_unknown_model_type_is_refused(model_type: str | None) -> None:
    message = refusal(BASE | {"model_type": model_type})
    assert f"model_type is {model_type!r}" in message and "deepseek_v3" in message


@pytest.mark.parametrize("name", ["hidden_size", "q_lora_rank", "norm_topk_prob", "kv_lora_rank", "rms_norm_eps"])
def test_a_missing_field_is_named(name: str) -> None:
    assert f"the field {name} is missing" in refusal({key: value for key, value in BASE.items() if key != name})


@pytest.mark.parametrize("name", ["factor", "original_max_position_embeddings"])
def test_a_missing_field_of_yarn_is_named(name: str) -> None:
    scaling = {key: value for key, value in YARN.items() if key != name}
    assert f"rope_scaling: the field {name} is missing" in refusal(BASE | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("hidden_size", "64", "a positive integer"),
        ("hidden_size", True, "a positive integer"),
        ("hidden_size", 64.0, "a positive integer"),
        ("hidden_size", -64, "a positive integer"),
        ("hidden_size", 0, "a positive integer"),
        ("hidden_size", None, "a positive integer"),
        ("num_nextn_predict_layers", -1, "a positive integer"),
        ("q_lora_rank", 0, "a positive integer or null"),
        ("q_lora_rank", "72", "a positive integer or null"),
        ("q_lora_rank", False, "a positive integer or null"),
        ("rms_norm_eps", "1e-6", "a positive number"),
        ("rms_norm_eps", math.nan, "a positive number"),
        ("rope_theta", math.inf, "a positive number"),
        ("routed_scaling_factor", [2.5], "a positive number"),
        ("norm_topk_prob", 1, "true or false"),
        ("norm_topk_prob", "true", "true or false"),
        ("rope_interleave", None, "true or false"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(name: str, value: object, wanted: str) -> None:
    assert f"{name} is {value!r}; it must be {wanted}" in refusal(BASE | {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("factor", "4"), ("factor", -4), ("original_max_position_embeddings", True), ("mscale", -1.0)]
)
def test_a_wrong_value_in_yarn_is_refused(name: str, value: object) -> None:
    assert f"rope_scaling: {name} is {value!r}; it must be a positive" in refusal(yarn(**{name: value}))


NUMBERS = [field for field in fields(Config) if field.type in (int, int | None, float)]
SHOWN_LENGTH = 250


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: str(field.name))
@pytest.mark.parametrize("value", [10**9, 10**12, 10**400], ids=["9", "12", "400"])
def test_a_number_beyond_all_models_is_refused_at_once(field: Field[Any], value: int) -> None:
    """Nothing is made of such a size, and nothing counts to it: one would never end, and the other did not fit."""
    if value == 10**9 and field.name == "rope_theta":
        assert config_from_hf(BASE | {field.name: value}).rope_theta == value
        return
    message = refusal(BASE | {field.name: value})
    assert f"{field.name} is 1000000" in message and len(message) < SHOWN_LENGTH


@pytest.mark.parametrize(
    "name", ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"]
)
@pytest.mark.parametrize("value", [10**12, 10**400, 1e308, math.inf, math.nan], ids=str)
def test_a_number_of_yarn_beyond_all_models_is_refused(name: str, value: float) -> None:
    message = refusal(yarn(**{name: value}))
    assert f"rope_scaling: {name} is " in message and len(message) < SHOWN_LENGTH


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000; up to 131,072 is accepted"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; 1.001 to 10,000,000,000 is accepted"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps is 1e-300; 1e-20 to 1 is accepted"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5; 1 to 10,000 is accepted"),
        ({"rope_scaling": YARN | {"beta_slow": 1e-320}}, "beta_slow is 1e-320; 0.001 to 10,000 is accepted"),
    ],
    ids=str,
)
def test_the_accepted_range_is_named(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(BASE | changes)


def test_the_largest_accepted_numbers_leave_ten_times_the_room_that_published_models_need() -> None:
    for name in ("deepseek_v3", "kimi_k2", "moonlight_16b_a3b"):
        raw = json.loads(config_path("models", name).read_text())
        for field in NUMBERS:
            if field.name not in ("rms_norm_eps", "routed_scaling_factor") and raw.get(field.name):
                config_from_hf(raw | _scaled(raw, field.name))


def _scaled(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """Ten times the field, and of those that limit it or are limited by it."""
    related = {"first_k_dense_replace": ["num_hidden_layers"], "n_group": ["n_routed_experts"]}
    related |= {"topk_group": ["n_group", "n_routed_experts"], "num_experts_per_tok": ["n_routed_experts"]}
    return {own: 10 * raw[own] for own in (name, *related.get(name, []))}


JUNK = ["x" * 10**6, {"a": ["b"] * 10**5}, ["c"] * 10**5, 10**400, {"a": {"b": {"c": {"d": {"e": 1}}}}}, "a\nb"]
# What does not say what the model computes, and what may be an object of anything.
IGNORED = ("architectures", "torch_dtype", "num_key_value_heads", "bos_token_id", "eos_token_id", "rope_scaling")


@pytest.mark.parametrize("value", JUNK, ids=["text", "object", "list", "integer", "nested", "two lines"])
def test_whatever_stands_in_a_field_the_message_is_short(value: object) -> None:
    for name in BASE.keys() - set(IGNORED):
        assert len(refusal(BASE | {name: value})) < SHOWN_LENGTH
    for name in (*YARN, "rope_type", "truncate"):
        assert len(refusal(yarn(**{name: value}))) < SHOWN_LENGTH


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_settings_that_are_no_object_are_refused(name: str) -> None:
    assert f"{name} is 'yarn'; it must be a JSON object or null" in refusal(BASE | {name: "yarn"})


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_other_kinds_of_rope_scaling_are_refused(key: str) -> None:
    message = refusal(BASE | {"rope_scaling": {key: "linear", "factor": 4.0}})
    assert "rope_scaling is of type 'linear'" in message and "yarn" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3, "topk_group": 1}, "n_group 3 must divide n_routed_experts 16"),
        ({"topk_group": 5}, "topk_group 5 must be at most n_group 4"),
        ({"n_group": 16}, "with n_group 16 a group needs two experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 must be at most the 8 experts"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim 15 must be even"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace 4 must be at most num_hidden_layers 3"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(changes: dict[str, int], message: str) -> None:
    assert message in refusal(BASE | changes)


@pytest.mark.parametrize(
    ("name", "value", "only"),
    [
        ("hidden_act", "gelu", "silu"),
        ("scoring_func", "softmax", "sigmoid"),
        ("topk_method", "greedy", "noaux_tc"),
        ("moe_layer_freq", 2, 1),
        ("attention_bias", True, False),
        ("tie_word_embeddings", True, False),
    ],
)
def test_what_the_model_computes_one_way_only_is_refused_otherwise(name: str, value: object, only: object) -> None:
    assert f"{name} is {value!r}; only {only!r} is supported" in refusal(BASE | {name: value})
    assert config_from_hf({key: value for key, value in BASE.items() if key != name}) == config_from_hf(BASE)


@pytest.mark.parametrize("name", ["residual_rotation", "down_input_transform"])
def test_a_rotation_is_hadamards_or_none(name: str) -> None:
    assert getattr(config_from_hf(BASE), name) is None
    assert getattr(config_from_hf(BASE | {name: "hadamard"}), name) == "hadamard"
    for value in ("random", True, ["hadamard"], {}, 0, JUNK[0]):
        message = refusal(BASE | {name: value})
        assert f"{name} is " in message and "accepted are 'hadamard' and null" in message
        assert len(message) < SHOWN_LENGTH


@pytest.mark.parametrize(("name", "value"), [("attention_factor", 1.2), ("truncate", False)])
def test_what_yarn_computes_one_way_only_is_refused_otherwise(name: str, value: object) -> None:
    assert f"rope_scaling: {name} is {value!r}; only" in refusal(yarn(**{name: value}))
