"""Rotated models in checkpoints: native ones hold them as they are, Hugging Face's as what another loader computes."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exported_case import write_native_of
from leaf_oracle import random_leaf, to_numpy
from model_cases import write_hf_checkpoint
from moejax.checkpoint.abstract import abstract_original
from moejax.checkpoint.hf_export import Dtype, write_huggingface
from moejax.checkpoint.hf_names import expected_tensors, num_elements
from moejax.checkpoint.huggingface import open_huggingface
from moejax.checkpoint.leaf_checks import check_indices
from moejax.checkpoint.load import load_model
from moejax.checkpoint.native import open_native
from moejax.checkpoint.native_bytes import Description, native_bytes
from moejax.checkpoint.native_writer import write_native
from moejax.checkpoint.summary import summarize
from moejax.errors import InputError
from moejax.formats import ExpertWeights
from moejax.kernels.hadamard_matrix import hadamard_matrix, hadamard_order
from moejax.model import DeepseekV3, Layout, config_from_hf, named_leaves
from moejax.transforms.rotate import rotate
from native_checkpoint import assert_equal_bits
from small_checkpoint import FP8_CONFIG
from small_models import CONFIG, RAW_CONFIG, small_model

TOKENS = np.random.RandomState(0).randint(CONFIG.vocab_size, size=(1, 9))


@cache
def rotated_model(mtp: bool, down: bool) -> DeepseekV3:
    return rotate(small_model(mtp), seed=5, down=down)


def raw_config_of(model: DeepseekV3, raw_config: dict[str, Any] = RAW_CONFIG) -> dict[str, Any]:
    names = ("num_nextn_predict_layers", "residual_rotation", "down_input_transform")
    return raw_config | {name: getattr(model.config, name) for name in names}


@jax.jit
def logits(model: DeepseekV3, tokens_BT: jax.Array) -> jax.Array:
    return model(tokens_BT)


def test_it_comes_back_from_the_native_checkpoint_in_the_bytes_predicted(tmp_path: Path) -> None:
    model = rotated_model(mtp=True, down=True)
    description = Description(raw_config_of(model), {}, {})
    predicted = native_bytes(jax.eval_shape(lambda m: m, model), description, []).total
    assert write_native(model, tmp_path / "out", description, [], predicted) == predicted
    checkpoint = open_native(tmp_path / "out")
    loaded = load_model(checkpoint)
    assert loaded.config == model.config
    assert_equal_bits(named_leaves(loaded), named_leaves(model))
    (mtp,) = (row for row in summarize(checkpoint.abstract_leaves()) if row.kind == "mtp")
    assert mtp.elements == sum(leaf.size for leaf in jax.tree.leaves(model.mtp)) - 6 * CONFIG.n_routed_experts


@pytest.mark.parametrize(("down", "name"), [(False, "residual_rotation"), (True, "down_input_transform")])
def test_a_config_that_is_silent_about_a_rotation_is_not_written(down: bool, name: str, tmp_path: Path) -> None:
    model = rotated_model(mtp=False, down=down)
    raw_config = {key: value for key, value in raw_config_of(model).items() if key != name}
    with pytest.raises(ValueError, match=f"the config says nothing of the model's {name}"):
        write_native(model, tmp_path / "out", Description(raw_config, {}, {}), [], 10**9)
    assert not list(tmp_path.iterdir())


def test_signs_that_are_none_are_refused() -> None:
    check_indices(Path("folder"), "mtp.0.signs", jnp.asarray([1, -1, -1], jnp.bfloat16), CONFIG)
    for wrong in (0, 2, np.nan):
        with pytest.raises(InputError, match=r"folder: mtp.0.signs holds numbers other than 1 and -1"):
            check_indices(Path("folder"), "mtp.0.signs", jnp.asarray([1, wrong, -1], jnp.bfloat16), CONFIG)


def test_a_rotated_models_original_has_the_tensors_that_any_has() -> None:
    config = rotated_model(mtp=True, down=True).config
    assert Layout(config).shapes().keys() - Layout(CONFIG).shapes().keys() == {"mtp.0.signs", "mtp.0.input_gain"}
    assert list(expected_tensors(config)) == list(expected_tensors(CONFIG))
    assert num_elements(config) == num_elements(CONFIG)


@pytest.mark.parametrize("name", ["residual_rotation", "down_input_transform"])
def test_a_hugging_face_checkpoint_that_claims_to_be_rotated_is_refused(name: str, tmp_path: Path) -> None:
    raw_config = RAW_CONFIG | {name: "hadamard"}
    write_hf_checkpoint(tmp_path, raw_config, {"a": np.ones(1, np.float32)}, shards=1)
    message = f"{name} is 'hadamard'; null is accepted in a Hugging Face checkpoint"
    with pytest.raises(InputError, match=message):
        open_huggingface(tmp_path)
    with pytest.raises(InputError, match=message):
        abstract_original(raw_config)


@pytest.mark.parametrize(("down", "dtype"), [(False, None), (False, "float32"), (True, "float32")])
def test_an_export_computes_the_same_with_gains_of_one(down: bool, dtype: Dtype | None, tmp_path: Path) -> None:
    model = rotated_model(mtp=False, down=down)
    raw_config = raw_config_of(model) | {"quantization_config": FP8_CONFIG["quantization_config"]}
    write_native_of(model, tmp_path / "native", raw_config)
    write_huggingface(open_native(tmp_path / "native"), tmp_path / "out", dtype)
    exported = open_huggingface(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == RAW_CONFIG | {"num_nextn_predict_layers": 0}
    for name, leaf in named_leaves(model).items():
        own = exported.leaf(name)
        if name.endswith("norm"):
            np.testing.assert_array_equal(own, 1)
        if name.endswith("router"):
            assert own.dtype == jnp.float32
        if name.endswith("down"):
            stored, found = (in_original_basis(leaf, down), in_original_basis(own, False))
            np.testing.assert_allclose(found, stored, rtol=0, atol=1e-6)
        else:
            assert jax.tree.all(jax.tree.map(np.array_equal, own, leaf)), name
    np.testing.assert_allclose(logits(load_model(exported), TOKENS), logits(model, TOKENS), rtol=0, atol=1e-4)


def in_original_basis(leaf: Any, is_rotated: bool) -> np.ndarray:
    """W' H^T / sqrt(b) of a `down` W'."""
    buckets = leaf.buckets if isinstance(leaf, ExpertWeights) else (leaf,)
    weight = np.concatenate([to_numpy(bucket) for bucket in buckets])
    n = weight.shape[-1]
    return weight @ hadamard_matrix(n).T / hadamard_order(n) ** 0.5 if is_rotated else weight


def test_exports_that_a_hugging_face_config_cannot_tell_of_are_refused(tmp_path: Path) -> None:
    for mtp, down, reason in (
        (True, False, "the model is rotated and its MTP blocks undo the rotation, .* compress --drop-mtp leaves them"),
        (False, True, "the inputs of the model's down projections are rotated, .* --dequantize bfloat16 puts the"),
    ):
        native, model = tmp_path / f"native_{mtp}", rotated_model(mtp, down)
        write_native_of(model, native, raw_config_of(model))
        with pytest.raises(InputError, match=reason):
            write_huggingface(open_native(native), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_packed_down_is_turned_back_when_it_is_dequantized(tmp_path: Path) -> None:
    model = rotated_model(mtp=False, down=True)
    name, leaves = "layers.1.mlp.shared.down", named_leaves(model)
    packed = random_leaf("int5g32[64,96]")
    model = DeepseekV3(model.config, (leaves | {name: packed}).__getitem__)
    write_native_of(model, tmp_path / "native", raw_config_of(model))
    write_huggingface(open_native(tmp_path / "native"), tmp_path / "out", "float32")
    found = open_huggingface(tmp_path / "out").leaf(name)
    np.testing.assert_allclose(found, in_original_basis(packed, True), rtol=0, atol=1e-4)


def test_what_the_config_says_of_a_rotation_decides_the_layout() -> None:
    plain = config_from_hf(RAW_CONFIG | {"residual_rotation": None})
    assert plain == CONFIG
    only_down = config_from_hf(RAW_CONFIG | {"down_input_transform": "hadamard"})
    assert Layout(only_down).shapes() == Layout(CONFIG).shapes()
