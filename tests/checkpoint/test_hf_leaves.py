from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8_checkpoint import BF16, BIAS, CONFIG, EXPERT, FP8, KV_A, NORM, SCALE, as_fp8, fp8_config
from model_cases import Config, Tensors, random_tensors, write_hf_checkpoint
from moejax.checkpoint import chunks, hf_leaves
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint, open_huggingface
from moejax.formats import ExpertWeights, Fp8Blocks, dense, describe
from moejax.model import Layout

quick_dense = jax.jit(dense, static_argnums=1)


def write(folder: Path, config: Config, tensors: Tensors) -> HuggingFaceCheckpoint:
    write_hf_checkpoint(folder, config, tensors)
    return open_huggingface(folder)


def leaves(checkpoint: HuggingFaceCheckpoint) -> dict[str, Any]:
    return {name: checkpoint.leaf(name) for name in Layout(checkpoint.config).shapes()}


def values_of(leaf: Any) -> np.ndarray[Any, Any]:
    """A leaf as float32; experts (E, O, I)."""
    if isinstance(leaf, ExpertWeights):
        return values_of(leaf.buckets[0])[leaf.index_E]
    return np.asarray(quick_dense(leaf, jnp.dtype(jnp.float32)))


def bits(array: jax.Array | np.ndarray[Any, Any]) -> bytes:
    return np.asarray(array).tobytes()


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(CONFIG, seed=30)


@pytest.mark.parametrize("block", [[128, 128], [32, 48]], ids=str)
def test_every_fp8_leaf_is_its_values_times_its_blocks_scales(
    tmp_path: Path, tensors: Tensors, block: list[int]
) -> None:
    stored, values = as_fp8(tensors, block)
    packed = leaves(write(tmp_path / "fp8", fp8_config(CONFIG, block), stored))
    plain = leaves(write(tmp_path / "float32", CONFIG, values))
    assert sum(isinstance(leaf, Fp8Blocks) for leaf in packed.values()) == 2 * 6 + 2 * 3
    for name, leaf in packed.items():
        assert leaf.shape == plain[name].shape
        np.testing.assert_array_equal(values_of(leaf), values_of(plain[name]), err_msg=name)


def test_fp8_bytes_are_kept(tmp_path: Path, tensors: Tensors) -> None:
    stored, _ = as_fp8(tensors, [128, 128])
    checkpoint = write(tmp_path, fp8_config(CONFIG, [128, 128]), stored)
    kv_a = checkpoint.leaf("layers.0.self_attn.kv_a")
    assert kv_a.block == (128, 128) and kv_a.scale_inv.shape == (5, 2)
    assert bits(kv_a.values) == bits(stored[KV_A]) and bits(kv_a.scale_inv) == bits(stored[KV_A + SCALE])
    up = checkpoint.leaf("layers.1.mlp.experts.up")
    assert len(up.buckets) == 1 and bits(up.expert(2).values) == bits(stored[EXPERT])
    per_head = stored["model.layers.0.self_attn.kv_b_proj.weight"].reshape(4, 24 + 16, 512)
    assert bits(checkpoint.leaf("layers.0.self_attn.k_b").values) == bits(per_head[:, :24])
    assert bits(checkpoint.leaf("layers.0.self_attn.v_b").values) == bits(per_head[:, 24:])


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_unquantized_leaves_keep_their_dtype_and_bits(tmp_path: Path, tensors: Tensors, dtype: Any) -> None:
    stored = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    checkpoint = write(tmp_path, CONFIG, stored)
    for name, tensor in [
        ("embed", "model.embed_tokens.weight"),
        ("layers.0.self_attn.kv_a", KV_A),
        ("layers.1.post_attention_norm", NORM),
        ("layers.1.mlp.bias", BIAS),
    ]:
        leaf = checkpoint.leaf(name)
        assert leaf.dtype == dtype and bits(leaf) == bits(stored[tensor])
    assert bits(checkpoint.leaf("layers.1.mlp.experts.up").expert(2)) == bits(stored[EXPERT])


def test_leaves_that_no_tensor_holds_follow_from_the_config(tmp_path: Path, tensors: Tensors) -> None:
    checkpoint = write(tmp_path, CONFIG, tensors)
    np.testing.assert_array_equal(checkpoint.leaf("layers.1.mlp.group_id"), [0, 0, 1, 1])
    assert checkpoint.leaf("layers.1.mlp.routing_scale") == 1
    assert checkpoint.experts_per_token == (2, 2)


def test_scales_are_no_elements_and_mtp_blocks_are(tmp_path: Path) -> None:
    config = CONFIG | {"num_nextn_predict_layers": 1}
    tensors = random_tensors(config, seed=31)
    stored, _ = as_fp8(tensors, [128, 128])
    checkpoint = write(tmp_path, fp8_config(config, [128, 128]), stored)
    assert checkpoint.num_elements == sum(tensor.size for tensor in tensors.values())
    assert isinstance(checkpoint.leaf("mtp.0.block.self_attn.o"), Fp8Blocks)
    assert bits(checkpoint.leaf("mtp.0.eh_proj").values) == bits(stored["model.layers.2.eh_proj.weight"])


def test_abstract_leaves_have_the_formats_and_shapes_of_those_read(tmp_path: Path, tensors: Tensors) -> None:
    stored, _ = as_fp8(tensors, [128, 128])
    checkpoint = write(tmp_path, fp8_config(CONFIG, [128, 128]), stored)
    abstract = {name: describe(leaf) for name, leaf in checkpoint.abstract_leaves()}
    assert abstract == {name: describe(leaf) for name, leaf in leaves(checkpoint).items()}
    assert abstract["layers.0.self_attn.kv_a"] == "fp8b128x128[576,200]"


def test_the_tiny_checkpoint_opens_and_most_of_its_bytes_are_fp8(tiny: Path) -> None:
    checkpoint = open_huggingface(tiny)
    info = checkpoint.folder.tensors
    assert sum(tensor.nbytes for tensor in info.values() if tensor.dtype == FP8) > 0.8 * checkpoint.num_elements
    assert isinstance(checkpoint.leaf("layers.4.mlp.experts.down").buckets[0], Fp8Blocks)


def test_the_largest_fp8_values_are_finite(tmp_path: Path, tensors: Tensors) -> None:
    stored, _ = as_fp8(tensors, [128, 128])
    stored[KV_A][0, :2] = [448, -448]
    kv_a = write(tmp_path, fp8_config(CONFIG, [128, 128]), stored).leaf("layers.0.self_attn.kv_a")
    np.testing.assert_array_equal(kv_a.values[0, :2].astype(np.float32), [448, -448])


@pytest.mark.parametrize("is_fp8", [True, False])
def test_experts_are_read_into_memory_that_jax_takes_without_a_copy(
    tmp_path: Path, tensors: Tensors, is_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, _ = as_fp8(tensors, [128, 128])
    checkpoint = write(tmp_path, fp8_config(CONFIG, [128, 128]) if is_fp8 else CONFIG, stored if is_fp8 else tensors)
    given: list[np.ndarray[Any, Any]] = []
    aligned = chunks.aligned

    def noted(*arguments: Any) -> np.ndarray[Any, Any]:
        given.append(aligned(*arguments))
        return given[-1]

    monkeypatch.setattr(hf_leaves, "aligned", noted)
    arrays = jax.tree.leaves(checkpoint.leaf("layers.1.mlp.experts.up").buckets)
    assert [array.unsafe_buffer_pointer() for array in arrays] == [memory.ctypes.data for memory in given]
