"""Compiles `matmul` for one v5e chip, for every argument `rows,dtype,leaf`, and prints a line of JSON for each.

A program of its own, because a bad kernel can abort the process.
"""

import json
import sys

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax import kernels
from moejax.formats import Leaf, abstract_leaf


def main(cases: list[str]) -> None:
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    chip = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    for case in cases:
        rows, dtype, spec = case.split(",", maxsplit=2)
        w = abstract_leaf(spec)
        x = jax.ShapeDtypeStruct((int(rows), w.shape[-1]), np.dtype(dtype))
        args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=chip), (x, w))
        compiled = jax.jit(multiply).trace(*args).lower(lowering_platforms=("tpu",)).compile()
        found = {
            "case": case,
            "mosaic_kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        print(json.dumps(found), flush=True)


def multiply(x: jax.Array, w: Leaf) -> jax.Array:
    return kernels.matmul(x, w)


main(sys.argv[1:])
