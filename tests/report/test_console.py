"""Progress bars, with a clock that the tests turn."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import rich.console

from moejax.report.console import progress_bar


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
