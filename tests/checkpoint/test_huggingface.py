import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fp8_checkpoint import BF16, BIAS, CONFIG, EXPERT, FP8, KV_A, NORM, SCALE, as_fp8, fp8_config
from model_cases import Config, Tensors, random_tensors, write_hf_checkpoint
from moejax.checkpoint.huggingface import open_huggingface
from moejax.errors import InputError

ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(CONFIG, seed=30)


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


def test_experts_of_one_projection_must_have_one_dtype(tmp_path: Path, tensors: Tensors) -> None:
    first = EXPERT.replace("experts.2", "experts.0")
    mixed = tensors | {EXPERT: tensors[EXPERT].astype(BF16)}
    message = refusal(tmp_path / "a", CONFIG, mixed)
    assert f"the tensor {EXPERT} has dtype bfloat16; float32 is needed, as {first} has" in message
    stored, values = as_fp8(tensors, [128, 128])
    del stored[EXPERT + SCALE]
    message = refusal(tmp_path / "b", fp8_config(CONFIG, [128, 128]), stored | {EXPERT: values[EXPERT]})
    assert f"the tensor {EXPERT} has dtype float32; float8_e4m3fn is needed, as {first} has" in message


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_the_routing_bias_is_of_any_dense_dtype_and_keeps_it(tmp_path: Path, tensors: Tensors, dtype: Any) -> None:
    stored = tensors | {BIAS: tensors[BIAS].astype(dtype)}
    write_hf_checkpoint(tmp_path, CONFIG, stored)
    bias = open_huggingface(tmp_path).leaf("layers.1.mlp.bias")
    assert bias.dtype == dtype and np.asarray(bias).tobytes() == stored[BIAS].tobytes()


@pytest.mark.parametrize("count", [32, 56])
def test_frequencies_as_kimi_k2_holds_them_are_left_out(tmp_path: Path, tensors: Tensors, count: int) -> None:
    frequency = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    extra = {frequency.format(layer): np.full(count, np.nan, np.float32) for layer in (0, 1)}
    write_hf_checkpoint(tmp_path / "a", CONFIG, tensors | extra)
    write_hf_checkpoint(tmp_path / "b", CONFIG, tensors)
    checkpoint, without = open_huggingface(tmp_path / "a"), open_huggingface(tmp_path / "b")
    assert checkpoint.num_elements == without.num_elements
    assert [name for name, _ in checkpoint.abstract_leaves()] == [name for name, _ in without.abstract_leaves()]
    name = "model.rotary_emb.inv_freq"
    assert f"the tensor {name} is none of" in refusal(tmp_path / "c", CONFIG, tensors | {name: extra.popitem()[1]})


def test_a_config_of_more_tensors_than_there_are_is_refused_at_the_first(tmp_path: Path, tensors: Tensors) -> None:
    """The others, 24 million, are not listed: that would take gigabytes."""
    router = {ROUTER: np.ones((8192, CONFIG["hidden_size"]), np.float32), BIAS: np.ones(8192, np.float32)}
    write_hf_checkpoint(tmp_path, CONFIG | {"num_hidden_layers": 1000, "n_routed_experts": 8192}, tensors | router)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"the tensor model.layers.1.mlp.experts.4.gate_proj.weight is missing"):
        open_huggingface(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_a_config_and_a_folder_that_cannot_be_read_are_named(tmp_path: Path, tensors: Tensors) -> None:
    assert "model_type is 'llama'" in refusal(tmp_path, CONFIG | {"model_type": "llama"}, tensors)
    with pytest.raises(InputError, match=r"nowhere.*config\.json"):
        open_huggingface(tmp_path / "nowhere")
