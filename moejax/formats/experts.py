"""The weights of one projection of all experts of a layer, each expert in the format it deserves."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats.dense import Leaf, format_name


@partial(jax.tree_util.register_dataclass, data_fields=["buckets", "bucket_E", "index_E"], meta_fields=[])
@dataclass(frozen=True)
class ExpertWeights:
    """expert e's matrix (O, I) = buckets[bucket_E[e]][index_E[e]].

    Experts of equal format lie in one bucket, a leaf (experts in bucket, O, I); the slot table finds them.

    bucket_E, index_E: int32 (E,).
    """

    buckets: tuple[Leaf, ...]
    bucket_E: jax.Array
    index_E: jax.Array

    @property
    def num_experts(self) -> int:
        return self.bucket_E.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)."""
        _, outputs, inputs = self.buckets[0].shape
        return self.num_experts, outputs, inputs

    def expert(self, e: int) -> Leaf:
        """One expert's matrix (O, I). With several buckets the slot table must be concrete."""
        bucket = self.buckets[0] if len(self.buckets) == 1 else self.buckets[int(self.bucket_E[e])]
        return jax.tree.map(lambda a: a[self.index_E[e]], bucket)


def gather_experts(experts: Sequence[Leaf]) -> ExpertWeights:
    """Put matrices (O, I), in order of expert, into buckets of equal format, in order of the formats' names."""
    names = [format_name(leaf) for leaf in experts]
    members_of = [[e for e, own in enumerate(names) if own == name] for name in sorted(set(names))]
    buckets = [
        jax.tree.map(lambda *arrays: jnp.stack(arrays), *(experts[e] for e in members)) for members in members_of
    ]
    return experts_in_buckets(buckets, members_of)


def experts_in_buckets(buckets: Sequence[Leaf], members_of: Sequence[Sequence[int] | np.ndarray]) -> ExpertWeights:
    """Experts that lie as `members_of[bucket]` lists them."""
    return ExpertWeights(tuple(buckets), *_slot_table(members_of))


def select_experts(weights: ExpertWeights, keep: Sequence[int] | np.ndarray) -> ExpertWeights:
    """The experts `keep`, renumbered 0, 1, ... in that order; their bytes are untouched.

    With one bucket, as in an original checkpoint, the weights may be traced; with several, the slot table must be
    concrete, because the new buckets' sizes depend on it.
    """
    kept = np.asarray(keep, np.int32)
    if len(weights.buckets) == 1:
        # `take`, because indexing costs eight times as much to trace.
        bucket = _take(weights.buckets[0], jnp.take(weights.index_E, kept))
        return ExpertWeights((bucket,), *_slot_table([range(len(kept))]))
    bucket_of, index_of = np.asarray(weights.bucket_E)[kept], np.asarray(weights.index_E)[kept]
    used = np.unique(bucket_of)
    members_of = [np.flatnonzero(bucket_of == bucket).tolist() for bucket in used]
    buckets = [
        _take(weights.buckets[bucket], index_of[members]) for bucket, members in zip(used, members_of, strict=True)
    ]
    return ExpertWeights(tuple(buckets), *_slot_table(members_of))


def _take(leaf: Leaf, index: jax.Array | np.ndarray) -> Leaf:
    return jax.tree.map(lambda a: jnp.take(a, index, axis=0, mode="clip"), leaf)


def _slot_table(members_of: Sequence[Sequence[int] | np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """(bucket_E, index_E) of experts that lie as `members_of[bucket]` lists them."""
    bucket_E, index_E = np.zeros((2, sum(map(len, members_of))), np.int32)
    for b, members in enumerate(members_of):
        bucket_E[members] = b
        index_E[members] = np.arange(len(members))
    return jnp.asarray(bucket_E), jnp.asarray(index_E)
