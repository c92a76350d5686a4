"""What a model predicted of a text, in one safetensors file, so that others can be compared with it again and again.

states      (N, S, D) what the head takes at the S scored positions of N chunks of T tokens, S = T-1 - T/2
tokens      int32 (N, T), the chunks
head.<n>    the arrays of the head's leaf (C, D)

The states, not log-probabilities: with the head they give the very log-probabilities back, and D numbers a token are
less than C. Of DeepSeek-V3 (D 7168, C 129280) a hundred chunks of 512 tokens take 0.7 GB instead of 13 GB, and the head
1.9 GB. The metadata tells format and version, the head's format and shape, the checkpoint's path, and the text's source
and SHA-256.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from safetensors import safe_open

from moejax.checkpoint.atomic import atomic_file, require_space
from moejax.checkpoint.chunks import bytes_of
from moejax.checkpoint.safetensors_folder import DTYPES, TensorInfo, read_header
from moejax.checkpoint.store import payload_bytes
from moejax.errors import InputError
from moejax.formats import Leaf, abstract_leaf, describe

_FORMAT, _VERSION = "moejax predictions", "1"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class BaseOrigin:
    """Whose predictions of what: the checkpoint's path, the text's source and the SHA-256 of its UTF-8."""

    checkpoint: str
    text: str
    text_sha256: str


@dataclass(frozen=True)
class SavedStates:
    """The states (N, S, D) in the file: a slice of chunks is read when it is asked for."""

    info: TensorInfo

    def __getitem__(self, chunks: slice) -> np.ndarray:
        return self.info.load(chunks)


@dataclass(frozen=True)
class SavedPredictions:
    """An opened and checked file of predictions; states and head are read when they are asked for."""

    path: Path
    origin: BaseOrigin
    tokens_NT: np.ndarray
    states_NSD: SavedStates
    head_spec: str
    tensors: dict[str, TensorInfo]

    @property
    def dtype(self) -> str:
        """What the states were computed in."""
        return self.states_NSD.info.dtype.name

    def head(self) -> Leaf:
        """The head's leaf (C, D), bit for bit."""
        arrays, structure = jax.tree.flatten(abstract_leaf(self.head_spec))
        own = (self.tensors[f"head.{n}"] for n in range(len(arrays)))
        return jax.tree.unflatten(structure, [jax.device_put(info.load()) for info in own])


@contextmanager
def saved_predictions(
    path: Path, origin: BaseOrigin, tokens_NT: np.ndarray, head: Callable[[], Leaf], dtype: jax.typing.DTypeLike
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a file of predictions: the block is given a function that takes all states (N, S, D) in `dtype`, in order
    of the chunks and as many chunks at a time as it is given. The head is asked for once and not kept. The file appears
    whole or not at all.

    Raises InputError, before the block runs, if `path` exists, cannot be written or needs more bytes than are free.
    """
    with atomic_file(path) as stream:
        states = _write_beginning(path, stream, origin, tokens_NT, head(), np.dtype(dtype))
        end = stream.tell() + math.prod(states.shape) * states.dtype.itemsize

        def append(states_BSD: np.ndarray) -> None:
            if states_BSD.dtype != states.dtype or states_BSD.shape[1:] != states.shape[1:]:
                raise ValueError(f"states of {states_BSD.dtype}{states_BSD.shape} came where {states} are expected")
            stream.write(bytes_of(np.ascontiguousarray(states_BSD)))

        yield append
        if stream.tell() != end:
            raise ValueError(f"{stream.tell() - end:+} bytes of states came to those that {states} takes")


def _write_beginning(
    path: Path, stream: BinaryIO, origin: BaseOrigin, tokens_NT: np.ndarray, head: Leaf, dtype: np.dtype[Any]
) -> jax.ShapeDtypeStruct:
    """Everything before the states, if they fit the disk too; returns their shape and dtype."""
    count, length = tokens_NT.shape
    states = jax.ShapeDtypeStruct((count, length - 1 - length // 2, head.shape[-1]), dtype)
    arrays = {f"head.{n}": np.asarray(array) for n, array in enumerate(jax.tree.leaves(head))}
    arrays["tokens"] = tokens_NT.astype(np.int32)
    metadata = {"format": _FORMAT, "version": _VERSION, "head": describe(head), **asdict(origin)}
    header = _header(arrays | {"states": states}, metadata)
    require_space(path, len(header) + payload_bytes(arrays | {"states": states}))
    stream.write(header)
    for array in arrays.values():
        stream.write(bytes_of(np.ascontiguousarray(array)))
    return states


def open_predictions(path: Path) -> SavedPredictions:
    """Open a file that `saved_predictions` wrote. Raises InputError if it is not one, or damaged."""
    tensors = read_header(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
        raise InputError(f"{path}: holds no predictions of version {_VERSION}; a file that --save-base wrote is needed")
    try:
        origin = BaseOrigin(metadata["checkpoint"], metadata["text"], metadata["text_sha256"])
        spec, tokens, states = metadata["head"], tensors["tokens"], tensors["states"]
        found = [(info.shape, info.dtype) for info in (tensors[f"head.{n}"] for n in range(len(tensors) - 2))]
        head = abstract_leaf(spec)
        (count, length), (_, width) = tokens.shape, head.shape
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: is damaged ({error}); a file that --save-base wrote is needed") from None
    scored = (count, length - 1 - length // 2, width)
    if (
        states.shape != scored
        or tokens.dtype != np.int32
        or found != [(a.shape, a.dtype) for a in jax.tree.leaves(head)]
    ):
        raise InputError(f"{path}: is damaged (its tensors disagree); a file that --save-base wrote is needed")
    return SavedPredictions(path, origin, tokens.load(), SavedStates(states), spec, tensors)


def _header(arrays: dict[str, Any], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + math.prod(array.shape) * array.dtype.itemsize
        dtype = _DTYPE_NAMES[np.dtype(array.dtype)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
