"""The native checkpoint: what is written comes back bit by bit, in the bytes that were predicted, or not at all."""

import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moejax.checkpoint import native_writer
from moejax.checkpoint.native import open_native
from moejax.checkpoint.native_bytes import PROVENANCE_BYTES, Description, native_bytes
from moejax.checkpoint.native_writer import write_native
from moejax.checkpoint.store import folder_bytes
from moejax.errors import InternalError
from moejax.formats import describe, payload_bytes
from moejax.model import DeepseekV3, Layout, named_leaves
from native_checkpoint import (
    BUCKETS,
    BUDGET,
    CONFIG,
    DESCRIPTION,
    FORMATS,
    PER_TOKEN,
    RAW_CONFIG,
    assert_equal_bits,
    files,
    refused,
)


def test_every_leaf_comes_back_bit_by_bit(model: DeepseekV3, written: Path) -> None:
    checkpoint = open_native(written)
    abstract = dict(checkpoint.abstract_leaves())
    assert set(abstract) == set(named_leaves(model)) == set(Layout(CONFIG).shapes())
    formats = {*FORMATS, *chain(*BUCKETS.values())}
    assert all(any(f"{own}[" in describe(leaf) for leaf in abstract.values()) for own in formats)
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
    descriptions = [replace(DESCRIPTION, provenance={}), DESCRIPTION, with_provenance(PROVENANCE_BYTES)]
    sizes = {native_bytes(abstract, description, []) for description in descriptions}
    assert len(sizes) == 1
    write_native(model, tmp_path / "out", descriptions[-1], [], BUDGET)
    assert folder_bytes(tmp_path / "out") == sizes.pop().total
    assert open_native(tmp_path / "out").provenance == descriptions[-1].provenance


def test_more_provenance_than_is_set_aside_is_a_mistake(model: DeepseekV3, tmp_path: Path) -> None:
    too_large = with_provenance(PROVENANCE_BYTES + 1)
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

    monkeypatch.setattr(native_writer, "manifest_of", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_native(model, tmp_path / "out", DESCRIPTION, [], BUDGET)
    assert not list(tmp_path.iterdir())


def test_other_bytes_than_predicted_are_a_bug(
    model: DeepseekV3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = native_bytes(model, DESCRIPTION, [])
    monkeypatch.setattr(native_writer, "native_bytes", lambda *_: replace(predicted, manifest=predicted.manifest + 1))
    size = predicted.total
    with pytest.raises(InternalError, match=f"out takes {size} bytes and was predicted to take {size + 1}; nothing"):
        write_native(model, tmp_path / "out", DESCRIPTION, [], BUDGET)
    assert not list(tmp_path.iterdir())


def test_more_than_is_free_is_refused(model: DeepseekV3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = native_bytes(model, DESCRIPTION, []).total
    usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    write = lambda: write_native(model, tmp_path / "out", DESCRIPTION, [], BUDGET)  # noqa: E731
    refused(write, str(tmp_path / "out"), f"{size} bytes are needed", f"{tmp_path} has {size - 1} free")
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
