"""`compress --work`: what a user is told when a job is stopped, and when it is not the same job."""

from pathlib import Path
from typing import Any, NoReturn

import pytest

from command_line import moejax, refused
from moejax.checkpoint.journal import Journal
from moejax.pipeline import job


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
    kept = f"moejax: what is finished is kept in {tmp_path / 'w'}; this goes on: "
    assert told.startswith(f"{kept}moejax compress {small} --budget 700KB ")
    assert f"--output '{tmp_path}/my out' " in told and told.endswith(f" --work {tmp_path / 'w'}")
    assert "goes on" not in moejax(*command).err


def test_another_recipe_is_refused(
    small: Path, text_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measures_once(*arguments: Any) -> NoReturn:
        arguments[-2].once("a", lambda: 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "prepare", measures_once)
    command = ["compress", small, "--budget", "700KB", "--output", tmp_path / "out", *text_options]
    assert moejax(*command, "--work", tmp_path / "w").code == 130
    message = refused(tmp_path, *command, "--work", tmp_path / "w", "--recipe", "paper")
    assert "was begun with another recipe; give that again, or another folder for --work" in message


@pytest.mark.parametrize("work", ["out", "out/w", ".out.partial"])
def test_work_in_the_output_is_refused_at_once(
    work: str, small: Path, text_options: list[object], tmp_path: Path
) -> None:
    command = ["compress", small, "--budget", "700KB", "--output", tmp_path / "out", *text_options]
    message = refused(tmp_path, *command, "--work", tmp_path / work)
    assert "lies in the output" in message and "another folder is needed" in message


def test_what_a_job_with_work_has_finished_is_not_removed_without(
    small: Path, text_options: list[object], tmp_path: Path
) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    journal = Journal(partial / "journal.jsonl", "a job")
    journal.begin()
    journal.add("layer_0", {})
    command = ["compress", small, "--budget", "700KB", "--output", tmp_path / "out", *text_options]
    assert "holds 1 finished items of a job with --work; give that, or" in refused(tmp_path, *command)


def test_what_is_complete_needs_no_more_than_its_figures(
    small: Path, text_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while what was written is evaluated."""
    output = tmp_path / "out"

    def written_and_stopped(*_: object) -> NoReturn:
        output.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "prepare", written_and_stopped)
    ran = moejax("compress", small, "--budget", "700KB", "--output", output, *text_options, "--work", tmp_path / "w")
    told = f"moejax: {output} is complete; its figures are told by: moejax evaluate {output} --against {small}\n"
    assert ran.code == 130 and told in ran.err and "goes on" not in ran.err
