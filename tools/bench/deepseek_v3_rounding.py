"""How long error feedback takes for DeepSeek-V3, and in how much memory: one matrix of each of its shapes, measured.

usage: python tools/bench/deepseek_v3_rounding.py [--format int2g128e8] [--model deepseek_v3] [--shapes 2048x7168 ...]

Weights and inputs are random, of the true shapes. Every shape has a process of its own, whose peak memory is shown, and
is rounded twice: the first time compiles, the second time counts, once for every such matrix of the model. Of matrices
with so many outputs that they are rounded in equal parts, one part is timed and counts as often as there are parts.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp

from moejax.calibrate import Inputs
from moejax.calibrate.products import products
from moejax.checkpoint.json_file import read_json_object
from moejax.formats import parse_format
from moejax.machine import peak_memory
from moejax.model import Config, config_from_hf
from moejax.model.weights import Layout, row_of
from moejax.planning.size import format_size
from moejax.resources import config_path
from moejax.transforms.error_feedback import MOST_ROWS
from moejax.transforms.rounding import round_weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int2g128e8")
    parser.add_argument("--model", default="deepseek_v3")
    parser.add_argument("--shapes", nargs="+", default=[], help="these only: OUTPUTSxINPUTS")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        outputs, inputs = map(int, options.shapes[0].split("x"))
        print(json.dumps(measure(outputs, inputs, options.format)))
        return
    config = config_from_hf(read_json_object(config_path("models", options.model)))
    counts = {f"{outputs}x{inputs}": count for (outputs, inputs), count in sorted(matrices(config).items())}
    if unknown := set(options.shapes) - counts.keys():
        parser.error(f"{options.model} has no matrices of {min(unknown)}; its shapes are {', '.join(counts)}")
    print("| outputs x inputs | such matrices | seconds each | peak memory | hours for all |\n|---|---|---|---|---|")
    hours = 0.0
    for shape in options.shapes or counts:
        command = [sys.executable, __file__, "--format", options.format, "--in-this-process", "--shapes", shape]
        seconds, memory = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        own = seconds * counts[shape] / 3600
        hours += own
        print(f"| {shape} | {counts[shape]:,} | {seconds:.2f} | {format_size(memory)} | {own:.1f} |", flush=True)
    print(f"\n{hours:.0f} hours in all")


def matrices(config: Config) -> Counter[tuple[int, int]]:
    """How many matrices of each shape are rounded by a Hessian: all but the embedding and the routers. Heads' parts of
    one weight have one input and are rounded as one matrix."""
    count: Counter[tuple[int, int]] = Counter()
    for name, shape in Layout(config).shapes().items():
        row = row_of(name)
        if not row.is_matrix or row.role in ("embedding", "router"):
            continue
        experts = shape[0] if row.is_per_expert else 1
        count[math.prod(shape[:-1]) // experts, shape[-1]] += experts
    return count


def measure(outputs: int, inputs: int, name: str) -> tuple[float, int]:
    """Seconds and bytes of rounding one random matrix, on what as many tokens as it has inputs say of its input."""
    weight_key, input_key = jax.random.split(jax.random.key(0))
    weight = jax.random.normal(weight_key, (outputs, inputs), jnp.float32) / inputs**0.5
    hessian = products(jax.random.normal(input_key, (inputs, inputs), jnp.bfloat16)) / inputs
    seen = Inputs(jnp.diagonal(hessian), hessian, float(inputs))
    parts = math.ceil(outputs / MOST_ROWS)
    part = weight[: math.ceil(outputs / parts)]
    for _ in range(2):
        started = time.monotonic()
        jax.block_until_ready(round_weight(part, seen, parse_format(name)))
        seconds = time.monotonic() - started
    return parts * seconds, peak_memory()


if __name__ == "__main__":
    main()
