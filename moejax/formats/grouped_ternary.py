"""Ternary weights in groups along the input axis, one scale a group."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Self

import jax

from moejax.formats import trits
from moejax.formats.group_format import GroupFormat, parse_groups
from moejax.formats.grouped import GroupedCodes, Levels, about_zero
from moejax.formats.scales import SUFFIXES, ScaleKind

_LEVELS = about_zero(3)


@partial(jax.tree_util.register_dataclass, data_fields=["words", "scale"], meta_fields=["group_size", "inputs"])
@dataclass(frozen=True)
class GroupedTernary(GroupedCodes):
    """weight[..., o, i] = (code[..., o, i] - 1) * scale[..., o, i // group_size]: -s, 0 or s.

    words: uint32 (..., O, ceil(I/20)), planar (see `trits`).
    scale: bfloat16 or uint8 (..., O, ceil(I/group_size)).
    """

    words: jax.Array
    scale: jax.Array
    group_size: int = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})

    @property
    def levels(self) -> Levels:
        return _LEVELS

    @property
    def format_name(self) -> str:
        return f"ternaryg{self.group_size}{SUFFIXES[self.scale_kind]}"

    def codes(self) -> jax.Array:
        return trits.unpack(self.words, self.inputs)

    @property
    def padding_bytes(self) -> int:
        unfilled = trits.words_per_row(self.inputs) * trits.CODES_PER_WORD - self.inputs
        return self.num_rows * unfilled * 4 // trits.CODES_PER_WORD


@dataclass(frozen=True)
class TernaryFormat(GroupFormat):
    """Weights -s, 0 and s with one scale s for every `group_size` inputs.

    Its name is `ternaryg<group_size>`, with `e8` behind it where scales have eight bits.
    """

    accepted: ClassVar[str] = "ternaryg<32, 64, 128 or 256>, such as ternaryg128, with e8 behind it for 8-bit scales"

    group_size: int
    scale_kind: ScaleKind = "bf16"
    bits: float = field(default=math.log2(3), init=False, repr=False)  # a code takes 1.6

    @property
    def name(self) -> str:
        return f"ternaryg{self.group_size}{SUFFIXES[self.scale_kind]}"

    @property
    def levels(self) -> Levels:
        return _LEVELS

    def words_per_row(self, inputs: int) -> int:
        return trits.words_per_row(inputs)

    def pack(self, codes: jax.Array) -> jax.Array:
        return trits.pack(codes)

    def leaf(self, words: jax.Array, scale: jax.Array, inputs: int) -> GroupedTernary:
        return GroupedTernary(words, scale, self.group_size, inputs)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        groups = parse_groups(name.removeprefix("ternary"))
        return cls(*groups) if groups and groups[1] != "f16" else None
