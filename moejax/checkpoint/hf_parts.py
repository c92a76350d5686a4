"""A leaf of Hugging Face tensors on several devices, of which no more is read than lies on this process's own."""

from collections.abc import Callable
from functools import partial
from threading import Lock

import jax
import numpy as np

from moejax.checkpoint.chunks import Index
from moejax.checkpoint.placed import placed
from moejax.errors import InputError
from moejax.formats import ExpertWeights
from moejax.model.leaves import Weight


def leaf_in_parts(like: Weight, read: Callable[[int, int], Weight]) -> Weight:
    """The leaf that `like` has the shapes and shardings of.

    read(part, count): the leaf made of a part of every tensor, where there are so many parts of equal numbers of rows.
    Rows are outputs. Leaves that are cut over heads, which tensors have side by side with other rows, are read whole.
    Raises what `read` does, and InputError where JAX has no CPU device.
    """
    arrays, structure = jax.tree.flatten(like)
    parts = _Parts(like, arrays, read)
    return jax.tree.unflatten(structure, [placed(own, partial(parts.of, n)) for n, own in enumerate(arrays)])


class _Parts:
    """The parts of a leaf's arrays, all of a part read once."""

    def __init__(self, like: Weight, arrays: list[jax.ShapeDtypeStruct], read: Callable[[int, int], Weight]):
        self._arrays, self._read, self._axis = arrays, read, int(isinstance(like, ExpertWeights))
        is_per_head = self._axis == 0 and like.ndim == 3
        self._count = 1 if is_per_head else max(map(self._pieces, arrays))
        self._locks, self._known = [Lock() for _ in range(self._count)], dict[int, list[np.ndarray]]()

    def of(self, n: int, index: Index) -> np.ndarray:
        """Of array number n."""
        own = self._arrays[n]
        if self._count == 1:
            return self._part(0)[n][index]
        if self._pieces(own) == 1:
            return self._part(next(iter(self._known), 0))[n]
        return self._part((index[self._axis].start or 0) * self._count // own.shape[self._axis])[n]

    def _part(self, number: int) -> list[np.ndarray]:
        with self._locks[number]:
            if number not in self._known:
                with jax.default_device(_host()):  # whatever devices it goes to
                    own = jax.tree.leaves(self._read(number, self._count))
                    self._known[number] = [np.asarray(array) for array in own]
            return self._known[number]

    def _pieces(self, array: jax.ShapeDtypeStruct) -> int:
        """Into how many parts an array is cut along its rows."""
        if array.ndim <= self._axis:
            return 1
        return array.shape[self._axis] // array.sharding.shard_shape(array.shape)[self._axis]


def _host() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise InputError(
            "a Hugging Face checkpoint is read onto a mesh by way of JAX's CPU device, which JAX_PLATFORMS leaves out; "
            "JAX_PLATFORMS=cuda,cpu has both"
        ) from None
