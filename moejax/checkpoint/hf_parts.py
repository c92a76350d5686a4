"""A leaf of Hugging Face tensors on several devices, of which no more is read than lies on this process's own."""

from collections.abc import Callable
from functools import cache, partial

import jax
import numpy as np

from moejax.checkpoint.chunks import Index
from moejax.checkpoint.placed import placed
from moejax.formats import ExpertWeights
from moejax.model.leaves import Weight


def leaf_in_parts(like: Weight, read: Callable[[int, int], Weight]) -> Weight:
    """The leaf that `like` has the shapes and shardings of.

    read(part, count): the leaf made of a part of every tensor, where there are so many parts of equal numbers of rows.
    Rows are outputs. Leaves that are cut over heads, which tensors have side by side with other rows, are read whole.
    """
    arrays, structure = jax.tree.flatten(like)
    axis = 1 if isinstance(like, ExpertWeights) else 0
    is_per_head = not isinstance(like, ExpertWeights) and like.ndim == 3
    count = 1 if is_per_head else max(_parts(own, axis) for own in arrays)

    @cache
    def part(number: int) -> list[np.ndarray]:
        # On the host, whatever devices it goes to.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return [np.asarray(own) for own in jax.tree.leaves(read(number, count))]

    def own_part(n: int, index: Index) -> np.ndarray:
        if count == 1 or arrays[n].ndim <= axis:
            return part(0)[n][index]
        rows = arrays[n].shape[axis] // count
        return part((index[axis].start or 0) // rows)[n]

    return jax.tree.unflatten(structure, [placed(own, partial(own_part, n)) for n, own in enumerate(arrays)])


def _parts(array: jax.ShapeDtypeStruct, axis: int) -> int:
    """Into how many parts an array is cut along an axis."""
    if array.ndim <= axis:
        return 1
    return array.shape[axis] // array.sharding.shard_shape(array.shape)[axis]
