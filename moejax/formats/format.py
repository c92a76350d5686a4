"""What a format is that weights are rounded to: a value that knows its name, its bits and its leaves' shapes."""

from collections.abc import Hashable, Sequence
from typing import ClassVar, Protocol, Self

from moejax.formats.packed import PackedTensor


class Format(Hashable, Protocol):
    """A way to pack weights: a frozen dataclass for every family of names (see `families`);
    `transforms/rounding.py` says for each how weights are rounded to it, and with what error.

    accepted: the family's names, for a message.
    """

    accepted: ClassVar[str]

    @property
    def name(self) -> str:
        """The format in one word, as plans and manifests write it."""
        ...

    @property
    def bits(self) -> float:
        """What the code of a weight is worth, scales apart."""
        ...

    @property
    def group_size(self) -> int:
        """How many inputs share a scale."""
        ...

    def abstract(self, shape: Sequence[int]) -> PackedTensor:
        """The packed leaf of a weight (..., O, I), shapes only."""
        ...

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The format of that name, None if it is none of the family's."""
        ...
