"""Dense float32 copies of a block's trunk and of some of its experts, in which probes try things out.

Whatever is tried (rounded weights, masked experts), arrays keep their shapes, so that blocks of a kind compile once.
"""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats import ExpertWeights, Leaf
from moejax.model import named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.moe import Experts
from moejax.transforms.rounding import to_float32

_NOTHING: Mapping[str, ExpertWeights] = MappingProxyType({})


def dense_trunk(trunk: Block) -> Block:
    """A trunk, or a dense block, with every packed weight unpacked to float32."""
    return trunk.with_leaves({name: _dense(leaf) for name, leaf in named_leaves(trunk).items()})


def dense_experts(experts: Experts, new: Mapping[str, ExpertWeights] = _NOTHING) -> Experts:
    """Experts with every packed weight unpacked to float32, in one bucket; of the projections `new`, which are, those
    in their place."""

    def of(name: str, own: ExpertWeights) -> ExpertWeights:
        return new[name] if name in new else one_bucket(_stacked(own))

    return Experts(experts.config, {name: of(name, own) for name, own in named_leaves(experts).items()}.__getitem__)


def in_slots(original: Experts, first: int, survivors: Mapping[str, Mapping[int, Leaf]]) -> Experts:
    """What has become of the experts `first`, `first` + 1 and so on, by projection and number, dense, in the original's
    shapes: those that have not survived are zeros."""

    def every(name: str, own: ExpertWeights) -> ExpertWeights:
        nothing, left = jnp.zeros(own.shape[1:]), survivors[name]
        numbers = range(first, first + own.num_experts)
        return one_bucket(jnp.stack([to_float32(left[e]) if e in left else nothing for e in numbers]))

    return Experts(
        original.config, {name: every(name, own) for name, own in named_leaves(original).items()}.__getitem__
    )


def _dense(leaf: Leaf) -> Leaf:
    return leaf if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.integer) else to_float32(leaf)


def _stacked(weights: ExpertWeights) -> jax.Array:
    """Every expert's matrix, (E, O, I), of experts of one format."""
    (bucket,) = weights.buckets
    dense = to_float32(bucket)
    in_order = np.array_equal(weights.index_E, range(len(dense)))
    return dense if in_order else dense[weights.index_E]


def one_bucket(experts_EOI: jax.Array) -> ExpertWeights:
    """Experts (E, O, I) of one format, slot e holding expert e."""
    slots = jnp.arange(len(experts_EOI), dtype=jnp.int32)
    return ExpertWeights((experts_EOI,), jnp.zeros_like(slots), slots)
