import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from moejax.checkpoint.atomic import (
    atomic_file,
    atomic_folder,
    clear_folder,
    partial_path,
    require_free,
    require_space,
    write_text,
)
from moejax.errors import InputError, Note

Atomic = Callable[[Path], AbstractContextManager[Any]]
BOTH = pytest.mark.parametrize("atomic", [atomic_folder, atomic_file])


def test_atomic_folder_appears_when_done(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as temporary:
        assert temporary.parent == tmp_path
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("text")
        assert not (tmp_path / "out").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "sub" / "file").read_text() == "text"


def test_atomic_folder_takes_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_folder(Path("out")):
        os.chdir("/")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_folder_vanishes_on_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("text")
        raise error
    assert not list(tmp_path.iterdir())


def test_atomic_folder_refuses_what_exists(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link", "folder/.", "folder/.."):
        with pytest.raises(InputError, match="exists already"), atomic_folder(tmp_path / name):
            pytest.fail("the block must not run")
    assert len(list(tmp_path.iterdir())) == 3


def test_atomic_folder_refuses_a_parent_that_cannot_take_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for output in (tmp_path / "missing" / "out", tmp_path / "file" / "out", tmp_path / ("a" * 250)):
        with pytest.raises(InputError, match="no folder can be made in"), atomic_folder(output):
            pytest.fail("the block must not run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_atomic_file_appears_when_done(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "out") as stream:
        stream.write(b"text")
        assert [entry.name for entry in tmp_path.iterdir()] == [".out.partial"]
    assert (tmp_path / "out").read_bytes() == b"text"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_file_gets_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with atomic_file(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


@BOTH
def test_what_fails_leaves_nothing_and_names_the_output(tmp_path: Path, atomic: Atomic) -> None:
    partial = tmp_path / ".out.partial"
    for named in (None, str(partial), str(partial / "sub" / "file")):
        with pytest.raises(OSError, match="No space left on device") as error, atomic(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), named)
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "out"))
        assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="source") as error, atomic(tmp_path / "out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "source"))
    assert error.value.filename == str(tmp_path / "source")


@BOTH
def test_a_disk_that_takes_no_more(tmp_path: Path, atomic: Atomic) -> None:
    """In a process of its own, which may write no file over 1000 bytes."""
    program = f"""
import resource, signal
from pathlib import Path
from moejax.checkpoint.atomic import {atomic.__name__} as atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    with atomic(Path({str(tmp_path / "out")!r})) as place:
        (place / "file").write_bytes(bytes(2000)) if isinstance(place, Path) else place.write(bytes(20000))
except OSError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{tmp_path / 'out'}'\n"
    assert not list(tmp_path.iterdir())


def begin_and_die(output: Path, atomic: Atomic) -> None:
    """A process that is killed, by `kill -9`, while it writes."""
    program = f"""
import os, signal
from pathlib import Path
from moejax.checkpoint.atomic import {atomic.__name__} as atomic
with atomic(Path({str(output)!r})) as place:
    if isinstance(place, Path):
        (place / "sub").mkdir()
        (place / "sub" / "half").write_text("half")
        (place / "link").symlink_to({str(output.parent / "elsewhere")!r})
    else:
        place.write(b"half of a text")
        place.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode < 0 and not ran.stderr


@BOTH
def test_what_a_killed_process_left_is_named_and_removed(tmp_path: Path, atomic: Atomic) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    begin_and_die(tmp_path / "out", atomic)
    assert partial_path(tmp_path / "out").exists()
    with (
        pytest.warns(Note, match=r"\.out\.partial, which a process that was killed left half-written, is removed"),
        atomic(tmp_path / "out") as place,
    ):
        if isinstance(place, Path):
            assert not list(place.iterdir())
    assert partial_path(tmp_path / "out").exists() is False
    assert (tmp_path / "out").is_dir() or (tmp_path / "out").read_bytes() == b""
    assert (tmp_path / "elsewhere" / "kept").exists()


def has_half(folder: Path) -> bool:
    return (folder / "sub" / "half").exists()


def test_what_is_resumable_is_gone_on_with(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    begin_and_die(output, atomic_folder)
    for n in range(2):
        with pytest.raises(RuntimeError), atomic_folder(output, is_resumable=has_half) as temporary:
            assert (temporary / "sub" / "half").read_text() == "half" and (temporary / "0").exists() == (n > 0)
            (temporary / str(n)).touch()
            raise RuntimeError
    with atomic_folder(output, is_resumable=has_half):
        pass
    assert sorted(path.name for path in output.iterdir()) == ["0", "1", "link", "sub"]


def test_what_is_not_resumable_is_removed(tmp_path: Path) -> None:
    begin_and_die(tmp_path / "out", atomic_folder)
    with (
        pytest.raises(RuntimeError),
        pytest.warns(Note, match="left half-written, is removed"),
        atomic_folder(tmp_path / "out", is_resumable=lambda folder: (folder / "other").exists()) as temporary,
    ):
        assert not list(temporary.iterdir())
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_clear_folder_keeps_what_is_named(tmp_path: Path) -> None:
    for name in ("kept", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "file").touch()
    clear_folder(tmp_path, but=["kept"])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept" / "file").exists()


def test_it_is_removed_before_the_work_already(tmp_path: Path) -> None:
    begin_and_die(tmp_path / "out", atomic_folder)
    with pytest.warns(Note, match="left half-written, is removed"):
        require_free(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    require_free(tmp_path / "out")


@BOTH
def test_two_writers_of_one_output(tmp_path: Path, atomic: Atomic) -> None:
    output = tmp_path / "out"
    refusal = rf"{output}: another process is writing it, in {partial_path(output)}; wait for its end, or give another"
    with atomic(output) as place:
        if isinstance(place, Path):
            (place / "file").write_text("first")
            with pytest.raises(InputError, match=refusal):
                require_free(output)
        with pytest.raises(InputError, match=refusal), atomic(output):
            pytest.fail("the block must not run")
        if isinstance(place, Path):
            assert (place / "file").read_text() == "first"
    assert output.exists() and not partial_path(output).exists()


@BOTH
def test_one_that_ends_between_another_ones_looks(
    tmp_path: Path, atomic: Atomic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has seen no output and opened what the first then renames."""
    first = atomic(tmp_path / "out")
    first.__enter__()
    lock = fcntl.flock

    def lock_after_the_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.__exit__(None, None, None)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_after_the_first)
    with pytest.raises(InputError, match="another process is writing it"), atomic(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@BOTH
def test_a_file_system_without_locks(tmp_path: Path, atomic: Atomic, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    begin_and_die(tmp_path / "other", atomic)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with atomic(tmp_path / "out"):
        pass
    assert (tmp_path / "out").exists()
    with pytest.raises(InputError, match="which cannot be locked there; remove that if none is at"):
        atomic(tmp_path / "other").__enter__()
    assert partial_path(tmp_path / "other").exists()


def test_a_link_in_the_partial_folders_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    partial_path(tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(InputError, match=r"\.out\.partial is in the way"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_more_than_is_free_is_refused_before_the_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    wanted = 10 * free
    refusal = rf"out: {wanted} bytes are needed and {tmp_path} has \d+ free; make room, or give a path on another disk"
    for check in (require_space, lambda *own: atomic_folder(*own).__enter__()):
        with pytest.raises(InputError, match=refusal):
            check(tmp_path / "out", wanted)
        assert not list(tmp_path.iterdir())
    require_space(tmp_path / "out", free // 10)


def test_require_free_refuses_what_atomic_folder_refuses(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="exists already"):
        require_free(tmp_path / "folder")
    for output in (tmp_path / "missing" / "out", tmp_path / ("a" * 250)):
        with pytest.raises(InputError, match="no folder can be made in"):
            require_free(output)


def test_a_new_text_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "new", "größer\n")
    assert (tmp_path / "new").read_bytes().decode() == "größer\n"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_text(tmp_path / "full", "text")
    assert error.value.filename == str(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_text_is_written_into_what_is_there(tmp_path: Path) -> None:
    """So a file keeps its mode, and a link leads where it did."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o600)
    link.symlink_to(file)
    write_text(link, "new\n")
    assert link.is_symlink() and file.read_text() == "new\n" and file.stat().st_mode & 0o777 == 0o600
    write_text(file, "newer\n")
    assert file.read_text() == "newer\n" and sorted(tmp_path.iterdir()) == [file, link]
    with pytest.raises(IsADirectoryError) as error:
        write_text(tmp_path, "text")
    assert error.value.filename == str(tmp_path)


def test_what_is_in_the_way_of_a_partial_is_named(tmp_path: Path) -> None:
    partial_path(tmp_path / "a").write_text("left by a file")
    partial_path(tmp_path / "b").mkdir()
    for atomic, name in ((atomic_folder, "a"), (atomic_file, "b")):
        refusal = rf"{name}: .*\.{name}\.partial is in the way \(.*\); remove it, or give another path$"
        with pytest.raises(InputError, match=refusal), atomic(tmp_path / name):
            pass


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "{}\n")
    assert os.read(reader, 10) == b"{}\n" and pipe.is_fifo()
    os.close(reader)
