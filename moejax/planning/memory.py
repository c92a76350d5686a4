"""Device memory of a compressed model while it decodes: weights, latent cache, workspace, and what context fits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moejax.errors import InputError
from moejax.formats import payload_bytes
from moejax.formats.arrays import abstract_array
from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import Block, head_logits
from moejax.model.latent_cache import bytes_per_token, empty_cache
from moejax.model.steps import run_block_cached
from moejax.model.workspace import largest_of_each_kind, step_bytes

# What is computed and cached in.
DTYPE = jnp.bfloat16
# The context at which the workspace is read off the compiler; attention goes block by block, so it is that of any.
_PROBED_CONTEXT = 4096


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes while `batch` sequences of `context` tokens are decoded, one token each a step.

    weights: all arrays, MTP blocks left out. cache_per_token: L+R numbers per decoder layer and sequence, in bfloat16.
    workspace: what a decode step of the widest layer, or the head, takes beside its arguments, its results included, as
    XLA's compiler says for this backend; it does not grow with the context.
    """

    weights: int
    cache_per_token: int
    workspace: int
    context: int
    batch: int

    @property
    def cache(self) -> int:
        return self.cache_per_token * self.context

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def longest_context(self, memory: int, limit: int) -> int:
        """The most tokens of context that fit `memory`, at most `limit`; 0 if not even the weights do."""
        return max(0, min(limit, (memory - self.weights - self.workspace) // self.cache_per_token))


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
    blocks = largest_of_each_kind(list(model.layers))
    taken = [_block_workspace(model, block, _PROBED_CONTEXT, batch) for block in blocks]
    workspace = max(*taken, _head_workspace(model, batch))
    return DeviceMemory(weight_bytes(model), batch * bytes_per_token(c, DTYPE), workspace, context, batch)


def weight_bytes(model: DeepseekV3) -> int:
    """Bytes of the arrays that decoding needs: all but MTP blocks'."""
    return payload_bytes([model.embed, *model.layers, model.norm, model.head])


def _block_workspace(model: DeepseekV3, block: Block, context: int, batch: int) -> int:
    c = model.config
    x_B1D = abstract_array((batch, 1, c.hidden_size), DTYPE)
    by = jax.eval_shape(lambda: model.angles(jnp.zeros((batch, 1), jnp.int32), jnp.dtype(DTYPE)))
    cache = jax.eval_shape(lambda: empty_cache(c, batch, context, DTYPE))
    return step_bytes(run_block_cached, block, x_B1D, by, cache, abstract_array((batch,), jnp.int32))


def _head_workspace(model: DeepseekV3, batch: int) -> int:
    x_BD = abstract_array((batch, model.config.hidden_size), DTYPE)
    return step_bytes(jax.jit(head_logits), x_BD, model.head.get_value())
