"""The model that a published checkpoint holds, in shapes alone: from its config, without a file of it."""

from collections.abc import Mapping
from typing import Any

from moejax.checkpoint.hf_config import dense_dtype, linear_block, unrotated_config
from moejax.checkpoint.hf_leaves import kv_b_block
from moejax.formats import abstract_experts, abstract_leaf
from moejax.formats.dense import DENSE_NAMES
from moejax.model import DeepseekV3, Layout

# What DeepSeek stores in FP8 where it quantizes: the matrices of attention and of every MLP. Embedding, head, router,
# norms and the MTP blocks' eh_proj stay dense (arXiv:2412.19437, section 3.3, and the published checkpoint).
_LINEAR = ("q", "q_a", "q_b", "kv_a", "k_b", "v_b", "o", "gate", "up", "down")
# Whatever the config's dtype is.
_FIXED_DTYPES = {"bias": "float32", "group_id": "int32", "routing_scale": "float32"}


def abstract_original(raw_config: Mapping[str, Any], source: str = "config.json") -> DeepseekV3:
    """The model of the checkpoint that DeepSeek's rule of formats gives this Hugging Face config, MTP blocks included.

    Every array is a `jax.ShapeDtypeStruct`; leaves and tree are those of `HuggingFaceCheckpoint.abstract_model` for
    such a checkpoint. Raises InputError, beginning with `source`, if the config describes no model, or quantizes by
    another method than FP8, or its dtype is none of a checkpoint's.
    """
    config = unrotated_config(raw_config, source)
    dense, block = dense_dtype(raw_config, source), linear_block(raw_config, source)
    shapes = Layout(config).shapes()

    def format_of(name: str) -> str:
        kind = name.rpartition(".")[2]
        if block is None or kind not in _LINEAR:
            return DENSE_NAMES[_FIXED_DTYPES.get(kind, dense)]
        rows, inputs = kv_b_block(block, config) if kind in ("k_b", "v_b") else block
        return f"fp8b{rows}x{inputs}"

    def leaf(name: str) -> Any:
        spec = f"{format_of(name)}[{','.join(map(str, shapes[name]))}]"
        return abstract_experts(spec) if ".experts." in name else abstract_leaf(spec)

    return DeepseekV3(config, leaf)
