"""An array in files: cut along its outputs into chunks, on a grid that its shape alone decides.

Whoever holds a part of an array can write and check that part, whatever mesh it lies on, and the files are the same.
The file of chunk n is named by its place in the grid, `n.0` of a matrix cut into rows, as zarr has it.
"""

import contextlib
import math
import mmap
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moejax.checkpoint.atomic import naming
from moejax.errors import InputError

# An array has a power of two of chunks: as many as a host has devices, but none of less than a megabyte.
MOST_CHUNKS = 8
_LEAST_BYTES = 1 << 20

# Bytes from which on pages of two megabytes are asked for.
_LARGE_PAGES = 8 << 20
_ALIGNMENT = 64

Index = tuple[slice, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """How an array is cut: along `axis`, into `count` equal chunks."""

    shape: tuple[int, ...]
    axis: int
    count: int

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        own = list(self.shape)
        if own:
            own[self.axis] //= self.count
        return tuple(own)

    def file_name(self, chunk: int) -> str:
        return ".".join(str(chunk if axis == self.axis else 0) for axis in range(len(self.shape))) or "0"

    def index(self, chunk: int) -> Index:
        """Which part of the array a chunk is."""
        size = self.chunk_shape[self.axis] if self.shape else 0
        own = slice(chunk * size, (chunk + 1) * size)
        return tuple(own if axis == self.axis else slice(0, n) for axis, n in enumerate(self.shape))


def grid_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Grid:
    """Matrices (O, ...) are cut along O; what has more axes, such as experts (E, O, ...), along its second."""
    axis = 1 if len(shape) > 2 else 0
    size = math.prod(shape) * dtype.itemsize
    count = MOST_CHUNKS if len(shape) > 1 else 1
    while count > 1 and (shape[axis] % count or size // count < _LEAST_BYTES):
        count //= 2
    return Grid(shape, axis, count)


def bytes_checksum(content: bytes | memoryview) -> str:
    """The CRC-32 of some bytes, as 8 hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


@dataclass(frozen=True)
class StoredArray:
    """An array of which every chunk is a file in `folder`; nothing of it is in memory."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def grid(self) -> Grid:
        return grid_of(self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def files(self) -> list[Path]:
        return [self.folder / self.grid.file_name(chunk) for chunk in range(self.grid.count)]

    def check_sizes(self) -> None:
        """Raises InputError, naming the file, where a chunk is missing or has not its bytes."""
        needed = self.nbytes // self.grid.count
        for file in self.files:
            found = file.stat().st_size if file.is_file() else 0
            if found != needed:
                raise InputError(
                    f"{file}: has {found} bytes where leaf {self.folder.name} of {self.dtype} {list(self.shape)} needs "
                    f"{needed}"
                )

    def read(self, index: Index | None = None) -> tuple[np.ndarray, dict[int, str]]:
        """A part of the array, begun where JAX on a CPU takes it over without a copy, and the checksum of every chunk
        that the part lies in, all of whose bytes are read.

        Raises InputError, naming the file, if one is shorter than it should be, and OSError if one cannot be read.
        """
        given = index or (slice(None),) * len(self.shape)
        bounds = tuple(slice(*own.indices(n)[:2]) for own, n in zip(given, self.shape, strict=True))
        part = aligned(tuple(own.stop - own.start for own in bounds), self.dtype)
        touched = [
            chunk
            for chunk in range(self.grid.count)
            if all(a.start < b.stop and b.start < a.stop for a, b in zip(self.grid.index(chunk), bounds, strict=True))
        ]
        return part, dict(zip(touched, _of_each(lambda own: self._read_chunk(own, bounds, part), touched), strict=True))

    def checksums(self) -> str:
        """Of every chunk, one behind another, with little of them in memory. Raises OSError, naming the file, if one
        cannot be read."""
        return "".join(_of_each(_file_checksum, self.files))

    def _read_chunk(self, chunk: int, bounds: Index, part: np.ndarray) -> str:
        """What of a chunk lies within the bounds into their part, and the chunk's checksum. For every place before the
        axis that is cut, the chunk's bytes are one run."""
        grid, file = self.grid, self.folder / self.grid.file_name(chunk)
        axis, run_shape = grid.axis, grid.chunk_shape[grid.axis :]
        if not self.shape:
            bounds, part, run_shape = (slice(0, 1),), part.reshape(1), (1,)
        first, last = chunk * run_shape[0], (chunk + 1) * run_shape[0]
        start, stop = max(first, bounds[axis].start), min(last, bounds[axis].stop)
        rows, into = slice(start - first, stop - first), slice(start - bounds[axis].start, stop - bounds[axis].start)
        scratch, checksum = np.empty(run_shape, self.dtype), 0
        with naming(file), file.open("rb", buffering=0) as stream:
            for place in np.ndindex(*self.shape[:axis]):
                inside = tuple(n - own.start for n, own in zip(place, bounds, strict=False))
                is_wanted = all(b.start <= n < b.stop for n, b in zip(place, bounds, strict=False))
                target = part[inside][into] if is_wanted else None
                run = scratch if target is None or target.shape != scratch.shape else target
                _fill(run, stream, file)
                checksum = zlib.crc32(bytes_of(run), checksum)
                if target is not None and run is scratch:
                    target[...] = scratch[(rows, *bounds[axis + 1 :])]
        return f"{checksum:08x}"


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array to be filled and given away: begun where JAX on a CPU wants it, or it would copy it, and in large pages
    where it has some and the system gives them, or making its memory would take as long as reading it."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE_PAGES:
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + size].view(dtype).reshape(shape)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system may be without
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


def _of_each(work: Callable[[T], str], chunks: Sequence[T]) -> list[str]:
    """What work gives for every chunk, several of them at once."""
    if len(chunks) == 1:
        return [work(chunks[0])]
    with ThreadPoolExecutor(max_workers=MOST_CHUNKS) as pool:
        return list(pool.map(work, chunks))


def bytes_of(array: np.ndarray) -> memoryview:
    """Of a contiguous array, its own."""
    return array.reshape(-1).view(np.uint8).data


def _fill(array: np.ndarray, stream: FileIO, file: Path) -> None:
    left = bytes_of(array)
    while left:
        taken = stream.readinto(left)
        if not taken:
            raise InputError(f"{file}: ends {len(left)} bytes too early; copy it anew")
        left = left[taken:]


def _file_checksum(file: Path) -> str:
    checksum = 0
    with naming(file), file.open("rb", buffering=0) as stream:
        while piece := stream.read(_LEAST_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"
