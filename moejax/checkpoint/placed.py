"""An array on the devices where it is to lie, each part of it read once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.checkpoint.chunks import MOST_CHUNKS, Index
from moejax.sharding import on_mesh


def placed(like: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """The array whose parts `read` gives, several at once, on those devices of a shape's sharding that are this
    process's own. Devices on which the same lies are given one part. Raises what `read` does."""
    indices = like.sharding.addressable_devices_indices_map(like.shape).values()
    different = {_bounds(index): index for index in indices}
    with ThreadPoolExecutor(max_workers=MOST_CHUNKS) as pool:
        parts = dict(zip(different, pool.map(read, different.values()), strict=True))
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: parts[_bounds(index)])


def spread(tree: Any, mesh: Mesh) -> Any:
    """What every process has in its own memory, on a mesh where `shardings` has it."""
    return jax.tree.map(lambda own, like: placed(like, np.asarray(own).__getitem__), tree, on_mesh(tree, mesh))


def _bounds(index: Index | None) -> tuple[tuple[int | None, int | None], ...]:
    assert index is not None
    return tuple((own.start, own.stop) for own in index)
