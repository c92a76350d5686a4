import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8_checkpoint
from fp8_checkpoint import as_fp8, fp8_config
from leaf_oracle import random_leaf, shapes_and_dtypes, to_numpy
from model_cases import Config, Tensors, random_tensors, write_hf_checkpoint
from moejax.checkpoint.abstract import abstract_original
from moejax.checkpoint.hf_leaves import HuggingFaceLeaves
from moejax.checkpoint.hf_tensors import Array, Block, Convert, as_it_is, hf_tensors
from moejax.checkpoint.huggingface import open_huggingface
from moejax.checkpoint.load import load_model
from moejax.checkpoint.safetensors_folder import DTYPES
from moejax.errors import InputError
from moejax.formats import Fp8Blocks, Leaf, dense, gather_experts, select_experts
from moejax.model import DeepseekV3, config_from_hf, named_leaves
from moejax.resources import config_path
from small_models import FP8_BLOCK, RAW_CONFIG, first_layers, small_model
from tensor_list import expand

GOLDEN = Path(__file__).parents[1] / "golden" / "deepseek_v3_tensors.json"
EXPERTS, K_B, V_B = "layers.1.mlp.experts.up", "layers.0.self_attn.k_b", "layers.0.self_attn.v_b"


def read(config: Config, tensors: Tensors, block: list[int]) -> DeepseekV3:
    parsed = config_from_hf(config)
    return DeepseekV3(parsed, HuggingFaceLeaves(parsed, tensors.__getitem__, lambda: (block[0], block[1])))


def with_leaf(model: DeepseekV3, name: str, change: Callable[[Any], Any]) -> DeepseekV3:
    leaves = named_leaves(model)
    return DeepseekV3(model.config, (leaves | {name: change(leaves[name])}).__getitem__)


def content(array: Array) -> tuple[tuple[int, ...], Any, bytes]:
    values = np.asarray(array)
    return values.shape, values.dtype, values.tobytes()


def exported_tensors(
    model: DeepseekV3, block: Block | None, convert: Convert = as_it_is
) -> Iterator[tuple[str, Array]]:
    return hf_tensors(model.config, named_leaves(model).__getitem__, block, convert)


def assert_exported(model: DeepseekV3, tensors: Tensors, block: Block) -> None:
    exported = list(exported_tensors(model, block))
    assert len(exported) == len(tensors) and {name for name, _ in exported} == tensors.keys()
    for name, array in exported:
        assert content(array) == content(tensors[name]), name


def test_the_tiny_checkpoint_comes_back_bit_for_bit(tiny: Path) -> None:
    checkpoint = open_huggingface(tiny)
    model, folder = load_model(checkpoint), checkpoint.folder
    assert_exported(model, {name: info.load() for name, info in folder.tensors.items()}, (128, 128))
    abstract = jax.eval_shape(lambda m: dict(exported_tensors(m, (128, 128))), model)
    assert shapes_and_dtypes(abstract) == {name: (info.shape, info.dtype) for name, info in folder.tensors.items()}


@pytest.mark.parametrize("q_lora_rank", [72, None])
@pytest.mark.parametrize("block", [[128, 128], [32, 48]], ids=str)
def test_partial_blocks_and_mtp_blocks_come_back_bit_for_bit(block: list[int], q_lora_rank: int | None) -> None:
    """Blocks of kv_b_proj's rows have borders within heads, and a head has borders within blocks."""
    config = fp8_checkpoint.CONFIG | {"num_nextn_predict_layers": 1, "q_lora_rank": q_lora_rank}
    stored, _ = as_fp8(random_tensors(config, seed=60), block)
    assert_exported(read(config, stored, block), stored, (block[0], block[1]))


def test_an_mtp_block_gets_its_copies_of_an_fp8_head_and_what_is_written_opens(tmp_path: Path) -> None:
    model = small_model()
    tensors = {name: np.asarray(array) for name, array in exported_tensors(model, FP8_BLOCK)}
    for part in ("weight", "weight_scale_inv"):
        copy = tensors[f"model.layers.3.shared_head.head.{part}"]
        assert content(copy) == content(tensors[f"lm_head.{part}"])
    write_hf_checkpoint(tmp_path, fp8_config(RAW_CONFIG, list(FP8_BLOCK)), tensors)
    again = load_model(open_huggingface(tmp_path))
    chex.assert_trees_all_equal_structs(again, model)
    assert list(map(content, jax.tree.leaves(again))) == list(map(content, jax.tree.leaves(model)))


def test_kv_b_alone_in_fp8_comes_back_bit_for_bit() -> None:
    config, block = fp8_checkpoint.CONFIG, [32, 48]
    stored, values = as_fp8(random_tensors(config, seed=61), block)
    mixed = values | {name: tensor for name, tensor in stored.items() if "kv_b_proj" in name}
    assert_exported(read(config, mixed, block), mixed, (32, 48))


def test_of_deepseek_v3_all_tensors_have_their_published_names_shapes_and_dtypes() -> None:
    model = abstract_original(json.loads(config_path("models", "deepseek_v3").read_text()))
    exported = jax.eval_shape(lambda m: dict(exported_tensors(m, (128, 128))), model)
    published = expand(json.loads(GOLDEN.read_text()))
    assert len(published) == 91_991
    assert shapes_and_dtypes(exported) == {name: (shape, DTYPES[dtype]) for name, (shape, dtype) in published.items()}


def integers(leaf: Any) -> Any:
    return random_leaf(f"int4g32[{','.join(map(str, leaf.shape))}]")


def two_formats(experts: Any) -> Any:
    first, *others = (experts.expert(e) for e in range(experts.num_experts))
    return gather_experts([integers(first), *others])


def other_order(experts: Any) -> Any:
    return replace(experts, index_E=experts.index_E[::-1])


def other_blocks(experts: Any) -> Any:
    return replace(experts, buckets=(random_leaf(f"fp8b16x16[{','.join(map(str, experts.shape))}]"),))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("head", integers, "head is int4g32; a Hugging Face checkpoint holds dense .* --dequantize bfloat16 makes"),
        (EXPERTS, lambda w: replace(w, buckets=(integers(w),)), f"{EXPERTS} is int4g32; "),
        (EXPERTS, two_formats, f"{EXPERTS} has experts in fp8b32x64, int4g32; .* in one format"),
        (EXPERTS, lambda w: select_experts(w, range(9)), rf"{EXPERTS} has shape \(9, 96, 64\); .* has \(12, 96, 64\)"),
        (EXPERTS, other_blocks, f"{EXPERTS} is fp8b16x16; its config names blocks of 32 x 64"),
        (V_B, lambda w: w.astype(jnp.bfloat16), f"{V_B} is bf16 and its k_b f32; kv_b_proj needs one format"),
    ],
)
def test_what_a_hugging_face_checkpoint_cannot_hold_is_named(
    name: str, change: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        list(exported_tensors(with_leaf(first_layers(2), name, change), FP8_BLOCK))


@pytest.mark.parametrize("name", ["layers.0.self_attn.o", V_B])
def test_fp8_needs_a_config_that_names_its_blocks(name: str) -> None:
    def as_blocks(leaf: Any) -> Any:
        return random_leaf(f"fp8b8x32[{','.join(map(str, leaf.shape))}]")

    model = with_leaf(with_leaf(first_layers(1), name, as_blocks), name.replace("v_b", "k_b"), as_blocks)
    with pytest.raises(InputError, match=f"{name} is fp8b8x32; its config names no FP8 blocks"):
        list(exported_tensors(with_leaf(model, "head", lambda w: dense(w, jnp.float32)), None))


def converted(_: str, leaf: Leaf) -> Leaf:
    return dense(leaf, jnp.float32)


def test_experts_are_found_wherever_they_lie() -> None:
    """In buckets of two formats and in another order, once every matrix is converted to one format."""
    model = with_leaf(first_layers(2), EXPERTS, other_order)
    model = with_leaf(model, EXPERTS.replace("up", "down"), two_formats)
    leaves, tensors = named_leaves(model), dict(exported_tensors(model, None, converted))
    for projection in ("up", "down"):
        experts = leaves[f"layers.1.mlp.experts.{projection}"]
        for e in range(12):
            tensor = tensors[f"model.layers.1.mlp.experts.{e}.{projection}_proj.weight"]
            assert content(tensor) == content(to_numpy(experts.expert(e)).astype(np.float32))
    abstract = jax.eval_shape(lambda m: dict(exported_tensors(m, None, converted)), model)
    assert shapes_and_dtypes(abstract) == shapes_and_dtypes(tensors)


def test_integers_in_kv_b_are_named() -> None:
    model = with_leaf(with_leaf(first_layers(1), K_B, integers), V_B, integers)
    with pytest.raises(InputError, match=f"{V_B} is int4g32"):
        list(exported_tensors(model, FP8_BLOCK))


def test_kv_b_must_be_of_whole_blocks_with_one_scale() -> None:
    config, block = fp8_checkpoint.CONFIG, [32, 48]
    model = read(config, as_fp8(random_tensors(config, seed=62), block)[0], block)
    changed = with_leaf(model, V_B, lambda w: replace(w, scale_inv=w.scale_inv.at[2, 1].multiply(2)))
    with pytest.raises(InputError, match=f"{V_B} cannot be written .*: a block of 32 rows has one scale"):
        list(exported_tensors(changed, (32, 48)))

    def of_six_rows(leaf: Fp8Blocks) -> Fp8Blocks:
        return replace(leaf, block=(6, 48))

    changed = with_leaf(with_leaf(model, K_B, of_six_rows), V_B, of_six_rows)
    with pytest.raises(InputError, match=f"{V_B} is fp8b6x48, which is no part of blocks of 32 x 48"):
        list(exported_tensors(changed, (32, 48)))
