"""The names of a Hugging Face `deepseek_v3` checkpoint's tensors, and which of the model's weights each one holds."""

import math
from collections.abc import Iterator

from moejax.model.config import Config
from moejax.model.weights import Layout, block_and_name, row_of

_ATTENTION = {
    "q": "q_proj",
    "q_a": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b": "q_b_proj",
    "kv_a": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "k_b": "kv_b_proj",
    "v_b": "kv_b_proj",
    "o": "o_proj",
}
_BLOCK = {
    "input_norm": "input_layernorm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "mlp.router": "mlp.gate.weight",
    "mlp.bias": "mlp.gate.e_score_correction_bias",
    **{f"self_attn.{ours}": f"self_attn.{theirs}.weight" for ours, theirs in _ATTENTION.items()},
    **{f"mlp.{name}": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"mlp.shared.{name}": f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"mlp.experts.{name}": f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")},
    "enorm": "enorm.weight",
    "hnorm": "hnorm.weight",
    "eh_proj": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
}
TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
# An MTP block's own copies of embedding and head.
MTP_COPIES = {"embed_tokens.weight": "embed", "shared_head.head.weight": "head"}
# Within a block, the two weights that one tensor holds, head by head: kv_b_proj.
K_B, V_B = "self_attn.k_b", "self_attn.v_b"
SCALE = "_scale_inv"


def hf_name(name: str, config: Config) -> str | None:
    """The Hugging Face tensor behind a weight, None if there is none; experts' names have a `{}` for the expert."""
    block, own = block_and_name(name, config.num_hidden_layers)
    if block is None:
        return TOP[own]
    return f"model.layers.{block}.{_BLOCK[own]}" if own in _BLOCK else None


def expected_tensors(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight that a checkpoint of this config is published with, FP8 scales apart."""
    for name, shape in Layout(config).shapes().items():
        tensor, row = hf_name(name, config), row_of(name)
        if tensor is None or row.name == K_B:
            continue
        if row.name == V_B:
            heads, latent = shape[0], shape[2]
            yield tensor, (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
        elif row.role == "routed experts":
            yield from ((tensor.format(e), shape[1:]) for e in range(shape[0]))
        else:
            yield tensor, shape
    for layer in range(config.num_hidden_layers, config.num_blocks):
        shape = (config.vocab_size, config.hidden_size)
        yield from ((f"model.layers.{layer}.{copy}", shape) for copy in MTP_COPIES)


def num_elements(config: Config) -> int:
    """The numbers in an original checkpoint, FP8 scales apart, MTP blocks included."""
    return sum(math.prod(shape) for _, shape in expected_tensors(config))
