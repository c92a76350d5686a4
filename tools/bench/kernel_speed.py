"""GB/s at which this machine multiplies packed weights, beside what it copies: one token's matrices and experts.

usage: python tools/bench/kernel_speed.py [--formats int1g128 ternaryg128 int2g128 ...] [--rows 1] [--experts 32]
           [--repeats 20] [--json FILE]

For every format one matrix of 7168 inputs and 18432 outputs is multiplied with so many rows, and K = 8 experts of
2048 x 7168 with a row each, as a decode step would (`kernels.matmul`, `kernels.expert_matmul`, each compiled alone, in
bfloat16). Packed bytes of what is read over the median time of `--repeats` runs; a copy of 2 GB of float32 counts its
bytes twice, once read and once written.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import kernels
from moejax.formats import ExpertWeights, Leaf, abstract_experts, abstract_leaf, payload_bytes

FORMATS = ("int1g128", "ternaryg128", "int2g128", "int3g128", "int4g128", "int8g128")
MATRIX, EXPERT, CHOSEN = (18432, 7168), (2048, 7168), 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    copied = jnp.zeros(1 << 29, jnp.float32)
    rate = 2 * copied.nbytes / median_seconds(jax.jit(lambda a: a + 1), (copied,), options.repeats) / 1e9
    print(f"{jax.devices()[0].device_kind}: copy {rate:.0f} GB/s\n\n| format | matrix | experts |\n|---|---|---|")
    found = {"device": jax.devices()[0].device_kind, "copy_gb_per_s": rate, "rows": options.rows, "gb_per_s": {}}
    for name in options.formats:
        matrix, experts = random_words(abstract_leaf(f"{name}[{MATRIX[0]},{MATRIX[1]}]")), experts_of(name, options)
        x_RI = jnp.ones((options.rows, MATRIX[1]), jnp.bfloat16)
        dense = payload_bytes(matrix) / median_seconds(jax.jit(kernels.matmul), (x_RI, matrix), options.repeats) / 1e9
        rows_E = jnp.asarray(np.arange(options.experts) < CHOSEN, jnp.int32)
        given = (jnp.ones((CHOSEN, EXPERT[1]), jnp.bfloat16), experts, rows_E)
        read = payload_bytes(experts.buckets) * CHOSEN / options.experts
        routed = read / median_seconds(jax.jit(kernels.expert_matmul), given, options.repeats) / 1e9
        print(f"| {name} | {dense:.1f} | {routed:.1f} |", flush=True)
        found["gb_per_s"][name] = {"matrix": dense, "experts": routed}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def experts_of(name: str, options: argparse.Namespace) -> ExpertWeights:
    abstract = abstract_experts(f"{name}[{options.experts},{EXPERT[0]},{EXPERT[1]}]")
    (bucket,) = abstract.buckets
    slots = jnp.arange(options.experts, dtype=jnp.int32)
    return ExpertWeights((random_words(bucket),), jnp.zeros_like(slots), slots)


def random_words(w: Leaf) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(
            rng.integers(0, 2**32, a.shape, np.uint32) if a.dtype == jnp.uint32 else np.ones(a.shape, a.dtype)
        ),
        w,
    )


def median_seconds(run: Callable[..., jax.Array], given: tuple[Any, ...], repeats: int) -> float:
    jax.block_until_ready(run(*given))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run(*given))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
