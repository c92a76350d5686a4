"""`compress --memory`: too little is refused before any work, and what is given is what the job may hold."""

import re
from pathlib import Path
from typing import Any, NoReturn

import pytest

from command_line import moejax, refused
from moejax.ledger import Ledger
from moejax.pipeline import job
from moejax.pipeline.room import Room


def command(small: Path, output: Path, text_options: list[object], memory: str) -> list[object]:
    return ["compress", small, "--budget", "700KB", "--output", output, *text_options, "--memory", memory]


def test_too_little_is_refused_with_what_would_do(small: Path, text_options: list[object], tmp_path: Path) -> None:
    message = refused(tmp_path, *command(small, tmp_path / "out", text_options, "300MB"))
    assert re.search(r"cannot be worked on in 300\.00 MB; \d+\.\d\dGB would do$", message)
    assert not list(tmp_path.iterdir())


def test_what_is_given_is_what_may_be_held(
    small: Path, text_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def stop(*arguments: Any) -> NoReturn:
        given.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "prepare", lambda *arguments: arguments[-1])
    monkeypatch.setattr(job, "compress_checkpoint", stop)
    assert moejax(*command(small, tmp_path / "out", text_options, "100GB")).code == 130
    room, ledger = given[0], next(own for own in given if isinstance(own, Ledger))
    assert ledger == Ledger(100 * 10**9) and isinstance(room, Room)
    assert 10**10 < room.statistics < ledger.limit / 4 and 10**10 < room.within < ledger.limit / 3
    assert not list(tmp_path.iterdir())
