"""A small random checkpoint of a dense and a sparse layer, in float32 or in DeepSeek's FP8, for tests of reading it."""

import ml_dtypes
import numpy as np

from model_cases import BASE, Config, Tensors, random_tensors

FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
SCALE = "_scale_inv"

# kv_a_proj is 576 x 200, so that blocks of 128 are partial along both axes; kv_b_proj has
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


def published(config: Config, block: list[int] | None) -> Tensors:
    """Tensors in the dtypes that DeepSeek publishes them in."""
    tensors = random_tensors(config, seed=50)
    linear = {name for name in tensors if is_linear(name) and not name.endswith("eh_proj.weight")} if block else set()
    stored = {
        name: tensor.astype(np.float32 if name.endswith("e_score_correction_bias") else BF16)
        for name, tensor in tensors.items()
        if name not in linear
    }
    return stored | as_fp8({name: tensors[name] for name in tensors if name in linear}, block or [])[0]
