import json

import pytest
from safetensors import safe_open

from moejax.errors import InputError
from moejax.resources import config_path, tiny_checkpoint


def test_the_tiny_checkpoint_holds_every_tensor_of_its_index() -> None:
    folder = tiny_checkpoint()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        with safe_open(folder / shard, framework="numpy") as tensors:
            assert set(tensors.keys()) == {name for name, file in index["weight_map"].items() if file == shard}


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3.json"])
def test_a_configuration_is_found_with_and_without_its_extension(name: str) -> None:
    config = json.loads(config_path("models", name).read_text())
    assert (config["model_type"], config["n_routed_experts"], config["kv_lora_rank"]) == ("deepseek_v3", 256, 512)


@pytest.mark.parametrize("name", ["deepseek_v4", "", "../models/deepseek_v3.json"])
def test_an_unknown_configuration_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"among the models; available: .*deepseek_v3"):
        config_path("models", name)


def test_an_unknown_kind_of_configuration_has_none() -> None:
    with pytest.raises(InputError, match="'fast' among the sandwiches; available: none"):
        config_path("sandwiches", "fast")
