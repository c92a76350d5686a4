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
from moejax.sharding import ALONE, Crew

_FILE = "measured.jsonl"


@dataclass(frozen=True)
class Work:
    """Values that JSON can hold, by name, and arrays, of one job; without a folder nothing is kept.

    job: a text that no other job has. journal: where values are kept, in the process of a crew that writes them; the
    values are the first one's in all of them.
    """

    folder: Path | None = None
    job: str | None = None
    journal: Journal | None = None
    _found: dict[str, Any] = field(default_factory=dict)
    crew: Crew = ALONE

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is known under that name, else what `find` gives, which is then known. Raises InputError for a value to
        be kept that is not finite, and for processes that are to find different things."""
        if name not in self._found:
            self.crew.agree({"next step": name})
            value = self.crew.told(find())
            if self.folder is None:
                return value
            self._keep(name, value)
        return self._found[name]

    def _keep(self, name: str, value: Any) -> None:
        try:
            if self.journal is not None:
                self.journal.add(name, value)
        except ValueError:
            raise InputError(
                f"{name}: a measurement is not finite; a checkpoint whose weights are sound is needed"
            ) from None
        self._found[name] = value

    def knows(self, name: str) -> bool:
        """Whether `once` would find nothing anew."""
        return name in self._found

    def known(self, name: str) -> Any:
        """What is known under that name; KeyError if nothing is."""
        return self._found[name]

    def keep_states(self, stage: str, passed: int, states: Mapping[str, np.ndarray]) -> None:
        """Keep how far a walk of the job, `stage`, has come: part number `passed` is behind it, and these arrays are
        what it goes on from. They take the place of those of an earlier part."""
        if self.folder is None or self.journal is None:
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
        found = _read_states(self._states_file(stage))
        self.crew.agree({"state of the work": str(found and found[0])})  # before others take its place
        return found

    def drop_states(self, stage: str) -> None:
        """The walk is over."""
        if self.journal is not None:
            self._states_file(stage).unlink(missing_ok=True)

    def _states_file(self, stage: str) -> Path:
        """Another job's states in the same folder have other names."""
        assert self.folder is not None and self.job is not None
        return self.folder / f"{stage}-{sha256(self.job.encode()).hexdigest()[:16]}.npz"


def _read_states(file: Path) -> tuple[int, dict[str, np.ndarray]] | None:
    try:
        with file.open("rb") as stream, np.load(stream) as kept:  # which compares checksums
            passed, names, *arrays = (kept[name] for name in kept.files)
        return int(passed), dict(zip(map(str, names), arrays, strict=True))
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile):
        return None


NOT_KEPT = Work()


@contextmanager
def work_in(folder: Path | None, made_of: Mapping[str, str], crew: Crew = ALONE) -> Iterator[Work]:
    """The work of a job that is made of these, by what they are called, in a folder; nothing is kept without one. The
    processes of a crew have one folder, which the first of them keeps.

    Raises InputError, before the block runs, if the folder cannot be made, another process is at work in it, or a job
    was begun there that is made of others.
    """
    crew.agree({**made_of, "--work": str(folder is not None)})
    if folder is None:
        yield Work(crew=crew)
    elif crew.is_first:
        with _kept_in(folder, json.dumps(made_of, sort_keys=True), made_of) as journal:
            found = journal.finished()
            if found:
                note(f"{folder}: {len(found)} measurements of an earlier run are taken over")
            yield Work(folder, journal.job, journal, crew.told(found), crew)
    else:
        yield Work(folder, json.dumps(made_of, sort_keys=True), None, crew.told(None), crew)


@contextmanager
def _kept_in(folder: Path, job: str, made_of: Mapping[str, str]) -> Iterator[Journal]:
    """The job's journal, which no other process writes."""
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
        journal = Journal(folder / _FILE, job)
        _check(folder, journal.whose(), made_of)
        if journal.whose() is None:
            journal.begin()
        yield journal


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
