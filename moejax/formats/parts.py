"""What the bytes of packed weights are spent on."""

from typing import NamedTuple

import jax

from moejax.formats.dense import payload_bytes
from moejax.formats.packed import PackedTensor


class ByteParts(NamedTuple):
    """Bytes of a tree of leaves: codes (and plain arrays), scales, and fields of words that no code fills, rounded."""

    codes: int
    scales: int
    padding: int


def byte_parts(tree: object) -> ByteParts:
    """The parts, which add up to `payload_bytes`, of leaves concrete or abstract."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, PackedTensor))
    packed = [leaf for leaf in leaves if isinstance(leaf, PackedTensor)]
    scales, padding = sum(own.scale_bytes for own in packed), sum(own.padding_bytes for own in packed)
    return ByteParts(payload_bytes(tree) - scales - padding, scales, padding)
