"""Kernels compiled ahead of time for TPUs, of which none is needed: what they take of a chip's memory.

usage: python tools/bench/tpu_compile.py [--chips v5e:2x4 v5p:2x2x1 v6e:2x4 tpu7x:2x2x1] [--cases ROWS,DTYPE,LEAF ...]
           [--json FILE]

A case is `matmul` of so many rows with a matrix (`1,bfloat16,int2g128[2048,7168]`), or `expert_matmul` with experts,
whose buckets are joined by `+` (`8,bfloat16,int2g128[32,2048,7168]+int3g128[32,2048,7168]`); without `--cases` it is
every format at DeepSeek-V3's shapes, one token and a prefill of 512. Prints a line of JSON for each: how many Mosaic
kernels there are, bytes of arguments and of temporaries, seconds; of few rows among experts also what the blocks of the
grid move, over the packed bytes of the experts that rows go to. Every chip has a process of its own, because a bad
kernel can abort it. libtpu exists for Linux on x86-64 only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax import kernels
from moejax.formats import ExpertWeights, abstract_experts, abstract_leaf, payload_bytes
from moejax.kernels import multiply_tpu

CHIPS = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")
FORMATS = [*(f"int{bits}g128" for bits in range(1, 9)), "int2g128e8", "sint4g32f16", "ternaryg128", "ternaryg128e8"]
# A token's 8 experts, and 512 tokens' 4096 choices among the 32 experts of a format.
CASES = [
    *(
        f"{rows},bfloat16,{name}[{shape}]"
        for name in FORMATS
        for rows in (1, 512)
        for shape in ("2048,7168", "7168,18432")
    ),
    *(
        f"{rows},bfloat16,{name}[32,{shape}]"
        for name in FORMATS
        for rows in (8, 4096)
        for shape in ("2048,7168", "7168,2048")
    ),
]
# libtpu would ask the cloud's metadata server which machine this is, and let only one process at a time load it.
WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS))
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if WITHOUT_TPU.items() <= os.environ.items() and len(options.chips) == 1:
        rows = compile_for(options.chips[0], options.cases)
    else:
        rows = [row for chip in options.chips for row in compiled_in_a_process(chip, options.cases)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def compiled_in_a_process(chip: str, cases: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "error", __file__, "--chips", chip, "--cases", *cases]
    with subprocess.Popen(command, env=os.environ | WITHOUT_TPU, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        rows = []
        for line in run.stdout:
            print(line, end="", flush=True)
            rows.append(json.loads(line))
    if run.returncode:
        sys.exit(f"{chip}: {cases[len(rows)] if len(rows) < len(cases) else 'the end'} failed")
    return rows


def compile_for(chip: str, cases: list[str]) -> list[dict[str, Any]]:
    topology = topologies.get_topology_desc(chip, platform="tpu")
    sharding = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    rows = []
    for case in cases:
        started = time.monotonic()
        rows.append({"chip": chip, "case": case, **compiled(case, sharding), "seconds": time.monotonic() - started})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def compiled(case: str, sharding: NamedSharding) -> dict[str, Any]:
    rows, dtype, spec = case.split(",", maxsplit=2)
    are_experts = len(spec.partition("+")[0].split(",")) == 3
    w = abstract_experts(spec) if are_experts else abstract_leaf(spec)
    x = jax.ShapeDtypeStruct((int(rows), w.shape[-1]), np.dtype(dtype))
    given = (x, w, jax.ShapeDtypeStruct((w.shape[0],), jnp.int32)) if are_experts else (x, w)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), given)
    multiply = kernels.expert_matmul if are_experts else kernels.matmul
    program = jax.jit(multiply).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    memory = program.memory_analysis()
    moved = {}
    if isinstance(w, ExpertWeights) and int(rows) <= w.num_experts:
        moved = {"moved_over_packed": moved_over_packed(w, dtype)}
    return {
        **moved,
        "mosaic_kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def moved_over_packed(w: ExpertWeights, dtype: str) -> float:
    """Bytes that the kernel's blocks move where each row goes to an expert of its own, over those of these experts'
    packed matrices, which must be read: by the grid, every tile of outputs of an expert once, its row each time."""
    _, outputs, inputs = w.shape
    tiles = -(-outputs // multiply_tpu.outputs_together(outputs, inputs, dtype))
    packed = payload_bytes(w.buckets) / w.num_experts
    row = (tiles * inputs + outputs) * np.dtype(dtype).itemsize
    return (packed + row) / packed


if __name__ == "__main__":
    main()
