"""How a model lies over the devices of a mesh, and the products of weights that are cut over them."""

from moejax.sharding.mesh import around, local_bytes, mesh_of
from moejax.sharding.operations import (
    by_sequence,
    data_parts,
    expert_matmul,
    gathered,
    matmul,
    matmul_transposed,
    put_by_sequence,
    take,
)
from moejax.sharding.rules import DATA, TENSOR, on_mesh, shardings

__all__ = [
    "DATA",
    "TENSOR",
    "around",
    "by_sequence",
    "data_parts",
    "expert_matmul",
    "gathered",
    "local_bytes",
    "matmul",
    "matmul_transposed",
    "mesh_of",
    "on_mesh",
    "put_by_sequence",
    "shardings",
    "take",
]
