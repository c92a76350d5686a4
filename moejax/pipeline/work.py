"""What a job has found out, kept in a folder: the same job, begun again, goes on where it was stopped."""

import fcntl
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.atomic import naming, sync
from moejax.checkpoint.journal import Journal
from moejax.errors import InputError, note

_FILE = "measured.jsonl"


@dataclass(frozen=True)
class Work:
    """Values that JSON can hold, by name, and arrays, of one job; without a folder and its journal nothing is kept."""

    journal: Journal | None = None
    folder: Path | None = None
    _found: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is known under that name, else what `find` gives, which is then known. Raises InputError for a value to
        be kept that is not finite."""
        if name not in self._found:
            value = find()
            if self.journal is None:
                return value
            try:
                self.journal.add(name, value)
            except ValueError:
                raise InputError(
                    f"{name}: a measurement is not finite; a checkpoint whose weights are sound is needed"
                ) from None
            self._found[name] = value
        return self._found[name]

    def knows(self, name: str) -> bool:
        """Whether `once` would find nothing anew."""
        return name in self._found

    def known(self, name: str) -> Any:
        """What is known under that name; KeyError if nothing is."""
        return self._found[name]

    def keep_states(self, stage: str, passed: int, states: Mapping[str, np.ndarray]) -> None:
        """Keep how far a walk of the job, `stage`, has come: part number `passed` is behind it, and these arrays are
        what it goes on from. They take the place of those of an earlier part."""
        if self.folder is None:
            return
        beside = self.folder / f".{stage}.partial"
        with naming(beside):
            with beside.open("wb") as file:
                np.savez(file, np.asarray(passed), np.asarray(list(states)), *states.values())
            sync(beside)
        beside.replace(self._states_file(stage))

    def states(self, stage: str) -> tuple[int, dict[str, np.ndarray]] | None:
        """What `keep_states` kept last; None if that is nothing, or its bytes are others now."""
        if self.folder is None:
            return None
        try:
            with self._states_file(stage).open("rb") as stream, np.load(stream) as file:  # which compares checksums
                passed, names, *arrays = (file[name] for name in file.files)
            return int(passed), dict(zip(map(str, names), arrays, strict=True))
        except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile):
            return None

    def drop_states(self, stage: str) -> None:
        """The walk is over."""
        if self.folder is not None:
            self._states_file(stage).unlink(missing_ok=True)

    def _states_file(self, stage: str) -> Path:
        """Another job's states in the same folder have other names."""
        assert self.folder is not None and self.job is not None
        return self.folder / f"{stage}-{sha256(self.job.encode()).hexdigest()[:16]}.npz"

    @property
    def job(self) -> str | None:
        """A text that no other job has; None where nothing is kept."""
        return None if self.journal is None else self.journal.job


NOT_KEPT = Work()


@contextmanager
def work_in(folder: Path | None, made_of: Mapping[str, str]) -> Iterator[Work]:
    """The work of a job that is made of these, by what they are called, in a folder; nothing is kept without one.

    Raises InputError, before the block runs, if the folder cannot be made, another process is at work in it, or a job
    was begun there that is made of others.
    """
    if folder is None:
        yield NOT_KEPT
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / _FILE).open("ab")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be worked in ({error.strerror}); give a folder that can be written"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is at work in it; wait for its end, or give another") from None
        except OSError:
            pass  # a file system without locks
        journal = Journal(folder / _FILE, json.dumps(made_of, sort_keys=True))
        _check(folder, journal.whose(), made_of)
        if journal.whose() is None:
            journal.begin()
        found = journal.finished()
        if found:
            note(f"{folder}: {len(found)} measurements of an earlier run are taken over")
        yield Work(journal, folder, found)


def _check(folder: Path, job: str | None, made_of: Mapping[str, str]) -> None:
    before = made_of if job is None else _named(job)
    for name in sorted(before.keys() | made_of.keys()):
        if before.get(name) != made_of.get(name):
            raise InputError(
                f"{folder}: the work there was begun with another {name}; give that again, or another folder for --work"
            )


def _named(job: str) -> dict[str, Any]:
    try:
        named = json.loads(job)
    except ValueError:
        named = None
    return named if isinstance(named, dict) else {}
