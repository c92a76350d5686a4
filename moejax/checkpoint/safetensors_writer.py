"""Writing safetensors files tensor by tensor: their headers are known from shapes before there is any tensor.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes), and
`model.safetensors.index.json`, whose `weight_map` says which file holds which tensor.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from moejax.checkpoint.safetensors_folder import DTYPES, INDEX_FILE
from moejax.checkpoint.store import ArrayLike, payload_bytes
from moejax.progress import Progress, silent

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Shard:
    """One file: its first bytes, the place in it of every tensor's, and its length."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    length: int

    @property
    def last(self) -> str:
        """The tensor that is written last."""
        return list(self.offsets)[-1]


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray | jax.Array]],
    abstract: Mapping[str, ArrayLike],
    shard_bytes: int,
    progress: Progress = silent,
) -> None:
    """Write `tensors`, which come in the order of `abstract` and with its shapes and dtypes, one in memory at a time.

    A file holds at most `shard_bytes` of tensors, or one that is larger. Equal tensors make equal bytes. Raises
    ValueError if a tensor is not what `abstract` says.
    """
    shards = _shards(abstract, shard_bytes)
    for shard in shards:
        with (folder / shard.file).open("wb") as stream:
            stream.write(shard.header)
            stream.truncate(shard.length)
    arrays = iter(tensors)
    for shard, name in progress([(own, name) for own in shards for name in own.offsets], "writing"):
        own_name, array = next(arrays)
        expected = abstract[name]
        if (own_name, array.shape, array.dtype) != (name, expected.shape, expected.dtype):
            raise ValueError(f"{own_name} of {array.dtype}{array.shape} came where {name} of {expected} was expected")
        with (folder / shard.file).open("r+b") as stream:
            stream.seek(shard.offsets[name])
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            if name == shard.last:  # else all the time that the disk takes comes after the last step
                stream.flush()
                os.fsync(stream.fileno())
    index = {
        "metadata": {"total_size": payload_bytes(abstract)},
        "weight_map": {name: shard.file for shard in shards for name in shard.offsets},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(abstract: Mapping[str, ArrayLike], shard_bytes: int) -> list[_Shard]:
    """Neighbours lie in one file, as many as it may hold."""
    groups: list[list[str]] = [[]]
    left = shard_bytes
    for name, own in abstract.items():
        size = payload_bytes({name: own})
        if size > left and groups[-1]:
            groups.append([])
            left = shard_bytes
        groups[-1].append(name)
        left -= size
    return [
        _shard(f"model-{n:05}-of-{len(groups):05}.safetensors", names, abstract)
        for n, names in enumerate(groups, start=1)
    ]


def _shard(file: str, names: Sequence[str], abstract: Mapping[str, ArrayLike]) -> _Shard:
    """Tensors of wide numbers lie first, so that each begins at a multiple of its numbers' bytes, as torch needs."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start: dict[str, int] = {}
    end = 0
    for name in sorted(names, key=lambda own: -np.dtype(abstract[own].dtype).itemsize):
        own = abstract[name]
        start[name], end = end, end + payload_bytes({name: own})
        header[name] = {
            "dtype": _DTYPE_NAMES[np.dtype(own.dtype)],
            "shape": list(own.shape),
            "data_offsets": [start[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    before = 8 + len(text)
    offsets = {name: before + start[name] for name in names}
    return _Shard(file, len(text).to_bytes(8, "little") + text, offsets, before + end)
