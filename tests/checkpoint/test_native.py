import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from leaf_oracle import random_leaf
from model_cases import BASE
from moejax.checkpoint import native
from moejax.checkpoint.native import Description, NativeCheckpoint, native_bytes, open_native, write_native
from moejax.checkpoint.store import folder_bytes
from moejax.errors import InputError
from moejax.formats import ExpertWeights, describe, payload_bytes
from moejax.model import DeepseekV3, Layout, config_from_hf, named_leaves

RAW_CONFIG = BASE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
}
CONFIG = config_from_hf(RAW_CONFIG)
INTS = ("int1g32", "int2g64", "int3g32", "int4g64", "int5g32", "int8g64")
FORMATS = (*INTS, "ternaryg32", "fp8b16x32", "bf16", "f16", "f32")
# Layer 1 and the MTP block are pruned; an expert's projections differ in format, and experts of one projection do too.
SURVIVORS = {"layers.1": 5, "layers.2": 8, "mtp.0": 6}
BUCKETS = {"gate": ("int2g64", "ternaryg32"), "up": ("bf16", "int4g64"), "down": ("fp8b16x32", "int1g32", "int8g64")}
PER_TOKEN = (2, 1, 2, 2)
DESCRIPTION = Description(RAW_CONFIG, {"plan": "ä value"}, {"made": ["by", 1, None]})
BUDGET = 10**9


def random_model() -> DeepseekV3:
    """A model with every format, nothing in which is computed."""
    shapes = Layout(CONFIG).shapes()
    leaves = {name: random_weight(name, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return DeepseekV3(CONFIG, leaves.__getitem__, PER_TOKEN)


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Any:
    block = ".".join(name.split(".")[:2])
    if ".experts." in name:
        return random_experts(name.rpartition(".")[2], SURVIVORS[block], shape[1:], seed)
    if name.endswith((".router", ".bias", ".group_id")):
        shape = (SURVIVORS[block], *shape[1:])
    if name.endswith(".group_id"):
        return jnp.arange(shape[0], dtype=jnp.int32) // 4
    return random_leaf(spec(FORMATS[seed % len(FORMATS)] if is_matrix(name, shape) else "f32", shape), seed)


def random_experts(projection: str, count: int, shape: tuple[int, ...], seed: int) -> ExpertWeights:
    formats = BUCKETS[projection]
    bucket_E = np.arange(count, dtype=np.int32) % len(formats)
    index_E = np.arange(count, dtype=np.int32) // len(formats)
    buckets = [random_leaf(spec(own, (int(np.sum(bucket_E == b)), *shape)), seed) for b, own in enumerate(formats)]
    return ExpertWeights(tuple(buckets), jnp.asarray(bucket_E), jnp.asarray(index_E))


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and not name.endswith(".router")


def spec(format_name: str, shape: tuple[int, ...]) -> str:
    return f"{format_name}[{','.join(map(str, shape))}]"


def files(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_equal_bits(found: Any, expected: Any) -> None:
    chex.assert_trees_all_equal_structs(found, expected)
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (own.shape, own.dtype) == (other.shape, other.dtype)
        assert np.asarray(own).tobytes() == np.asarray(other).tobytes()


def refused(action: Callable[[], object], *parts: str) -> str:
    """The one-line message of the InputError, in which all parts stand."""
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return message


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    return random_model()


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("copied")
    (folder / "tokenizer.json").write_text('{"vocab": "ö"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return [folder / "tokenizer.json", folder / "tokenizer_config.json"]


@pytest.fixture(scope="module")
def written(model: DeepseekV3, copied: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    output = tmp_path_factory.mktemp("written") / "out"
    write_native(model, output, DESCRIPTION, copied, BUDGET)
    return output


@pytest.fixture
def own_copy(written: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_every_leaf_comes_back_bit_by_bit(model: DeepseekV3, written: Path) -> None:
    checkpoint = open_native(written)
    abstract = dict(checkpoint.abstract_leaves())
    assert set(abstract) == set(named_leaves(model)) == set(Layout(CONFIG).shapes())
    assert all(any(own in describe(leaf) for leaf in abstract.values()) for own in FORMATS)
    for name, leaf in named_leaves(model).items():
        assert_equal_bits(checkpoint.leaf(name), leaf)
        assert describe(abstract[name]) == describe(leaf)
        assert abstract[name].shape == leaf.shape


def test_what_is_no_weight_comes_back_too(written: Path) -> None:
    checkpoint = open_native(written)
    assert (checkpoint.config, checkpoint.raw_config) == (CONFIG, RAW_CONFIG)
    assert checkpoint.experts_per_token == (CONFIG.num_experts_per_tok, *PER_TOKEN[1:])
    assert (checkpoint.plan, checkpoint.provenance) == (DESCRIPTION.plan, DESCRIPTION.provenance)
    assert (written / "tokenizer.json").read_text() == '{"vocab": "ö"}'


def test_the_size_predicted_from_shapes_is_the_size_written(
    model: DeepseekV3, copied: list[Path], tmp_path: Path
) -> None:
    abstract = jax.eval_shape(lambda m: m, model)
    parts = native_bytes(abstract, DESCRIPTION, copied)
    predicted = parts.total
    assert write_native(model, tmp_path / "out", DESCRIPTION, copied, predicted) == predicted
    assert folder_bytes(tmp_path / "out") == predicted
    own = files(tmp_path / "out")
    assert predicted == sum(map(len, own.values()))
    assert parts.arrays == payload_bytes(named_leaves(model))
    assert parts.manifest == len(own[Path("manifest.json")])
    assert parts.copied == sum(len(own[Path(file.name)]) for file in copied)


def with_provenance(size: int) -> Description:
    """A description whose provenance takes that many bytes of JSON."""
    return replace(DESCRIPTION, provenance={"a": "b" * (size - len('{"a":""}'))})


def test_the_size_does_not_depend_on_the_provenance(model: DeepseekV3, tmp_path: Path) -> None:
    abstract = jax.eval_shape(lambda m: m, model)
    descriptions = [replace(DESCRIPTION, provenance={}), DESCRIPTION, with_provenance(native.PROVENANCE_BYTES)]
    sizes = {native_bytes(abstract, description, []) for description in descriptions}
    assert len(sizes) == 1
    write_native(model, tmp_path / "out", descriptions[-1], [], BUDGET)
    assert folder_bytes(tmp_path / "out") == sizes.pop().total
    assert open_native(tmp_path / "out").provenance == descriptions[-1].provenance


def test_more_provenance_than_is_set_aside_is_a_mistake(model: DeepseekV3, tmp_path: Path) -> None:
    too_large = with_provenance(native.PROVENANCE_BYTES + 1)
    for action in (
        lambda: native_bytes(model, too_large, []),
        lambda: write_native(model, tmp_path / "out", too_large, [], BUDGET),
    ):
        with pytest.raises(ValueError, match="the provenance takes 2049 bytes; 2048 are set aside"):
            action()
    assert not list(tmp_path.iterdir())


def test_a_budget_one_byte_short_leaves_nothing(model: DeepseekV3, copied: list[Path], tmp_path: Path) -> None:
    size = native_bytes(model, DESCRIPTION, copied).total
    write = lambda: write_native(model, tmp_path / "out", DESCRIPTION, copied, size - 1)  # noqa: E731
    refused(write, str(tmp_path / "out"), str(size), str(size - 1), "nothing was written")
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(model: DeepseekV3, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(lambda: write_native(model, tmp_path / "out", DESCRIPTION, [], BUDGET), "out: exists already")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_a_failure_while_writing_leaves_nothing(
    model: DeepseekV3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(*_: object) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(native, "_manifest", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_native(model, tmp_path / "out", DESCRIPTION, [], BUDGET)
    assert not list(tmp_path.iterdir())


def test_two_writes_are_equal_byte_for_byte(
    model: DeepseekV3, copied: list[Path], written: Path, tmp_path: Path
) -> None:
    write_native(model, tmp_path / "another", DESCRIPTION, copied, BUDGET)
    assert files(tmp_path / "another") == files(written)


def test_plain_orbax_restores_every_item(model: DeepseekV3, written: Path) -> None:
    items = sorted(path.name for path in (written / "items").iterdir())
    assert items == ["layer_0", "layer_1", "layer_2", "mtp_0", "outer"]
    with ocp.PyTreeCheckpointer() as plain_orbax:
        restored = {item: plain_orbax.restore(written / "items" / item) for item in items}
    np.testing.assert_array_equal(restored["outer"]["norm"], model.norm.get_value())
    gate = named_leaves(model)["layers.1.mlp.experts.gate"]
    np.testing.assert_array_equal(restored["layer_1"]["mlp.experts.gate.buckets.1.words"], gate.buckets[1].words)
    assert sum(map(len, restored.values())) == len(jax.tree.leaves(named_leaves(model)))


def test_a_folder_made_anew_in_the_same_place_is_read_anew(model: DeepseekV3, tmp_path: Path) -> None:
    write_native(model, tmp_path / "out", DESCRIPTION, [], BUDGET)
    open_native(tmp_path / "out").leaf("norm")
    shutil.rmtree(tmp_path / "out")
    other = named_leaves(model) | {"norm": jnp.full(CONFIG.hidden_size, 2.0)}
    write_native(DeepseekV3(CONFIG, other.__getitem__, PER_TOKEN), tmp_path / "out", DESCRIPTION, [], BUDGET)
    np.testing.assert_array_equal(open_native(tmp_path / "out").leaf("norm"), 2.0)


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
        (at("format", value="gguf"), "not a moejax manifest of version 1"),
        (at("version", value=2), "not a moejax manifest of version 1"),
        (without("version"), "not a moejax manifest of version 1"),
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
        (at(*NORM, 1, value=""), "layers.1.input_norm needs a checksum of 8 digits for each of its arrays"),
        (at(*NORM, 1, value="0" * 16), "layers.1.input_norm needs a checksum of 8 digits for each of its arrays"),
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
        (at(*NORM, 0, value="int4g128[64,64]"), "layers.1.input_norm: format int4g128 cannot hold rows of 64"),
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


def test_no_more_than_one_item_is_kept_open(tmp_path: Path) -> None:
    write_native(random_model(), tmp_path / "out", DESCRIPTION, [], BUDGET)
    checkpoint = open_native(tmp_path / "out")
    for name in Layout(CONFIG).shapes():
        checkpoint.leaf(name)
        mapped = {line.split("items/")[1].split("/")[0] for line in maps() if str(tmp_path) in line}
        assert mapped <= {native.item_of(name)[0]}, name


def maps() -> list[str]:
    """The files mapped into this process, where the system tells."""
    file = Path("/proc/self/maps")
    return file.read_text().splitlines() if file.exists() else []
