"""Native checkpoints that were damaged or edited: each is refused in a sentence that names what is wrong."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moejax.checkpoint import native
from moejax.checkpoint.native import NativeCheckpoint, open_native
from native_checkpoint import (
    refused,
)


def test_a_flipped_bit_in_any_array_names_the_weight(own_copy: Path) -> None:
    owners = {array: name for name, array in arrays_of(open_native(own_copy))}
    chunks = [file for file in (own_copy / "items").rglob("*") if file.is_file() and file.name[0].isdigit()]
    assert len(chunks) == len(owners)
    for chunk in chunks:
        name = owners[chunk.parent.relative_to(own_copy / "items")]
        flip_bit(chunk)
        refused(lambda name=name: open_native(own_copy).leaf(name), f"the bytes of {name} are not those")  # type: ignore[misc]
        flip_bit(chunk)
        open_native(own_copy).leaf(name)


def arrays_of(checkpoint: NativeCheckpoint) -> list[tuple[str, Path]]:
    """Every array's place below `items`, and the weight it is part of."""
    places = []
    for name, leaf in checkpoint.abstract_leaves():
        item, within = native.item_of(name)
        for path, _ in jax.tree_util.tree_flatten_with_path(leaf)[0]:
            keys = [str(getattr(key, "name", getattr(key, "idx", None))) for key in path]
            places.append((name, Path(item) / ".".join([within, *keys])))
    return places


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda item: (item / "mlp.router" / "0.0").write_bytes(b"short"), "mlp.router/0.0: has 5 bytes"),
        (lambda item: (item / "mlp.router" / "0.0").unlink(), "mlp.router/0.0: has 0 bytes"),
        (lambda item: shutil.rmtree(item / "input_norm"), "leaf input_norm is missing"),
        (lambda item: shutil.copytree(item / "input_norm", item / "norm"), "leaf norm does not belong there"),
        (lambda item: (item / "_METADATA").unlink(), "_METADATA: cannot be read"),
        (shutil.rmtree, "has no item layer_1"),
    ],
)
def test_missing_truncated_and_extra_files_are_named(own_copy: Path, damage: Any, reason: str) -> None:
    damage(own_copy / "items" / "layer_1")
    checkpoint = open_native(own_copy)
    refused(lambda: checkpoint.leaf("layers.1.mlp.router"), reason)
    checkpoint.leaf("layers.2.mlp.router")


def test_an_array_whose_dtype_was_changed_is_refused(own_copy: Path) -> None:
    file = own_copy / "items" / "layer_1" / "input_norm" / ".zarray"
    file.write_text(file.read_text().replace('"<f4"', '"<i4"'))
    refused(lambda: open_native(own_copy).leaf("layers.1.input_norm"), "input_norm holds int32(64,)", "float32(64,)")


def at(*keys: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    """Set one value of a manifest."""

    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


def without(*keys: str | int) -> Callable[[dict[str, Any]], None]:
    """Delete one value of a manifest."""

    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


GATE = ("items", "layer_1", "mlp.experts.gate")
NORM = ("items", "layer_1", "input_norm")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (at("format", value="gguf"), "not a moejax manifest of version 3"),
        (at("version", value=4), "not a moejax manifest of version 3"),
        (at("version", value=1), "a manifest of version 1, whose packed words are in another order than in version 3"),
        (at("version", value=2), "version 2, whose arrays are one file each where they are several in version 3"),
        (at("version", value=True), "not a moejax manifest of version 3"),
        (without("version"), "not a moejax manifest of version 3"),
        *((without(key), f"damaged (KeyError('{key}'))") for key in ("config", "items", "plan", "provenance")),
        (without("experts_per_token"), "damaged (KeyError('experts_per_token'))"),
        (at("config", value=[]), "damaged"),
        (at("items", value=7), "damaged"),
        (at("items", "layer_1", value="x"), "damaged"),
        (at(*NORM, value=3), "damaged"),
        (at(*NORM, value=["f32[64]"]), "damaged"),
        (at(*NORM, value="ab"), "the weight layers.1.input_norm: 'a' describes no leaf"),
        (at(*NORM, value=[["f32[64]"], "0" * 8]), "damaged (TypeError(\"['f32[64]'] is no str\"))"),
        (at(*NORM, 1, value=12345678), "damaged (TypeError('12345678 is no str'))"),
        (at(*NORM, 1, value=""), "layers.1.input_norm needs a checksum of 8 digits for each of its arrays' chunks"),
        (
            at(*NORM, 1, value="0" * 16),
            "layers.1.input_norm needs a checksum of 8 digits for each of its arrays' chunks",
        ),
        (at(*NORM, 0, value="i32[64]"), "layers.1.input_norm is i32[64]; i32 is what group_id alone is made of"),
        (at("items", "layer_1", "mlp.group_id", 0, value="f32[5]"), "layers.1.mlp.group_id is f32[5]; i32 is what"),
        (at("plan", value=[]), "damaged (TypeError('[] is no dict'))"),
        (at("provenance", value=None), "damaged (TypeError('None is no dict'))"),
        (at("config", value="deepseek_v3"), "damaged"),
        (at("config", "num_hidden_layers", value=10**9), "num_hidden_layers is 1000000000; up to 1,000 is accepted"),
        (at("experts_per_token", 1, value="2"), "damaged"),
        (at("experts_per_token", 1, value=True), "damaged (TypeError('True is no int'))"),
        (at("experts_per_token", 1, value=2.0), "damaged"),
        (at("experts_per_token", 1, value=10**400), "experts_per_token of layers.1.mlp.router is 1000000000"),
        (at("experts_per_token", value=[2] * 10**5), "experts_per_token needs 4 entries"),
        (at("items", "../outer", value={}), "the item ../outer is none of a model with this config"),
        (at("items", "layer_1", "../norm", value=["f32[64]", "0" * 8]), "the weight ../norm of layer_1 is none of"),
        (at(*NORM, 0, value="f32[" + "9" * 5000 + "]"), "layers.1.input_norm: 'f32[999"),
        (at(*NORM, 0, value="f32[999999999999999]"), "layers.1.input_norm has shape (999999999999999,)"),
        (at(*GATE, 0, value="+".join(["f32[1,64,64]"] * 10**5)), "layers.1.mlp.experts.gate: 'f32[1,64,64]+f32"),
        (at("experts_per_token", value=None), "damaged"),
        (at("experts_per_token", value=["two"] * 4), "damaged"),
        (at("experts_per_token", value=[2, 1, 2]), "experts_per_token needs 4 entries"),
        (at("experts_per_token", 1, value=6), "experts_per_token of layers.1.mlp.router is 6; 1 to 5 are accepted"),
        (at("experts_per_token", 3, value=0), "experts_per_token of mtp.0.block.mlp.router is 0; 1 to 6"),
        (at("config", "model_type", value="llama"), "model_type is 'llama'"),
        (at("config", "hidden_size", value=128), "the weight embed has shape (97, 64); the config asks for (97, 128)"),
        (without("items", "outer"), "the weight embed is missing"),
        (without(*NORM), "the weight layers.1.input_norm is missing"),
        (at("items", "layer_1", "more", value=["f32[64]", "0" * 8]), "the weight more of layer_1 is none of a model"),
        (at("items", "layer_9", value={"x": ["f32[64]", "0" * 8]}), "the item layer_9 is none of a model"),
        (at(*NORM, 0, value="f32[65]"), "layers.1.input_norm has shape (65,); the config asks for (64,)"),
        (at(*NORM, 0, value="f32[]"), "layers.1.input_norm has shape (); the config asks for (64,)"),
        (at(*NORM, 0, value="int9g64[64,64]"), "layers.1.input_norm: unknown format 'int9g64'"),
        (at(*NORM, 0, value="int4g128[64,64]"), "layers.1.input_norm has shape (64, 64); the config asks for (64,)"),
        (at(*NORM, 0, value="no format"), "layers.1.input_norm: 'no format' describes no leaf"),
        (at(*GATE, 0, value="f32[5]"), "layers.1.mlp.experts.gate: 'f32[5]' describes no experts"),
        (at(*GATE, 0, value="f32[3,64,64]+f32[2,64,32]"), "layers.1.mlp.experts.gate: 'f32[3,64,64]+f32[2,64,32]'"),
        (at(*GATE, 0, value="f32[9,64,64]"), "layers.1.mlp.experts.gate has shape (9, 64, 64)"),
        (at(*GATE, value=["f32[4,64,64]", "0" * 24]), "layers.1.mlp.experts.gate is of 4 experts; its router has 5"),
        (at("items", "layer_2", "mlp.group_id", 0, value="i32[7]"), "layers.2.mlp.group_id is of 7 experts"),
    ],
)
def test_a_damaged_manifest_is_refused_when_opened(
    own_copy: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    manifest = json.loads((own_copy / "manifest.json").read_text())
    change(manifest)
    (own_copy / "manifest.json").write_text(json.dumps(manifest))
    message = refused(lambda: open_native(own_copy), reason)
    assert message.startswith(f"{own_copy / 'manifest.json'}: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (at(*NORM, 0, value="f16[64]"), "layers.1.input_norm holds float32(64,); its manifest names float16(64,)"),
        (at(*NORM, 1, value="0" * 8), "the bytes of layers.1.input_norm are not those"),
        (at("items", "layer_1", "self_attn.o", value=["bf16[64,64]", "0" * 8]), "items/layer_1: leaf self_attn.o"),
    ],
)
def test_a_manifest_that_does_not_describe_the_arrays_is_refused_when_they_are_read(
    own_copy: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    manifest = json.loads((own_copy / "manifest.json").read_text())
    change(manifest)
    (own_copy / "manifest.json").write_text(json.dumps(manifest))
    refused(lambda: open_native(own_copy).leaf("layers.1.input_norm"), reason)


@pytest.mark.parametrize(
    ("within", "array", "reason"),
    [
        ("mlp.experts.gate", "mlp.experts.gate.bucket_E", "does not give each of its experts a place of its own"),
        ("mlp.experts.up", "mlp.experts.up.index_E", "does not give each of its experts a place of its own"),
        ("mlp.group_id", "mlp.group_id", "names a group that is none of the 2"),
    ],
)
def test_slots_and_groups_out_of_range_are_refused_though_their_checksum_is_right(
    own_copy: Path, within: str, array: str, reason: str
) -> None:
    chunk, manifest = own_copy / "items" / "layer_1" / array / "0", json.loads((own_copy / "manifest.json").read_text())
    values = np.frombuffer(chunk.read_bytes(), np.int32).copy()
    right = f"{zlib.crc32(values.tobytes()):08x}"
    values[0] = 7
    chunk.write_bytes(values.tobytes())
    leaf = manifest["items"]["layer_1"][within]
    assert right in leaf[1]
    leaf[1] = leaf[1].replace(right, f"{zlib.crc32(values.tobytes()):08x}")
    (own_copy / "manifest.json").write_text(json.dumps(manifest))
    refused(lambda: open_native(own_copy).leaf(f"layers.1.{within}"), f"{own_copy}: layers.1.{within} {reason}")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_manifest_that_is_no_json_object_is_refused(own_copy: Path, content: bytes) -> None:
    (own_copy / "manifest.json").write_bytes(content)
    refused(lambda: open_native(own_copy), str(own_copy / "manifest.json"))
