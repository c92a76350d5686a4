"""Folders and files that appear under their names whole or not at all.

Until it is whole, an output `NAME` lies beside its place as `.NAME.partial`, which the process that writes it keeps
locked: a process that finds it locked leaves it alone, one that finds it unlocked removes what a killed one left, or
goes on with it if it can.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moejax.errors import InputError, note

_NO_FOLDER = "no folder can be made in {parent} ({reason}); give a path in a folder that exists and can be written to"
_NO_FILE = "cannot be written ({reason}); give a file in a folder that exists"


def _never(_: Path) -> bool:
    return False


@contextmanager
def atomic_folder(output: Path, size: int = 0, is_resumable: Callable[[Path], bool] = _never) -> Iterator[Path]:
    """Yields the folder `.NAME.partial` beside `output`, which becomes `output` if the block succeeds and vanishes if
    not.

    If `is_resumable` says so of the folder, a failure leaves it, and another block finds it as it was left.

    Raises InputError, before the block runs, if `output` exists, is being written by another process, or its parent
    cannot be written to or has not `size` bytes free. OSErrors of the block that name no file, or one of the folder's,
    are raised naming `output`.
    """
    output = Path(os.path.abspath(output))
    with _partial(output, _begin_folder, _NO_FOLDER, is_resumable):
        require_space(output, size)
        yield partial_path(output)
        _sync_tree(partial_path(output))
        partial_path(output).rename(output)
    sync(output.parent)


@contextmanager
def atomic_file(output: Path) -> Iterator[BinaryIO]:
    """Yields a file open for writing, `.NAME.partial` beside `output`, which becomes `output` if the block succeeds and
    vanishes if not. Raises as `atomic_folder` does."""
    output = Path(os.path.abspath(output))
    with _partial(output, _begin_file, _NO_FILE) as descriptor:
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial_path(output).rename(output)
    sync(output.parent)


def write_text(output: Path, text: str) -> None:
    """Writes a text in UTF-8: a new file whole or not at all; into what is there already, be it a file, a link, a
    device or a pipe, as it is. OSErrors name `output`."""
    if not os.path.lexists(output):
        with atomic_file(output) as stream:
            stream.write(text.encode())
        return
    with naming(output):
        output.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """OSErrors of the block, which where a disk is full name no file, are raised naming `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def clear_folder(folder: Path, but: Collection[str] = ()) -> None:
    """Removes everything in `folder` but the entries of these names."""
    for entry in folder.iterdir():
        if entry.name not in but:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's own entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(output: Path) -> Path:
    """Where an output lies until it is whole."""
    return output.with_name(f".{output.name}.partial")


def require_free(output: Path, is_resumable: Callable[[Path], bool] = _never) -> None:
    """Raises the InputError that `atomic_folder` would: before the work whose result is to lie there. How much room
    there is, `require_space` says, once it is known how much is needed.

    What a killed process left is removed, unless it is resumable.
    """
    output = Path(os.path.abspath(output))
    if os.path.lexists(partial_path(output)):
        with _partial(output, _begin_folder, _NO_FOLDER, is_resumable):
            if not is_resumable(partial_path(output)):
                _remove(partial_path(output))
    _require_none(output)
    try:  # under another name, lest a process that is about to begin writing finds its own taken
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}").cleanup()
    except OSError as error:
        raise _refused(output, _NO_FOLDER, error) from error


def require_space(output: Path, size: int) -> None:
    """Raises InputError if the disk on which `output` is to lie has not `size` bytes free."""
    free = shutil.disk_usage(output.parent).free
    if size > free:
        raise InputError(
            f"{output}: {size} bytes are needed and {output.parent} has {free} free; "
            "make room, or give a path on another disk"
        )


@contextmanager
def _partial(
    output: Path, begin: Callable[[Path], int], refusal: str, is_resumable: Callable[[Path], bool] = _never
) -> Iterator[int]:
    """The descriptor of `.NAME.partial`, locked; unless it is resumable, it is empty, and gone after a failure."""
    _require_none(output)
    temporary = partial_path(output)
    try:
        descriptor = begin(temporary)
    except OSError as error:
        if os.path.lexists(temporary):
            raise InputError(
                f"{output}: {temporary} is in the way ({error.strerror}); remove it, or give another path"
            ) from error
        raise _refused(output, refusal, error) from error
    try:
        _lock(output, descriptor, is_resumable)
        try:
            _require_none(output)  # another process may have come to its end meanwhile
            yield descriptor
        except BaseException as error:  # an interrupt too
            if not is_resumable(temporary):
                _remove(temporary)
            if isinstance(error, OSError) and error.errno is not None and _is_within(error.filename, temporary):
                raise OSError(error.errno, error.strerror, str(output)) from error
            raise
    finally:
        os.close(descriptor)


def _require_none(output: Path) -> None:
    if os.path.lexists(output):
        raise InputError(f"{output}: exists already; give a path that is free")


def _refused(output: Path, refusal: str, error: OSError) -> InputError:
    return InputError(f"{output}: {refusal.format(parent=output.parent, reason=error.strerror)}")


def _begin_folder(path: Path) -> int:
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _begin_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _lock(output: Path, descriptor: int, is_resumable: Callable[[Path], bool]) -> None:
    """Locks `.NAME.partial` and empties it, unless it is resumable. Raises InputError if another process has it."""
    temporary = partial_path(output)
    in_use = InputError(
        f"{output}: another process is writing it, in {temporary}; wait for its end, or give another path"
    )
    is_locked = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise in_use from None
    except OSError:  # some network file systems have no locks
        is_locked = False
    if not _is_same(descriptor, temporary):  # its process renamed or removed it before this one had the lock
        raise in_use
    if not _is_empty(temporary):
        if not is_locked:
            raise InputError(
                f"{output}: another process is writing it, or one was killed, in {temporary}, which cannot be locked "
                "there; remove that if none is at work"
            )
        if not is_resumable(temporary):
            note(f"{temporary}, which a process that was killed left half-written, is removed")
            _empty(temporary, descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


def _empty(path: Path, descriptor: int) -> None:
    clear_folder(path) if path.is_dir() else os.ftruncate(descriptor, 0)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_within(file: object, folder: Path) -> bool:
    return file is None or (isinstance(file, str | os.PathLike) and Path(file).is_relative_to(folder))


def _sync_tree(folder: Path) -> None:
    """Waits until everything in `folder`, and its own entries, are on the disk.

    In threads, because file systems commit what waits together in one go (measured: 20 times faster).
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(sync, [folder, *folder.rglob("*")]))
