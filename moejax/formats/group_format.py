"""Formats of even levels in groups along the input axis, one scale a group, as values."""

import abc
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moejax.formats.arrays import abstract_array
from moejax.formats.grouped import GroupedCodes, Levels, group, groups_per_row, round_to_codes, ungroup
from moejax.formats.scales import DTYPES, SUFFIXES, ScaleKind, decode_scales, encode_scales

# Behind a family's name: the group size and how scales are stored.
_REST = re.compile(rf"g(32|64|128|256)({'|'.join(SUFFIXES.values())})")


class GroupFormat(abc.ABC):
    """How a `Format` packs rows of codes under one scale for every `group_size` inputs."""

    bits: float
    group_size: int
    scale_kind: ScaleKind

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The format in one word, as plans and manifests write it."""

    @property
    @abc.abstractmethod
    def levels(self) -> Levels:
        """The values that a weight can take under its scale."""

    @abc.abstractmethod
    def words_per_row(self, inputs: int) -> int:
        """How many words hold a row of that many inputs."""

    @abc.abstractmethod
    def pack(self, codes: jax.Array) -> jax.Array:
        """Codes (..., O, I) in [0, levels.highest] to words uint32 (..., O, W)."""

    @abc.abstractmethod
    def leaf(self, words: jax.Array, scale: jax.Array, inputs: int) -> GroupedCodes:
        """The weight, of rows of that many inputs, that these arrays are."""

    def abstract(self, shape: Sequence[int]) -> GroupedCodes:
        """The packed leaf of a weight (..., O, I), shapes only."""
        *outer, inputs = shape
        words = abstract_array((*outer, self.words_per_row(inputs)), jnp.uint32)
        groups = groups_per_row(inputs, self.group_size)
        return self.leaf(words, abstract_array((*outer, groups), DTYPES[self.scale_kind]), inputs)


def parse_groups(rest: str) -> tuple[int, ScaleKind] | None:
    """`g64e8` to 64 and "e8"; None if that is no group size and kind of scales."""
    match = _REST.fullmatch(rest)
    kinds: dict[str, ScaleKind] = {suffix: kind for kind, suffix in SUFFIXES.items()}
    return (int(match[1]), kinds[match[2]]) if match else None


def encode(weight: jax.Array, scale: jax.Array, to: GroupFormat) -> GroupedCodes:
    """Round every weight (..., O, I) to the nearest level of its group's scale (..., O, groups), and pack."""
    stored = encode_scales(scale, to.scale_kind)
    weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    decoded = decode_scales(stored, weight.dtype)[..., None]
    codes = round_to_codes(group(weight, to.group_size), decoded, to.levels)
    inputs = weight.shape[-1]
    return to.leaf(to.pack(ungroup(codes, inputs).astype(jnp.uint32)), stored, inputs)
