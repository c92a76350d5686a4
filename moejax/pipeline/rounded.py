"""What has been rounded so far: plans that agree on a matrix and its format share the work."""

from collections.abc import Callable, Sequence

from moejax.formats import Leaf, payload_bytes

# The tiny checkpoint in nine formats takes 0.15 GB.
_MAX_BYTES = 8 << 30


class RoundedWeights:
    """A `Rounder` that remembers, by name and format, as much as `max_bytes` hold.

    It suits one model and its statistics: what a matrix is rounded to depends on them.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES):
        self._known: dict[tuple[str, str], Leaf] = {}
        self._bytes_left = max_bytes

    def __call__(self, names: Sequence[str], target: str, rounded: Callable[[Sequence[int]], list[Leaf]]) -> list[Leaf]:
        unknown = [i for i, name in enumerate(names) if (name, target) not in self._known]
        new = dict(zip(unknown, rounded(unknown), strict=True)) if unknown else {}
        leaves = [new[i] if i in new else self._known[name, target] for i, name in enumerate(names)]
        for i, leaf in new.items():
            self._remember(names[i], target, leaf)
        return leaves

    def _remember(self, name: str, target: str, leaf: Leaf) -> None:
        size = payload_bytes(leaf)
        if size <= self._bytes_left:
            self._known[name, target] = leaf
            self._bytes_left -= size
