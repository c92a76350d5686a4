"""Progress bars, with a clock that the tests turn."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import rich.console

from moejax.report.console import Phases, format_seconds, progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    own = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(rich.console, "monotonic", lambda: own.now)
    return own


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in which a bar is printed once, when it ends."""
    for name, value in {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)


def shown(capsys: pytest.CaptureFixture[str], steps: Iterator[object]) -> list[str]:
    """The words of the bar when it is left."""
    steps.close()  # type: ignore[attr-defined]
    return capsys.readouterr().err.split()


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("seconds", "elapsed", "left"), [(1, "0:00:03", "0:00:02"), (600, "0:30:00", "0:20:00")])
def test_the_time_left_of_short_and_of_long_steps(
    capsys: pytest.CaptureFixture[str], clock: Any, seconds: int, elapsed: str, left: str
) -> None:
    steps = iter(progress_bar(range(5), "some work"))
    next(steps)
    for _ in range(3):
        clock.now += seconds
        next(steps)
    assert shown(capsys, steps)[-4:] == ["3/5", elapsed, "left", left]


@pytest.mark.usefixtures("terminal")
def test_a_step_counts_when_it_is_done(capsys: pytest.CaptureFixture[str], clock: Any) -> None:
    steps = iter(progress_bar(["a", "b"], "some work"))
    assert next(steps) == "a"
    assert shown(capsys, steps)[-4:] == ["0/2", "0:00:00", "left", "-:--:--"]


def test_a_file_is_told_of_what_comes_to_its_end_alone(capsys: pytest.CaptureFixture[str]) -> None:
    steps = iter(progress_bar(["a", "b"], "some work"))
    next(steps)
    assert shown(capsys, steps) == []
    assert list(progress_bar(["a", "b"], "some work")) == ["a", "b"]
    printed = capsys.readouterr().err
    assert "2/2" in printed and printed.count("\n") == 1


def test_phases_say_what_is_left_by_what_those_before_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: own.now)
    phases = Phases()
    phases.expected = {"measuring": 3600.0, "trying": 60.0, "writing": 7200.0}
    for name, seconds in (
        ("reading", 1.0),
        ("measuring", 7200.0),
        ("trying", 100.0),
        ("trying", 20.0),
        ("writing", 1.0),
    ):
        for _ in phases([0], name):
            own.now += seconds
    assert capsys.readouterr().out.splitlines() == [
        "about 3.0 h to go: measuring 60 min, trying 60 s, writing 2.0 h",
        "about 4.0 h to go: trying 2 min, writing 4.0 h",
        "about 4.0 h to go: writing 4.0 h",
    ]
    assert phases.seconds == {"reading": 1.0, "measuring": 7200.0, "trying": 120.0, "writing": 1.0}


def test_phases_that_a_job_goes_on_behind_are_not_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases()
    phases.expected = {"measuring": 3600.0, "trying": 60.0, "writing": 7200.0}
    assert list(phases([0], "trying")) == [0]
    assert capsys.readouterr().out == "about 2.0 h to go: trying 60 s, writing 2.0 h\n"


def test_phases_of_which_nothing_is_expected_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases()
    assert list(phases([1, 2], "measuring")) == [1, 2] and list(phases.seconds) == ["measuring"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (5400, "1.5 h"), (86400, "24.0 h")],
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words
