"""Times of tokens, by a clock that the tests turn themselves."""

from collections.abc import Iterator

import pytest

from moejax.errors import InputError
from moejax.generate import speed as module
from moejax.generate.decode import Decoding
from moejax.generate.speed import Timed, measure_speed
from small_models import first_layers


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def tokens(self, waits: list[float]) -> Iterator[int]:
        for n, wait in enumerate(waits):
            self.now += wait
            yield n


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(module, "time", own)
    return own


def test_the_first_two_tokens_compile_and_the_others_count(clock: Clock) -> None:
    timed = Timed(clock.tokens([10, 5, 0.5, 0.25, 0.25]))
    assert list(timed) == [0, 1, 2, 3, 4]
    assert (timed.count, timed.first_seconds, timed.decode_tokens_per_s) == (5, 10, 3.0)


def test_too_few_tokens_have_no_speed(clock: Clock) -> None:
    for count in (0, 1, 2):
        timed = Timed(clock.tokens([1.0] * count))
        list(timed)
        assert timed.count == count and timed.decode_tokens_per_s is None
        assert timed.first_seconds == (None if count == 0 else 1)


def test_speeds_are_of_the_tokens_asked_for() -> None:
    speed = measure_speed(first_layers(2), 6, 3, 2, Decoding())
    assert (speed.prompt_tokens, speed.decoded_tokens) == (6, 3)
    assert speed.prefill_tokens_per_s > 0 and speed.decode_tokens_per_s > 0


@pytest.mark.parametrize(("name", "numbers"), [("prompt", (0, 1, 1)), ("tokens", (1, 0, 1)), ("repeats", (1, 1, 0))])
def test_nothing_to_measure(name: str, numbers: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=f"{name} is 0; at least 1 is needed"):
        measure_speed(first_layers(2), *numbers, Decoding())
