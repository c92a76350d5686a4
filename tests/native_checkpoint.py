"""A small random model in every format, pruned and mixed, for the tests of the native checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import random_leaf
from model_cases import BASE
from moejax.checkpoint.native_bytes import Description
from moejax.errors import InputError
from moejax.formats import ExpertWeights
from moejax.model import DeepseekV3, Layout, config_from_hf

RAW_CONFIG = BASE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
}
CONFIG = config_from_hf(RAW_CONFIG)
INTS = ("int1g32", "int2g64", "int3g32", "int4g64", "int5g32", "int8g64")
FORMATS = (*INTS, "ternaryg32", "fp8b16x32", "bf16", "f16", "f32")
# Layer 1 and the MTP block are pruned; an expert's projections differ in format, and experts of one projection do too.
SURVIVORS = {"layers.1": 5, "layers.2": 8, "mtp.0": 6}
BUCKETS = {
    "gate": ("int2g64", "ternaryg32"),
    "up": ("bf16", "int4g64", "ternaryg32e8"),
    "down": ("fp8b16x32", "int1g32", "int8g64", "int3g64e8"),
}
PER_TOKEN = (2, 1, 2, 2)
DESCRIPTION = Description(RAW_CONFIG, {"plan": "ä value"}, {"made": ["by", 1, None]})
BUDGET = 10**9


def random_model() -> DeepseekV3:
    """A model with every format, nothing in which is computed."""
    shapes = Layout(CONFIG).shapes()
    leaves = {name: random_weight(name, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return DeepseekV3(CONFIG, leaves.__getitem__, PER_TOKEN)


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Any:
    block = ".".join(name.split(".")[:2])
    if ".experts." in name:
        return random_experts(name.rpartition(".")[2], SURVIVORS[block], shape[1:], seed)
    if name.endswith((".router", ".bias", ".group_id")):
        shape = (SURVIVORS[block], *shape[1:])
    if name.endswith(".group_id"):
        return jnp.arange(shape[0], dtype=jnp.int32) // 4
    return random_leaf(spec(FORMATS[seed % len(FORMATS)] if is_matrix(name, shape) else "f32", shape), seed)


def random_experts(projection: str, count: int, shape: tuple[int, ...], seed: int) -> ExpertWeights:
    formats = BUCKETS[projection]
    bucket_E = np.arange(count, dtype=np.int32) % len(formats)
    index_E = np.arange(count, dtype=np.int32) // len(formats)
    buckets = [random_leaf(spec(own, (int(np.sum(bucket_E == b)), *shape)), seed) for b, own in enumerate(formats)]
    return ExpertWeights(tuple(buckets), jnp.asarray(bucket_E), jnp.asarray(index_E))


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and not name.endswith(".router")


def spec(format_name: str, shape: tuple[int, ...]) -> str:
    return f"{format_name}[{','.join(map(str, shape))}]"


def files(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_equal_bits(found: Any, expected: Any) -> None:
    chex.assert_trees_all_equal_structs(found, expected)
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (own.shape, own.dtype) == (other.shape, other.dtype)
        assert np.asarray(own).tobytes() == np.asarray(other).tobytes()


def refused(action: Callable[[], object], *parts: str) -> str:
    """The one-line message of the InputError, in which all parts stand."""
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return message
