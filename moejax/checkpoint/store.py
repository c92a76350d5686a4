"""The native store: `items/<item>/<leaf>`, one orbax item per name, one file of raw bytes per chunk of a leaf.

Without OCDBT and compression an item's bytes are a function of its leaves alone, and plain orbax restores it:
`ocp.PyTreeCheckpointer().restore(folder / "items" / item)`. Orbax does not write it, because it cannot be told the
chunks: those of its arrays follow the mesh they lie on, those of NumPy's are gathered by one process. Format:
https://zarr-specs.readthedocs.io (version 2), and orbax's `_METADATA`.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from moejax.checkpoint.atomic import atomic_folder, partial_path, sync
from moejax.checkpoint.chunks import StoredArray, grid_of
from moejax.checkpoint.held import Held
from moejax.checkpoint.json_file import read_json_object
from moejax.errors import InputError, InternalError
from moejax.sharding import ALONE, Crew

ITEMS_FOLDER = "items"
_TREE_FILE = "_METADATA"
_ARRAY_FILE = ".zarray"

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


def write_item(
    folder: Path, name: str, leaves: Mapping[str, np.ndarray | jax.Array], crew: Crew = ALONE
) -> dict[str, str]:
    """Writes `leaves` as the item `name` of the store in `folder`; returns the checksums of their chunks, one behind
    another. The item appears whole or not at all. The processes of a crew write it together, each what it holds.

    It takes `item_bytes(leaves)` bytes. Raises InputError if the item exists, ValueError as `item_bytes` does, OSError
    if it cannot be written, and InternalError if it takes other bytes.
    """
    _check_name(name)
    size, item = item_bytes(leaves), folder / ITEMS_FOLDER / name
    if not crew.is_first:
        crew.meet()  # the folder is there
        checksums = _write_chunks(partial_path(item), leaves, crew)
        crew.meet()
        return checksums
    (folder / ITEMS_FOLDER).mkdir(exist_ok=True)
    with atomic_folder(item) as temporary:
        if shutil.disk_usage(temporary).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
        for leaf in leaves:
            (temporary / leaf).mkdir()
        crew.meet()
        checksums = _write_chunks(temporary, leaves, crew)
        for file, content in _descriptions(leaves).items():
            (temporary / file).write_bytes(content)
        check_written(f"item {name}", folder_bytes(temporary), size)
    crew.meet()
    return checksums


def _write_chunks(item: Path, leaves: Mapping[str, np.ndarray | jax.Array], crew: Crew) -> dict[str, str]:
    """Writes what this process holds; returns the checksums of all chunks, by leaf."""
    own: list[tuple[str, int, str]] = []
    for leaf, array in leaves.items():
        held = Held(array, crew)
        for number in held.own_chunks:
            file, content, checksum = held.chunk(number)
            (item / leaf / file).write_bytes(content)
            if not crew.is_first:
                sync(item / leaf / file)  # which the first, that writes the folder, may not be able to
            own.append((leaf, number, checksum))
    every = sorted(tuple(one) for process in crew.heard(own) for one in process)
    return {leaf: "".join(checksum for name, _, checksum in every if name == leaf) for leaf in leaves}


def check_written(what: str, found: int, predicted: int) -> None:
    """Raises InternalError if the bytes written are not those predicted."""
    if found != predicted:
        raise InternalError(f"{what} takes {found} bytes and was predicted to take {predicted}; nothing was written")


def read_item(folder: Path, name: str, names: Collection[str] | None = None) -> dict[str, StoredArray]:
    """Returns the leaves of the item `name`, of which nothing is read yet.

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
    return {leaf: _stored(item / leaf) for leaf in sorted(expected)}


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
        files == len(_descriptions(leaves)) + sum(len(array.files) for array in arrays.values())
        and {leaf: array.checksums() for leaf, array in arrays.items()} == checksums
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
        "chunks": list(grid_of(shape, dtype).chunk_shape),
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
        raise InputError(f"{file}: lacks the object `tree_metadata`; the file as it was written is needed")
    return {key.removeprefix("('").removesuffix("',)") for key in tree}


def _stored(leaf: Path) -> StoredArray:
    """A leaf, after comparing its chunks' sizes with its description."""
    shape, dtype = _read_array_fields(leaf / _ARRAY_FILE)
    stored = StoredArray(leaf, shape, dtype)
    stored.check_sizes()
    return stored


def _read_array_fields(file: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    fields = read_json_object(file)
    shape: Any = fields.get("shape")
    dtype = _DTYPES.get(str(fields.get("dtype")))
    is_shape = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if is_shape and dtype is not None and fields | _array_fields(tuple(shape), dtype) == fields:
        return tuple(shape), dtype
    raise InputError(f"{file}: does not describe uncompressed chunks of a known dtype on the native store's grid")
