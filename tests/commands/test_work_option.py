"""`compress --work`: what a user is told when a job is stopped, and when it is not the same job."""

from pathlib import Path
from typing import NoReturn

import pytest

from command_line import moejax, refused
from moejax.pipeline import compress as job


def stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def disk_full(*_: object) -> NoReturn:
    raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.parametrize(
    ("ending", "code", "last"), [(stop, 130, "interrupted"), (disk_full, 1, "somewhere: no space")]
)
def test_the_command_that_goes_on_is_printed(
    ending: object,
    code: int,
    last: str,
    small: Path,
    text_options: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "prepare", ending)
    command = ["compress", small, "--budget", "700KB", "--output", tmp_path / "my out", *text_options]
    ran = moejax(*command, "--work", tmp_path / "w")
    told, ended = ran.err.splitlines()[-2:]
    assert ran.code == code and ended.startswith(f"moejax: {last}")
    assert told.startswith(f"moejax: what is finished is kept; this goes on: moejax compress {small} --budget 700KB ")
    assert f"--output '{tmp_path}/my out' " in told and told.endswith(f" --work {tmp_path / 'w'}")
    assert "goes on" not in moejax(*command).err


def test_another_recipe_is_refused(
    small: Path, text_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measures_once(*arguments: object) -> NoReturn:
        arguments[-1].once("a", lambda: 1)  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "prepare", measures_once)
    command = ["compress", small, "--budget", "700KB", "--output", tmp_path / "out", *text_options]
    assert moejax(*command, "--work", tmp_path / "w").code == 130
    message = refused(tmp_path, *command, "--work", tmp_path / "w", "--recipe", "paper")
    assert "was begun with another recipe; give that again, or another folder for --work" in message
