"""An array that lies on devices, of one process or several: who writes which of its chunks, and where from."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from moejax.checkpoint.chunks import Grid, Index, bytes_checksum, bytes_of, grid_of
from moejax.sharding import ALONE, Crew


class Held:
    """The chunks of an array that this process writes, `own_chunks`.

    A chunk is written by the first of a crew's processes that hold all of it: of arrays that lie in a process's own
    memory, which are equal in all, by the first of all. An array of which a chunk lies in no process whole is gathered,
    whole in every process.
    """

    def __init__(self, array: np.ndarray | jax.Array, crew: Crew = ALONE):
        self._array: np.ndarray | jax.Array = array
        self._grid = grid_of(array.shape, np.dtype(array.dtype))
        first = jax.process_index() if crew.is_first else None
        writers: Sequence[int | None] = [first] * self._grid.count
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            of_parts = _writers(array, self._grid)
            if None in of_parts:
                self._array = np.asarray(multihost_utils.process_allgather(array, tiled=True))
            else:
                writers = of_parts
        self.own_chunks = [chunk for chunk, writer in enumerate(writers) if writer == jax.process_index()]

    def chunk(self, number: int) -> tuple[str, memoryview, str]:
        """Of one that this process writes: the name of its file, its bytes and their checksum."""
        content = bytes_of(np.ascontiguousarray(self._part(self._grid.index(number))))
        return self._grid.file_name(number), content, bytes_checksum(content)

    def _part(self, index: Index) -> np.ndarray:
        parts = self._parts
        for bounds, part in parts:
            if all(a.start <= b.start and b.stop <= a.stop for a, b in zip(bounds, index, strict=True)):
                return part[_within(index, bounds)]
        found = np.empty(tuple(own.stop - own.start for own in index), parts[0][1].dtype)
        for bounds, part in parts:
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(index, bounds, strict=True)]
            if all(own.start < own.stop for own in both):
                found[_within(both, index)] = part[_within(both, bounds)]
        return found

    @cached_property
    def _parts(self) -> list[tuple[Index, np.ndarray]]:
        """What lies in this process, each part once."""
        if isinstance(self._array, np.ndarray):
            return [(_bounds((), self._array.shape), self._array)]
        shards = {str(shard.index): shard for shard in self._array.addressable_shards}
        return [(_bounds(shard.index, self._array.shape), np.asarray(shard.data)) for shard in shards.values()]


def _writers(array: jax.Array, grid: Grid) -> Sequence[int | None]:
    """Of every chunk the first process that has all of it, None where none has."""
    whole = tuple(slice(0, n) for n in array.shape)
    holds: dict[int, np.ndarray] = {}  # of every process, whether it has all at each place along the axis that is cut
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        process: int = cast(Any, device).process_index
        bounds = _bounds(index or (), array.shape)
        if not array.shape:
            holds[process] = np.ones(1, bool)
        elif bounds[: grid.axis] + bounds[grid.axis + 1 :] == whole[: grid.axis] + whole[grid.axis + 1 :]:
            holds.setdefault(process, np.zeros(array.shape[grid.axis], bool))[bounds[grid.axis]] = True
    places = [grid.index(chunk)[grid.axis] if array.shape else slice(None) for chunk in range(grid.count)]
    return [min((process for process, own in holds.items() if own[place].all()), default=None) for place in places]


def _within(both: Sequence[slice], bounds: Index) -> Index:
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(both, bounds, strict=True))


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> Index:
    every = [*index, *[slice(None)] * (len(shape) - len(index))]
    return tuple(slice(*own.indices(n)[:2]) for own, n in zip(every, shape, strict=True))
