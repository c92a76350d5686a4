"""The formats that weights are rounded to, as values: even levels in groups along the input axis, one scale a group."""

import abc
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moejax.errors import InputError
from moejax.formats import planar, trits
from moejax.formats.arrays import abstract_array
from moejax.formats.grouped import GroupedCodes, group, groups_per_row, round_to_codes, ungroup
from moejax.formats.grouped_int import GroupedInt
from moejax.formats.grouped_ternary import GroupedTernary
from moejax.formats.scales import DTYPES, SUFFIXES, ScaleKind, decode_scales, encode_scales


class _Packing(abc.ABC):
    """How a format packs rows."""

    group_size: int
    scale_kind: ScaleKind

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The format in one word, as plans and manifests write it."""

    @abc.abstractmethod
    def words_per_row(self, inputs: int) -> int:
        """How many words hold a row of that many inputs."""

    @abc.abstractmethod
    def pack(self, codes: jax.Array) -> jax.Array:
        """Codes (..., O, I) in [0, levels) to words uint32 (..., O, W)."""

    @abc.abstractmethod
    def leaf(self, words: jax.Array, scale: jax.Array, inputs: int) -> GroupedCodes:
        """The weight, of rows of that many inputs, that these arrays are."""

    def abstract(self, shape: Sequence[int]) -> GroupedCodes:
        """The packed leaf of a weight (..., O, I), shapes only."""
        *outer, inputs = shape
        words = abstract_array((*outer, self.words_per_row(inputs)), jnp.uint32)
        groups = groups_per_row(inputs, self.group_size)
        return self.leaf(words, abstract_array((*outer, groups), DTYPES[self.scale_kind]), inputs)


@dataclass(frozen=True)
class IntFormat(_Packing):
    """Integers of `bits` bits with one scale for every `group_size` inputs.

    Its name is `int<bits>g<group_size>`, with `e8` behind it where scales have eight bits.
    """

    bits: int
    group_size: int
    scale_kind: ScaleKind = "bf16"

    @property
    def name(self) -> str:
        return f"int{self.bits}g{self.group_size}{SUFFIXES[self.scale_kind]}"

    @property
    def levels(self) -> int:
        return 2**self.bits

    def words_per_row(self, inputs: int) -> int:
        return planar.words_per_row(inputs, self.bits)

    def pack(self, codes: jax.Array) -> jax.Array:
        return planar.pack(codes, self.bits)

    def leaf(self, words: jax.Array, scale: jax.Array, inputs: int) -> GroupedInt:
        return GroupedInt(words, scale, self.bits, self.group_size, inputs)


@dataclass(frozen=True)
class TernaryFormat(_Packing):
    """Weights -s, 0 and s with one scale s for every `group_size` inputs.

    Its name is `ternaryg<group_size>`, with `e8` behind it where scales have eight bits.
    """

    group_size: int
    scale_kind: ScaleKind = "bf16"

    @property
    def name(self) -> str:
        return f"ternaryg{self.group_size}{SUFFIXES[self.scale_kind]}"

    @property
    def levels(self) -> int:
        return 3

    @property
    def bits(self) -> float:
        """What a code is worth, log2 3 = 1.58; it takes 1.6."""
        return math.log2(3)

    def words_per_row(self, inputs: int) -> int:
        return trits.words_per_row(inputs)

    def pack(self, codes: jax.Array) -> jax.Array:
        return trits.pack(codes)

    def leaf(self, words: jax.Array, scale: jax.Array, inputs: int) -> GroupedTernary:
        return GroupedTernary(words, scale, self.group_size, inputs)


GroupFormat = IntFormat | TernaryFormat


def parse_group_format(name: str) -> GroupFormat:
    """`int3g64` to IntFormat(3, 64), `ternaryg128e8` to TernaryFormat(128, "e8")."""
    match = re.fullmatch(r"(?:int([1-8])|ternary)g(32|64|128|256)(e8)?", name)
    if not match:
        raise InputError(
            f"unknown format {name!r}: a format is int<1 to 8>g<32, 64, 128 or 256>, such as int3g64, or "
            f"ternaryg<32, 64, 128 or 256>, such as ternaryg128, and e8 behind either for scales of eight bits"
        )
    group_size = int(match[2])
    scale_kind: ScaleKind = "e8" if match[3] else "bf16"
    if match[1]:
        return IntFormat(int(match[1]), group_size, scale_kind)
    return TernaryFormat(group_size, scale_kind)


def encode(weight: jax.Array, scale: jax.Array, to: GroupFormat) -> GroupedCodes:
    """Round every weight (..., O, I) to the nearest level of its group's scale (..., O, groups), and pack."""
    stored = encode_scales(scale, to.scale_kind)
    weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    decoded = decode_scales(stored, weight.dtype)[..., None]
    codes = round_to_codes(group(weight, to.group_size), decoded, to.levels)
    inputs = weight.shape[-1]
    return to.leaf(to.pack(ungroup(codes, inputs).astype(jnp.uint32)), stored, inputs)
