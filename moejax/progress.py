"""How long jobs tell what they are at, in a place every folder may import."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

Step = TypeVar("Step")


class Progress(Protocol):
    """Passes on the steps of a job while telling the user how many are done."""

    def __call__(self, steps: Iterable[Step], description: str, /) -> Iterable[Step]: ...


def silent(steps: Iterable[Step], _: str, /) -> Iterable[Step]:
    """The steps, and not a word."""
    return steps
