"""Arrays that a job needs again later: in memory as long as they fit, else in files that go when nobody needs them."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checkpoint.atomic import naming
from moejax.errors import note


@dataclass(frozen=True, eq=False)
class OnDisk:
    """An array in a file, which is removed with this."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.array(np.memmap(self.file, self.dtype, "r", shape=self.shape)[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Not mapped, since mapped pages count as the process's own memory as long as it is.
        return np.fromfile(self.file, self.dtype).reshape(self.shape).astype(dtype or self.dtype, copy=False)


class Shelf:
    """Puts arrays away: `most_bytes` of them at a time stay as they are, others lie in a folder."""

    def __init__(self, most_bytes: int, folder: Path):
        self._bytes_left, self._folder, self._numbers = most_bytes, folder, count()

    def put(self, array: jax.Array) -> jax.Array | OnDisk:
        """The array, or where it lies. Raises OSError, naming the file, where the disk does not take it."""
        size = array.size * array.dtype.itemsize
        if size <= self._bytes_left:
            self._bytes_left -= size
            weakref.finalize(array, self._give_back, size)
            return array
        file = self._folder / f"{next(self._numbers)}.bin"
        with naming(file):
            np.asarray(array).tofile(file)
        kept = OnDisk(file, array.shape, np.dtype(array.dtype))
        weakref.finalize(kept, file.unlink, missing_ok=True)
        return kept

    def _give_back(self, size: int) -> None:
        self._bytes_left += size


def remove_left(output: Path) -> None:
    """Removes the folders beside `output` that shelves of killed processes have left, which nobody has locked; a note
    says so."""
    for other in [own for own in _folder(output).iterdir() if own.name.startswith(_prefix(output))]:
        with contextlib.suppress(FileNotFoundError), _locked(other) as is_own:  # its process may remove it meanwhile
            if is_own:
                note(f"{other}, which a process that was killed left, is removed")
                shutil.rmtree(other, ignore_errors=True)


@contextmanager
def shelf_beside(output: Path, most_bytes: int) -> Iterator[Shelf]:
    """A shelf in a folder `.NAME.states-*` beside `output`, its own and locked, which is removed behind."""
    with naming(_folder(output)):
        folder = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=_folder(output)))
    with _locked(folder):
        try:
            yield Shelf(most_bytes, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _folder(output: Path) -> Path:
    return Path(os.path.abspath(output)).parent


def _prefix(output: Path) -> str:
    return f".{Path(os.path.abspath(output)).name}.states-"


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder to itself; not where another one has, or where there are no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
