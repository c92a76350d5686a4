"""Opens a checkpoint again and again, one file damaged each time: a program, to be run under limits of its own.

    python fuzz_loading.py FOLDER KIND COUNT

Each time, an InputError of one short line is raised, or everything loads and is what the damaged files say, read here a
second time by a small parser of our own. Prints the number of both; anything else ends it with the damage that did it.
"""

import itertools
import json
import os
import random
import re
import resource
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from leaf_oracle import to_numpy
from model_cases import tensor_shapes
from moejax.checkpoint.hf_names import hf_name
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import Checkpoint, open_checkpoint
from moejax.checkpoint.native import NativeCheckpoint, item_of
from moejax.errors import MAX_MESSAGE, InputError
from moejax.formats import ExpertWeights, Fp8Blocks, PackedTensor
from moejax.model import Layout
from moejax.model.rope import frequencies
from mutations import damaged_bytes, damaged_json

MEMORY, SECONDS = 500_000_000, 20
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
SPECS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "i32"}
SCALE = "_scale_inv"
# An MTP layer that the config does not mention is left out; its copies of embedding and head are not used.
MTP_LAYER = "model.layers.1."
COPIES = (f"{MTP_LAYER}embed_tokens.", f"{MTP_LAYER}shared_head.head.")

Found = tuple[Checkpoint, dict[str, Any]]
Damage = Callable[[Path, bytes, random.Random], None]


def main(folder: Path, kind: str, count: int) -> None:
    files: list[tuple[str, Damage]] = {"huggingface": HUGGINGFACE, "native": NATIVE}[kind]
    check = {"huggingface": check_huggingface, "native": check_native}[kind]
    outcome(folder, check)
    limit_memory()
    signal.signal(signal.SIGALRM, stop)
    results: Counter[str] = Counter()
    for seed, (name, damage) in zip(range(count), itertools.cycle(files), strict=False):
        file = folder / name
        original = file.read_bytes()
        file.unlink()
        damage(file, original, random.Random(seed))
        signal.alarm(SECONDS)
        try:
            results[f"{file.name} {outcome(folder, check)}"] += 1
        except BaseException:
            print(f"seed {seed} of {file.name}, {damage.__name__}: {file.stat().st_size} bytes", file=sys.stderr)
            raise
        signal.alarm(0)
        file.unlink()
        file.write_bytes(original)
    print(json.dumps(results))


def outcome(folder: Path, check: Callable[[Found], None]) -> str:
    try:
        checkpoint: Checkpoint = open_checkpoint(folder)
        leaves = {name: checkpoint.leaf(name) for name in Layout(checkpoint.config).shapes()}
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) <= MAX_MESSAGE, error
        return "refused"
    check((checkpoint, leaves))
    return "loaded"


def limit_memory() -> None:
    """So many bytes more than are in use: the kernel then refuses them, and the program fails."""
    in_use = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + MEMORY, in_use + MEMORY))


class Hang(BaseException):
    """Not an Exception, so that nothing that handles errors takes it for one of its own."""


def stop(*_: object) -> None:
    raise Hang(f"not done after {SECONDS} s")


def json_damage(file: Path, original: bytes, rng: random.Random) -> None:
    file.write_bytes(damaged_json(original, rng))


def byte_damage(file: Path, original: bytes, rng: random.Random) -> None:
    file.write_bytes(damaged_bytes(original, rng))


def header_damage(file: Path, original: bytes, rng: random.Random) -> None:
    """The JSON of a safetensors header, its length right again."""
    length = int.from_bytes(original[:8], "little")
    header = rng.choice([damaged_json, damaged_json, damaged_json, damaged_bytes])(original[8 : 8 + length], rng)
    file.write_bytes(len(header).to_bytes(8, "little") + header + original[8 + length :])


def length_damage(file: Path, original: bytes, rng: random.Random) -> None:
    """Another length of the header, of the file, or both; the file then has holes that take no space."""
    length = rng.choice([0, 1, len(original), 10**6, 10**7, 10**8, 2**31, 2**62, 2**64 - 1, rng.randrange(10**4)])
    file.write_bytes(length.to_bytes(8, "little") + original[8:])
    os.truncate(file, rng.choice([len(original), rng.randrange(len(original)), 2 * 10**8]))


def flood(file: Path, original: bytes, rng: random.Random) -> None:
    """Five million bytes of JSON."""
    piece = rng.choice([b"[],", b"{},", b'{"a":0},', b"1e5,", b'"\\u0001",', b"[", b'{"a":'])
    text = b'{"__metadata__":[' + piece * (5_000_000 // len(piece)) + b"0]}"
    file.write_bytes(len(text).to_bytes(8, "little") + text if file.suffix == ".safetensors" else text)


def no_file(file: Path, original: bytes, rng: random.Random) -> None:
    """What cannot be read, or never ends, stands in its place."""
    rng.choice([lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to(file), lambda: os.mkfifo(file)])()


SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
JSON: tuple[Damage, ...] = (*[json_damage] * 7, *[byte_damage] * 2)
HEADERS: tuple[Damage, ...] = (*[header_damage] * 7, byte_damage, length_damage)
RARE: tuple[Damage, ...] = (flood, no_file)
HUGGINGFACE = [
    *((file, damage) for damage in HEADERS for file in SHARDS),
    *((file, damage) for damage in JSON * 3 for file in ("model.safetensors.index.json", "config.json", "config.json")),
    *((file, damage) for damage in RARE for file in (SHARDS[0], "model.safetensors.index.json", "config.json")),
]
NATIVE = [
    *(("manifest.json", damage) for damage in JSON * 5 + RARE),
    *(("items/mtp_0/_METADATA", damage) for damage in [json_damage, byte_damage]),
    *(("items/mtp_0/block.mlp.router/.zarray", damage) for damage in [json_damage, json_damage, byte_damage]),
]


def check_huggingface(found: Found) -> None:
    """Names and shapes are the config's, and every leaf has the values, shapes and dtypes of the headers."""
    checkpoint, leaves = found
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    raw = json.loads((checkpoint.path / "config.json").read_bytes())
    config = {"num_nextn_predict_layers": 0, "q_lora_rank": None} | raw
    check_config(checkpoint, config)
    index = json.loads((checkpoint.path / "model.safetensors.index.json").read_bytes())["weight_map"]
    tensors = {name: t for shard in set(index.values()) for name, t in read_shard(checkpoint.path / shard).items()}
    assert set(tensors) == set(index)
    weights = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(SCALE)}
    left_out = COPIES if config["num_nextn_predict_layers"] else MTP_LAYER
    assert {name: shape for name, shape in weights.items() if not name.startswith(left_out)} == {
        name: shape for name, shape in tensor_shapes(config).items() if not name.startswith(left_out)
    }
    for name, leaf in leaves.items():
        expected = numpy_leaf(name, checkpoint, tensors)
        for own, other in zip(jax.tree.leaves(compared(name, leaf)), expected, strict=True):
            assert (own.shape, own.dtype) == (other.shape, other.dtype), name
            assert np.asarray(own).tobytes() == other.tobytes(), name


def read_shard(file: Path) -> dict[str, np.ndarray]:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, fields in header.items():
        first, last = fields["data_offsets"]
        raw = np.frombuffer(content[start + first : start + last], np.uint8)
        tensors[name] = raw.view(DTYPES[fields["dtype"]]).reshape(fields["shape"])
    return tensors


def numpy_leaf(name: str, checkpoint: HuggingFaceCheckpoint, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The arrays of a leaf, with what experts and kv_b are made of put together or taken apart."""
    config, tensor = checkpoint.config, hf_name(name, checkpoint.config)
    experts = np.arange(config.n_routed_experts, dtype=np.int32)
    if tensor is None:
        group_size = config.n_routed_experts // config.n_group
        return [np.ones((), np.float32) if name.endswith("scale") else experts // np.int32(group_size)]
    if "{}" in tensor:
        each = [with_scale(tensors, tensor.format(e)) for e in experts]
        return [*(np.stack(arrays) for arrays in zip(*each, strict=True)), np.zeros_like(experts), experts]
    if not name.endswith(("k_b", "v_b")):
        return with_scale(tensors, tensor)
    whole = tensors[tensor]
    if tensor + SCALE in tensors:
        rows, columns = np.indices(whole.shape)
        block = checkpoint.raw_config["quantization_config"]["weight_block_size"]
        whole = whole.astype(np.float64) * tensors[tensor + SCALE][rows // block[0], columns // block[1]]
    per_head = whole.reshape(config.num_attention_heads, -1, whole.shape[-1])
    nope = config.qk_nope_head_dim
    return [per_head[:, :nope] if name.endswith("k_b") else per_head[:, nope:]]


def compared(name: str, leaf: Any) -> Any:
    """FP8 scales of kv_b's halves are of finer blocks: what they stand for is compared."""
    return to_numpy(leaf) if isinstance(leaf, Fp8Blocks) and name.endswith(("k_b", "v_b")) else leaf


def with_scale(tensors: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    return [tensors[own] for own in (name, name + SCALE) if own in tensors]


def check_config(checkpoint: Checkpoint, raw: dict[str, Any]) -> None:
    for field in ("hidden_size", "n_group", "topk_group", "rms_norm_eps", "norm_topk_prob", "max_position_embeddings"):
        assert getattr(checkpoint.config, field) == raw[field], field
    assert np.all(np.isfinite(np.float32(frequencies(checkpoint.config))))
    assert np.isfinite(np.float32(checkpoint.config.softmax_scale))


def check_native(found: Found) -> None:
    """Every leaf is of the format and shape that the manifest says, and of the bytes that lie in its folder."""
    checkpoint, leaves = found
    assert isinstance(checkpoint, NativeCheckpoint)
    manifest = json.loads((checkpoint.path / "manifest.json").read_bytes())
    check_config(checkpoint, manifest["config"])
    assert list(checkpoint.experts_per_token) == manifest["experts_per_token"]
    assert (checkpoint.plan, checkpoint.provenance) == (manifest["plan"], manifest["provenance"])
    assert {item_of(name) for name in leaves} == {(i, name) for i, own in manifest["items"].items() for name in own}
    for name, leaf in leaves.items():
        item, within = item_of(name)
        spec, checksums = manifest["items"][item][within]
        check_spec(leaf, spec)
        flat, _ = jax.tree_util.tree_flatten_with_path(leaf)
        contents = []
        for path, array in flat:
            keys = [str(getattr(key, "name", getattr(key, "idx", None))) for key in path]
            (chunk,) = (checkpoint.path / "items" / item / ".".join([within, *keys])).glob("[0-9]*")
            contents.append(chunk.read_bytes())
            assert np.asarray(array).tobytes() == contents[-1]
        assert checksums == "".join(f"{zlib.crc32(content):08x}" for content in contents)


def check_spec(leaf: Any, spec: str) -> None:
    buckets = leaf.buckets if isinstance(leaf, ExpertWeights) else [leaf]
    for bucket, own in zip(buckets, spec.split("+"), strict=True):
        shape = tuple(int(size) for size in own.partition("[")[2][:-1].split(",") if size)
        assert bucket.shape == shape
        if not isinstance(bucket, PackedTensor):
            assert own.startswith(SPECS[bucket.dtype.name])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
