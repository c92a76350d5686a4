"""MTP layers that are not what the config promises, and those that are dropped."""

import json
import tracemalloc
import warnings
from pathlib import Path

import chex
import ml_dtypes
import numpy as np
import pytest

from fp8_checkpoint import CONFIG, SCALE, as_fp8, fp8_config
from model_cases import Config, Tensors, random_tensors, write_hf_checkpoint
from moejax.checkpoint import hf_mtp
from moejax.checkpoint.hf_names import num_elements
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint, open_huggingface
from moejax.checkpoint.load import open_checkpoint
from moejax.errors import InputError, Note
from moejax.model import Layout, config_from_hf

PROMISED = CONFIG | {"num_nextn_predict_layers": 1}
LAYER = "model.layers.2."
EMBEDDING, HEAD = LAYER + "embed_tokens.weight", LAYER + "shared_head.head.weight"
COPIES = (EMBEDDING, HEAD)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(PROMISED, seed=32)


def without_layer(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYER)}


def opened(folder: Path, config: Config, tensors: Tensors, drop_mtp: bool = False) -> HuggingFaceCheckpoint:
    """Opened without a note."""
    write_hf_checkpoint(folder, config, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return open_huggingface(folder, drop_mtp)


def noted(folder: Path, config: Config, tensors: Tensors) -> tuple[HuggingFaceCheckpoint, str]:
    """Opened with one note."""
    write_hf_checkpoint(folder, config, tensors)
    with pytest.warns(Note) as notes:
        checkpoint = open_huggingface(folder)
    (said,) = [str(own.message) for own in notes]
    assert said.startswith(f"{folder}: ") and "\n" not in said
    return checkpoint, said


def assert_equal(one: HuggingFaceCheckpoint, other: HuggingFaceCheckpoint) -> None:
    assert one.config == other.config
    for name in Layout(one.config).shapes():
        chex.assert_trees_all_equal(one.leaf(name), other.leaf(name))


def test_a_promised_layer_of_which_there_is_nothing_is_done_without(tmp_path: Path, tensors: Tensors) -> None:
    rest = without_layer(tensors)
    checkpoint, said = noted(tmp_path / "promised", PROMISED, rest)
    assert "has no tensor of the MTP layers that the config's num_nextn_predict_layers 1 names" in said
    assert LAYER.rstrip(".") in said and said.endswith("the model is taken without them")
    assert checkpoint.raw_config == CONFIG | {"num_nextn_predict_layers": 0}
    assert checkpoint.num_elements == sum(tensor.size for tensor in rest.values())
    assert checkpoint.dropped_mtp == 0
    assert_equal(checkpoint, opened(tmp_path / "plain", CONFIG, rest))


@pytest.mark.parametrize("name", ["eh_proj.weight", "enorm.weight", "mlp.experts.1.up_proj.weight"])
def test_a_layer_of_which_a_part_is_missing_is_refused(tmp_path: Path, tensors: Tensors, name: str) -> None:
    rest = {own: tensor for own, tensor in tensors.items() if own != LAYER + name}
    write_hf_checkpoint(tmp_path / "one", PROMISED, rest)
    with pytest.raises(InputError, match=f"the tensor {LAYER}{name} is missing"):
        open_huggingface(tmp_path / "one")
    write_hf_checkpoint(
        tmp_path / "copies", PROMISED, without_layer(tensors) | {name: tensors[name] for name in COPIES}
    )
    with pytest.raises(InputError, match=f"the tensor {LAYER}input_layernorm.weight is missing"):
        open_huggingface(tmp_path / "copies")


def test_a_layer_that_the_config_does_not_mention_is_left_out(tmp_path: Path, tensors: Tensors) -> None:
    for config in (CONFIG, {name: value for name, value in CONFIG.items() if name != "num_nextn_predict_layers"}):
        checkpoint, said = noted(tmp_path / str(len(config)), config, tensors)
        assert "holds MTP layers (model.layers.2) beside the 0 that the config's num_nextn_predict_layers names" in said
        assert checkpoint.raw_config == config and checkpoint.dropped_mtp == 0
        assert checkpoint.num_elements == num_elements(checkpoint.config)
        assert_equal(checkpoint, opened(tmp_path / f"{len(config)} plain", config, without_layer(tensors)))


def test_a_layer_too_many_that_is_no_mtp_layer_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith("eh_proj.weight")}
    write_hf_checkpoint(tmp_path, CONFIG, rest)
    with pytest.raises(InputError, match=rf"the tensor {LAYER}\S+ is none of a deepseek_v3 model"):
        open_huggingface(tmp_path)


@pytest.mark.parametrize("missing", [(EMBEDDING,), (HEAD,), COPIES])
def test_missing_copies_are_the_models_own(tmp_path: Path, missing: tuple[str, ...]) -> None:
    tensors = random_tensors(PROMISED, seed=32)
    whole = opened(tmp_path / "whole", PROMISED, tensors)
    rest = {name: tensor for name, tensor in tensors.items() if name not in missing}
    checkpoint, said = noted(tmp_path / "rest", PROMISED, rest)
    assert [name for name in COPIES if f"{name} is missing" in said] == list(missing)
    assert said.endswith("; the MTP layers use the model's own embedding and head")
    assert whole.num_elements == sum(tensor.size for tensor in tensors.values())
    assert checkpoint.num_elements == sum(tensor.size for tensor in rest.values())
    assert_equal(checkpoint, whole)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("change", ["last", "dtype", "shape"])
def test_stale_copies_are_the_models_own(tmp_path: Path, copy: str, change: str) -> None:
    tensors = random_tensors(PROMISED, seed=32)
    whole = opened(tmp_path / "whole", PROMISED, tensors)
    own = tensors[copy].copy()
    own[-1, -1] += 1
    stale = {"last": own, "dtype": tensors[copy].astype(ml_dtypes.bfloat16), "shape": own[:-1]}[change]
    checkpoint, said = noted(tmp_path / "stale", PROMISED, tensors | {copy: stale})
    original = "model.embed_tokens.weight" if copy == EMBEDDING else "lm_head.weight"
    assert f"{copy} differs from {original}; the MTP layers use the model's own" in said
    assert_equal(checkpoint, whole)


@pytest.mark.parametrize("stale", [False, True])
def test_copies_in_fp8_are_compared_with_their_scales(tmp_path: Path, stale: bool) -> None:
    linear = random_tensors(PROMISED, seed=32)
    stored, _ = as_fp8({"own.o_proj.weight": linear["lm_head.weight"]}, [128, 128])
    head, scale = stored["own.o_proj.weight"], stored["own.o_proj.weight" + SCALE]
    tensors = linear | {"lm_head.weight": head, HEAD: head, "lm_head.weight" + SCALE: scale, HEAD + SCALE: scale}
    config = fp8_config(PROMISED, [128, 128])
    if not stale:
        opened(tmp_path, config, tensors)
        return
    _, said = noted(tmp_path, config, tensors | {HEAD + SCALE: 2 * scale})
    assert f"{HEAD} differs from lm_head.weight" in said


def test_little_of_the_copies_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of a copy and of what it repeats at a time."""
    config = PROMISED | {"vocab_size": 20_000}
    tensors = random_tensors(config, seed=33)
    write_hf_checkpoint(tmp_path, config, tensors)
    monkeypatch.setattr(hf_mtp, "_PIECE", 200_000)
    size = tensors[HEAD].nbytes
    del tensors
    tracemalloc.start()
    open_huggingface(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < size / 8
    tracemalloc.stop()


def test_a_dropped_layer_is_not_looked_at(tmp_path: Path, tensors: Tensors) -> None:
    """Neither a tensor of it, nor a file that has only such."""
    rest = without_layer(tensors)
    plain = opened(tmp_path / "plain", CONFIG, rest)
    part = {name: tensors[name] for name in (EMBEDDING, LAYER + "enorm.weight")}
    odd: Tensors = {LAYER + "enorm.weight": np.zeros((3, 3), np.int8), LAYER + "whatever": np.zeros(1, np.float32)}
    cases: list[tuple[Config, Tensors]] = [
        (PROMISED, tensors),
        (PROMISED, rest),
        (PROMISED, rest | part),
        (PROMISED, rest | odd),
        (CONFIG, tensors),
    ]
    for number, (config, own) in enumerate(cases):
        checkpoint = opened(tmp_path / f"{number}", config, own, drop_mtp=True)
        assert checkpoint.config == plain.config and checkpoint.raw_config["num_nextn_predict_layers"] == 0
        assert checkpoint.folder.tensors.keys() == plain.folder.tensors.keys()
        assert checkpoint.dropped_mtp == (own is not rest and config is PROMISED)
    assert_equal(checkpoint, plain)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_file_of_dropped_layers_alone_need_not_be_there(tmp_path: Path, tensors: Tensors, damage: str) -> None:
    write_hf_checkpoint(tmp_path, CONFIG, without_layer(tensors))
    whole, file = num_elements(config_from_hf(PROMISED)), tmp_path / "mtp.safetensors"
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"] |= {name: file.name for name in tensors if name.startswith(LAYER)}
    index_file.write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(PROMISED))
    if damage == "cut":
        file.write_bytes(b"\1\2\3")
    with pytest.raises(InputError, match=r"mtp\.safetensors"):
        open_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path, drop_mtp=True)
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    assert (checkpoint.num_elements, checkpoint.dropped_mtp) == (whole, 1)


def test_a_budget_is_of_what_the_files_hold_dropped_or_not(tmp_path: Path) -> None:
    tensors = random_tensors(PROMISED, seed=32)
    rest = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    kept, _ = noted(tmp_path / "kept", PROMISED, rest)
    dropped = opened(tmp_path / "dropped", PROMISED, rest, drop_mtp=True)
    assert kept.num_elements == dropped.num_elements == sum(tensor.size for tensor in rest.values())
    assert opened(tmp_path / "none", PROMISED, without_layer(rest), drop_mtp=True).num_elements == num_elements(
        dropped.config
    )


def test_a_native_checkpoints_layers_are_not_dropped(written: Path) -> None:
    with pytest.raises(InputError, match="compressed already; MTP layers can be dropped from an original"):
        open_checkpoint(written, drop_mtp=True)
