"""Write a checkpoint of DeepSeek-V3's layers, or of smaller ones, to compress: some 27 GB with three layers.

    python tools/bench/synthetic_checkpoint.py OUTPUT [--layers 3] [--dense-layers 1] [--hidden-size 7168]
           [--experts 256] [--expert-size 2048] [--vocabulary 129280]

The first layers are dense, one unless told otherwise, the others have experts; all is as in the published checkpoint
otherwise, FP8 blocks of 128 x 128 included. The tokenizer is the tiny checkpoint's.

What makes it like a trained model, as far as time and memory can tell: weights are normal within an FP8 block, and
blocks differ in size as e^(0.3 z) by inputs and e^(0.15 z) by outputs, z normal, so that a few inputs weigh most;
norms' gains are e^(0.3 z) and the router's biases 0.02 z, so that experts are chosen unequally. It says
nothing of quality.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moejax.checkpoint.atomic import atomic_folder
from moejax.checkpoint.hf_names import SCALE, expected_tensors
from moejax.checkpoint.safetensors_writer import write_shards
from moejax.model import config_from_hf
from moejax.resources import config_path, tiny_checkpoint

SHARD_BYTES = 4 * 10**9
BLOCK = 128
# The largest of a normal distribution's quantiles in the table is 4.2: 80 of e4m3's 448.
UNIT = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write; it must not exist")
    for name, default in (
        ("layers", 3),
        ("dense-layers", 1),
        ("hidden-size", 7168),
        ("experts", 256),
        ("expert-size", 2048),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=129280)
    options = parser.parse_args()
    raw = config(options)
    shapes = dict(abstract_tensors(raw))
    with atomic_folder(options.output) as folder:
        write_shards(folder, tensors(shapes), shapes, SHARD_BYTES)
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_checkpoint() / name, folder / name)


def config(options: argparse.Namespace) -> dict[str, Any]:
    """DeepSeek-V3's with those sizes; what is left grows or shrinks with the hidden size."""
    raw: dict[str, Any] = json.loads(config_path("models", "deepseek_v3").read_text())
    share = options.hidden_size / raw["hidden_size"]
    heads = max(1, round(raw["num_attention_heads"] * share))
    return raw | {
        "num_hidden_layers": options.layers,
        "first_k_dense_replace": options.dense_layers,
        "num_nextn_predict_layers": 0,
        "hidden_size": options.hidden_size,
        "intermediate_size": max(BLOCK, round(raw["intermediate_size"] * share / BLOCK) * BLOCK),
        "moe_intermediate_size": options.expert_size,
        "n_routed_experts": options.experts,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": max(BLOCK, round(raw["q_lora_rank"] * share / BLOCK) * BLOCK),
        "vocab_size": options.vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def abstract_tensors(raw: dict[str, Any]) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    for name, shape in expected_tensors(config_from_hf(raw)):
        if not is_fp8(name):
            yield name, jax.ShapeDtypeStruct(shape, np.float32 if name.endswith("bias") else ml_dtypes.bfloat16)
            continue
        yield name, jax.ShapeDtypeStruct(shape, ml_dtypes.float8_e4m3fn)
        yield name + SCALE, jax.ShapeDtypeStruct(tuple(-(-size // BLOCK) for size in shape), np.float32)


def is_fp8(name: str) -> bool:
    return ("self_attn" in name or ".mlp." in name) and "_proj" in name


def tensors(shapes: dict[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, np.ndarray]]:
    random, table = np.random.default_rng(0), quantiles()
    for name, own in shapes.items():
        if own.dtype == ml_dtypes.float8_e4m3fn:
            index = random.integers(0, len(table), own.shape, dtype=np.uint16)
            yield name, table[index].view(ml_dtypes.float8_e4m3fn)
        elif name.endswith(SCALE):
            outputs, inputs = (
                np.exp(spread * random.standard_normal(size))
                for spread, size in zip((0.15, 0.3), own.shape, strict=True)
            )
            deviation = shapes[name.removesuffix(SCALE)].shape[1] ** -0.5
            yield name, (np.outer(outputs, inputs) * deviation / UNIT).astype(own.dtype)
        elif name.endswith("bias"):
            yield name, (0.02 * random.standard_normal(own.shape)).astype(own.dtype)
        elif len(own.shape) == 1:
            yield name, np.exp(0.3 * random.standard_normal(own.shape)).astype(own.dtype)
        else:
            deviation = 1.0 if "embed" in name else own.shape[-1] ** -0.5
            yield name, np.concatenate([*rows(random, own, deviation)])


def rows(random: np.random.Generator, own: jax.ShapeDtypeStruct, deviation: float) -> Iterator[np.ndarray]:
    """A dense matrix of noise, a few rows at a time, which take four bytes a number while they are made."""
    for start in range(0, own.shape[0], 4096):
        size = (min(4096, own.shape[0] - start), own.shape[1])
        yield (random.standard_normal(size, np.float32) * np.float32(deviation)).astype(own.dtype)


def quantiles() -> np.ndarray:
    """65,536 quantiles of a normal distribution in e4m3, of deviation UNIT, as bytes: drawing from them is quicker."""
    half = [NormalDist().inv_cdf((k + 0.5) / 65536) for k in range(65536)]
    return (UNIT * np.asarray(half, np.float32)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


if __name__ == "__main__":
    main()
