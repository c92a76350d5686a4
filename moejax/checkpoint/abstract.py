"""The model that a published checkpoint holds, in shapes alone: from its config, without a file of it."""

from collections.abc import Mapping
from typing import Any

from moejax.checkpoint.hf_config import dense_dtype, linear_block, unrotated_config
from moejax.checkpoint.hf_leaves import kv_b_block
from moejax.checkpoint.hf_names import K_B, V_B
from moejax.formats import abstract_experts, abstract_leaf
from moejax.formats.dense import DENSE_NAMES
from moejax.model import DeepseekV3, Layout
from moejax.model.weights import row_of


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
        row = row_of(name)
        if block is None or not row.is_fp8:
            return DENSE_NAMES[row.dtype or dense]
        rows, inputs = kv_b_block(block, config) if row.name in (K_B, V_B) else block
        return f"fp8b{rows}x{inputs}"

    def leaf(name: str) -> Any:
        spec = f"{format_of(name)}[{','.join(map(str, shapes[name]))}]"
        return abstract_experts(spec) if row_of(name).role == "routed experts" else abstract_leaf(spec)

    return DeepseekV3(config, leaf)
