"""Write the random 2.2B-parameter checkpoint (0.43B active, BF16, 4.4 GB) on which speed and memory are measured.

    python tools/bench/random_checkpoint.py OUTPUT

A DeepSeek-V3 in small: one dense layer and five of 64 experts in 8 groups. The tokenizer is the tiny checkpoint's. Its
weights are noise, so it says nothing of quality.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moejax.checkpoint.atomic import atomic_folder
from moejax.checkpoint.hf_names import expected_tensors
from moejax.checkpoint.safetensors_writer import write_shards
from moejax.model import config_from_hf
from moejax.resources import tiny_checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "num_nextn_predict_layers": 0,
}
DEVIATION = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write; it must not exist")
    output = parser.parse_args().output
    shapes = {
        name: jax.ShapeDtypeStruct(shape, np.float32 if name.endswith("bias") else ml_dtypes.bfloat16)
        for name, shape in expected_tensors(config_from_hf(CONFIG))
    }
    with atomic_folder(output) as folder:
        write_shards(folder, tensors(shapes), shapes, shard_bytes=10**9)
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_checkpoint() / name, folder / name)


def tensors(shapes: dict[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, np.ndarray]]:
    """Norms are ones, biases zeros, all else is normal noise."""
    random = np.random.default_rng(0)
    for name, own in shapes.items():
        if len(own.shape) == 1:
            yield name, np.full(own.shape, not name.endswith("bias"), own.dtype)
        else:
            noise = random.standard_normal(own.shape, np.float32) * np.float32(DEVIATION)
            yield name, noise.astype(own.dtype)


if __name__ == "__main__":
    main()
