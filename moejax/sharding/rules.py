"""Which axis of a weight is cut over a mesh's axis `tensor`; over its axis `data`, sequences alone are.

Matrices (O, I) are cut over their outputs, experts' (E, O, I) too, so that buckets of any number of experts can be;
what is one matrix per head (H, O, I) is cut over the heads. Packed rows stay whole, and no product is summed over
devices: outputs are gathered where the next product takes all of them. What does not fall into equal parts is on every
device, and so are vectors and caches.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.errors import InputError
from moejax.formats import ExpertWeights, Fp8Blocks, Leaf, PackedTensor

TENSOR = "tensor"
DATA = "data"
EVERYWHERE = PartitionSpec()


def spec_of(w: Leaf | ExpertWeights, parts: int) -> Any:
    """PartitionSpecs of a weight's arrays over so many devices, as a prefix of its tree."""
    if isinstance(w, ExpertWeights):
        bucket = PartitionSpec(None, TENSOR) if is_cut(w, parts) else EVERYWHERE
        return ExpertWeights((bucket,) * len(w.buckets), EVERYWHERE, EVERYWHERE)  # type: ignore[arg-type]
    return PartitionSpec(TENSOR) if is_cut(w, parts) else EVERYWHERE


def is_cut(w: Leaf | ExpertWeights, parts: int) -> bool:
    """Whether a product with w has its outputs, or its heads, in so many parts; vectors are not cut."""
    if isinstance(w, ExpertWeights):
        return all(_falls_into(bucket, 1, parts) for bucket in w.buckets)
    return w.ndim >= 2 and _falls_into(w, 0, parts)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding: where the arrays of a model lie on a mesh with the axis `tensor`.

    Raises InputError for a mesh without that axis, or with an axis that is not `AxisType.Auto`.
    """
    if TENSOR not in mesh.axis_names or set(mesh.axis_types) != {AxisType.Auto}:
        axes = ", ".join(f"{name} ({kind.name})" for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))
        raise InputError(f"a mesh has the axes {axes}; one named {TENSOR} is needed, and AxisType.Auto for all")
    parts = mesh.shape[TENSOR]

    def place(w: Leaf | ExpertWeights) -> Any:
        specs = jax.tree.broadcast(spec_of(w, parts), w, is_leaf=lambda own: isinstance(own, PartitionSpec))
        return jax.tree.map(
            lambda own: NamedSharding(mesh, own), specs, is_leaf=lambda own: isinstance(own, PartitionSpec)
        )

    return jax.tree.map(place, tree, is_leaf=lambda own: isinstance(own, PackedTensor | ExpertWeights))


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The tree in shapes alone, each with its place in `shardings`. Raises InputError as that does."""
    places = shardings(tree, mesh)
    return jax.tree.map(lambda own, place: jax.ShapeDtypeStruct(own.shape, own.dtype, sharding=place), tree, places)


def _falls_into(w: Leaf, axis: int, parts: int) -> bool:
    """Whether an axis falls into so many equal parts, of whole blocks where it is the outputs of FP8 blocks."""
    multiple = w.block[0] if isinstance(w, Fp8Blocks) and axis == w.ndim - 2 else 1
    return w.shape[axis] % (parts * multiple) == 0
