"""A checkpoint of 4 GB that is written in seconds: random numbers, repeated at varying offsets.

Many experts of which few are active, so that it is large to read and little to compute.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from moejax.checkpoint.hf_names import expected_tensors
from moejax.model import config_from_hf
from small_checkpoint import CONFIG as SMALL_CONFIG
from small_checkpoint import write_tokenizer

CONFIG = SMALL_CONFIG | {
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 2,
    "num_experts_per_tok": 2,
}
_HEAD = "head.safetensors"
# As wide as weights usually are, so that activations neither vanish nor explode.
_DEVIATION = 0.05
_NUMBERS = 32_000_000


def write_large_checkpoint(folder: Path, seed: int) -> None:
    """One file for every block, one for the head, one for the rest."""
    folder.mkdir()
    shapes = dict(expected_tensors(config_from_hf(CONFIG)))
    numbers = _numbers(seed)
    files = {name: _file(name) for name in shapes}
    for file in sorted(set(files.values())):
        _write(folder / file, {name: shape for name, shape in shapes.items() if files[name] == file}, numbers)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)


def write_with_another_head(folder: Path, original: Path, seed: int) -> None:
    """The same model but for its head: links to the original's other files."""
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / _HEAD).unlink()
    shapes = {name: shape for name, shape in expected_tensors(config_from_hf(CONFIG)) if _file(name) == _HEAD}
    _write(folder / _HEAD, shapes, _numbers(seed))


def _file(name: str) -> str:
    if name.endswith("head.weight"):
        return _HEAD
    return f"layer-{name.split('.')[2]}.safetensors" if ".layers." in name else "outer.safetensors"


def _numbers(seed: int) -> NDArray[np.uint16]:
    normal = np.random.default_rng(seed).standard_normal(_NUMBERS, np.float32)
    normal *= _DEVIATION
    return normal.astype(ml_dtypes.bfloat16).view(np.uint16)


def _write(file: Path, shapes: dict[str, tuple[int, ...]], numbers: NDArray[np.uint16]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for values in _values(shapes, numbers):
            stream.write(values.data)


def _values(shapes: dict[str, tuple[int, ...]], numbers: NDArray[np.uint16]) -> Iterator[NDArray[np.uint16]]:
    """Every tensor's bits: norms are ones, and an MTP block's copies are what they are copies of."""
    one = np.ones(1, ml_dtypes.bfloat16).view(np.uint16)
    for n, (name, shape) in enumerate(shapes.items()):
        size = int(np.prod(shape))
        if name.endswith("norm.weight"):
            yield np.repeat(one, size)
        elif "embed_tokens" in name or name.endswith("head.weight"):
            yield numbers[:size]
        else:
            start = n * 1_000_003 % (len(numbers) - size)
            yield numbers[start : start + size]
