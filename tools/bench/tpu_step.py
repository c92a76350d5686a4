"""A whole decode step, or a chunk of a prompt, of a compressed model compiled ahead of time for several TPU chips.

usage: python tools/bench/tpu_step.py PLAN [--model NAME|config.json] [--chip v5e:2x4] [--batch 1] [--tokens 1]
           [--context 4096] [--layers N] [--text FILE] [--json FILE]

PLAN is what `moejax plan deepseek_v3 --budget 103GB --output PLAN` writes. Weights lie over all the chips
(`moejax.sharding`), and there are none, of chips as of weights: only shapes. Prints how many lines of StableHLO and
kernels there are, seconds to trace, to lower and to compile, and what `memory_analysis()` says of one chip: bytes of
arguments (weights and cache), of results and of temporaries. `--layers` takes the first N alone, `--text` is where the
compiled program goes. Beside that stand the bytes that a step moves on a chip, and the tokens a second that this
allows at most (`roofline.py`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import roofline
from moejax.checkpoint.abstract import abstract_original
from moejax.checkpoint.json_file import read_json_object
from moejax.checkpoint.toml_file import read_toml
from moejax.generate.decode import Rows, decode_step
from moejax.generate.sampling import GREEDY, Draw
from moejax.model import DeepseekV3
from moejax.pipeline.shapes import shapes_for
from moejax.planning.plan import from_json
from moejax.resources import config_path
from moejax.sharding import TENSOR, on_mesh
from tpu_compile import WITHOUT_TPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--model", default="deepseek_v3")
    parser.add_argument("--chip", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not WITHOUT_TPU.items() <= os.environ.items():
        done = subprocess.run([sys.executable, *sys.argv], env=os.environ | WITHOUT_TPU)
        sys.exit(done.returncode)
    found = compiled_step(compressed(options.model, options.plan, options.layers), options)
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def compressed(name: str, plan_file: Path, layers: int | None) -> DeepseekV3:
    """The abstract model that a plan makes of a known one; of its layers the first ones, if a number is given."""
    plan, file = from_json(read_toml(plan_file)), Path(name) if name.endswith(".json") else config_path("models", name)
    raw = read_json_object(file)
    model = shapes_for(abstract_original(raw, str(file)), plan.method, raw, []).compressed(plan)
    if layers is not None:
        model.layers = nnx.List(list(model.layers)[:layers])
    return model


def compiled_step(model: DeepseekV3, options: argparse.Namespace) -> dict[str, Any]:
    topology = topologies.get_topology_desc(options.chip, platform="tpu")
    mesh = Mesh(topology.devices, (TENSOR,), axis_types=(AxisType.Auto,))
    seconds = Stopwatch()
    with jax.set_mesh(mesh):
        traced = decode_step.trace(*arguments(model, mesh, options), dtype="bfloat16")
        seconds.lap("trace")
        lowered = traced.lower(lowering_platforms=("tpu",))
        text = lowered.as_text()
        seconds.lap("lower")
        program = lowered.compile()
        seconds.lap("compile")
    memory, compiled_text = program.memory_analysis(), program.as_text()
    if options.text:
        options.text.write_text(compiled_text)
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return {
        "chip": options.chip,
        "batch": options.batch,
        "tokens": options.tokens,
        "context": options.context,
        "layers": len(model.layers),
        **bound(model, options, mesh.size),
        "stablehlo_lines": text.count("\n"),
        "mosaic_kernels": text.count("tpu_custom_call"),
        "seconds": seconds.laps,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "chip_gib": (total - memory.alias_size_in_bytes) / 2**30,
        "collectives": Counter(
            re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", compiled_text)
        ),
    }


def bound(model: DeepseekV3, options: argparse.Namespace, chips: int) -> dict[str, float]:
    """What a step moves on a chip at least, and what that allows; see `roofline`."""
    moved = roofline.step(model, options.batch, options.tokens, options.context, chips)
    found = {"needed_bytes": moved.needed, "moved_bytes": moved.moved, "moved_over_needed": moved.moved / moved.needed}
    if chip := roofline.CHIPS.get(options.chip.partition(":")[0]):
        found["bound_tokens_per_s"] = options.batch * options.tokens / moved.seconds(chip)
    return found


def arguments(model: DeepseekV3, mesh: Mesh, options: argparse.Namespace) -> tuple[Any, ...]:
    """What `decode_step` takes, abstract, and where it lies."""
    batch, tokens = options.batch, options.tokens
    cache = jax.eval_shape(lambda: model.empty_cache(batch, options.context, "bfloat16"))[: len(model.layers)]
    of_rows = ((batch, tokens), (batch,), (batch,))
    rows = jax.eval_shape(lambda: Rows(*(jnp.zeros(shape, jnp.int32) for shape in of_rows)))
    draw = jax.eval_shape(lambda: Draw(jax.tree.map(jnp.asarray, GREEDY), jax.random.split(jax.random.key(0), batch)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    others = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), (rows, cache, draw))
    return (on_mesh(model, mesh), *others)


class Stopwatch:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.since = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self.since = round(now - self.since, 1), now


if __name__ == "__main__":
    main()
