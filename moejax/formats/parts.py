"""What the bytes of packed weights are spent on."""

from typing import NamedTuple

import jax

from moejax.formats import planar, trits
from moejax.formats.dense import payload_bytes
from moejax.formats.fp8_blocks import Fp8Blocks
from moejax.formats.grouped import GroupedCodes
from moejax.formats.grouped_int import GroupedInt
from moejax.formats.grouped_ternary import GroupedTernary
from moejax.formats.packed import PackedTensor


class ByteParts(NamedTuple):
    """Bytes of a tree of leaves: codes (and plain arrays), scales, and fields of words that no code fills, rounded."""

    codes: int
    scales: int
    padding: int


def byte_parts(tree: object) -> ByteParts:
    """The parts, which add up to `payload_bytes`, of leaves concrete or abstract."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, PackedTensor))
    scales = sum(payload_bytes(_scales(leaf)) for leaf in leaves)
    padding = sum(_padding_bytes(leaf) for leaf in leaves)
    return ByteParts(payload_bytes(tree) - scales - padding, scales, padding)


def _scales(leaf: object) -> object:
    if isinstance(leaf, GroupedCodes):
        return leaf.scale
    return leaf.scale_inv if isinstance(leaf, Fp8Blocks) else ()


def _padding_bytes(leaf: object) -> int:
    if not isinstance(leaf, GroupedTernary | GroupedInt):
        return 0
    inputs, rows = leaf.inputs, leaf.size // leaf.inputs
    if isinstance(leaf, GroupedInt):
        return rows * (planar.padded(inputs, leaf.bits) - inputs) * leaf.bits // 8
    unfilled = trits.words_per_row(inputs) * trits.CODES_PER_WORD - inputs
    return rows * unfilled * 4 // trits.CODES_PER_WORD
