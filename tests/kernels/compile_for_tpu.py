"""Compiles `matmul` for one v5e chip, for every argument `rows,dtype,leaf`, and `expert_matmul` where the leaf is
experts (`int2g128[4,O,I]+int3g128[4,O,I]`), and prints a line of JSON for each.

A program of its own, because a bad kernel can abort the process.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax import kernels
from moejax.formats import ExpertWeights, Leaf, abstract_experts, abstract_leaf


def main(cases: list[str]) -> None:
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    chip = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    for case in cases:
        rows, dtype, spec = case.split(",", maxsplit=2)
        are_experts = spec.count(",") > 1
        w = abstract_experts(spec) if are_experts else abstract_leaf(spec)
        x = jax.ShapeDtypeStruct((int(rows), w.shape[-1]), np.dtype(dtype))
        given = (x, w, jax.ShapeDtypeStruct((w.shape[0],), jnp.int32)) if are_experts else (x, w)
        args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=chip), given)
        multiply = multiply_experts if are_experts else multiply_matrix
        compiled = jax.jit(multiply).trace(*args).lower(lowering_platforms=("tpu",)).compile()
        found = {
            "case": case,
            "mosaic_kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        print(json.dumps(found), flush=True)


def multiply_matrix(x: jax.Array, w: Leaf) -> jax.Array:
    return kernels.matmul(x, w)


def multiply_experts(x_RI: jax.Array, w: ExpertWeights, rows_E: jax.Array) -> jax.Array:
    return kernels.expert_matmul(x_RI, w, rows_E)


main(sys.argv[1:])
