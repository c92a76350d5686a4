"""Either kind of checkpoint restored onto a mesh: every part where the rules have it, no more read than that."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fp8_checkpoint import fp8_config
from model_cases import random_tensors, write_hf_checkpoint
from moejax.checkpoint import chunks
from moejax.checkpoint.chunks import StoredArray
from moejax.checkpoint.load import Checkpoint, load_model, open_checkpoint
from moejax.checkpoint.native import open_native
from moejax.checkpoint.native_writer import write_native
from moejax.checkpoint.safetensors_folder import TensorInfo
from moejax.formats import describe
from moejax.model import DeepseekV3, named_leaves
from moejax.sharding import mesh_of, on_mesh, shardings
from native_checkpoint import BUDGET, DESCRIPTION, refused
from small_models import FP8_BLOCK, RAW_CONFIG, with_fp8

MESHES = ("tensor=1", "tensor=8", "tensor=4,data=2", "tensor=3", "tensor=5")
WITHOUT_MTP = RAW_CONFIG | {"num_nextn_predict_layers": 0}


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_LEAST_BYTES", 64)


@pytest.fixture
def native(model: DeepseekV3, tmp_path: Path) -> Path:
    write_native(model, tmp_path / "out", DESCRIPTION, [], BUDGET)
    return tmp_path / "out"


def assert_restored(checkpoint: Checkpoint, model: DeepseekV3, spec: str) -> None:
    mesh = mesh_of(spec)
    restored, expected = load_model(checkpoint, mesh), named_leaves(model)
    assert [own.sharding for own in jax.tree.leaves(restored)] == jax.tree.leaves(shardings(model, mesh))
    for name, leaf in named_leaves(restored).items():
        assert describe(leaf) == describe(expected[name])
        jax.tree.map(np.testing.assert_array_equal, leaf, expected[name])


@pytest.mark.parametrize("spec", MESHES)
def test_a_native_checkpoint(model: DeepseekV3, native: Path, spec: str) -> None:
    words = native / "items" / "layer_1" / "mlp.experts.gate.buckets.0.words"
    assert len(list(words.glob("0.*.0"))) == 8
    assert_restored(open_native(native), model, spec)


@pytest.mark.parametrize("spec", MESHES)
def test_a_hugging_face_checkpoint(tmp_path: Path, spec: str) -> None:
    write_hf_checkpoint(
        tmp_path, fp8_config(WITHOUT_MTP, list(FP8_BLOCK)), with_fp8(random_tensors(WITHOUT_MTP, seed=1))
    )
    checkpoint = open_checkpoint(tmp_path)
    assert_restored(checkpoint, load_model(checkpoint), spec)


@pytest.mark.parametrize("name", ["norm", "layers.1.mlp.experts.down", "layers.1.self_attn.o"])
def test_a_part_reads_its_own_chunks_alone(native: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process does whose device is one of eight."""
    checkpoint, read = open_native(native), list[Path]()
    original = StoredArray._read_chunk

    def noted(self: StoredArray, chunk: int, *arguments: Any) -> str:
        read.append(self.files[chunk])
        return original(self, chunk, *arguments)

    monkeypatch.setattr(StoredArray, "_read_chunk", noted)
    like = jax.tree.leaves(on_mesh(checkpoint.abstract(name), mesh_of("tensor=8")))
    for n, (stored, own) in enumerate(zip(checkpoint._stored(name), like, strict=True)):
        read.clear()
        index = own.sharding.devices_indices_map(own.shape)[jax.devices()[3]]
        checkpoint._read(name, n, stored, index)
        is_cut = own.sharding.shard_shape(own.shape) != own.shape
        assert read == ([stored.files[3 * stored.grid.count // 8]] if is_cut else stored.files)


def test_a_part_of_a_tensor_reads_its_own_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf_checkpoint(
        tmp_path, fp8_config(WITHOUT_MTP, list(FP8_BLOCK)), with_fp8(random_tensors(WITHOUT_MTP, seed=1))
    )
    checkpoint, rows = open_checkpoint(tmp_path), list[slice]()
    original = TensorInfo.load

    def noted(self: TensorInfo, own: slice = slice(None)) -> np.ndarray:
        rows.append(own)
        return original(self, own)

    monkeypatch.setattr(TensorInfo, "load", noted)
    name = "layers.1.self_attn.q_b"
    checkpoint.leaf(name, on_mesh(dict(checkpoint.abstract_leaves())[name], mesh_of("tensor=4")))
    outputs = dict(checkpoint.abstract_leaves())[name].shape[0]
    assert rows == [slice(part * outputs // 4, (part + 1) * outputs // 4) for part in range(4)]


def test_a_flipped_bit_is_found_by_whoever_reads_it(native: Path) -> None:
    chunk = sorted((native / "items" / "outer" / "head.words").iterdir())[-1]
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    checkpoint = open_native(native)
    refused(lambda: load_model(checkpoint, mesh_of("tensor=8")), "the bytes of head are not those that its manifest")
