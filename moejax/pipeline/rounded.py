"""What has been rounded so far: plans that agree on a matrix and its format share the work."""

from collections.abc import Callable

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

    def __call__(self, name: str, target: str, rounded: Callable[[], Leaf]) -> Leaf:
        known = self._known.get((name, target))
        if known is not None:
            return known
        leaf = rounded()
        size = payload_bytes(leaf)
        if size <= self._bytes_left:
            self._known[name, target] = leaf
            self._bytes_left -= size
        return leaf
