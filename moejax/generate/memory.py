"""What decoding takes of memory, from shapes: with the model whole in memory, or part by part."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.formats import payload_bytes
from moejax.formats.arrays import abstract_array
from moejax.generate.decode import Decoding, cache_length, chunks
from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import head_logits
from moejax.model.latent_cache import empty_cache
from moejax.model.steps import run_block_cached
from moejax.model.workspace import largest_of_each_kind, reading_bytes, step_bytes, with_margin
from moejax.sharding import crew_of, local_bytes, on_mesh


@dataclass(frozen=True)
class DecodingNeeds:
    """Bytes that decoding takes beside what the process holds already: with the model in memory, or its parts one after
    another."""

    whole: int
    part: int


def ample_bytes(model: DeepseekV3, prompt_tokens: int, max_tokens: int, decoding: Decoding) -> int:
    """More than `decoding_needs` says with the model in memory, without compiling anything: twice its weights, the
    caches, and a gigabyte."""
    return 2 * payload_bytes(model) + _cache_bytes(model, prompt_tokens, max_tokens, decoding) + 10**9


def bytes_on_mesh(mesh: Mesh, model: DeepseekV3, prompt_tokens: int, max_tokens: int, decoding: Decoding) -> int:
    """Of this process's own memory, with the model on its devices of a mesh."""
    with jax.set_mesh(mesh):
        device = decoding_needs(on_mesh(model, mesh), prompt_tokens, max_tokens, decoding)
    steps = device.whole - with_margin(payload_bytes(model))
    return with_margin(local_bytes(model, mesh)) + crew_of(mesh).local_devices * steps


def decoding_needs(model: DeepseekV3, prompt_tokens: int, max_tokens: int, decoding: Decoding) -> DecodingNeeds:
    """Of an abstract model, one sequence, its cache included. Compiles the widest step of a block of each kind."""
    config, length = model.config, cache_length(prompt_tokens, max_tokens, decoding.prefill_chunk)
    cache = jax.eval_shape(lambda: empty_cache(config, 1, length, decoding.kept_in))
    caches = _cache_bytes(model, prompt_tokens, max_tokens, decoding)
    size = max(size for _, size in chunks(prompt_tokens, decoding.prefill_chunk))
    x_1TD = abstract_array((1, size, config.hidden_size), decoding.dtype)
    by = jax.eval_shape(lambda: model.angles(jnp.zeros((1, size), jnp.int32), jnp.dtype(decoding.dtype)))
    start_1 = abstract_array((1,), jnp.int32)
    blocks = largest_of_each_kind(list(model.layers))
    workspace = max(step_bytes(run_block_cached, block, x_1TD, by, cache, start_1) for block in blocks)
    outer = [model.embed.get_value(), model.head.get_value()]
    logits = step_bytes(jax.jit(head_logits), abstract_array((1, config.hidden_size), decoding.dtype), outer[1])
    parts = [*map(reading_bytes, outer), *(reading_bytes(block) for block in model.layers)]
    return DecodingNeeds(
        whole=with_margin(payload_bytes(model) + caches + max(workspace, logits)),
        part=with_margin(max(parts) + caches + max(workspace, logits)),
    )


def _cache_bytes(model: DeepseekV3, prompt_tokens: int, max_tokens: int, decoding: Decoding) -> int:
    """Of all layers and MTP blocks."""
    length = cache_length(prompt_tokens, max_tokens, decoding.prefill_chunk)
    cache = jax.eval_shape(lambda: empty_cache(model.config, 1, length, decoding.kept_in))
    return model.config.num_blocks * payload_bytes(cache)
