"""The kernels' operations with weights that lie on a mesh: the products of every device's own outputs, or heads.

Without a mesh (`jax.set_mesh`), or with one that has no axis `tensor`, they are the kernels' own. Kernels see one
device's part (`jax.shard_map`), so that compilers need not know how to cut them. A whole step sees the sequences of one
place along the axis `data` (`by_sequence`).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import kernels
from moejax.formats import ExpertWeights, Leaf
from moejax.sharding.rules import DATA, EVERYWHERE, TENSOR, is_cut, spec_of

T = TypeVar("T")


def matmul(x: jax.Array, w: Leaf) -> jax.Array:
    """`kernels.matmul`: x (..., *batch, I), w (*batch, O, I) -> (..., *batch, O)."""
    if (parts := _parts()) is None:
        return kernels.matmul(x, w)
    if w.ndim == 3:
        return _per_head(kernels.matmul, x, w, parts)
    outputs = PartitionSpec(*[None] * (x.ndim - 1), TENSOR) if is_cut(w, parts) else EVERYWHERE
    return _on_every_device(kernels.matmul, (EVERYWHERE, spec_of(w, parts)), outputs)(x, w)


def matmul_transposed(x: jax.Array, w: Leaf) -> jax.Array:
    """`kernels.matmul_transposed` of one matrix per head: x (..., H, O), w (H, O, I) -> (..., H, I)."""
    parts = _parts()
    return kernels.matmul_transposed(x, w) if parts is None else _per_head(kernels.matmul_transposed, x, w, parts)


def expert_matmul(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array) -> jax.Array:
    """`kernels.expert_matmul`: (R, I) -> (R, O)."""
    if (parts := _parts()) is None:
        return kernels.expert_matmul(x_RI, w, rows_E)
    outputs = PartitionSpec(None, TENSOR) if is_cut(w, parts) else EVERYWHERE
    return _on_every_device(kernels.expert_matmul, (EVERYWHERE, spec_of(w, parts), EVERYWHERE), outputs)(
        x_RI, w, rows_E
    )


def take(w: Leaf, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`kernels.take`: rows of w (O, I) at index (...), as (..., I); every device gives its own, the sum all."""
    parts = _parts()
    if parts is None or not is_cut(w, parts):
        return kernels.take(w, index, dtype)
    outputs = w.shape[0] // parts

    def own_rows(w: Leaf, index: jax.Array) -> jax.Array:
        local = index - jax.lax.axis_index(TENSOR) * outputs
        is_own = (local >= 0) & (local < outputs)
        rows = kernels.take(w, jnp.clip(local, 0, outputs - 1), dtype)
        return jax.lax.psum(jnp.where(is_own[..., None], rows, 0), TENSOR)

    return _on_every_device(own_rows, (spec_of(w, parts), EVERYWHERE), EVERYWHERE)(w, index)


def gathered(x: jax.Array) -> jax.Array:
    """x on every device whole: compilers would else leave it in parts, and cut what it comes to as well."""
    return x if not is_meshed() else jax.lax.with_sharding_constraint(x, EVERYWHERE)


def by_sequence(step: Callable[..., Any], shared: tuple[Any, ...], batched: tuple[Any, ...]) -> Any:
    """step(*shared, *batched), where what is batched and all results have the batch (B, ...) for their first axis:
    every place along `data` has a part of the sequences. Where B does not fall into such parts, all have all."""
    batch = _batch_spec(batched)
    if batch == EVERYWHERE:
        return step(*shared, *batched)
    specs = (*(EVERYWHERE for _ in shared), *(batch for _ in batched))
    run = jax.shard_map(step, in_specs=specs, out_specs=batch, axis_names={DATA}, check_vma=False)
    return run(*shared, *batched)


def made_by_sequence(make: Callable[[], T]) -> T:
    """The arrays (B, ...) that `make` gives, made on the devices of the mesh where `by_sequence` takes them."""
    if not is_meshed():
        return make()
    place = NamedSharding(jax.sharding.get_mesh(), _batch_spec(jax.eval_shape(make)))
    return jax.jit(make, out_shardings=place)()


def is_meshed() -> bool:
    """Whether what is computed here lies on a mesh."""
    return bool(_sizes())


def _batch_spec(batched: Any) -> PartitionSpec:
    parts = data_parts()
    is_parted = parts > 1 and jax.tree.leaves(batched)[0].shape[0] % parts == 0
    return PartitionSpec(DATA) if is_parted else EVERYWHERE


def data_parts() -> int:
    """Into how many parts sequences are cut; 1 without a mesh."""
    return _sizes().get(DATA, 1)


def _per_head(operation: Callable[[jax.Array, Leaf], jax.Array], x: jax.Array, w: Leaf, parts: int) -> jax.Array:
    heads = PartitionSpec(*[None] * (x.ndim - 2), TENSOR) if is_cut(w, parts) else EVERYWHERE
    return _on_every_device(operation, (heads, spec_of(w, parts)), heads)(x, w)


def _on_every_device(
    operation: Callable[..., jax.Array], in_specs: tuple[object, ...], out_specs: PartitionSpec
) -> Callable[..., jax.Array]:
    return jax.shard_map(operation, in_specs=in_specs, out_specs=out_specs, axis_names={*_sizes()}, check_vma=False)


def _parts() -> int | None:
    """How many devices weights are cut over; None without a mesh, and within one device's part."""
    return _sizes().get(TENSOR)


def _sizes() -> dict[str, int]:
    """The axes of the mesh that lie around here still, and how long they are."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
