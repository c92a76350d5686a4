import json
from pathlib import Path
from typing import Any

import chex
import pytest

import fp8_checkpoint
import small_checkpoint
from fp8_checkpoint import fp8_config, published
from leaf_oracle import shapes_and_dtypes
from model_cases import Config, write_hf_checkpoint
from moejax.checkpoint.abstract import abstract_original
from moejax.checkpoint.hf_names import num_elements
from moejax.checkpoint.huggingface import open_huggingface
from moejax.errors import InputError
from moejax.formats import describe
from moejax.model import DeepseekV3, config_from_hf, named_leaves
from moejax.resources import config_path

RAGGED: Config = fp8_checkpoint.CONFIG | {"torch_dtype": "bfloat16", "num_nextn_predict_layers": 1}
BLOCKS: Any = ([128, 128], [32, 48])


def assert_holds(folder: Path, abstract: DeepseekV3) -> None:
    """That a checkpoint's own abstract model is this one: leaves, formats and static fields."""
    own = open_huggingface(folder).abstract_model()
    chex.assert_trees_all_equal_structs(abstract, own)
    assert shapes_and_dtypes(named_leaves(abstract)) == shapes_and_dtypes(named_leaves(own))


def test_the_tiny_checkpoint_is_what_its_config_says(tiny: Path) -> None:
    assert_holds(tiny, abstract_original(json.loads((tiny / "config.json").read_text())))


def test_without_quantization_every_matrix_is_of_the_configs_dtype(tmp_path: Path) -> None:
    config = small_checkpoint.CONFIG
    assert config["num_nextn_predict_layers"] == 1
    write_hf_checkpoint(tmp_path, config, published(config, None))
    assert_holds(tmp_path, abstract_original(config))


@pytest.mark.parametrize("q_lora_rank", [72, None])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_partial_blocks_and_mtp_blocks(tmp_path: Path, block: list[int], q_lora_rank: int | None) -> None:
    config = fp8_config(RAGGED | {"q_lora_rank": q_lora_rank}, block)
    write_hf_checkpoint(tmp_path, config, published(config, block))
    assert_holds(tmp_path, abstract_original(config))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
def test_both_names_of_the_dtype_are_read(field: str, dtype: str) -> None:
    config = {name: value for name, value in RAGGED.items() if name != "torch_dtype"}
    leaves = named_leaves(abstract_original(config | {field: dtype}))
    assert leaves["layers.0.self_attn.o"].dtype == leaves["norm"].dtype == dtype
    assert leaves["layers.1.mlp.bias"].dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; accepted are bfloat16, float16, float32"),
        ({"torch_dtype": None}, "torch_dtype is None; accepted are"),
        ({"dtype": ["bfloat16"]}, r"dtype is \['bfloat16'\]; accepted are"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'; only 'fp8' is supported"),
        ({"quantization_config": {"weight_block_size": [128, 128]}}, "quant_method is None; only 'fp8'"),
        ({"quantization_config": "int4"}, "quant_method is 'int4'; only 'fp8'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"weight_block_size is None; .* such as \[128, 128\]"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [10**400, 1]}},
            "positive integers up to",
        ),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 8193]}}, "is .128, 8193.; FP8 wei"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [True, 128]}}, "is .True, 128.; FP8"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; up to 1,000 is accepted"),
    ],
    ids=str,
)
def test_a_config_of_no_published_checkpoint_is_refused(changes: Config, message: str) -> None:
    with pytest.raises(InputError, match=f"^here/config.json: .*{message}"):
        abstract_original(RAGGED | changes, "here/config.json")


@pytest.mark.parametrize(
    ("name", "elements", "up"),
    [
        ("moonlight_16b_a3b", 15.96e9, "bf16[64,1408,2048]"),
        ("kimi_k2", 1.03e12, "fp8b128x128[384,2048,7168]"),
    ],
)
def test_published_models_have_their_published_sizes(name: str, elements: float, up: str) -> None:
    raw = json.loads(config_path("models", name).read_text())
    config = config_from_hf(raw)
    assert config.num_nextn_predict_layers == 0
    assert num_elements(config) == pytest.approx(elements, rel=0.01)
    leaves = named_leaves(abstract_original(raw))
    assert describe(leaves[f"layers.{config.num_hidden_layers - 1}.mlp.experts.up"]) == up
