"""A checkpoint part by part, against the model loaded at once."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from model_cases import CASES, write_hf_checkpoint
from moejax.checkpoint.load import abstract_model, load_model, open_checkpoint
from moejax.checkpoint.native_writer import Description, write_native
from moejax.checkpoint.source import CheckpointSource
from moejax.formats import describe
from moejax.model import DeepseekV3, named_leaves

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
        for block, layer in zip([*blocks, source.mtp(0)], [*model.layers, *model.mtp], strict=True):
            same(block, layer)
        own = [getattr(block.mlp, "experts_per_token", per_token[0]) for block in [*blocks, source.mtp(0).block]]
        assert own == list(per_token)


def test_the_abstract_model_is_the_loaded_one_in_shapes_alone(small_fp8: Path) -> None:
    checkpoint = open_checkpoint(small_fp8)
    abstract, loaded = (named_leaves(model) for model in (abstract_model(checkpoint), load_model(checkpoint)))
    assert {name: describe(leaf) for name, leaf in abstract.items()} == {
        n: describe(leaf) for n, leaf in loaded.items()
    }
    assert all(isinstance(array, jax.ShapeDtypeStruct) for array in jax.tree.leaves(abstract))
