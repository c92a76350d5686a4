"""A random native checkpoint of several GB onto meshes: how fast it is restored, what that takes, how fast it decodes.

    python tools/bench/mesh.py FOLDER [--layers 8] [--experts 128] [--hidden-size 4096] [--expert-size 1536]
           [--meshes tensor=1 tensor=2] [--speed] [--check] [--json FILE]

The checkpoint is made in FOLDER unless it is there: int4g128 in attention and dense matrices, experts in int2g128e8
and int3g128e8 by halves, its words and scales noise, so that it says nothing of quality. For every mesh a process of
its own restores it, twice. `--speed` decodes too (`moejax bench`). `--check` compares logits in float64 of a model with
the same formats in small on every mesh with those on one device. What devices there are, JAX decides: eight on a CPU
are `XLA_FLAGS=--xla_force_host_platform_device_count=8`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.native_bytes import Description, native_bytes
from moejax.checkpoint.native_writer import native_writer
from moejax.formats import ExpertWeights, abstract_experts, abstract_leaf
from moejax.machine import peak_memory
from moejax.model import DeepseekV3, Layout, config_from_hf
from moejax.model.leaves import Weight
from moejax.model.weights import row_of
from moejax.resources import tiny_checkpoint
from moejax.sharding import around, mesh_of
from random_checkpoint import CONFIG

SMALL = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 3}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--expert-size", type=int, default=1536)
    parser.add_argument("--meshes", nargs="+", default=["tensor=1", "tensor=2"])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--restore", metavar="MESH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.restore:
        print(json.dumps(restored(options.folder, options.restore)))
        return
    sizes = {"hidden_size": options.hidden_size, "moe_intermediate_size": options.expert_size}
    raw = CONFIG | sizes | {"num_hidden_layers": options.layers, "n_routed_experts": options.experts}
    made(options.folder, raw)
    rows = [measured(options.folder, mesh, options.speed) for mesh in options.meshes]
    if options.check:
        small = options.folder.with_name(f"{options.folder.name}-small")
        made(small, CONFIG | SMALL)
        rows = [row | {"logits_differ_by": difference(small, row["mesh"])} for row in rows]
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in columns))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def made(folder: Path, raw: dict[str, Any]) -> None:
    """Write the checkpoint of a config, if it is not there."""
    if folder.exists():
        return
    config = config_from_hf(raw)
    shapes = Layout(config).shapes()
    model = DeepseekV3(config, {name: abstract(name, shape) for name, shape in shapes.items()}.__getitem__)
    description, copied = Description(raw, {}, {}), [tiny_checkpoint() / name for name in TOKENIZER]
    size = native_bytes(model, description, copied).total
    with native_writer(model, folder, description, copied, size) as writer:
        for item, leaves in writer.items.items():
            drawn_leaves = {name: noise(leaf, n, config.n_group) for n, (name, leaf) in enumerate(leaves.items())}
            writer.add(item, drawn_leaves)
    print(f"{folder}: {size / 1e9:.2f} GB", flush=True)


def abstract(name: str, shape: tuple[int, ...]) -> Weight:
    row, own = row_of(name), ",".join(map(str, shape))
    if row.role == "routed experts":
        half, rest = shape[0] // 2, ",".join(map(str, shape[1:]))
        return abstract_experts(f"int2g128e8[{half},{rest}]+int3g128e8[{shape[0] - half},{rest}]")
    if row.dtype == "int32":
        return abstract_leaf(f"i32[{own}]")
    return abstract_leaf(f"int4g128[{own}]" if row.may_be_rounded and shape[-1] % 128 == 0 else f"f32[{own}]")


def noise(leaf: Weight, seed: int, groups: int) -> Weight:
    """Random words, and scales about 0.01; experts in their order, in groups of equal size."""
    random, (arrays, structure) = np.random.default_rng(seed), jax.tree.flatten(leaf)
    order = np.arange(leaf.shape[0] if leaf.shape else 1, dtype=np.int32)
    if isinstance(leaf, ExpertWeights):
        half = leaf.buckets[0].shape[0]
        drawn_arrays = [drawn(own, random) for own in arrays[:-2]] + [order // half, order % half]
    elif arrays[0].dtype == np.int32:
        drawn_arrays = [order // (len(order) // groups)]
    else:
        drawn_arrays = [drawn(own, random) for own in arrays]
    return jax.tree.unflatten(structure, drawn_arrays)


def drawn(array: jax.Array, random: np.random.Generator) -> np.ndarray:
    if np.issubdtype(array.dtype, np.unsignedinteger):
        return random.integers(0, np.iinfo(array.dtype).max, array.shape, array.dtype, endpoint=True)
    is_scale = len(array.shape) > 1
    return (random.uniform(0.5, 1.5, array.shape) * (0.01 if is_scale else 1)).astype(array.dtype)


def measured(folder: Path, mesh: str, with_speed: bool) -> dict[str, Any]:
    """Of processes of their own."""
    once = [sys.executable, __file__, str(folder), "--restore", mesh]
    row: dict[str, Any] = {"mesh": mesh}
    for _ in range(2):  # the second time out of the page cache
        row |= json.loads(subprocess.run(once, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    if with_speed:
        file = folder.with_name("bench.json")
        sizes = ["--prompt", "256", "--tokens", "32", "--dtype", "bfloat16", "--json", str(file)]
        command = [sys.executable, "-m", "moejax", "bench", str(folder), *sizes, "--mesh", mesh]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        bench = json.loads(file.read_text())
        row |= {name: bench[f"{name}_tokens_per_s"] for name in ("prefill", "decode")}
    return row


def restored(folder: Path, mesh: str) -> dict[str, float]:
    checkpoint, devices = open_checkpoint(folder), mesh_of(mesh)
    started = time.monotonic()
    jax.block_until_ready(load_model(checkpoint, devices))
    return {"restore_seconds": time.monotonic() - started, "peak_memory_gb": peak_memory() / 1e9}


def difference(folder: Path, mesh: str) -> float:
    """The largest, relative to the largest logit."""
    with jax.enable_x64(True):
        checkpoint, devices = open_checkpoint(folder), mesh_of(mesh)
        tokens = np.random.default_rng(0).integers(CONFIG["vocab_size"], size=(2, 16)).astype(np.int32)
        logits = jax.jit(lambda model: model(jnp.asarray(tokens), jnp.float64))
        alone = np.asarray(logits(load_model(checkpoint)))
        model = load_model(checkpoint, devices)
        with around(devices):
            together = np.asarray(logits(model))
    return float(np.abs(together - alone).max() / np.abs(alone).max())


if __name__ == "__main__":
    main()
