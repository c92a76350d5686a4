from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from model_cases import BASE, Config, Tensors, random_tensors, write_hf_checkpoint
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint, open_huggingface
from moejax.errors import InputError
from moejax.formats import ExpertWeights, Fp8Blocks, dense, describe
from moejax.model import Layout
from quick_jit import quick_jit

quick_dense = quick_jit(dense, static_argnums=1)
FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
SCALE = "_scale_inv"

# A dense and a sparse layer. kv_a_proj is 576 x 200, so that blocks of 128 are partial along both axes; kv_b_proj has
# 40 rows a head, so that the borders of blocks lie within heads, and one of them within a head's keys.
CONFIG: Config = BASE | {
    "num_hidden_layers": 2,
    "hidden_size": 200,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def fp8_config(config: Config, block: list[int]) -> Config:
    return config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}


def is_linear(name: str) -> bool:
    """Whether DeepSeek stores the tensor in FP8: every linear layer but the router and the head."""
    return name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight")


def as_fp8(tensors: Tensors, block: list[int]) -> tuple[Tensors, Tensors]:
    """The checkpoint's tensors with linear layers in FP8 and other matrices in BF16, and the values they stand for."""
    random, stored, values = np.random.RandomState(0), Tensors(), Tensors()
    for name, tensor in tensors.items():
        if not is_linear(name):
            stored[name] = tensor.astype(BF16) if tensor.ndim == 2 else tensor
            values[name] = stored[name].astype(np.float32)
            continue
        stored[name] = (100 * tensor).astype(FP8)
        blocks = [-(-length // size) for length, size in zip(tensor.shape, block, strict=True)]
        stored[name + SCALE] = (0.01 * (0.5 + random.rand(*blocks))).astype(np.float32)
        i, j = np.indices(tensor.shape)
        values[name] = stored[name].astype(np.float32) * stored[name + SCALE][i // block[0], j // block[1]]
    return stored, values


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


def refusal(folder: Path, config: Config, tensors: Tensors, read: str | None = None) -> str:
    """The one-line message of opening the checkpoint or, where a leaf is named, of reading that."""
    write_hf_checkpoint(folder, config, tensors)
    if read is None:
        with pytest.raises(InputError) as error:
            open_huggingface(folder)
    else:
        checkpoint = open_huggingface(folder)
        with pytest.raises(InputError) as error:
            checkpoint.leaf(read)
    message = str(error.value)
    assert message.startswith(str(folder)) and "\n" not in message
    return message


@pytest.mark.parametrize("name", [KV_A, NORM, BIAS, EXPERT, "lm_head.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, tensors: Tensors, name: str) -> None:
    remaining = {other: tensor for other, tensor in tensors.items() if other != name}
    assert f"the tensor {name} is missing" in refusal(tmp_path, CONFIG, remaining)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.input_layernorm.weight",
        "model.layers.1.mlp.experts.4.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.bias",
        KV_A + SCALE,
    ],
)
def test_a_tensor_too_many_is_named(tmp_path: Path, tensors: Tensors, name: str) -> None:
    message = refusal(tmp_path, CONFIG, tensors | {name: np.ones((5, 2), np.float32)})
    assert f"the tensor {name} is none of a deepseek_v3 model" in message and ".safetensors" in message


@pytest.mark.parametrize("name", [KV_A, NORM, EXPERT])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path, tensors: Tensors, name: str) -> None:
    shape = tensors[name].shape
    longer = (shape[0] + 1, *shape[1:])
    message = refusal(tmp_path, CONFIG, tensors | {name: np.ones(longer, np.float32)})
    assert f"the tensor {name} has shape {longer}; the config asks for {shape}" in message


@pytest.mark.parametrize(
    ("name", "leaf", "dtype"),
    [
        ("model.embed_tokens.weight", "embed", BF16),
        (NORM, "layers.1.post_attention_norm", np.float32),
        (BIAS, "layers.1.mlp.bias", np.float32),
        (EXPERT, "layers.1.mlp.experts.up", np.float32),
        ("lm_head.weight", "head", np.float16),
        ("model.layers.0.self_attn.kv_b_proj.weight", "layers.0.self_attn.v_b", BF16),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(
    tmp_path: Path, tensors: Tensors, name: str, leaf: str, dtype: Any, value: float
) -> None:
    broken = tensors[name].astype(dtype)
    broken[(-1,) * broken.ndim] = value
    message = refusal(tmp_path, CONFIG, tensors | {name: broken}, read=leaf)
    assert f"the tensor {name} holds a NaN or an infinity" in message and ".safetensors" in message


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        (KV_A, "layers.0.self_attn.kv_a"),
        (EXPERT, "layers.1.mlp.experts.up"),
        ("model.layers.0.self_attn.kv_b_proj.weight", "layers.0.self_attn.k_b"),
    ],
)
@pytest.mark.parametrize("suffix", ["", SCALE])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_in_fp8_values_or_scales_is_refused(
    tmp_path: Path, tensors: Tensors, name: str, leaf: str, suffix: str, sign: int
) -> None:
    stored, _ = as_fp8(tensors, [128, 128])
    stored[name + suffix][0, 0] = np.copysign(np.nan, sign)
    message = refusal(tmp_path, fp8_config(CONFIG, [128, 128]), stored, read=leaf)
    assert f"the tensor {name}{suffix} holds a NaN or an infinity" in message


def test_the_largest_fp8_values_are_finite(tmp_path: Path, tensors: Tensors) -> None:
    stored, _ = as_fp8(tensors, [128, 128])
    stored[KV_A][0, :2] = [448, -448]
    kv_a = write(tmp_path, fp8_config(CONFIG, [128, 128]), stored).leaf("layers.0.self_attn.kv_a")
    np.testing.assert_array_equal(kv_a.values[0, :2].astype(np.float32), [448, -448])


def test_an_fp8_weight_without_its_scale_is_named(tmp_path: Path, tensors: Tensors) -> None:
    stored, _ = as_fp8(tensors, [128, 128])
    del stored[KV_A + SCALE]
    message = refusal(tmp_path, fp8_config(CONFIG, [128, 128]), stored)
    assert f"the tensor {KV_A}{SCALE} is missing; its FP8 weight needs it" in message


def test_scales_of_another_shape_or_dtype_are_named(tmp_path: Path, tensors: Tensors) -> None:
    stored, _ = as_fp8(tensors, [128, 128])
    scale, config = KV_A + SCALE, fp8_config(CONFIG, [128, 128])
    transposed = stored | {scale: np.ascontiguousarray(stored[scale].T)}
    assert f"{scale} has shape (2, 5); (5, 2) is accepted" in refusal(tmp_path / "a", config, transposed)
    halved = stored | {scale: stored[scale].astype(BF16)}
    assert f"{scale} has dtype bfloat16; float32 is accepted" in refusal(tmp_path / "b", config, halved)


@pytest.mark.parametrize(
    "quantization", [None, {}, "fp8", {"weight_block_size": [128]}, {"weight_block_size": [128, 0]}], ids=str
)
def test_fp8_weights_need_the_size_of_their_blocks(tmp_path: Path, tensors: Tensors, quantization: object) -> None:
    stored, _ = as_fp8(tensors, [128, 128])
    message = refusal(tmp_path, CONFIG | {"quantization_config": quantization}, stored)
    assert "config.json: quantization_config.weight_block_size is" in message and "[128, 128]" in message


@pytest.mark.parametrize(
    ("name", "dtype", "accepted"),
    [
        (KV_A, np.int8, "bfloat16, float16, float32 and float8_e4m3fn"),
        (KV_A, np.float64, "bfloat16, float16, float32 and float8_e4m3fn"),
        (EXPERT, ml_dtypes.float8_e5m2, "bfloat16, float16, float32 and float8_e4m3fn"),
        (NORM, FP8, "bfloat16, float16, float32"),
        ("model.layers.1.mlp.gate.weight", FP8, "bfloat16, float16, float32"),
    ],
)
def test_a_tensor_of_a_dtype_that_cannot_be_a_weight_is_named(
    tmp_path: Path, tensors: Tensors, name: str, dtype: Any, accepted: str
) -> None:
    message = refusal(tmp_path, CONFIG, tensors | {name: tensors[name].astype(dtype)})
    assert f"the tensor {name} has dtype {np.dtype(dtype)}; accepted are {accepted}" in message
    assert message.endswith(accepted)


@pytest.mark.parametrize("copy", ["embed_tokens.weight", "shared_head.head.weight"])
def test_an_mtp_blocks_own_embedding_or_head_is_refused(tmp_path: Path, copy: str) -> None:
    config, name = CONFIG | {"num_nextn_predict_layers": 1}, f"model.layers.2.{copy}"
    tensors = random_tensors(config, seed=32)
    rounded = tensors | {name: tensors[name].astype(BF16)}
    assert f"the tensor {name} differs from" in refusal(tmp_path / "rounded", config, rounded)
    tensors[name][3, 5] += 1
    assert f"the tensor {name} differs from" in refusal(tmp_path / "changed", config, tensors)


def test_experts_of_one_projection_must_have_one_dtype(tmp_path: Path, tensors: Tensors) -> None:
    first = EXPERT.replace("experts.2", "experts.0")
    mixed = tensors | {EXPERT: tensors[EXPERT].astype(BF16)}
    message = refusal(tmp_path / "a", CONFIG, mixed)
    assert f"the tensor {EXPERT} has dtype bfloat16; float32 is needed, as {first} has" in message
    stored, values = as_fp8(tensors, [128, 128])
    del stored[EXPERT + SCALE]
    message = refusal(tmp_path / "b", fp8_config(CONFIG, [128, 128]), stored | {EXPERT: values[EXPERT]})
    assert f"the tensor {EXPERT} has dtype float32; float8_e4m3fn is needed, as {first} has" in message


def test_a_config_and_a_folder_that_cannot_be_read_are_named(tmp_path: Path, tensors: Tensors) -> None:
    assert "model_type is 'llama'" in refusal(tmp_path, CONFIG | {"model_type": "llama"}, tensors)
    with pytest.raises(InputError, match=r"nowhere.*config\.json"):
        open_huggingface(tmp_path / "nowhere")
