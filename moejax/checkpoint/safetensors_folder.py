"""Reading a Hugging Face checkpoint folder: where the tensors of its safetensors files lie, its config as a dict.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes), and for
sharded checkpoints `model.safetensors.index.json`, whose `weight_map` says which file holds which tensor.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moejax.checkpoint.json_file import POINTER, parse_json_object, read_json_object, refuse_pointer
from moejax.errors import InputError, brief

T = TypeVar("T")

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_HEADER_BYTES = 10_000_000
"""The largest header read; DeepSeek-V3's files have headers of 100 thousand bytes, Kimi-K2's of 300 thousand."""

# What NumPy can hold, even where an axis of size zero lets the file hold any other.
_MAX_AXES, _MAX_ELEMENTS = 8, 2**48
_MAX_FILE_NAME = 255  # the usual limit of file systems, in bytes

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""The dtype names of safetensors headers that are accepted, and what they are read as."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes of `file` from `offset` on, in row-major order."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some rows of its first axis, in memory of its own: pages of a map would stay in memory too.

        Raises InputError if the file has been cut off since its header was read.
        """
        first, last, _ = rows.indices(self.shape[0] if self.shape else 1)
        size = self.nbytes // max(1, self.shape[0] if self.shape else 1)
        values = np.fromfile(self.file, np.uint8, (last - first) * size, offset=self.offset + first * size)
        if values.size != (last - first) * size:
            raise InputError(f"{self.file}: is shorter than its header says; fetch or write it again")
        return values.view(self.dtype).reshape((last - first, *self.shape[1:]) if self.shape else ())


@dataclass(frozen=True)
class SafetensorsFolder:
    """A checkpoint folder whose headers have been read and agree with its index; no tensor's bytes have.

    left_out: the names of tensors that were not looked at.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    left_out: frozenset[str] = frozenset()


def nothing(_: Collection[str]) -> frozenset[str]:
    """No name."""
    return frozenset()


def open_folder(path: Path, leave_out: Callable[[Collection[str]], frozenset[str]] = nothing) -> SafetensorsFolder:
    """Reads the headers of the checkpoint in the folder `path`: one `model.safetensors`, or shards with an index.

    Of all names `leave_out` gives those of tensors that are not wanted; a shard that holds only such need not be there.

    Raises InputError if the folder or a file is missing, a file is corrupt or truncated, a header is larger than
    `MAX_HEADER_BYTES`, a tensor's dtype is not in `DTYPES`, or the files do not hold exactly the tensors that the index
    gives them.
    """
    if not path.is_dir():
        raise InputError(f"{path}: is not a folder; give the folder of a Hugging Face checkpoint")
    if (path / SINGLE_FILE).is_file():
        tensors = read_header(path / SINGLE_FILE)
        left_out = leave_out(tensors.keys())
        return SafetensorsFolder(path, _without(tensors, left_out), left_out)
    if not (path / INDEX_FILE).is_file():
        raise InputError(f"{path}: has neither {SINGLE_FILE} nor {INDEX_FILE}; one of them is needed")
    weight_map = _read_weight_map(path / INDEX_FILE)
    left_out = leave_out(weight_map.keys())
    return SafetensorsFolder(path, _read_shards(path, _without(weight_map, left_out), left_out), left_out)


def read_config_json(path: Path) -> dict[str, Any]:
    """Returns the fields of `config.json` in the folder `path`; raises InputError if it is not a JSON object."""
    return read_json_object(path / CONFIG_FILE)


def resolve_checkpoint(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the checkpoint's folder: `name_or_path` itself where it is a folder, else the hub's `org/name`, fetched.

    Only safetensors, JSON and tokenizer files are fetched, into the hub's own cache. Raises InputError if there is
    neither, or the hub cannot be reached.
    """
    path, name = Path(name_or_path), os.fspath(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise InputError(f"{name}: is neither a folder nor a name of the form org/name on the Hugging Face hub")

    from huggingface_hub import snapshot_download  # here: its import takes half a second, and folders do not need it

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*", "tiktoken*"])
        )
    except Exception as error:  # the hub's client has no common base class for what can go wrong
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{name}: no such folder here, and fetching it from the Hugging Face hub failed ({reason}); "
            "give a checkpoint folder, or the org/name of a model that the hub lets you read"
        ) from error


def _read_weight_map(index_file: Path) -> dict[str, str]:
    """Returns the index's map from tensor name to file name, each a file in the index's folder."""
    weight_map = read_json_object(index_file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index_file}: lacks the object `weight_map` from tensor names to file names")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not 0 < len(shard.encode(errors="replace")) <= _MAX_FILE_NAME:
            raise InputError(f"{index_file}: gives tensor {tensor} the file {brief(shard)}, which is not a file name")
        if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise InputError(f"{index_file}: gives tensor {tensor} the file {shard}, which is outside the folder")
    return weight_map


def _without(values: Mapping[str, T], left_out: frozenset[str]) -> dict[str, T]:
    return {name: value for name, value in values.items() if name not in left_out}


def _read_shards(path: Path, weight_map: dict[str, str], left_out: frozenset[str]) -> dict[str, TensorInfo]:
    """Reads every shard's header and compares it with the index, in both directions."""
    tensors: dict[str, TensorInfo] = {}
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (path / shard).is_file():
            raise InputError(f"{path / INDEX_FILE}: names the file {shard}, which is not in the folder; fetch it too")
    for shard in shards:
        for name, info in _without(read_header(path / shard), left_out).items():
            if name in tensors:
                raise InputError(f"{path}: tensor {name} is in {tensors[name].file.name} and in {shard}; one is needed")
            if name not in weight_map:
                raise InputError(f"{path / shard}: holds tensor {name}, which {INDEX_FILE} does not list")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != path / shard:
            raise InputError(f"{path / shard}: does not hold tensor {name}, which {INDEX_FILE} says it does")
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns where the tensors of one safetensors file lie, once the safetensors library has found it sound.

    The library refuses byte ranges that overlap, leave gaps, disagree with shape and dtype, or do not end with the
    file; but it does not give the ranges away.
    """
    try:
        with file.open("rb") as stream:
            refuse_pointer(stream.read(len(POINTER)), file)
            stream.seek(0)
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise SafetensorError(f"header too large: {header_bytes} bytes, {MAX_HEADER_BYTES} are accepted")
            with safe_open(file, framework="numpy"):
                pass
            header = parse_json_object(stream.read(header_bytes), file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: is not a sound safetensors file ({error}); fetch or write it again") from error
    header.pop("__metadata__", None)
    return {name: _tensor_info(file, 8 + header_bytes, name, fields) for name, fields in header.items()}


def _tensor_info(file: Path, data_start: int, name: str, fields: Any) -> TensorInfo:
    dtype = fields.get("dtype") if isinstance(fields, dict) else None
    if not isinstance(dtype, str):  # the library takes lists for objects, and objects for names of dtypes
        raise InputError(f"{file}: tensor {name} is described by {brief(fields)}; an object with its dtype is needed")
    if dtype not in DTYPES:
        raise InputError(f"{file}: tensor {name} has dtype {dtype}; accepted are {', '.join(DTYPES)}")
    start, _ = fields["data_offsets"]
    info = TensorInfo(tuple(fields["shape"]), DTYPES[dtype], file, data_start + start)
    if len(info.shape) > _MAX_AXES or math.prod(size or 1 for size in info.shape) > _MAX_ELEMENTS:
        raise InputError(
            f"{file}: tensor {name} has shape {brief(list(info.shape))}; up to {_MAX_AXES} axes are accepted, and "
            f"{_MAX_ELEMENTS} elements where no axis is empty"
        )
    return info
