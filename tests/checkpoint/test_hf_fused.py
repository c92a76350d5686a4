"""Experts fused in one tensor, as transformers 5 can write them."""

import re
import tracemalloc
from pathlib import Path
from typing import Any

import chex
import ml_dtypes
import numpy as np
import pytest

from fp8_checkpoint import CONFIG, FP8
from model_cases import Config, Tensors, random_tensors, write_hf_checkpoint
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint, open_huggingface
from moejax.errors import InputError
from moejax.formats import ExpertWeights, describe
from moejax.model import Layout

MTP = CONFIG | {"num_nextn_predict_layers": 1}
EXPERTS = CONFIG["n_routed_experts"]
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))


def fused(tensors: Tensors, layers: tuple[int, ...] = (1, 2)) -> Tensors:
    """With the experts of these layers as transformers 5 stacks them."""
    result = dict(tensors)
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp.experts"

        def stacked(name: str, prefix: str = prefix) -> np.ndarray:
            return np.stack([result.pop(f"{prefix}.{e}.{name}_proj.weight") for e in range(EXPERTS)])

        result[f"{prefix}.gate_up_proj"] = np.concatenate([stacked("gate"), stacked("up")], axis=1)
        result[f"{prefix}.down_proj"] = stacked("down")
    return result


def opened(folder: Path, config: Config, tensors: Tensors) -> HuggingFaceCheckpoint:
    write_hf_checkpoint(folder, config, tensors)
    return open_huggingface(folder)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("layers", [(1, 2), (2,)])
def test_the_model_is_the_same(tmp_path: Path, dtype: Any, layers: tuple[int, ...]) -> None:
    """In an MTP layer too, and where other layers have their experts one by one."""
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors(MTP, seed=34).items()}
    plain, own = opened(tmp_path / "plain", MTP, tensors), opened(tmp_path / "fused", MTP, fused(tensors, layers))
    assert own.num_elements == plain.num_elements == open_huggingface(tmp_path / "fused", drop_mtp=True).num_elements
    assert own.folder.tensors.keys() == plain.folder.tensors.keys()
    abstract = {name: describe(leaf) for name, leaf in plain.abstract_leaves()}
    assert {name: describe(leaf) for name, leaf in own.abstract_leaves()} == abstract
    for name in Layout(plain.config).shapes():
        if isinstance(leaf := own.leaf(name), ExpertWeights):
            (values,), (wanted,) = leaf.buckets, plain.leaf(name).buckets
            chex.assert_trees_all_equal(values, wanted, strict=True)


def test_no_more_is_in_memory_than_is_needed(tmp_path: Path) -> None:
    config = CONFIG | {"moe_intermediate_size": 2000}
    checkpoint = opened(tmp_path, config, fused(random_tensors(config, seed=34), (1,)))
    size = checkpoint.folder.tensors["model.layers.1.mlp.experts.0.up_proj.weight"].nbytes
    tracemalloc.start()
    checkpoint.leaf("layers.1.mlp.experts.up")
    # The stacked experts, and two being stacked; the fused tensor takes 2 E.
    assert tracemalloc.get_traced_memory()[1] < (EXPERTS + 2.5) * size
    tracemalloc.stop()


def test_a_value_that_is_not_finite_is_named_by_expert(tmp_path: Path) -> None:
    tensors = fused(random_tensors(CONFIG, seed=34), (1,))
    tensors[GATE_UP][2, -1, 0] = np.inf
    checkpoint = opened(tmp_path, CONFIG, tensors)
    checkpoint.leaf("layers.1.mlp.experts.gate")
    with pytest.raises(InputError, match=r"the tensor model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight holds a NaN"):
        checkpoint.leaf("layers.1.mlp.experts.up")


@pytest.mark.parametrize("name", [GATE_UP, DOWN])
def test_another_shape_or_dtype_is_refused(tmp_path: Path, name: str) -> None:
    tensors = fused(random_tensors(CONFIG, seed=34), (1,))
    right = tensors[name]
    transposed = np.ascontiguousarray(right.swapaxes(1, 2))
    reason = f"the tensor {name} has shape {transposed.shape}; the config asks for {right.shape}"
    with pytest.raises(InputError, match=re.escape(reason)):
        opened(tmp_path / "transposed", CONFIG, tensors | {name: transposed})
    with pytest.raises(InputError, match=f"the tensor {name} has dtype float8_e4m3fn; fused experts are accepted in"):
        opened(tmp_path / "fp8", CONFIG, tensors | {name: right.astype(FP8)})


def test_experts_in_both_layouts_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, seed=34)
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    both = fused(tensors, (1,)) | {expert: tensors[expert]}
    with pytest.raises(InputError, match=f"the tensor {DOWN} holds {expert}, which is there too"):
        opened(tmp_path, CONFIG, both)


def test_a_layer_without_its_fused_experts_is_refused(tmp_path: Path) -> None:
    tensors = fused(random_tensors(CONFIG, seed=34), (1,))
    del tensors[DOWN]
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight is missing"):
        opened(tmp_path, CONFIG, tensors)
