"""How long jobs tell what they are at, in a place every folder may import."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

Step = TypeVar("Step")


class Progress(Protocol):
    """Passes on the steps of a job while telling the user how many are done."""

    def __call__(self, steps: Iterable[Step], description: str, /) -> Iterable[Step]: ...


def silent(steps: Iterable[Step], _: str, /) -> Iterable[Step]:
    """The steps, and not a word."""
    return steps


@contextmanager
def counted(progress: Progress, steps: int, description: str) -> Iterator[Callable[[], None]]:
    """For a job whose steps are not one loop's: a function to call before each of them."""
    told = iter(progress(range(steps), description))

    def begin() -> None:
        next(told, None)

    try:
        yield begin
        for _ in told:
            pass
    finally:
        if isinstance(told, Generator):  # a bar ends here, before anything is said of why
            told.close()
