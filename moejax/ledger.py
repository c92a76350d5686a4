"""The ledger of memory: what a command may hold of it, and whether what a step says that it takes still fits."""

import math
from dataclasses import dataclass
from typing import NoReturn

from moejax.errors import InputError
from moejax.machine import available_memory, resident_memory
from moejax.planning.size import format_size, parse_size

# The least that a refusal asks for is so much more than what would do now, and a multiple of this: what a process
# holds at its start varies by less (by 0.2 GB of 12 from one to the next, with large pages).
_MORE, _STEP = 1.02, 50_000_000


@dataclass(frozen=True)
class Ledger:
    """limit: the bytes that this process may hold at most."""

    limit: int

    @property
    def left(self) -> int:
        """The bytes that may come to what is held now."""
        return max(0, self.limit - resident_memory())

    def fits(self, size: int) -> bool:
        """Whether a step that takes so many bytes fits beside what is held now."""
        return size <= self.left

    def sentence_of(self, size: int) -> str:
        """That a step of so many bytes does not fit."""
        held = format_size(resident_memory() + size)
        return f"{held} for everything does not fit {format_size(self.limit)}"

    def refuse(self, what: str, least: int) -> NoReturn:
        """Raise InputError: `what` takes at least so many bytes beside what is held now."""
        needed = math.ceil(_MORE * (resident_memory() + least) / _STEP) * _STEP
        raise InputError(f"{what} in {format_size(self.limit)}; {needed / 1e9:.2f}GB would do")


def ledger_of(memory: str | None) -> Ledger:
    """By a size that a user gives, or by what the machine has available."""
    return Ledger(available_memory() if memory is None else parse_size(memory))
