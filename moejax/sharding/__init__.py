"""How a model lies over the devices of a mesh, the products of weights that are cut over them, and jobs and words that
devices and processes share."""

from moejax.sharding.crew import ALONE, Crew, crew_of, told_bytes
from moejax.sharding.mesh import around, local_bytes, mesh_of
from moejax.sharding.operations import (
    by_sequence,
    data_parts,
    expert_matmul,
    gathered,
    is_meshed,
    made_by_sequence,
    matmul,
    matmul_transposed,
    take,
)
from moejax.sharding.rules import DATA, TENSOR, on_mesh, shardings

__all__ = [
    "ALONE",
    "DATA",
    "TENSOR",
    "Crew",
    "around",
    "by_sequence",
    "crew_of",
    "data_parts",
    "expert_matmul",
    "gathered",
    "is_meshed",
    "local_bytes",
    "made_by_sequence",
    "matmul",
    "matmul_transposed",
    "mesh_of",
    "on_mesh",
    "shardings",
    "take",
    "told_bytes",
]
