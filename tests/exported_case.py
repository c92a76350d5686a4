"""A small model compressed in every way that an export knows: pruned in equal groups, fewer experts a token, a routing
scale in each layer, integers and ternary codes, experts of two formats.

    python tests/exported_case.py FOLDER

writes its dequantized float32 export, which `tools/make_golden.py --exported FOLDER` runs through Hugging Face
transformers. Codes are drawn, not rounded to, so that the model is the same on every machine.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp
import numpy as np

from model_cases import BASE, random_tensors
from moejax.checkpoint.hf_export import write_huggingface
from moejax.checkpoint.hf_leaves import HuggingFaceLeaves
from moejax.checkpoint.native import open_native
from moejax.checkpoint.native_bytes import Description
from moejax.checkpoint.native_writer import write_native
from moejax.formats import ExpertWeights, GroupFormat, Leaf, gather_experts, parse_format
from moejax.model import DeepseekV3, config_from_hf, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.moe import MoE
from moejax.transforms.experts_per_token import adjust
from moejax.transforms.prune import prune

# Input dimensions are multiples of 32, so that groups fit.
RAW_CONFIG = BASE | {
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 40,
}
# Three of four experts of every group; by layer, for the dense first one there is no scale.
KEEP = {1: (0, 1, 3, 4, 6, 7, 8, 9, 10, 13, 14, 15), 2: (1, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 15)}
EXPERTS_PER_TOKEN = 2
SCALES = {1: 1.25, 2: 0.75}


def build() -> DeepseekV3:
    """The compressed model."""
    config, tensors = config_from_hf(RAW_CONFIG), random_tensors(RAW_CONFIG, seed=73)
    original = DeepseekV3(config, HuggingFaceLeaves(config, tensors.__getitem__, lambda: (128, 128)))
    leaves: dict[str, Any] = named_leaves(original)
    for i, layer in enumerate(original.layers):
        leaves |= {f"layers.{i}.{name}": leaf for name, leaf in _adjusted(layer, i).items()}
    random = np.random.RandomState(71)
    packed = {name: _packed(name, leaf, random) for name, leaf in leaves.items()}
    per_token = [config.num_experts_per_tok, EXPERTS_PER_TOKEN, EXPERTS_PER_TOKEN]
    return DeepseekV3(config, packed.__getitem__, per_token)


def write_native_of(model: DeepseekV3, output: Path, raw_config: dict[str, Any] = RAW_CONFIG) -> None:
    """The model as a native checkpoint that says nothing of a plan."""
    write_native(model, output, Description(raw_config, {}, {}), [], sys.maxsize)


def _adjusted(layer: Block, i: int) -> dict[str, Any]:
    if not isinstance(layer.mlp, MoE):
        return {}
    mlp = adjust(prune(layer.mlp, KEEP[i]), EXPERTS_PER_TOKEN, SCALES[i])
    return {f"mlp.{name}": leaf for name, leaf in named_leaves(mlp).items()}


def _packed(name: str, leaf: Any, random: np.random.RandomState) -> Any:
    if isinstance(leaf, ExpertWeights):
        formats = ("int4g32", "ternaryg32") if name.endswith("up") else ("int5g32", "int5g32")
        shape = leaf.shape[1:]
        return gather_experts([_drawn(formats[e % 2], shape, random) for e in range(leaf.num_experts)])
    if leaf.ndim < 2 or name.endswith((".router", "self_attn.o", "embed")):
        return leaf
    return _drawn("int6g32", leaf.shape, random)


def _drawn(spec: str, shape: tuple[int, ...], random: np.random.RandomState) -> Leaf:
    """Any codes, with scales such that weights have about the variance 1 / inputs."""
    to = parse_format(spec)
    assert isinstance(to, GroupFormat)
    steps = int(to.levels.highest) + 1
    codes, scale = random.randint(0, steps, shape), random.uniform(0.7, 1.3, to.abstract(shape).scale.shape)
    scale *= (12 / shape[-1]) ** 0.5 / steps
    return to.leaf(to.pack(jnp.asarray(codes)), jnp.asarray(scale, jnp.bfloat16), shape[-1])


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        write_native_of(build(), Path(folder) / "native")
        write_huggingface(open_native(Path(folder) / "native"), Path(sys.argv[1]), "float32")
