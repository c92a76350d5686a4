from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from moejax.progress import counted, silent


def test_every_step_is_told_when_it_begins_and_the_end_when_it_comes() -> None:
    told: list[Any] = []

    def progress(steps: Iterable[Any], description: str) -> Iterator[Any]:
        for step in steps:
            told.append(step)
            yield step
        told.append(f"end of {description}")

    with counted(progress, 3, "work") as begin:
        assert told == []
        for n in range(3):
            begin()
            assert told == list(range(n + 1))
    assert told == [0, 1, 2, "end of work"]


def test_more_steps_than_announced_are_no_failure() -> None:
    with counted(silent, 1, "work") as begin:
        begin()
        begin()


def test_what_tells_ends_when_the_job_fails() -> None:
    told: list[str] = []

    def progress(steps: Iterable[Any], description: str) -> Iterator[Any]:
        try:
            yield from steps
        finally:
            told.append(f"end of {description}")

    with pytest.raises(OSError) as error, counted(progress, 3, "work") as begin:
        begin()
        raise OSError
    assert told == ["end of work"] and error.value.__traceback__ is not None
