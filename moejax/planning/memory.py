"""Device memory of a compressed model while it decodes: weights, latent cache, workspace, and what context fits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from moejax.errors import InputError
from moejax.formats import payload_bytes
from moejax.formats.abstract import abstract_array
from moejax.model import DeepseekV3
from moejax.model.attention import LatentCache
from moejax.model.deepseek_v3 import Block, head_logits
from moejax.model.rope import Rotation

# What is computed and cached in.
DTYPE = jnp.bfloat16
# Contexts at which the workspace is read off the compiler; between and beyond them it is linear.
_PROBED_CONTEXTS = (4096, 8192)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes while `batch` sequences of `context` tokens are decoded, one token each a step.

    weights: all arrays, MTP blocks left out. cache_per_token: L+R numbers per decoder layer and sequence, in bfloat16.
    workspace: what a decode step of the widest layer, or the head, takes beside its arguments, fixed and per token of
    context, as XLA's compiler says for this backend.
    """

    weights: int
    cache_per_token: int
    workspace_fixed: int
    workspace_per_token: float
    context: int
    batch: int

    @property
    def cache(self) -> int:
        return self.cache_per_token * self.context

    @property
    def workspace(self) -> int:
        return math.ceil(self.workspace_fixed + self.workspace_per_token * self.context)

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def longest_context(self, memory: int, limit: int) -> int:
        """The most tokens of context that fit `memory`, at most `limit`; 0 if not even the weights do."""
        left = memory - self.weights - self.workspace_fixed
        return max(0, min(limit, int(left / (self.cache_per_token + self.workspace_per_token))))


def check_context(context: int, batch: int, limit: int) -> None:
    """Raise InputError for contexts that the model was not made for, and for no sequences."""
    if not 1 <= context <= limit:
        raise InputError(f"a context of {context} tokens is beyond the model; 1 to {limit} are accepted")
    if batch < 1:
        raise InputError(f"a batch of {batch} is none; at least 1 is needed")


def device_memory(model: DeepseekV3, context: int, batch: int) -> DeviceMemory:
    """The memory of an abstract model. Compiles a decode step of a layer of each kind, and of the head."""
    c = model.config
    check_context(context, batch, c.max_position_embeddings)
    blocks = _different_blocks(model.layers)
    short, long = _PROBED_CONTEXTS
    taken = [_block_workspace(model, block, short, batch) for block in blocks]
    # All layers attend alike, and nothing else depends on the context: one of them says how.
    per_token = (_block_workspace(model, blocks[0], long, batch) - taken[0]) / (long - short)
    fixed = max(max(taken) - round(per_token * short), _head_workspace(model, batch))
    per_layer = (c.kv_lora_rank + c.qk_rope_head_dim) * batch * jnp.dtype(DTYPE).itemsize
    weights = payload_bytes([model.embed, *model.layers, model.norm, model.head])
    return DeviceMemory(weights, per_layer * c.num_hidden_layers, fixed, per_token, context, batch)


def _different_blocks(layers: Sequence[Block]) -> list[Block]:
    """One dense layer and one with experts, as far as there are any: the largest of their kind."""
    kinds: dict[bool, Block] = {}
    for i, layer in enumerate(layers):
        kind = layer.config.is_moe(i)
        if kind not in kinds or payload_bytes(layer) > payload_bytes(kinds[kind]):
            kinds[kind] = layer
    return list(kinds.values())


def _block_workspace(model: DeepseekV3, block: Block, context: int, batch: int) -> int:
    c = model.config
    x_B1D = abstract_array((batch, 1, c.hidden_size), DTYPE)
    by = jax.eval_shape(lambda: model.rotation(jnp.zeros(1, jnp.int32), jnp.dtype(DTYPE)))
    cache = LatentCache(
        abstract_array((batch, context, c.kv_lora_rank), DTYPE),
        abstract_array((batch, context, c.qk_rope_head_dim), DTYPE),
    )
    return _temporary_bytes(_decode, (block, x_B1D, by, cache, abstract_array((), jnp.int32)), donated=3)


def _decode(
    block: Block, x_B1D: jax.Array, by: Rotation, cache: LatentCache, start: jax.Array
) -> tuple[jax.Array, LatentCache]:
    return block.attend_cached(x_B1D, by, cache, start)


def _head_workspace(model: DeepseekV3, batch: int) -> int:
    x_BD = abstract_array((batch, model.config.hidden_size), DTYPE)
    logits = batch * model.config.vocab_size * 4
    return _temporary_bytes(head_logits, (x_BD, model.head.get_value()), donated=()) + logits


def _temporary_bytes(function: Callable[..., Any], arguments: tuple[Any, ...], donated: int | tuple[()]) -> int:
    compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)
