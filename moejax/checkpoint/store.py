"""The native store: `items/<item>/<leaf>`, one orbax item per name, one file of raw bytes per leaf.

Without OCDBT and compression, and with one zarr chunk per leaf, an item's size is a function of its leaves' names,
shapes and dtypes only, and a leaf can be memory-mapped. Orbax writes the items, so plain orbax restores them:
`ocp.PyTreeCheckpointer().restore(folder / "items" / item)`. Format: https://zarr-specs.readthedocs.io (version 2).
"""

import errno
import functools
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from moejax.checkpoint.atomic import atomic_folder
from moejax.checkpoint.json_file import read_json_object
from moejax.errors import InputError, InternalError

ITEMS_FOLDER = "items"
_TREE_FILE = "_METADATA"
_ARRAY_FILE = ".zarray"
# Seconds that a write which goes on after another one failed is waited for.
_LONGEST_WRITE = 10.0

_DTYPES: dict[str, np.dtype[Any]] = {np.dtype(code).str: np.dtype(code) for code in "?bBhHiIqQefd"} | {
    np.dtype(scalar).name: np.dtype(scalar)
    for scalar in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ArrayLike(Protocol):
    """What has a shape and a dtype: a NumPy or JAX array, or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def write_item(folder: Path, name: str, leaves: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Writes `leaves` as the item `name` of the store in `folder`; the item appears whole or not at all.

    It takes `item_bytes(leaves)` bytes. Raises InputError if the item exists, ValueError as `item_bytes` does, OSError
    if it cannot be written, and InternalError if it takes other bytes.
    """
    _check_name(name)
    size = item_bytes(leaves)
    arrays = {leaf: np.asarray(array) for leaf, array in leaves.items()}
    (folder / ITEMS_FOLDER).mkdir(exist_ok=True)
    with atomic_folder(folder / ITEMS_FOLDER / name) as temporary:
        if shutil.disk_usage(temporary).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
        with _failing_once(temporary):
            _handler().save(epath.Path(temporary), args=ocp.args.PyTreeSave(arrays))
        check_written(f"item {name}", folder_bytes(temporary), size)


def check_written(what: str, found: int, predicted: int) -> None:
    """Raises InternalError if the bytes written are not those predicted."""
    if found != predicted:
        raise InternalError(f"{what} takes {found} bytes and was predicted to take {predicted}; nothing was written")


def read_item(folder: Path, name: str, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the leaves of the item `name` as read-only arrays over memory maps.

    With `names`, the item must have exactly these leaves; without, those that it lists itself. Raises InputError if the
    item or a leaf is missing, a leaf is there that should not be, or a leaf's files are damaged or truncated.
    """
    item = folder / ITEMS_FOLDER / name
    if not item.is_dir():
        raise InputError(f"{folder}: has no item {name}; the folder {item} is needed")
    listed = _listed_leaves(item / _TREE_FILE)
    expected = listed if names is None else set(names)
    present = {entry.name for entry in item.iterdir()} - {_TREE_FILE}
    for leaf in sorted(expected):
        if leaf not in present & listed:
            raise InputError(f"{item}: leaf {leaf} is missing; a complete item is needed")
    for leaf in sorted(present | listed):
        if leaf not in expected:
            raise InputError(f"{item}: leaf {leaf} does not belong there; an item with only its own leaves is needed")
    return {leaf: _map_leaf(item / leaf) for leaf in sorted(expected)}


def is_whole(folder: Path, name: str, leaves: Mapping[str, ArrayLike], checksums: Mapping[str, str]) -> bool:
    """Returns whether the item `name` is byte for byte what `write_item` makes of leaves of these names, shapes, dtypes
    and checksums."""
    item = folder / ITEMS_FOLDER / name
    try:
        arrays = read_item(folder, name, leaves)
        check_descriptions(folder, name, leaves)
    except InputError:
        return False
    files = sum(file.is_file() for file in item.rglob("*"))
    return (
        files == len(_descriptions(leaves)) + len(leaves)
        and {leaf: checksum(array) for leaf, array in arrays.items()} == checksums
    )


def check_descriptions(folder: Path, name: str, leaves: Mapping[str, ArrayLike]) -> int:
    """Returns the bytes of what describes the arrays of the item `name`. Raises InputError, naming the file, if one is
    not byte for byte what `write_item` writes beside leaves of these names, shapes and dtypes."""
    described = _descriptions(leaves)
    for file, content in described.items():
        path = folder / ITEMS_FOLDER / name / file
        if not path.is_file() or path.read_bytes() != content:
            raise InputError(f"{path}: is not what was written there; copy it anew")
    return sum(map(len, described.values()))


def item_bytes(leaves: Mapping[str, ArrayLike]) -> int:
    """Returns the bytes of all files of an item with these leaves: the arrays' plus what describes them.

    Raises ValueError for what cannot be stored: no leaf at all, an array of size zero, a dtype that zarr has no name
    for, a name that is no file name.
    """
    _check_leaves(leaves)
    return payload_bytes(leaves) + sum(map(len, _descriptions(leaves).values()))


def payload_bytes(leaves: Mapping[str, ArrayLike]) -> int:
    """Returns the bytes of the arrays alone."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())


def folder_bytes(path: Path) -> int:
    """Returns the sizes of all files under `path`, summed."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def checksum(array: np.ndarray | jax.Array) -> str:
    """Returns the CRC-32 of the array's bytes in row-major order, as 8 hexadecimal digits."""
    return bytes_checksum(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def bytes_checksum(content: bytes | memoryview) -> str:
    """Returns their CRC-32, as 8 hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


@contextmanager
def _failing_once(folder: Path) -> Iterator[None]:
    """Raises as OSError what the threads of orbax and tensorstore that write to `folder` fail with, none of which
    prints it beside. After a failure or an interrupt they are waited for: no file appears after that."""
    show = sys.unraisablehook
    sys.unraisablehook = _but_for_closed_loops(show)
    try:
        yield
    except BaseException as error:  # the hook stays, since some come late
        _wait_for_writers(folder)
        if isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error)):  # tensorstore's, whatever went wrong
            code = re.search(r"os_error_code='(\d+)'", str(error))
            number, reason = (int(code[1]), os.strerror(int(code[1]))) if code else (errno.EIO, str(error))
            raise OSError(number, reason, str(folder)) from error
        raise
    sys.unraisablehook = show


def _but_for_closed_loops(show: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """After one leaf's failure orbax closes the loop to which tensorstore reports the others: each would be shown."""

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    return show_others


def _wait_for_writers(folder: Path) -> None:
    """tensorstore writes a file under a name of its own that ends in `.__lock` while it is at it."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            thread.join()
    end = time.monotonic() + _LONGEST_WRITE
    while any(folder.rglob("*.__lock")) and time.monotonic() < end:
        time.sleep(0.01)


@functools.cache
def _handler() -> ocp.PyTreeCheckpointHandler:
    """The part of orbax that writes one item.

    The handler alone, because a `Checkpointer` around it adds its own temporary folder, files with timestamps and the
    folder's path, and warnings about the OCDBT files that are not there. NumPy arrays alone, because `jax.Array` leaves
    bring further files that describe shardings; not copied before writing, because nobody changes them meanwhile. What
    its threads and loops log is what `save` raises.
    """
    logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in str(record.msg))
    logging.getLogger("asyncio").addFilter(lambda record: ".partial/" not in str(record.msg))
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.get_type_handler(jax.Array)),  # unused, but orbax warns where it is missing
    )
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):  # 255 bytes is the usual limit of file systems
        raise ValueError(
            f"the name {name!r} cannot be stored; up to 200 letters, digits and, but not first, '.', '_' and '-' can"
        )


def _check_leaves(leaves: Mapping[str, ArrayLike]) -> None:
    if not leaves:
        raise ValueError("an item without leaves cannot be stored; it needs at least one")
    for name, leaf in leaves.items():
        _check_name(name)
        if np.dtype(leaf.dtype) not in _DTYPE_NAMES:
            raise ValueError(f"leaf {name}: dtype {leaf.dtype} cannot be stored; {', '.join(_DTYPES)} can")
        if math.prod(leaf.shape) == 0:
            raise ValueError(f"leaf {name}: shape {leaf.shape} has no elements and cannot be stored; others can")


def _descriptions(leaves: Mapping[str, ArrayLike]) -> dict[str, bytes]:
    """The content of an item's files but for the arrays', by their paths within it."""
    arrays = {name: _array_fields(leaf.shape, np.dtype(leaf.dtype)) for name, leaf in leaves.items()}
    return {_TREE_FILE: json.dumps(_tree_fields(sorted(leaves))).encode()} | {
        f"{name}/{_ARRAY_FILE}": json.dumps(fields, separators=(",", ":")).encode() for name, fields in arrays.items()
    }


def _array_fields(shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, Any]:
    """The content of a leaf's `.zarray`, in the order in which it is written there."""
    return {
        "chunks": list(shape),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _DTYPE_NAMES[dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }


def _tree_fields(names: Collection[str]) -> dict[str, Any]:
    """The content of an item's `_METADATA`, in which the leaves are sorted."""
    dict_key = 2
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    return {
        "tree_metadata": {
            str((name,)): {"key_metadata": [{"key": name, "key_type": dict_key}], "value_metadata": value}
            for name in names
        },
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _listed_leaves(file: Path) -> set[str]:
    """Returns the names in an item's `_METADATA`, whose keys are `str((name,))`."""
    tree = read_json_object(file).get("tree_metadata")
    if not isinstance(tree, dict):
        raise InputError(f"{file}: lacks the object `tree_metadata`; the file as orbax wrote it is needed")
    return {key.removeprefix("('").removesuffix("',)") for key in tree}


def _map_leaf(leaf: Path) -> np.ndarray:
    """Maps the single chunk of a leaf into memory, after comparing its size with the leaf's description."""
    shape, dtype = _read_array_fields(leaf / _ARRAY_FILE)
    chunk = leaf / (".".join("0" * len(shape)) or "0")
    needed = math.prod(shape) * dtype.itemsize
    found = chunk.stat().st_size if chunk.is_file() else 0
    if found != needed:
        raise InputError(f"{chunk}: has {found} bytes where leaf {leaf.name} of {dtype} {list(shape)} needs {needed}")
    return np.asarray(np.memmap(chunk, np.uint8, "r")).view(dtype).reshape(shape)


def _read_array_fields(file: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    fields = read_json_object(file)
    shape: Any = fields.get("shape")
    dtype = _DTYPES.get(str(fields.get("dtype")))
    is_shape = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if is_shape and dtype is not None and fields | _array_fields(tuple(shape), dtype) == fields:
        return tuple(shape), dtype
    raise InputError(f"{file}: does not describe one uncompressed chunk of a known dtype, as the native store needs")
