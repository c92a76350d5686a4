"""Devices as a mesh."""

import math
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from moejax.errors import InputError, brief
from moejax.formats import ExpertWeights, PackedTensor
from moejax.sharding.rules import DATA, TENSOR, on_mesh

_AXES = (DATA, TENSOR)


def mesh_of(spec: str) -> Mesh:
    """The mesh of `tensor=8`, or `tensor=4,data=2`: weights over `tensor`, sequences over `data`; an axis that is not
    named is one device long. Neighbours along `tensor` are neighbours among the devices.

    Raises InputError for other text, for more devices than there are, and if a process has none of them.
    """
    sizes: dict[str, int] = {}
    for own in spec.split(","):
        match = re.fullmatch(r"\s*(\w+)=([1-9]\d{0,5})\s*", own)
        if match is None or match[1] not in _AXES or match[1] in sizes:
            raise InputError(f"--mesh is {brief(spec)}; tensor=8, data=2 or tensor=4,data=2 are accepted")
        sizes[match[1]] = int(match[2])
    shape, devices = tuple(sizes.get(name, 1) for name in _AXES), jax.devices()
    wanted = int(np.prod(shape))
    if wanted > len(devices):
        kind = devices[0].platform.upper()
        raise InputError(f"--mesh {spec} is of {wanted} devices; there {_count(len(devices), kind)}")
    left_out = {own.process_index for own in devices} - {own.process_index for own in devices[:wanted]}
    if left_out:
        raise InputError(f"--mesh {spec} has no device of process {min(left_out)}; all {len(devices)} are accepted")
    return jax.make_mesh(shape, _AXES, (AxisType.Auto,) * len(_AXES), devices=devices[:wanted])


def around(mesh: Mesh | None) -> AbstractContextManager[object]:
    """What is computed within lies on the mesh, if there is one."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def local_bytes(tree: Any, mesh: Mesh) -> int:
    """What the arrays of a tree, in shapes alone, take on a mesh of this process's own memory: all that lies on its
    devices where those compute in it, devices that hold equal parts sharing them; else what of the largest weight is
    read for them."""
    placed = on_mesh(tree, mesh)
    if jax.default_backend() == "cpu":
        return sum(map(_local_bytes, jax.tree.leaves(placed)))
    weights = jax.tree.leaves(placed, is_leaf=lambda leaf: isinstance(leaf, PackedTensor | ExpertWeights))
    return max(sum(map(_local_bytes, jax.tree.leaves(own))) for own in weights)


def _local_bytes(own: jax.ShapeDtypeStruct) -> int:
    indices = own.sharding.addressable_devices_indices_map(own.shape).values()
    parts = {tuple((axis.start, axis.stop) for axis in index) for index in indices}
    return len(parts) * math.prod(own.sharding.shard_shape(own.shape)) * own.dtype.itemsize


def _count(number: int, kind: str) -> str:
    return f"is 1 {kind} device" if number == 1 else f"are {number} {kind} devices"
