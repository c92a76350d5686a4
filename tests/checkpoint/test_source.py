"""A checkpoint part by part, against the model loaded at once."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model_cases import CASES, write_hf_checkpoint
from moejax.checkpoint.load import abstract_model, load_model, open_checkpoint
from moejax.checkpoint.native_bytes import Description
from moejax.checkpoint.native_writer import write_native
from moejax.checkpoint.safetensors_folder import TensorInfo
from moejax.checkpoint.source import CheckpointSource
from moejax.formats import describe
from moejax.model import DeepseekV3, named_leaves, sliced
from moejax.model.moe import MoE

PER_TOKEN = (3, 1, 2, 1)


def same(part: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, part, other)


def test_every_part_is_the_loaded_models(tmp_path: Path) -> None:
    """Of either kind of checkpoint; a block's K is its own."""
    case = CASES["mtp"]
    write_hf_checkpoint(tmp_path / "hf", case.config, case.tensors())
    original = open_checkpoint(tmp_path / "hf")
    changed = DeepseekV3(original.config, original.leaf, PER_TOKEN)
    write_native(changed, tmp_path / "native", Description(case.config, {}, {}), [], 10**9)
    for checkpoint, per_token in (
        (original, original.experts_per_token),
        (open_checkpoint(tmp_path / "native"), PER_TOKEN),
    ):
        model, source = load_model(checkpoint), CheckpointSource(checkpoint)
        assert source.config == model.config
        same(source.embedding(), model.embed.get_value())
        same(source.norm(), model.norm.get_value())
        same(source.head(), model.head.get_value())
        blocks = [source.block(index) for index in range(len(model.layers))]
        for block, layer in zip(blocks, model.layers, strict=True):
            same(block.whole(), layer)
        same(source.mtp(0).whole(), model.mtp[0])
        own = [block.experts_per_token for block in [*blocks[1:], source.mtp(0).block]]
        assert own == list(per_token[1:])


def test_experts_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an original those alone that are asked for, in that order; a compressed layer's, which are few bytes, lie
    together."""
    case = CASES["mtp"]
    write_hf_checkpoint(tmp_path / "hf", case.config, case.tensors())
    original = open_checkpoint(tmp_path / "hf")
    config, whole = original.config, load_model(original)
    write_native(whole, tmp_path / "native", Description(case.config, {}, {}), [], 10**9)
    monkeypatch.setattr(sliced, "MOST_NUMBERS", 5 * 3 * config.hidden_size * config.moe_intermediate_size)
    every, read, load = config.n_routed_experts, list[TensorInfo](), TensorInfo.load

    def watched(own: TensorInfo, rows: slice = slice(None)) -> np.ndarray:
        read.append(own)
        return load(own, rows)

    monkeypatch.setattr(TensorInfo, "load", watched)
    block = CheckpointSource(original).block(1)
    assert not any(".experts." in str(own) for own in read)
    assert [*map(len, block.ranges)] == [5] * (every // 5) + [every % 5] * (every % 5 > 0)
    mlp = whole.layers[1].mlp
    assert isinstance(mlp, MoE) and mlp.experts is not None
    for members in (block.ranges[-1], [3, 0]):
        read.clear()
        same(block.experts_of(members), sliced.some_of(mlp.experts, members))
        assert len(read) in (3 * len(members), 6 * len(members))  # with scales, or without
    native = CheckpointSource(open_checkpoint(tmp_path / "native")).block(1)
    assert native.ranges == [range(every)]
    same(native.experts_of([3, 0]), sliced.some_of(mlp.experts, [3, 0]))


def test_the_abstract_model_is_the_loaded_one_in_shapes_alone(small_fp8: Path) -> None:
    checkpoint = open_checkpoint(small_fp8)
    abstract, loaded = (named_leaves(model) for model in (abstract_model(checkpoint), load_model(checkpoint)))
    assert {name: describe(leaf) for name, leaf in abstract.items()} == {
        n: describe(leaf) for n, leaf in loaded.items()
    }
    assert all(isinstance(array, jax.ShapeDtypeStruct) for array in jax.tree.leaves(abstract))
