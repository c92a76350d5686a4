from pathlib import Path

import jax
import numpy as np
import pytest

from model_cases import CASES, write_hf_checkpoint
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.native import NativeCheckpoint
from moejax.checkpoint.native_bytes import Description
from moejax.checkpoint.native_writer import write_native
from moejax.errors import InputError
from moejax.formats import describe
from moejax.model import DeepseekV3, named_leaves


def test_without_a_name_it_is_the_tiny_checkpoint(tiny: Path) -> None:
    assert open_checkpoint().path == tiny


def test_either_kind_of_folder_gives_the_same_model(tmp_path: Path) -> None:
    case = CASES["mtp"]
    write_hf_checkpoint(tmp_path / "hf", case.config, case.tensors())
    original = open_checkpoint(tmp_path / "hf")
    model = load_model(original)
    write_native(model, tmp_path / "native", Description(case.config, {}, {}), [], 10**9)
    copy = open_checkpoint(str(tmp_path / "native"))
    assert isinstance(original, HuggingFaceCheckpoint) and isinstance(copy, NativeCheckpoint)
    assert (copy.config, copy.raw_config) == (original.config, original.raw_config)
    assert copy.experts_per_token == original.experts_per_token == (3, 3, 3, 3)
    described = {name: describe(leaf) for name, leaf in original.abstract_leaves()}
    assert {name: describe(leaf) for name, leaf in copy.abstract_leaves()} == described
    for name, leaf in named_leaves(load_model(copy)).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, named_leaves(model)[name])


def test_a_compressed_blocks_experts_per_token_are_loaded(tmp_path: Path) -> None:
    case = CASES["mtp"]
    write_hf_checkpoint(tmp_path / "hf", case.config, case.tensors())
    original = open_checkpoint(tmp_path / "hf")
    model = DeepseekV3(original.config, original.leaf, (3, 1, 2, 1))
    write_native(model, tmp_path / "native", Description(case.config, {}, {}), [], 10**9)
    loaded = load_model(open_checkpoint(tmp_path / "native"))
    assert [getattr(layer.mlp, "experts_per_token", None) for layer in loaded.layers] == [None, 1, 2]
    assert getattr(loaded.mtp[0].block.mlp, "experts_per_token", None) == 1


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "not a name", ""])
def test_what_is_no_checkpoint_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        open_checkpoint(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        open_checkpoint(tmp_path)
