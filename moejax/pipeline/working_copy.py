"""A dense float32 copy of a model, one block at a time, in which probes try things out.

Whatever is tried (rounded weights, masked experts), arrays keep their shapes, so that blocks of a kind compile once.
"""

from collections.abc import Mapping
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats import ExpertWeights, Leaf
from moejax.model import named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.moe import MoE
from moejax.model.weights import PER_EXPERT
from moejax.transforms.prune import masked_bias
from moejax.transforms.rounding import to_float32


def dense_block(block: Block) -> Block:
    """The block with every packed weight unpacked to float32, experts in one bucket."""
    return with_leaves(block, {})


def with_leaves(block: Block, new: Mapping[str, Leaf | ExpertWeights], experts_per_token: int | None = None) -> Block:
    """A dense copy of the block in which the weights `new`, by name, replace its own."""
    leaves = {name: _dense(leaf) for name, leaf in (named_leaves(block) | dict(new)).items()}
    own = block.mlp.experts_per_token if isinstance(block.mlp, MoE) else None
    return Block(block.config, leaves.__getitem__, isinstance(block.mlp, MoE), experts_per_token or own)


def in_original_slots(original: Block, compressed: Block, keep: tuple[int, ...] | None) -> Block:
    """A dense copy of a compressed block in the original's shapes: pruned experts are there, but never chosen."""
    leaves = named_leaves(compressed)
    if keep is None or not isinstance(compressed.mlp, MoE):
        return with_leaves(original, leaves)
    kept = np.asarray(keep)
    before = named_leaves(original)
    pruned_E = np.isin(np.arange(len(before["mlp.bias"])), kept, invert=True)
    for row in PER_EXPERT:
        if row.role == "routed experts":
            survivors = _dense_experts(leaves[row.name])
            leaves[row.name] = one_bucket(jnp.zeros((len(pruned_E), *survivors.shape[1:])).at[kept].set(survivors))
        else:
            leaves[row.name] = before[row.name]
    leaves["mlp.bias"] = masked_bias(before["mlp.bias"], pruned_E)
    return with_leaves(original, leaves, compressed.mlp.experts_per_token)


def _dense(leaf: Leaf | ExpertWeights) -> Leaf | ExpertWeights:
    if isinstance(leaf, ExpertWeights):
        return one_bucket(_dense_experts(leaf))
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf
    return to_float32(leaf)


def _dense_experts(weights: ExpertWeights) -> jax.Array:
    """Every expert's matrix, (E, O, I)."""
    if len(weights.buckets) == 1:
        return to_float32(weights.buckets[0])[weights.index_E]
    # One by one, because buckets are of any size and every other would be compiled.
    buckets, bucket_E, index_E = jax.device_get((weights.buckets, weights.bucket_E, weights.index_E))
    each = [jax.tree.map(itemgetter(i), buckets[b]) for b, i in zip(bucket_E, index_E, strict=True)]
    return jnp.stack([to_float32(leaf) for leaf in each])


def one_bucket(experts_EOI: jax.Array) -> ExpertWeights:
    """Experts (E, O, I) of one format, slot e holding expert e."""
    slots = jnp.arange(len(experts_EOI), dtype=jnp.int32)
    return ExpertWeights((experts_EOI,), jnp.zeros_like(slots), slots)
