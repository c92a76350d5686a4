"""Small random models whose matrices fit the integer formats, made in memory; built once for all tests."""

from dataclasses import replace
from functools import cache

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model_cases import BASE, Config, Tensors, random_tensors
from moejax.calibrate import Statistics, calibrate
from moejax.checkpoint.hf_leaves import HuggingFaceLeaves
from moejax.model import DeepseekV3, config_from_hf, named_leaves

# Every input dimension is a multiple of 32; D is one of 64 too.
RAW_CONFIG = BASE | {
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 96,
    "n_routed_experts": 12,
    "n_group": 3,
    "kv_lora_rank": 32,
    "q_lora_rank": 96,
    "num_nextn_predict_layers": 1,
}
CONFIG = config_from_hf(RAW_CONFIG)
FP8_BLOCK = (32, 64)
CHUNKS: NDArray[np.int32] = np.random.RandomState(0).randint(CONFIG.vocab_size, size=(4, 14)).astype(np.int32)


@cache
def small_model(mtp: bool = True) -> DeepseekV3:
    """One dense layer, two with experts and an MTP block. Experts, o_proj and head are FP8 with ragged edges."""
    raw = RAW_CONFIG | {"num_nextn_predict_layers": int(mtp)}
    tensors = with_fp8(random_tensors(raw, seed=1))
    return model_of(raw, tensors)


def model_of(raw: Config, tensors: Tensors) -> DeepseekV3:
    """The model of a Hugging Face config and its checkpoint's tensors, FP8 ones in blocks of FP8_BLOCK."""
    config = config_from_hf(raw)
    return DeepseekV3(config, HuggingFaceLeaves(config, tensors.__getitem__, lambda: FP8_BLOCK))


@cache
def first_layers(count: int) -> DeepseekV3:
    """The first layers of `small_model`, which compile faster; 1 is the dense one."""
    config = replace(CONFIG, num_hidden_layers=count, num_nextn_predict_layers=0)
    return DeepseekV3(config, named_leaves(small_model()).__getitem__)


@cache
def small_statistics() -> Statistics:
    """Of `small_model` on CHUNKS, in two batches."""
    return calibrate(small_model(), CHUNKS, batch=2)


def with_fp8(tensors: Tensors) -> Tensors:
    """The checkpoint with a part of its matrices in FP8 blocks."""
    random, out = np.random.RandomState(2), dict(tensors)
    for name, tensor in tensors.items():
        if ".mlp.experts." in name or name.endswith(("o_proj.weight", "lm_head.weight")):
            blocks = [-(-length // block) for length, block in zip(tensor.shape, FP8_BLOCK, strict=True)]
            scale_inv = np.exp2(random.uniform(-6, -4, blocks)).astype(np.float32)
            wide = np.repeat(np.repeat(scale_inv, FP8_BLOCK[0], axis=0), FP8_BLOCK[1], axis=1)
            out[name] = (tensor / wide[: tensor.shape[0], : tensor.shape[1]]).astype(ml_dtypes.float8_e4m3fn)
            out[f"{name}_scale_inv"] = scale_inv
    return out
