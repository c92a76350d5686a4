"""Small random DeepSeek-V3 models: their Hugging Face configs and every tensor of their checkpoints.

`tools/make_golden.py` runs these models through Hugging Face transformers once and stores what came out under
`tests/golden`; the tests build the same tensors again, without torch. Sizes are small and, as far as possible, all
different, so that a transposed or swapped axis cannot go unnoticed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Config = dict[str, Any]
Tensors = dict[str, NDArray[Any]]

YARN: Config = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 512,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

BASE: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "float32",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 104,
    "moe_intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 72,
    "qk_rope_head_dim": 16,
    "v_head_dim": 56,
    "qk_nope_head_dim": 24,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    # Not the 1e-6 of the two latent norms, whose epsilon Hugging Face does not take from the config.
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
}


@dataclass(frozen=True)
class ModelCase:
    """One small model: its config, the seed of its weights and the mean of its router's correction bias."""

    config: Config
    seed: int
    bias_mean: float = 0.0

    def tensors(self) -> Tensors:
        """The case's checkpoint, as `random_tensors` makes it."""
        return random_tensors(self.config, self.seed, self.bias_mean)


CASES: dict[str, ModelCase] = {
    "base": ModelCase(BASE, seed=1),
    "n_group_1": ModelCase(BASE | {"n_routed_experts": 12, "n_group": 1, "topk_group": 1}, seed=2),
    "no_q_lora": ModelCase(BASE | {"q_lora_rank": None}, seed=3),
    "no_yarn": ModelCase(BASE | {"rope_scaling": None}, seed=4),
    "no_norm_topk": ModelCase(BASE | {"norm_topk_prob": False}, seed=5),
    # Nearly every biased score is negative: masking the other groups to 0 instead of -inf would then choose from them.
    "negative_bias": ModelCase(BASE, seed=6, bias_mean=-1.2),
    "two_shared": ModelCase(BASE | {"n_shared_experts": 2}, seed=7),
    "rope_not_interleaved": ModelCase(BASE | {"rope_interleave": False}, seed=8),
    "mscale": ModelCase(BASE | {"rope_scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 1.5}}, seed=9),
    "no_mscale_all_dim": ModelCase(
        BASE
        | {"rope_scaling": {key: value for key, value in YARN.items() if key != "mscale_all_dim"} | {"mscale": 0.5}},
        seed=10,
    ),
    "mtp": ModelCase(BASE | {"num_nextn_predict_layers": 1}, seed=11),
}

# Decoding is compiled as a whole: one dense layer and one with experts are enough.
SHALLOW = BASE | {"num_hidden_layers": 2}
N_GROUP_1 = SHALLOW | {"n_group": 1, "topk_group": 1}
N_GROUP_8 = SHALLOW | {"n_routed_experts": 24, "n_group": 8, "topk_group": 4}
# Beyond YaRN's original length; keys and values are worth expanding for a long prompt, as they are in the real model.
LONG = SHALLOW | {
    "vocab_size": 53,
    "kv_lora_rank": 128,
    "rope_scaling": YARN | {"original_max_position_embeddings": 32},
    "max_position_embeddings": 128,
}
LONG_MSCALE = LONG | {"rope_scaling": LONG["rope_scaling"] | {"mscale": 0.5, "mscale_all_dim": 1.5}}


@dataclass(frozen=True)
class DecodeCase:
    """A batch of random prompts of these lengths for a small model, and how many tokens each row gets after its own."""

    model: ModelCase
    prompts: tuple[int, ...]
    steps: int


DECODE_CASES: dict[str, DecodeCase] = {
    "n_group_1": DecodeCase(ModelCase(N_GROUP_1, seed=12), prompts=(6, 6), steps=6),
    "n_group_1_no_q_lora": DecodeCase(ModelCase(N_GROUP_1 | {"q_lora_rank": None}, seed=13), prompts=(6, 6), steps=6),
    "n_group_4_mtp": DecodeCase(ModelCase(SHALLOW | {"num_nextn_predict_layers": 1}, seed=14), prompts=(6, 6), steps=6),
    "n_group_4_no_q_lora": DecodeCase(ModelCase(SHALLOW | {"q_lora_rank": None}, seed=15), prompts=(6, 6), steps=6),
    "n_group_8_padded": DecodeCase(ModelCase(N_GROUP_8, seed=16), prompts=(3, 8, 5), steps=4),
    "n_group_8_no_q_lora": DecodeCase(ModelCase(N_GROUP_8 | {"q_lora_rank": None}, seed=17), prompts=(6, 6), steps=6),
    "yarn": DecodeCase(ModelCase(LONG, seed=18), prompts=(92,), steps=8),
    "yarn_mscale": DecodeCase(ModelCase(LONG_MSCALE, seed=19), prompts=(92,), steps=8),
}


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face DeepSeek-V3 checkpoint, in the order in which they are drawn."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= _block_shapes(config, layer)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    for layer in _mtp_layers(config):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "embed_tokens.weight": (vocab, hidden),
            prefix + "enorm.weight": (hidden,),
            prefix + "hnorm.weight": (hidden,),
            prefix + "eh_proj.weight": (hidden, 2 * hidden),
            prefix + "shared_head.norm.weight": (hidden,),
            prefix + "shared_head.head.weight": (vocab, hidden),
        }
        shapes |= _block_shapes(config, layer)
    return shapes


def random_tensors(config: Config, seed: int, bias_mean: float = 0.0) -> Tensors:
    """Every tensor of the checkpoint in float32, from NumPy's frozen `RandomState` stream.

    Matrices have variance 1 / inputs, so that activations stay O(1); norms lie near 1 but are not 1; the router is
    scaled up and its correction bias is `bias_mean` + 0.15 * N(0, 1), so that tokens choose different experts. MTP
    blocks repeat the model's own embedding and head, as the published checkpoint does.
    """
    random = np.random.RandomState(seed)
    tensors: Tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name.startswith("model.layers.") and name.endswith("embed_tokens.weight"):
            tensors[name] = tensors["model.embed_tokens.weight"].copy()
        elif name.endswith("shared_head.head.weight"):
            tensors[name] = tensors["lm_head.weight"].copy()
        else:
            mean, deviation = _distribution(name, shape, bias_mean)
            tensors[name] = (mean + deviation * random.randn(*shape)).astype(np.float32)
    return tensors


def write_hf_checkpoint(folder: Path, config: Config, tensors: Tensors, shards: int = 2) -> None:
    """Write config.json and the tensors as Hugging Face does: one file, or `shards` files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{shard:05}-of-{shards:05}.safetensors" for shard in range(1, shards + 1)]
    # Neighbouring tensors go to different files, so that a reader cannot count on finding a layer in one of them.
    weight_map = {name: files[position % shards] for position, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _mtp_layers(config: Config) -> range:
    first = config["num_hidden_layers"]
    return range(first, first + config["num_nextn_predict_layers"])


def _block_shapes(config: Config, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, experts = config["hidden_size"], config["n_routed_experts"]
    shapes = {
        "input_layernorm.weight": (hidden,),
        **{f"self_attn.{name}": shape for name, shape in _attention_shapes(config)},
        "post_attention_layernorm.weight": (hidden,),
    }
    if layer < config["first_k_dense_replace"]:
        shapes |= _mlp_shapes("mlp", hidden, config["intermediate_size"])
    else:
        width = config["moe_intermediate_size"]
        shapes |= {"mlp.gate.weight": (experts, hidden), "mlp.gate.e_score_correction_bias": (experts,)}
        for expert in range(experts):
            shapes |= _mlp_shapes(f"mlp.experts.{expert}", hidden, width)
        shapes |= _mlp_shapes("mlp.shared_experts", hidden, width * config["n_shared_experts"])
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def _attention_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_latent, kv_latent = config["q_lora_rank"], config["kv_lora_rank"]
    if q_latent is None:
        yield "q_proj.weight", (heads * (nope + rope), hidden)
    else:
        yield "q_a_proj.weight", (q_latent, hidden)
        yield "q_a_layernorm.weight", (q_latent,)
        yield "q_b_proj.weight", (heads * (nope + rope), q_latent)
    yield "kv_a_proj_with_mqa.weight", (kv_latent + rope, hidden)
    yield "kv_a_layernorm.weight", (kv_latent,)
    yield "kv_b_proj.weight", (heads * (nope + value), kv_latent)
    yield "o_proj.weight", (hidden, heads * value)


def _mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def _distribution(name: str, shape: tuple[int, ...], bias_mean: float) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's entries."""
    if name.endswith("e_score_correction_bias"):
        return bias_mean, 0.15
    if len(shape) == 1:
        return 1.0, 0.1
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    if name.endswith("mlp.gate.weight"):
        return 0.0, 1.5 / shape[1] ** 0.5
    return 0.0, 1.0 / shape[1] ** 0.5
